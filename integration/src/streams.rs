//! The client of streams: client-go's executors and port-forward, as `integration/go/streams` has them.

use crate::go;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    io::Write,
    process::{Command, Stdio},
};

/// What kubelet speaks.
pub const SPDY: &[&str] = &["-transport", "spdy"];
/// What kubectl speaks: version 5, and for port-forward the tunnel.
pub const WEBSOCKET: &[&str] = &["-transport", "websocket"];

/// Runs the client with these URLs, one a line, on its standard input. Its answer.
pub fn client(flags: &[&str], arguments: &[&str], urls: &str) -> Result<Value> {
    client_in(None, flags, arguments, urls)
}

/// The same in the network namespace of a process.
pub fn client_in(process: Option<i32>, flags: &[&str], arguments: &[&str], urls: &str) -> Result<Value> {
    let program = go::streams()?;
    let mut command = match process {
        None => Command::new(program),
        Some(pid) => {
            let mut enter = Command::new("nsenter");
            enter.args(["--net", "--target", &pid.to_string()]).arg(program);
            enter
        }
    };
    let mut child = command
        .args(flags)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("run the client of streams")?;
    child.stdin.take().context("its standard input")?.write_all(urls.as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{flags:?} {arguments:?}: {}", output.status);
    serde_json::from_slice(&output.stdout).context("the client's answer")
}
