//! `windlass exec`: a command in a container, over the streaming server, as kubectl has it.

use super::{
    Place,
    client::{Client, answer},
    output::failed_write,
};
use crate::{
    error::{Error, Result},
    streaming::client::{self, Outgoing},
};
use clap::Args;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::{Value, json};
use std::{
    io::{IsTerminal, Read, Write},
    process::ExitCode,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};
use windlass_proto::cri;

/// Channels of the protocol.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ENDING: u8 = 3;
const RESIZE: u8 = 4;

/// Read of standard input at once.
const INPUT_BYTES: usize = 32 << 10;
/// Reads that wait to be sent.
const INPUTS_MAX: usize = 4;

/// What a shell adds to the number of the signal that ended a program.
const SIGNALLED: u8 = 128;

/// `windlass exec ...`
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: Place,
    /// Give it standard input
    #[arg(short = 'i', long)]
    stdin: bool,
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Beginning of an id, NAMESPACE/POD/CONTAINER, or a pod with one container
    container: String,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// A terminal without line discipline for as long as this lives.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Raw> {
        let failed = |error: rustix::io::Errno| Error::io("set up the terminal", error);
        let before = tcgetattr(rustix::stdio::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Runs the command to its end, and exits as it does.
pub(super) async fn run(options: Options) -> Result<ExitCode> {
    if options.tty && !std::io::stdin().is_terminal() {
        return Err(Error::invalid("--tty: standard input is no terminal; leave it out"));
    }
    let (config, mut daemon) = Client::of(options.place).await?;
    let container = daemon.find_container(&options.container).await?;
    let request = cri::ExecRequest {
        container_id: container.id,
        cmd: options.command,
        tty: options.tty,
        stdin: options.stdin,
        stdout: true,
        stderr: !options.tty,
    };
    let url = answer(daemon.runtime.exec(request)).await?.url;
    let (mut incoming, mut outgoing) = client::connect(&url, &config.streaming.tls_certificate).await?;
    let signal = |kind| signal(kind).map_err(|error| Error::io("wait for signals", error));
    // A terminal whose keys go nowhere keeps its own: Ctrl-C ends this program.
    let raw = if options.tty && options.stdin { Some(Raw::enter()?) } else { None };
    let (mut terminated, mut hung_up) = match &raw {
        Some(_) => (Some(signal(SignalKind::terminate())?), Some(signal(SignalKind::hangup())?)),
        None => (None, None),
    };
    if options.tty {
        resize(&mut outgoing).await?;
    }
    let resized = if options.tty { Some(signal(SignalKind::window_change())?) } else { None };
    let input = if options.stdin { Some(standard_input()) } else { None };
    // Apart, so that a command that waits for its output to be read is not waited for with its input. What it no longer takes is told by the
    // end of the connection.
    tokio::spawn(send(outgoing, input, resized));
    let mut ending = None;
    loop {
        tokio::select! {
            message = incoming.next() => match message.map_err(|error| Error::io("read from the streaming server", error))? {
                Some((STDOUT, bytes)) => put(&mut std::io::stdout().lock(), &bytes)?,
                Some((STDERR, bytes)) => put(&mut std::io::stderr().lock(), &bytes)?,
                Some((ENDING, bytes)) if !bytes.is_empty() => ending = Some(bytes),
                Some(_) => {}
                None => break,
            },
            () = received(&mut terminated) => return Ok(ExitCode::from(SIGNALLED + 15)),
            () = received(&mut hung_up) => return Ok(ExitCode::from(SIGNALLED + 1)),
        }
    }
    let ending = ending.ok_or_else(|| Error::internal("the daemon went away; a command of an exec ends with its session"))?;
    exit_code(&ending)
}

/// What standard input gives, read by a thread of its own: a read that nobody waits for any more holds up nothing.
fn standard_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(INPUTS_MAX);
    std::thread::spawn(move || {
        let mut buffer = vec![0; INPUT_BYTES];
        while let Ok(length @ 1..) = std::io::stdin().read(&mut buffer) {
            if sender.blocking_send(buffer.get(..length).unwrap_or_default().to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Sends what standard input gives and the sizes of the terminal, until nothing is taken any more.
async fn send(mut outgoing: Outgoing, mut input: Option<mpsc::Receiver<Vec<u8>>>, mut resized: Option<Signal>) -> Result<()> {
    loop {
        tokio::select! {
            read = next_of(&mut input), if input.is_some() => match read {
                Some(bytes) => outgoing.send(STDIN, &bytes).await?,
                None => {
                    input = None;
                    outgoing.end(STDIN).await?;
                }
            },
            () = received(&mut resized), if resized.is_some() => resize(&mut outgoing).await?,
            else => return Ok(()),
        }
    }
}

async fn next_of(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    input.as_mut()?.recv().await
}

/// Waits for a signal, for ever where none is waited for.
async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

fn put(to: &mut impl Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes).and_then(|()| to.flush()).map_err(|error| failed_write("write the output", error))
}

async fn resize(outgoing: &mut Outgoing) -> Result<()> {
    let Ok(size) = tcgetwinsize(rustix::stdio::stdin()) else { return Ok(()) };
    let size = json!({ "Width": size.ws_col, "Height": size.ws_row });
    outgoing.send(RESIZE, size.to_string().as_bytes()).await
}

/// The exit code that a v1.Status tells; an error where it tells that there was none.
fn exit_code(ending: &[u8]) -> Result<ExitCode> {
    let status: Value =
        serde_json::from_slice(ending).map_err(|error| Error::internal(format!("the command's ending: {error}")))?;
    if status["status"] == "Success" {
        return Ok(ExitCode::SUCCESS);
    }
    let cause = &status["details"]["causes"][0];
    let message = cause["message"].as_str().unwrap_or_default();
    match message.parse::<i32>() {
        Ok(code) if cause["reason"] == "ExitCode" => Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))),
        _ => Err(Error::internal(message)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ending_is_the_exit_code_or_an_error() {
        let code = |text: &str| exit_code(text.as_bytes()).map(|code| format!("{code:?}"));
        assert_eq!(code(r#"{"status":"Success"}"#), Ok(format!("{:?}", ExitCode::SUCCESS)));
        let failed = r#"{"status":"Failure","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(code(failed), Ok(format!("{:?}", ExitCode::from(7))));
        let error = code(r#"{"status":"Failure","details":{"causes":[{"message":"no such file"}]}}"#).expect_err("no exit code");
        assert_eq!(error.message, "no such file");
    }
}
