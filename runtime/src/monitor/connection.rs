//! One daemon's connection: whole frames in, frames with descriptors out, both bounded. Knows nothing of what the frames mean.

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use windlass_proto::frame::{self, FRAME_FDS_MAX};
use windlass_proto::monitor::Frame;

/// Most bytes that wait for a peer that does not read.
const OUTPUT_LIMIT_BYTES: usize = 16 << 20;

/// Most frames that wait: a small frame costs more than its bytes, and may carry descriptors.
const OUTPUT_LIMIT_FRAMES: usize = 4096;

/// Read at once.
const READ_BYTES: usize = 4096;

/// Before a frame for which the kernel had no memory is sent again.
const SHORT_PAUSE: Duration = Duration::from_millis(1);

/// Why a connection is of no further use.
#[derive(Debug)]
pub(super) enum Lost {
    /// The peer closed it.
    Closed,
    /// The peer broke the protocol, does not read, or the socket failed.
    Broken(String),
}

struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// Go with the first byte, and are closed then.
    fds: Vec<OwnedFd>,
}

pub(super) struct Connection {
    socket: OwnedFd,
    input: Vec<u8>,
    output: VecDeque<Outgoing>,
    waiting_bytes: usize,
}

impl Connection {
    /// Takes a connected stream socket.
    pub(super) fn new(socket: OwnedFd) -> std::io::Result<Connection> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Connection { socket, input: Vec::new(), output: VecDeque::new(), waiting_bytes: 0 })
    }

    /// Frames that have come whole. Descriptors that a peer sends are not received and so closed by the kernel.
    pub(super) fn receive(&mut self) -> (Vec<Frame>, Result<(), Lost>) {
        let mut frames = Vec::new();
        let state = self.fill(&mut frames);
        if self.input.is_empty() {
            self.input = Vec::new();
        }
        (frames, state)
    }

    fn fill(&mut self, frames: &mut Vec<Frame>) -> Result<(), Lost> {
        let mut buffer = [0u8; READ_BYTES];
        loop {
            match recv(&self.socket, &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Lost::Closed),
                Ok((count, _)) => self.input.extend_from_slice(&buffer[..count]),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::CONNRESET) => return Err(Lost::Closed),
                Err(errno) => return Err(Lost::Broken(format!("receive: {errno}"))),
            }
            while let Some(frame) = frame::decode(&mut self.input).map_err(|error| Lost::Broken(error.to_string()))? {
                frames.push(frame);
            }
        }
    }

    /// Queues a frame and sends what the socket takes.
    pub(super) fn send(&mut self, frame: &Frame, fds: Vec<OwnedFd>) -> Result<(), Lost> {
        let bytes = frame::encode(frame).map_err(|error| Lost::Broken(error.to_string()))?;
        self.waiting_bytes += bytes.len();
        self.output.push_back(Outgoing { bytes, sent: 0, fds });
        self.flush()?;
        if self.waiting_bytes > OUTPUT_LIMIT_BYTES || self.output.len() > OUTPUT_LIMIT_FRAMES {
            return Err(Lost::Broken(format!("the peer leaves {} bytes unread", self.waiting_bytes)));
        }
        Ok(())
    }

    /// Sends until the socket is full.
    pub(super) fn flush(&mut self) -> Result<(), Lost> {
        while let Some(front) = self.output.front_mut() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FRAME_FDS_MAX))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds: Vec<BorrowedFd<'_>> = front.fds.iter().map(AsFd::as_fd).collect();
            if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(Lost::Broken(format!("{} descriptors for one frame", fds.len())));
            }
            let rest = front.bytes.get(front.sent..).unwrap_or_default();
            match sendmsg(&self.socket, &[IoSlice::new(rest)], &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(count) => {
                    front.sent += count;
                    front.fds = Vec::new();
                    self.waiting_bytes -= count;
                    if front.sent == front.bytes.len() {
                        self.output.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                // The pod's memory is used up (a socket's buffers are charged to it): it is sent when there is some again.
                Err(Errno::NOBUFS | Errno::NOMEM) => {
                    std::thread::sleep(SHORT_PAUSE);
                    return Ok(());
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Lost::Closed),
                Err(errno) => return Err(Lost::Broken(format!("send: {errno}"))),
            }
        }
        self.output = VecDeque::new();
        Ok(())
    }

    /// Whether something waits for the socket to take it.
    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use windlass_proto::monitor::{Empty, Failure, frame::Body};

    fn pair() -> (Connection, UnixStream) {
        let (ours, peers) = UnixStream::pair().unwrap();
        (Connection::new(ours.into()).unwrap(), peers)
    }

    #[test]
    fn frames_come_whole_and_garbage_breaks() {
        let (mut connection, mut peer) = pair();
        let sent = Frame { id: 9, body: Some(Body::Done(Empty {})) };
        let bytes = frame::encode(&sent).unwrap();
        peer.write_all(&bytes[..3]).unwrap();
        assert!(matches!(connection.receive(), (frames, Ok(())) if frames.is_empty()));
        peer.write_all(&bytes[3..]).unwrap();
        assert!(matches!(connection.receive(), (frames, Ok(())) if frames == [sent]));
        peer.write_all(&[0, 0, 0, 1, 255]).unwrap();
        assert!(matches!(connection.receive(), (_, Err(Lost::Broken(_)))));
    }

    #[test]
    fn a_peer_that_does_not_read_is_given_up_and_one_that_reads_gets_all() {
        let (mut connection, mut peer) = pair();
        let large = Frame { id: 1, body: Some(Body::Failure(Failure { message: "x".repeat(1 << 20), ..Failure::default() })) };
        let taken = (0..100).take_while(|_| connection.send(&large, Vec::new()).is_ok()).count();
        assert!((15..20).contains(&taken), "{taken} frames of 1 MiB");
        drop(connection);
        let (mut connection, mut reader) = pair();
        connection.send(&large, Vec::new()).unwrap();
        assert!(connection.has_output());
        let expected = frame::encode(&large).unwrap();
        let mut received = vec![0; expected.len()];
        let mut at = 0;
        while at < expected.len() {
            at += reader.read(&mut received[at..]).unwrap();
            connection.flush().unwrap();
        }
        assert!(received == expected && !connection.has_output());
        let _ = peer.read(&mut [0; 1]);
    }
}
