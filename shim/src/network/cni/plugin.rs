//! One execution of a plugin: its environment, its standard input, its bounded output, its end.
//!
//! A plugin leads a process group of its own, which is killed as a whole when its time is over or nobody waits for it any more.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

/// Longest result; a plugin that prints more is killed.
const OUTPUT_LIMIT: usize = 1 << 20;
/// As much of the error output is kept, from its end.
const ERRORS_LIMIT: usize = 2048;
/// How long the output is waited for when the plugin has ended and something that it left behind holds its pipes.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// What is executed, and for whom.
#[derive(Debug, Clone)]
pub(super) struct Call<'a> {
    pub(super) command: &'a str,
    pub(super) program: &'a str,
    pub(super) container_id: &'a str,
    /// Empty when the namespace is gone.
    pub(super) netns: &'a str,
    pub(super) interface: &'a str,
    pub(super) arguments: &'a str,
    pub(super) directories: &'a [PathBuf],
    pub(super) stdin: &'a [u8],
}

/// The specification's error object.
#[derive(Debug, Deserialize)]
struct Reported {
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

/// The program of this name in the first directory that has it.
pub(super) fn find(program: &str, directories: &[PathBuf]) -> Option<PathBuf> {
    directories.iter().map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// Executes the plugin and returns its output; an error tells what the plugin said, on both ways.
pub(super) async fn run(call: Call<'_>, deadline: Instant) -> Result<Vec<u8>, String> {
    let path = find(call.program, call.directories).ok_or_else(|| {
        let searched: Vec<String> = call.directories.iter().map(|directory| directory.display().to_string()).collect();
        format!("there is no such program in {}", searched.join(", "))
    })?;
    let mut child = command(&path, &call).spawn().map_err(|error| format!("execute {}: {error}", path.display()))?;
    let group = Group(child.id());
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let work = async {
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A plugin need not read all, or anything.
                let _ = stdin.write_all(call.stdin).await;
            }
            Ok::<(), String>(())
        };
        let mut output = Vec::new();
        let mut errors = Vec::new();
        let status = {
            let copies = async { tokio::try_join!(feed, copy(stdout, &mut output), copy_end(stderr, &mut errors)).map(drop) };
            tokio::pin!(copies);
            let (status, copied) = tokio::select! {
                copied = &mut copies => {
                    copied?;
                    (child.wait().await, true)
                }
                status = child.wait() => (status, false),
            };
            if !copied && let Ok(copied) = tokio::time::timeout(DRAIN_LIMIT, copies).await {
                copied?;
            }
            status.map_err(|error| format!("wait: {error}"))?
        };
        Ok((status, output, errors))
    };
    let ended: Result<_, String> = match tokio::time::timeout_at(deadline, work).await {
        Ok(ended) => ended,
        Err(_) => Err("not done in time; killed".to_owned()),
    };
    let (status, output, errors) = ended?;
    group.ended();
    if status.success() {
        return Ok(output);
    }
    Err(failure(status, &output, &errors))
}

fn command(path: &std::path::Path, call: &Call<'_>) -> tokio::process::Command {
    let mut search = OsString::new();
    for directory in call.directories {
        if !search.is_empty() {
            search.push(":");
        }
        search.push(directory);
    }
    let mut command = tokio::process::Command::new(path);
    command
        .env_remove("NOTIFY_SOCKET")
        .env("CNI_COMMAND", call.command)
        .env("CNI_CONTAINERID", call.container_id)
        .env("CNI_NETNS", call.netns)
        .env("CNI_IFNAME", call.interface)
        .env("CNI_ARGS", call.arguments)
        .env("CNI_PATH", search)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    command
}

/// Kills the process group when it is dropped before the plugin has ended.
struct Group(Option<u32>);

impl Group {
    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0.and_then(|pid| Pid::from_raw(pid.cast_signed())) {
            // It may have ended by itself; then nothing of that name is there.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn copy(from: Option<impl AsyncRead + Unpin>, to: &mut Vec<u8>) -> Result<(), String> {
    let Some(from) = from else { return Ok(()) };
    let read = from.take(OUTPUT_LIMIT as u64 + 1).read_to_end(to).await;
    read.map_err(|error: io::Error| format!("read its output: {error}"))?;
    if to.len() > OUTPUT_LIMIT {
        return Err(format!("it prints more than {OUTPUT_LIMIT} bytes; killed"));
    }
    Ok(())
}

/// Keeps the end and lets the rest go.
async fn copy_end(from: Option<impl AsyncRead + Unpin>, to: &mut Vec<u8>) -> Result<(), String> {
    let Some(mut from) = from else { return Ok(()) };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        to.extend_from_slice(&buffer[..count]);
        to.drain(..to.len().saturating_sub(ERRORS_LIMIT));
    }
    Ok(())
}

fn failure(status: std::process::ExitStatus, output: &[u8], errors: &[u8]) -> String {
    let mut text = match serde_json::from_slice::<Reported>(output) {
        Ok(Reported { code, msg, details }) if details.is_empty() => format!("{msg} (code {code})"),
        Ok(Reported { code, msg, details }) => format!("{msg}; {details} (code {code})"),
        Err(_) if output.is_empty() => format!("{status} without a word"),
        Err(_) => {
            let shown = String::from_utf8_lossy(&output[..output.len().min(200)]).into_owned();
            format!("{status}, printing {shown:?}, which is no CNI error")
        }
    };
    let errors = String::from_utf8_lossy(errors);
    if !errors.trim().is_empty() {
        text = format!("{text}; stderr: {}", errors.trim());
    }
    text
}
