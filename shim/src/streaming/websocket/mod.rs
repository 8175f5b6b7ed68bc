//! A server's end of a WebSocket connection that carries channels: the first byte of a message is its channel's number
//! (`channel.k8s.io` and its later versions), or a digit before base64 text; or that carries one plain stream of bytes.

pub mod client;
mod frame;

use super::{
    channel::{OUTGOING_MAX, Outgoing, Reader, Writer},
    wire::{Peer, Wire},
};
use aws_lc_rs::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Buf, Bytes, BytesMut};
use frame::Kind;
use std::{io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Channels of a connection.
const CHANNELS_MAX: usize = 256;
/// The channel that says which other one has ended (version 5).
const CLOSE_CHANNEL: u8 = 255;
/// Longest wait for the client to end a connection that has been said farewell to.
const LINGER: Duration = Duration::from_secs(2);
/// Status 1000, a normal end.
const NORMAL: [u8; 2] = [0x03, 0xe8];

/// The answer to a client's `Sec-WebSocket-Key` (RFC 6455, 4.2.2).
pub(super) fn accept_key(key: &str) -> String {
    let text = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes()))
}

/// How messages carry bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A byte for the channel, then the bytes.
    Binary,
    /// A digit for the channel, then base64.
    Base64,
    /// The bytes of one stream, which is channel 0.
    Plain,
}

