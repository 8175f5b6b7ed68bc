//! The socket between a child and the process that made it.
//!
//! ```text
//! child  -> parent   in a user namespace of its own: Moved (a pidfd of the process that goes on, as SCM_RIGHTS)
//! child  -> parent   with hooks for the runtime's namespaces: Hooks (the socket that takes their outcome, as SCM_RIGHTS)
//! child  -> parent   one datagram: Ready (a terminal's master as SCM_RIGHTS) or Failed
//! parent -> child    one byte: the gate is open
//! child  -> parent   Failed, or end of file because exec closed the socket
//! ```

use super::{Kind, StepError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType, accept_with, recvmsg, sendmsg, socket_with, socketpair,
};
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Longest datagram: an error has three bounded texts, JSON may escape each byte as six.
const REPORT_LIMIT_BYTES: usize = 96 * 1024;

/// What came from the child.
#[derive(Debug)]
pub enum Message {
    /// It has built everything and waits at the gate. (An exec has no gate and sends this just before its program runs.)
    Ready {
        /// The pty's master, with [`super::Stdio::Terminal`].
        console: Option<OwnedFd>,
        /// Limits of `config.json` that this host's cgroup tree cannot enforce, by controller: `memory`, `cpu`, `pids`..
        not_enforced: Vec<String>,
        /// The bundle has poststart or poststop hooks, which the caller runs.
        later_hooks: bool,
    },
    /// The first process is another one from now on, a child of the receiver like the one before, which ends.
    Moved {
        /// In the pid namespace of the receiver.
        pid: i32,
        /// Close-on-exec pidfd.
        pidfd: OwnedFd,
    },
    /// The root is built, and hooks that run in the caller's namespaces are due: the receiver calls [`super::hooks::serve`].
    Hooks {
        /// Where the outcome goes.
        outcome: OwnedFd,
    },
    /// It could not, and ends by itself. Nothing follows.
    Failed(StepError),
    /// End of file: the program runs. Nothing follows.
    Executed,
    /// Nothing there yet.
    WouldBlock,
}

#[derive(Debug, Serialize, Deserialize)]
enum Wire {
    Moved { pid: i32 },
    Hooks,
    Ready { not_enforced: Vec<String>, later_hooks: bool },
    Failed(StepError),
}

/// The parent's end. Nonblocking and close-on-exec; readable by epoll when [`Report::receive`] has something.
#[derive(Debug)]
pub struct Report {
    socket: OwnedFd,
    /// Whether end of file means that exec worked: the gate was opened, or there is none.
    gate_open: bool,
    ended: bool,
}

impl Report {
    /// A connected pair: the parent's end and the child's. `gated` when the child waits for [`Report::open_gate`].
    pub(super) fn pair(gated: bool) -> Result<(Report, ChildReport), Errno> {
        let flags = SocketFlags::CLOEXEC;
        let (parent, child) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::io::ioctl_fionbio(&parent, true)?;
        Ok((Report { socket: parent, gate_open: !gated, ended: false }, ChildReport { socket: child }))
    }

    /// Connects to the gate of a child that [`super::create_behind`] made. ECONNREFUSED when it has ended.
    pub fn connect(path: &Path) -> std::io::Result<Report> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Report { socket, gate_open: false, ended: false })
    }

    /// Waits for the next message; never [`Message::WouldBlock`].
    pub fn wait(&mut self) -> std::io::Result<Message> {
        loop {
            match self.receive()? {
                Message::WouldBlock => {
                    // An interrupted wait is only an early look.
                    let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], None);
                }
                message => return Ok(message),
            }
        }
    }

    /// Takes the next message without waiting.
    pub fn receive(&mut self) -> std::io::Result<Message> {
        if self.ended {
            return Ok(Message::Executed);
        }
        let mut bytes = vec![0; REPORT_LIMIT_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg(&self.socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received.bytes,
            Err(Errno::AGAIN) => return Ok(Message::WouldBlock),
            Err(Errno::INTR) => return Ok(Message::WouldBlock),
            Err(Errno::CONNRESET) => 0,
            Err(errno) => return Err(errno.into()),
        };
        let mut console = None;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                console = fds.into_iter().next().or(console);
            }
        }
        if received == 0 {
            self.ended = true;
            if self.gate_open {
                return Ok(Message::Executed);
            }
            let why = "the process ended before it had reported";
            return Ok(Message::Failed(StepError::because(Kind::Internal, "create", "", why)));
        }
        let wire = serde_json::from_slice(bytes.get(..received).unwrap_or_default())?;
        Ok(match (wire, console) {
            (Wire::Moved { pid }, Some(pidfd)) => Message::Moved { pid, pidfd },
            (Wire::Hooks, Some(outcome)) => Message::Hooks { outcome },
            (Wire::Moved { .. } | Wire::Hooks, None) => return Err(std::io::ErrorKind::InvalidData.into()),
            (Wire::Ready { not_enforced, later_hooks }, console) => Message::Ready { console, not_enforced, later_hooks },
            (Wire::Failed(error), _) => Message::Failed(error),
        })
    }

    /// Lets the program run. EPIPE when the child has gone.
    pub fn open_gate(&mut self) -> std::io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, b"g", SendFlags::NOSIGNAL))?;
        self.gate_open = true;
        Ok(())
    }
}

impl AsFd for Report {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The child's end.
#[derive(Debug)]
pub(super) struct ChildReport {
    socket: OwnedFd,
}

impl ChildReport {
    /// The same end in another process.
    pub(super) fn of(socket: OwnedFd) -> ChildReport {
        ChildReport { socket }
    }

    /// Asks the parent to have hooks run; their outcome comes through the other end of `outcome`.
    pub(super) fn hooks_due(&self, outcome: &ChildReport) -> Result<(), Errno> {
        self.send(&Wire::Hooks, Some(outcome.as_fd()))
    }

    /// Waits for the one connection to a gate that listens.
    pub(super) fn accept(gate: &OwnedFd) -> Result<ChildReport, Errno> {
        loop {
            match accept_with(gate, SocketFlags::CLOEXEC) {
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                other => return other.map(|socket| ChildReport { socket }),
            }
        }
    }

    /// Says that the child is at the gate. The master of a pty goes along.
    pub(super) fn ready(
        &self,
        console: Option<BorrowedFd<'_>>,
        not_enforced: Vec<String>,
        later_hooks: bool,
    ) -> Result<(), Errno> {
        self.send(&Wire::Ready { not_enforced, later_hooks }, console)
    }

    /// Says that another process goes on in place of the caller.
    pub(super) fn moved(&self, pid: i32, pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.send(&Wire::Moved { pid }, Some(pidfd))
    }

    /// Says what went wrong. The parent may be gone, so a failure here is nobody's.
    pub(super) fn failed(&self, error: StepError) {
        let _ = self.send(&Wire::Failed(error), None);
    }

    /// Waits until the gate opens. False: the parent has gone.
    pub(super) fn wait_at_gate(&self) -> Result<bool, Errno> {
        let mut byte = [0u8; 1];
        loop {
            match rustix::net::recv(&self.socket, &mut byte, RecvFlags::empty()) {
                Ok((count, _)) => return Ok(count == 1),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn send(&self, wire: &Wire, fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let bytes = serde_json::to_vec(wire).map_err(|_| Errno::INVAL)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        }
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL).map(drop)
    }
}

impl AsFd for ChildReport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
