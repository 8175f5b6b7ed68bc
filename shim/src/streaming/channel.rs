//! One stream within a connection that carries several: its bytes come through a bounded queue, and go to the connection's one writer. A queue
//! that is full holds back the connection, which is the only back-pressure that these protocols have.

use bytes::{Buf, Bytes};
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::mpsc,
};
use tokio_util::sync::PollSender;

/// Pieces that wait in a stream's queue, each at most what was read from the socket at once.
pub(super) const QUEUE_PIECES: usize = 16;
/// Messages that wait for the writer.
pub(super) const OUTGOING_MAX: usize = 32;
/// Most bytes of one message.
pub(super) const MESSAGE_BYTES: usize = 64 << 10;

/// What a connection's writer is given, in the order in which it goes out.
#[derive(Debug)]
pub(super) enum Outgoing {
    /// Bytes of a stream; `last` half-closes it.
    Data { id: u32, bytes: Bytes, last: bool },
    /// The stream is taken (SPDY only).
    Accept { id: u32 },
    /// The stream is refused or given up (SPDY only).
    Reset { id: u32 },
    /// The answer to a ping.
    Pong { bytes: Bytes },
    /// Nothing comes after this.
    Farewell,
}

/// A stream's bytes from the client.
#[derive(Debug)]
pub(super) struct Reader {
    queue: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Reader {
    /// A queue and its reader. Dropping the sender is the stream's end.
    pub(super) fn new() -> (mpsc::Sender<Bytes>, Reader) {
        let (sender, queue) = mpsc::channel(QUEUE_PIECES);
        (sender, Reader { queue, current: Bytes::new() })
    }

    /// The next piece whole, `None` at the end.
    pub(super) async fn piece(&mut self) -> Option<Bytes> {
        if self.current.has_remaining() {
            return Some(std::mem::take(&mut self.current));
        }
        self.queue.recv().await
    }
}

impl AsyncRead for Reader {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.current.is_empty() {
            match ready!(self.queue.poll_recv(context)) {
                Some(bytes) => self.current = bytes,
                None => return Poll::Ready(Ok(())),
            }
        }
        let take = self.current.len().min(into.remaining());
        into.put_slice(&self.current.split_to(take));
        Poll::Ready(Ok(()))
    }
}

/// A stream's bytes to the client.
#[derive(Clone)]
pub(super) struct Writer {
    id: u32,
    sender: PollSender<Outgoing>,
    ended: bool,
}

impl Writer {
    pub(super) fn new(id: u32, sender: mpsc::Sender<Outgoing>) -> Writer {
        Writer { id, sender: PollSender::new(sender), ended: false }
    }

    fn poll_room(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.sender.poll_reserve(context).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn send(&mut self, bytes: Bytes, last: bool) -> io::Result<()> {
        let message = Outgoing::Data { id: self.id, bytes, last };
        self.sender.send_item(message).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl AsyncWrite for Writer {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        ready!(self.poll_room(context))?;
        let take = bytes.len().min(MESSAGE_BYTES);
        self.send(Bytes::copy_from_slice(&bytes[..take]), false)?;
        Poll::Ready(Ok(take))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_room(context))?;
        self.send(Bytes::new(), true)?;
        self.ended = true;
        Poll::Ready(Ok(()))
    }
}
