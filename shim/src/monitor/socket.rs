//! Frames and descriptors over a unix stream socket, without blocking a thread.

use rustix::{
    fd::OwnedFd,
    io::IoSliceMut,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags},
};
use std::{io, mem::MaybeUninit};
use tokio::{io::Interest, net::UnixStream};
use windlass_proto::{
    frame::{self, FRAME_FDS_MAX},
    monitor::{Frame, frame::Body},
};

const CHUNK_BYTES: usize = 16 << 10;

/// Splits what comes over a socket into frames, each with the descriptors that arrived with its first byte.
#[derive(Default)]
pub(super) struct Reader {
    buffer: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Reader {
    /// The next frame, or `None` at the end of the connection.
    pub(super) async fn next(&mut self, stream: &UnixStream) -> io::Result<Option<(Frame, Vec<OwnedFd>)>> {
        loop {
            if let Some(frame) = frame::decode(&mut self.buffer).map_err(io::Error::other)? {
                let carries = match &frame.body {
                    Some(Body::SetupReply(_) | Body::ExecReply(_) | Body::AttachReply(_) | Body::SocketsReply(_)) => true,
                    Some(Body::StateReply(state)) => state.layers,
                    _ => false,
                };
                let descriptors = if carries { std::mem::take(&mut self.descriptors) } else { Vec::new() };
                return Ok(Some((frame, descriptors)));
            }
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || self.receive(stream)) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// One recvmsg. The kernel ends a read after the message that carries descriptors but may put bytes of earlier ones before it,
    /// so descriptors wait for the first frame of a kind that has some.
    fn receive(&mut self, stream: &UnixStream) -> io::Result<usize> {
        let mut chunk = [0u8; CHUNK_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received =
            rustix::io::retry_on_intr(|| rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut chunk)], &mut control, flags))?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        self.buffer.extend_from_slice(chunk.get(..received.bytes).unwrap_or_default());
        Ok(received.bytes)
    }
}

/// Writes what the socket takes at once.
pub(super) fn write_some(stream: &UnixStream, bytes: &[u8]) -> io::Result<usize> {
    match stream.try_write(bytes) {
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
        written => written,
    }
}

/// Ends the connection in both directions.
pub(super) fn end(stream: &UnixStream) {
    let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Both);
}

/// Writes all of `bytes`.
pub(super) async fn write_all(stream: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.writable().await?;
        match stream.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
