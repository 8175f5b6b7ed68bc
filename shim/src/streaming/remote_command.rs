//! Exec and attach over either framing: finds the streams of the protocol, hands them to the handler, tells the ending.

use super::{
    channel::Reader,
    session::{Ending, Handler, Input, Output, Streams, Target, TerminalSize, Wanted},
    spdy, status,
    websocket::{self, Form},
    wire::Wire,
};
use serde::Deserialize;
use std::{sync::Arc, time::Duration};
use tokio::{io::AsyncWriteExt, sync::mpsc, time::timeout};

/// Longest wait for a client to open the streams that it asked for.
const CREATION_LIMIT: Duration = Duration::from_secs(30);
/// Sizes of a terminal that wait.
const SIZES_MAX: usize = 8;
/// Longest message of the resize stream.
const SIZE_LIMIT_BYTES: usize = 1024;

/// Protocols over SPDY, the best first. The empty name is version 1 of clients that name none.
pub(super) const SPDY_PROTOCOLS: [&str; 4] = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
/// Protocols over WebSocket, the best first.
pub(super) const WEBSOCKET_PROTOCOLS: [&str; 5] =
    ["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "channel.k8s.io", "base64.channel.k8s.io"];

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

fn wanted(target: &Target) -> Wanted {
    match target {
        Target::Exec { wanted, .. } | Target::Attach { wanted, .. } => *wanted,
        Target::PortForward { .. } => Wanted::default(),
    }
}

async fn serve(handler: &Arc<dyn Handler>, target: Target, streams: Streams) -> Ending {
    match target {
        Target::Exec { container_id, command, wanted } => handler.exec(&container_id, command, wanted.tty, streams).await,
        Target::Attach { container_id, wanted } => handler.attach(&container_id, wanted.tty, streams).await,
        Target::PortForward { .. } => Ending::Detached,
    }
}

/// Whether endings are told as JSON.
fn speaks_json(protocol: &str) -> bool {
    protocol.starts_with("v4.") || protocol.starts_with("v5.")
}

fn told(ending: &Ending, protocol: &str) -> String {
    if let Ending::Failed(error) = ending {
        tracing::debug!(%error, "stream failed");
    }
    if speaks_json(protocol) { status::json_of(ending) } else { status::text_of(ending) }
}

/// The streams of a SPDY connection by their roles.
#[derive(Default)]
struct Found {
    error: Option<spdy::Stream>,
    stdin: Option<spdy::Stream>,
    stdout: Option<spdy::Stream>,
    stderr: Option<spdy::Stream>,
    resize: Option<spdy::Stream>,
}

impl Found {
    fn slot(&mut self, role: &str) -> Option<&mut Option<spdy::Stream>> {
        Some(match role {
            "error" => &mut self.error,
            "stdin" => &mut self.stdin,
            "stdout" => &mut self.stdout,
            "stderr" => &mut self.stderr,
            "resize" => &mut self.resize,
            _ => return None,
        })
    }

    fn complete(&self, wanted: Wanted, resizes: bool) -> bool {
        self.error.is_some()
            && (!wanted.stdin || self.stdin.is_some())
            && (!wanted.stdout || self.stdout.is_some())
            && (!wanted.stderr || self.stderr.is_some())
            && (!(wanted.tty && resizes) || self.resize.is_some())
    }
}

/// Serves a SPDY connection to its end.
pub(super) async fn over_spdy(handler: Arc<dyn Handler>, target: Target, protocol: &str, mut connection: spdy::Connection) {
    let resizes = protocol.starts_with("v3.") || protocol.starts_with("v4.");
    let found = timeout(CREATION_LIMIT, find(&mut connection, wanted(&target), resizes)).await;
    let Ok(Some(found)) = found else {
        tracing::debug!(kind = target.kind(), "a client did not open its streams");
        return connection.farewell().await;
    };
    let mut outputs: Vec<super::channel::Writer> =
        [&found.stdout, &found.stderr].into_iter().flatten().map(|s| s.writer.clone()).collect();
    let error = found.error.map(|stream| stream.writer);
    let output = |stream: Option<spdy::Stream>| stream.map(|stream| Box::new(stream.writer) as Output);
    let streams = Streams {
        stdin: found.stdin.map(|stream| Box::new(stream.reader) as Input),
        stdout: output(found.stdout),
        stderr: output(found.stderr),
        resize: found.resize.map(|stream| sizes(stream.reader)),
        gone: connection.gone.clone(),
    };
    let ending = serve(&handler, target, streams).await;
    // Ended twice at the most, which the client does not mind.
    for output in &mut outputs {
        let _ = output.shutdown().await;
    }
    if let Some(mut error) = error {
        let _ = error.write_all(told(&ending, protocol).as_bytes()).await;
        let _ = error.shutdown().await;
    }
    connection.farewell().await;
}

async fn find(connection: &mut spdy::Connection, wanted: Wanted, resizes: bool) -> Option<Found> {
    let mut found = Found::default();
    while !found.complete(wanted, resizes) {
        let stream = connection.streams.recv().await?;
        let role = spdy::value(&stream.headers, "streamtype").unwrap_or_default().to_owned();
        match found.slot(&role) {
            Some(slot @ None) => {
                connection.accept(stream.id).await;
                *slot = Some(stream);
            }
            _ => connection.reset(stream.id).await,
        }
    }
    Some(found)
}

/// Serves a WebSocket connection to its end.
pub(super) async fn over_websocket(handler: Arc<dyn Handler>, target: Target, protocol: &str, wire: Wire) {
    let form = if protocol.contains("base64") { Form::Base64 } else { Form::Binary };
    let wanted = wanted(&target);
    let mut queues = Vec::new();
    let mut reader = |channel: u8, wanted: bool| {
        wanted.then(|| {
            let (queue, reader) = Reader::new();
            queues.push((channel, queue));
            reader
        })
    };
    let stdin = reader(STDIN, wanted.stdin);
    let resize = reader(RESIZE, wanted.tty);
    let connection = websocket::Connection::start(form, queues, wire);
    let lowest = if wanted.stdout {
        STDOUT
    } else if wanted.stderr {
        STDERR
    } else {
        ERROR
    };
    connection.greet(lowest).await;
    let writer = |channel: u8, wanted: bool| wanted.then(|| Box::new(connection.writer(channel)) as Output);
    let streams = Streams {
        stdin: stdin.map(|reader| Box::new(reader) as Input),
        stdout: writer(STDOUT, wanted.stdout),
        stderr: writer(STDERR, wanted.stderr),
        resize: resize.map(sizes),
        gone: connection.gone.clone(),
    };
    let ending = serve(&handler, target, streams).await;
    let _ = connection.writer(ERROR).write_all(told(&ending, protocol).as_bytes()).await;
    connection.farewell().await;
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

/// Reads sizes, `{"Width":80,"Height":24}` one after another, however they are cut.
fn sizes(mut reader: Reader) -> mpsc::Receiver<TerminalSize> {
    let (sender, receiver) = mpsc::channel(SIZES_MAX);
    tokio::spawn(async move {
        let mut text = Vec::new();
        while let Some(piece) = reader.piece().await {
            text.extend_from_slice(&piece);
            let mut values = serde_json::Deserializer::from_slice(&text).into_iter::<Size>();
            let mut read = 0;
            while let Some(Ok(Size { width, height })) = values.next() {
                read = values.byte_offset();
                if sender.send(TerminalSize { width, height }).await.is_err() {
                    return;
                }
            }
            text.drain(..read);
            if text.len() > SIZE_LIMIT_BYTES {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[tokio::test]
    async fn sizes_come_in_any_pieces() {
        let (queue, reader) = Reader::new();
        let mut receiver = sizes(reader);
        for piece in ["{\"Width\":80,\"Hei", "ght\":24}{\"Width\":1,\"Height\":2}\n", "garbage"] {
            queue.send(Bytes::from(piece)).await.expect("taken");
        }
        assert_eq!(receiver.recv().await, Some(TerminalSize { width: 80, height: 24 }));
        assert_eq!(receiver.recv().await, Some(TerminalSize { width: 1, height: 2 }));
        drop(queue);
        assert_eq!(receiver.recv().await, None);
    }
}
