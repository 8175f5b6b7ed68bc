//! A server's end of a SPDY/3.1 connection: streams that the client opens, in both directions, over one socket.
//!
//! The client libraries of Kubernetes neither send nor honour window updates, so no credit is waited for: a stream that is not read holds the
//! socket back. Two tasks: one reads and hands out, one writes.

mod frame;
mod headers;

pub(super) use headers::{Headers, value};

use super::{
    channel::{MESSAGE_BYTES, OUTGOING_MAX, Outgoing, Reader, Writer},
    wire::{Peer, Wire},
};
use bytes::{Bytes, BytesMut};
use frame::{CONTROL_LIMIT_BYTES, Control, HEAD_BYTES, Head};
use std::{collections::HashMap, io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Most streams of a connection that are open at a time: a port-forward has two for each of its connections.
const STREAMS_MAX: usize = 2048;
/// Streams that wait to be looked at.
const WAITING_MAX: usize = 64;
/// Longest wait for the client to end a connection that has been said farewell to.
const LINGER: Duration = Duration::from_secs(2);

/// A stream that the client has opened.
pub(super) struct Stream {
    pub(super) id: u32,
    pub(super) headers: Headers,
    pub(super) reader: Reader,
    pub(super) writer: Writer,
}

/// A connection that is being served.
pub(super) struct Connection {
    /// New streams, each to be accepted or reset.
    pub(super) streams: mpsc::Receiver<Stream>,
    outgoing: mpsc::Sender<Outgoing>,
    /// Cancelled when nothing comes from the client any more.
    pub(super) gone: CancellationToken,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Connection {
    /// Serves a connection.
    pub(super) fn start(wire: Wire) -> Connection {
        let Wire { first, input, output, peer } = wire;
        let (outgoing, queue) = mpsc::channel(OUTGOING_MAX);
        let (opened, streams) = mpsc::channel(WAITING_MAX);
        let gone = CancellationToken::new();
        let incoming = Incoming {
            input,
            buffer: BytesMut::from(first.as_slice()),
            headers: headers::Reader::new(),
            open: HashMap::new(),
            opened: Some(opened),
            outgoing: outgoing.clone(),
            peer: peer.clone(),
        };
        let read = tokio::spawn({
            let gone = gone.clone();
            async move {
                if let Err(error) = incoming.run().await {
                    tracing::debug!(%error, "SPDY connection ended");
                }
                gone.cancel();
            }
        });
        let written = tokio::spawn({
            let gone = gone.clone();
            async move {
                if let Err(error) = write(output, queue, &peer).await {
                    tracing::debug!(%error, "SPDY connection not written");
                    gone.cancel();
                }
            }
        });
        Connection { streams, outgoing, gone, tasks: vec![written, read] }
    }

    pub(super) async fn accept(&self, id: u32) {
        let _ = self.outgoing.send(Outgoing::Accept { id }).await;
    }

    pub(super) async fn reset(&self, id: u32) {
        let _ = self.outgoing.send(Outgoing::Reset { id }).await;
    }

    /// A handle that can reset streams after the connection was lent.
    pub(super) fn resetter(&self) -> mpsc::Sender<Outgoing> {
        self.outgoing.clone()
    }

    /// Says that nothing more comes, and waits a little for the client to end the connection, so that it reads all that was written.
    pub(super) async fn farewell(self) {
        let _ = self.outgoing.send(Outgoing::Farewell).await;
        drop((self.outgoing, self.streams));
        for mut task in self.tasks {
            if timeout(LINGER, &mut task).await.is_err() {
                task.abort();
            }
        }
    }
}

/// A stream as the reading task keeps it; dropping the queue is its end.
struct Open {
    queue: Option<mpsc::Sender<Bytes>>,
}

struct Incoming<R> {
    input: R,
    buffer: BytesMut,
    headers: headers::Reader,
    open: HashMap<u32, Open>,
    opened: Option<mpsc::Sender<Stream>>,
    outgoing: mpsc::Sender<Outgoing>,
    peer: Peer,
}

fn broken(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl<R: AsyncRead + Unpin> Incoming<R> {
    async fn run(mut self) -> io::Result<()> {
        while self.fill(HEAD_BYTES).await? {
            let Some(head) = self.buffer.split_to(HEAD_BYTES).first_chunk().copied() else { return Ok(()) };
            match Head::read(head).map_err(broken)? {
                Head::Data { stream, last, length } => self.data(stream, last, length).await?,
                Head::Control { kind, last, length } => self.control(kind, last, length).await?,
            }
        }
        Ok(())
    }

    /// Reads until `length` bytes are there; false at an end between frames.
    async fn fill(&mut self, length: usize) -> io::Result<bool> {
        while self.buffer.len() < length {
            self.buffer.reserve(MESSAGE_BYTES);
            if self.peer.read(&mut self.input, &mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() { Ok(false) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
        Ok(true)
    }

    async fn data(&mut self, stream: u32, last: bool, mut left: usize) -> io::Result<()> {
        while left > 0 {
            if self.buffer.is_empty() && !self.fill(1).await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let piece = self.buffer.split_to(left.min(self.buffer.len())).freeze();
            left -= piece.len();
            if let Some(open) = self.open.get_mut(&stream)
                && let Some(queue) = &open.queue
                && !self.peer.give(queue, piece).await?
            {
                // Nobody reads it: what comes is thrown away.
                open.queue = None;
            }
        }
        if last {
            self.open.remove(&stream);
        }
        Ok(())
    }

    async fn control(&mut self, kind: u16, last: bool, length: usize) -> io::Result<()> {
        debug_assert!(length <= CONTROL_LIMIT_BYTES);
        if !self.fill(length).await? && length > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let body = self.buffer.split_to(length).freeze();
        match Control::read(kind, last, &body).map_err(broken)? {
            Control::Open { stream, last, block } => {
                let headers = self.headers.read(block).map_err(broken)?;
                self.opened(stream, last, headers).await?;
            }
            Control::Reset { stream } => {
                self.open.remove(&stream);
            }
            Control::Ping { .. } => {
                let _ = self.outgoing.send(Outgoing::Pong { bytes: body }).await;
            }
            Control::Goaway => self.opened = None,
            Control::Other => {}
        }
        Ok(())
    }

    async fn opened(&mut self, id: u32, last: bool, headers: Headers) -> io::Result<()> {
        // Senders whose reader is gone belong to streams that have ended here.
        if self.open.len() >= STREAMS_MAX {
            self.open.retain(|_, open| open.queue.as_ref().is_some_and(|queue| !queue.is_closed()));
        }
        let room = self.open.len() < STREAMS_MAX && !self.open.contains_key(&id) && id % 2 == 1;
        let Some(opened) = self.opened.as_ref().filter(|_| room) else {
            let _ = self.outgoing.send(Outgoing::Reset { id }).await;
            return Ok(());
        };
        let (queue, reader) = Reader::new();
        let writer = Writer::new(id, self.outgoing.clone());
        if self.peer.give(opened, Stream { id, headers, reader, writer }).await? && !last {
            self.open.insert(id, Open { queue: Some(queue) });
        }
        Ok(())
    }
}

/// Writes what comes through the queue until its farewell or its end.
async fn write(mut output: impl AsyncWrite + Unpin, mut queue: mpsc::Receiver<Outgoing>, peer: &Peer) -> io::Result<()> {
    let mut headers = headers::Writer::new();
    let mut last_accepted = 0;
    while let Some(message) = queue.recv().await {
        match message {
            Outgoing::Data { id, bytes, last } => {
                let head = frame::data(id, bytes.len(), last);
                let mut both = bytes::Buf::chain(&head[..], bytes);
                output.write_all_buf(&mut both).await?;
            }
            Outgoing::Accept { id } => {
                last_accepted = id.max(last_accepted);
                output.write_all(&frame::reply(id, &headers.write(&[]))).await?;
            }
            Outgoing::Reset { id } => output.write_all(&frame::reset(id)).await?,
            Outgoing::Pong { bytes } => output.write_all(&frame::ping(&bytes)).await?,
            Outgoing::Farewell => {
                output.write_all(&frame::goaway(last_accepted)).await?;
                break;
            }
        }
        // TLS keeps what the socket did not take at once.
        output.flush().await?;
        peer.moved();
    }
    output.flush().await?;
    output.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn streams_are_opened_written_half_closed_and_pings_answered() {
        let (client, server) = tokio::io::duplex(1 << 20);
        let (input, output) = tokio::io::split(server);
        let (mut from, mut to) = tokio::io::split(client);
        let mut blocks = headers::Writer::new();
        let mut wire = frame::open(1, false, &blocks.write(&[("streamtype", "stdin")]));
        wire.extend(frame::open(3, true, &blocks.write(&[("streamtype", "error")])));
        wire.extend(frame::data(1, 5, false));
        wire.extend(b"hello");
        wire.extend(frame::data(1, 0, true));
        wire.extend(frame::ping(&[0, 0, 0, 9]));
        let (first, later) = wire.split_at(7);
        let mut connection = Connection::start(Wire {
            first: first.to_vec(),
            input: Box::new(input),
            output: Box::new(output),
            peer: Peer::unseen(),
        });
        to.write_all(later).await.expect("written");
        let mut stdin = connection.streams.recv().await.expect("a stream");
        assert_eq!((stdin.id, value(&stdin.headers, "streamtype")), (1, Some("stdin")));
        let mut read = Vec::new();
        stdin.reader.read_to_end(&mut read).await.expect("read");
        assert_eq!(read, b"hello");
        let error = connection.streams.recv().await.expect("a stream");
        assert_eq!(value(&error.headers, "streamtype"), Some("error"));
        stdin.writer.write_all(b"back").await.expect("written");
        stdin.writer.shutdown().await.expect("half-closed");
        let mut answer = vec![0; 12 + 8 + 4 + 8];
        from.read_exact(&mut answer).await.expect("answers");
        let mut expected = frame::ping(&[0, 0, 0, 9]);
        expected.extend(frame::data(1, 4, false));
        expected.extend(b"back");
        expected.extend(frame::data(1, 0, true));
        assert_eq!(answer, expected);
        drop((from, to));
        connection.gone.cancelled().await;
    }
}