/// A connection that is being served.
pub(super) struct Connection {
    outgoing: mpsc::Sender<Outgoing>,
    /// Cancelled when nothing comes from the client any more.
    pub(super) gone: CancellationToken,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Connection {
    /// Serves a connection; what comes on a channel goes to its queue, dropping which is the channel's end.
    pub(super) fn start(form: Form, queues: Vec<(u8, mpsc::Sender<Bytes>)>, wire: Wire) -> Connection {
        let Wire { first, input, output, peer } = wire;
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let gone = CancellationToken::new();
        let mut channels = vec![None; CHANNELS_MAX];
        for (channel, queue) in queues {
            channels[usize::from(channel)] = Some(queue);
        }
        let buffer = BytesMut::from(first.as_slice());
        let incoming =
            Incoming { form, input, buffer, message: BytesMut::new(), channels, outgoing: outgoing.clone(), peer: peer.clone() };
        let read = tokio::spawn({
            let gone = gone.clone();
            async move {
                if let Err(error) = incoming.run().await {
                    tracing::debug!(%error, "WebSocket connection ended");
                }
                gone.cancel();
            }
        });
        let written = tokio::spawn({
            let gone = gone.clone();
            async move {
                if let Err(error) = write(form, output, queue, &peer).await {
                    tracing::debug!(%error, "WebSocket connection not written");
                    gone.cancel();
                }
            }
        });
        Connection { outgoing, gone, tasks: vec![written, read] }
    }

    /// What is written to a channel.
    pub(super) fn writer(&self, channel: u8) -> Writer {
        Writer::new(channel.into(), self.outgoing.clone())
    }

    /// An empty message, by which clients see that the connection stands.
    pub(super) async fn greet(&self, channel: u8) {
        let _ = self.outgoing.send(Outgoing::Data { id: channel.into(), bytes: Bytes::new(), last: false }).await;
    }

    /// Says that nothing more comes, and waits a little for the client to end the connection, so that it reads all that was written.
    pub(super) async fn farewell(self) {
        let _ = self.outgoing.send(Outgoing::Farewell).await;
        drop(self.outgoing);
        for mut task in self.tasks {
            if timeout(LINGER, &mut task).await.is_err() {
                task.abort();
            }
        }
    }
}

struct Incoming<R> {
    form: Form,
    input: R,
    buffer: BytesMut,
    /// What has come of a message in several frames.
    message: BytesMut,
    channels: Vec<Option<mpsc::Sender<Bytes>>>,
    outgoing: mpsc::Sender<Outgoing>,
    peer: Peer,
}

fn broken(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl<R: AsyncRead + Unpin> Incoming<R> {
    async fn run(mut self) -> io::Result<()> {
        loop {
            let head = loop {
                match frame::read(&self.buffer).map_err(broken)? {
                    Some(head) if self.buffer.len() >= head.head_bytes + head.length => break head,
                    _ => self.more().await?,
                }
            };
            self.buffer.advance(head.head_bytes);
            let mut payload = self.buffer.split_to(head.length);
            frame::mask(&mut payload, head.mask);
            match head.kind {
                Kind::Close => return Ok(()),
                Kind::Ping => {
                    let _ = self.outgoing.send(Outgoing::Pong { bytes: payload.freeze() }).await;
                }
                Kind::Pong => {}
                Kind::Text | Kind::Binary | Kind::Continuation => {
                    let message = if self.message.is_empty() && head.last { payload } else { self.join(payload)? };
                    if head.last {
                        self.message.clear();
                        self.deliver(message.freeze()).await?;
                    }
                }
            }
        }
    }

    /// Appends a part of a message; gives all of it so far.
    fn join(&mut self, part: BytesMut) -> io::Result<BytesMut> {
        self.message.unsplit(part);
        if self.message.len() as u64 > frame::PAYLOAD_LIMIT_BYTES {
            return Err(broken(format!("a message over {} bytes", frame::PAYLOAD_LIMIT_BYTES)));
        }
        Ok(self.message.clone())
    }

    async fn more(&mut self) -> io::Result<()> {
        self.buffer.reserve(super::channel::MESSAGE_BYTES);
        if self.peer.read(&mut self.input, &mut self.buffer).await? == 0 {
            Err(io::ErrorKind::UnexpectedEof.into())
        } else {
            Ok(())
        }
    }

    async fn deliver(&mut self, mut message: Bytes) -> io::Result<()> {
        if self.form == Form::Plain {
            return self.give(0, message).await;
        }
        let Some(first) = message.first().copied() else { return Ok(()) };
        message.advance(1);
        match self.form {
            Form::Binary if first == CLOSE_CHANNEL => {
                for channel in message {
                    self.channels[usize::from(channel)] = None;
                }
                Ok(())
            }
            Form::Base64 => {
                let channel = first.checked_sub(b'0').filter(|digit| *digit < 10);
                let channel = channel.ok_or_else(|| broken(format!("a message for channel {first:#x}")))?;
                let plain = STANDARD.decode(&message).map_err(|error| broken(format!("base64: {error}")))?;
                self.give(channel, plain.into()).await
            }
            _ => self.give(first, message).await,
        }
    }

    async fn give(&mut self, channel: u8, bytes: Bytes) -> io::Result<()> {
        let slot = &mut self.channels[usize::from(channel)];
        if !bytes.is_empty()
            && let Some(queue) = slot
            && !self.peer.give(queue, bytes).await?
        {
            // Nobody reads it: what comes is thrown away.
            *slot = None;
        }
        Ok(())
    }
}

/// Writes what comes through the queue until its farewell or its end.
async fn write(
    form: Form,
    mut output: impl AsyncWrite + Unpin,
    mut queue: mpsc::Receiver<Outgoing>,
    peer: &Peer,
) -> io::Result<()> {
    while let Some(message) = queue.recv().await {
        match message {
            // These protocols cannot half-close a channel of the server's.
            Outgoing::Data { bytes, last: true, .. } if bytes.is_empty() => {}
            Outgoing::Data { id, bytes, .. } => write_message(form, &mut output, id, bytes).await?,
            Outgoing::Pong { bytes } => {
                let head = frame::head(Kind::Pong, bytes.len());
                output.write_all_buf(&mut Buf::chain(&head[..], bytes)).await?;
            }
            Outgoing::Farewell => {
                output.write_all(&frame::head(Kind::Close, NORMAL.len())).await?;
                output.write_all(&NORMAL).await?;
                break;
            }
            Outgoing::Accept { .. } | Outgoing::Reset { .. } => {}
        }
        output.flush().await?;
        peer.moved();
    }
    output.flush().await?;
    output.shutdown().await
}

async fn write_message(form: Form, output: &mut (impl AsyncWrite + Unpin), id: u32, bytes: Bytes) -> io::Result<()> {
    let channel = id as u8;
    match form {
        Form::Plain => {
            let head = frame::head(Kind::Binary, bytes.len());
            output.write_all_buf(&mut Buf::chain(&head[..], bytes)).await
        }
        Form::Binary => {
            let mut head = frame::head(Kind::Binary, bytes.len() + 1);
            head.push(channel);
            output.write_all_buf(&mut Buf::chain(&head[..], bytes)).await
        }
        Form::Base64 => {
            let text = format!("{channel}{}", STANDARD.encode(&bytes));
            let head = frame::head(Kind::Text, text.len());
            output.write_all_buf(&mut Buf::chain(&head[..], text.as_bytes())).await
        }
    }
}

/// A plain stream of bytes within the connection, for a protocol that is tunnelled.
pub(super) fn tunnel(wire: Wire) -> Wire {
    let peer = wire.peer.clone();
    let (queue, reader) = Reader::new();
    let connection = Connection::start(Form::Plain, vec![(0, queue)], wire);
    let writer = connection.writer(0);
    tokio::spawn(async move {
        connection.gone.cancelled().await;
        connection.farewell().await;
    });
    Wire { first: Vec::new(), input: Box::new(reader), output: Box::new(writer), peer }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[test]
    fn the_key_is_answered_as_the_rfc_says() {
        assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[tokio::test]
    async fn channels_carry_bytes_both_ways_and_end() {
        for (form, sent, back) in [
            (
                Form::Binary,
                frame::of_client(Kind::Binary, b"\0in", [1, 2, 3, 4]),
                [frame::head(Kind::Binary, 4), b"\x01out".to_vec()].concat(),
            ),
            (
                Form::Base64,
                frame::of_client(Kind::Text, b"0aW4=", [1, 2, 3, 4]),
                [frame::head(Kind::Text, 5), b"1b3V0".to_vec()].concat(),
            ),
        ] {
            let (client, server) = tokio::io::duplex(1 << 16);
            let (input, output) = tokio::io::split(server);
            let (queue, mut reader) = Reader::new();
            let connection = Connection::start(
                form,
                vec![(0, queue)],
                Wire { first: sent, input: Box::new(input), output: Box::new(output), peer: Peer::unseen() },
            );
            let mut bytes = [0; 2];
            reader.read_exact(&mut bytes).await.expect("read");
            assert_eq!(&bytes, b"in");
            let mut writer = connection.writer(1);
            writer.write_all(b"out").await.expect("written");
            let (mut from, mut to) = tokio::io::split(client);
            let mut answer = vec![0; back.len()];
            from.read_exact(&mut answer).await.expect("an answer");
            assert_eq!(answer, back);
            if form == Form::Binary {
                to.write_all(&frame::of_client(Kind::Binary, &[CLOSE_CHANNEL, 0], [5; 4])).await.expect("written");
                assert_eq!(reader.read(&mut bytes).await.expect("the end"), 0);
            }
            to.write_all(&frame::of_client(Kind::Close, &NORMAL, [5; 4])).await.expect("written");
            connection.gone.cancelled().await;
        }
    }
}
