//! Attached clients: each reads a container's output through a pipe of its own, which is filled beside the log and never waited for. Who does
//! not read until it is full is given up. Input goes from the clients straight into the container's pipe or terminal.

use super::container::{Phase, check_id, pipe};
use super::note::note;
use super::server::{Monitor, Reply};
use crate::log::Stream;
use crate::process::{Context, Kind, StepError};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use windlass_proto::monitor::{AttachReply, AttachRequest, DetachReply, DetachRequest, SocketsReply, frame::Body};

/// Most clients of a container at a time.
const ATTACHED_MAX: usize = 64;

/// How far a client may be behind, for each stream. The kernel's default limit for one pipe (pipe(7), pipe-max-size).
const BEHIND_MAX_BYTES: usize = 1 << 20;

/// A client of one container.
pub(super) struct Attached {
    id: String,
    /// The connection that asked for it.
    connection: u64,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// It did not read, and was given up.
    overrun: bool,
}

impl Attached {
    fn stream(&mut self, stream: Stream) -> &mut Option<OwnedFd> {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    /// Whether a reader has gone: its daemon may have ended without a word.
    fn abandoned(&self) -> bool {
        [&self.stdout, &self.stderr].into_iter().flatten().any(|fd| has_no_reader(fd.as_fd()))
    }
}

fn has_no_reader(fd: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::empty())];
    let ready = rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    ready.is_ok() && polled[0].revents().contains(PollFlags::ERR)
}

/// Gives the bytes to every client of the stream.
pub(super) fn tee(clients: &mut [Attached], stream: Stream, bytes: &[u8]) {
    for client in clients {
        let Some(fd) = client.stream(stream) else { continue };
        match write_all(fd.as_fd(), bytes) {
            Ok(()) => {}
            Err(errno) => {
                client.overrun |= errno == Errno::AGAIN;
                (client.stdout, client.stderr) = (None, None);
            }
        }
    }
}

/// The stream has ended: clients see that when they have read what there is.
pub(super) fn end(clients: &mut [Attached], stream: Stream) {
    for client in clients {
        *client.stream(stream) = None;
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// A pipe for one client: its end, and ours, which does not block.
fn channel() -> Result<(OwnedFd, OwnedFd), StepError> {
    let (theirs, ours) = pipe()?;
    rustix::io::ioctl_fionbio(&ours, true).context("make", "pipe")?;
    if let Err(errno) = rustix::pipe::fcntl_setpipe_size(&ours, BEHIND_MAX_BYTES) {
        note(format_args!("an attached client's pipe stays small: {errno}"));
    }
    Ok((theirs, ours))
}

impl Monitor {
    pub(super) fn attach(&mut self, to: Reply, request: &AttachRequest) -> Result<(), StepError> {
        check_id(&request.attach_id)?;
        let (_, container) = self.living("attach", &request.container_id)?;
        let id = &request.container_id;
        if !matches!(container.phase, Phase::Running { .. } | Phase::Created) {
            return Err(StepError::because(Kind::WrongState, "attach", id, "the container is not running"));
        }
        if container.attached.len() >= ATTACHED_MAX {
            container.attached.retain(|client| !client.abandoned());
        }
        if container.attached.len() >= ATTACHED_MAX {
            return Err(StepError::because(Kind::WrongState, "attach", id, format!("{ATTACHED_MAX} clients are attached")));
        }
        if container.attached.iter().any(|client| client.id == request.attach_id) {
            return Err(StepError::because(Kind::WrongState, "attach", &request.attach_id, "the id is in use"));
        }
        let mut fds = Vec::new();
        let input = match (container.terminal, request.stdin) {
            (true, _) => container.stdout.as_ref(),
            (false, true) => container.stdin.as_ref(),
            (false, false) => None,
        };
        if let Some(input) = input {
            let copy = input.try_clone().context("share", "input")?;
            // Pipes and terminals of the container's side are descriptions of their own.
            rustix::io::ioctl_fionbio(&copy, true).context("share", "input")?;
            fds.push(copy);
        }
        let mut client =
            Attached { id: request.attach_id.clone(), connection: to.connection, stdout: None, stderr: None, overrun: false };
        let wanted = [
            (request.stdout && container.stdout.is_some(), Stream::Stdout),
            (request.stderr && container.stderr.is_some() && !container.terminal, Stream::Stderr),
        ];
        for (_, stream) in wanted.into_iter().filter(|(wanted, _)| *wanted) {
            let (theirs, ours) = channel()?;
            fds.push(theirs);
            *client.stream(stream) = Some(ours);
        }
        let reply = AttachReply { terminal: container.terminal, stdin: input.is_some(), stdin_once: container.stdin_once };
        container.attached.push(client);
        self.reply(to, Body::AttachReply(reply), fds);
        Ok(())
    }

    pub(super) fn detach(&mut self, to: Reply, request: &DetachRequest) -> Result<(), StepError> {
        let container = self.container_key(&request.container_id).and_then(|key| self.containers.get_mut(&key));
        let mut overrun = false;
        if let Some(container) = container {
            container.attached.retain(|client| {
                let found = client.id == request.attach_id;
                overrun |= found && client.overrun;
                !found
            });
        }
        self.reply(to, Body::DetachReply(DetachReply { overrun }), Vec::new());
        Ok(())
    }

    /// Forgets the clients of a daemon that is gone.
    pub(super) fn detach_all_of(&mut self, connection: u64) {
        for container in self.containers.values_mut() {
            container.attached.retain(|client| client.connection != connection);
        }
    }

    pub(super) fn close_stdin(&mut self, to: Reply, id: &str) -> Result<(), StepError> {
        if let Some(container) = self.container_key(id).and_then(|key| self.containers.get_mut(&key)) {
            container.stdin = None;
        }
        self.done(to);
        Ok(())
    }

    pub(super) fn sockets(&mut self, to: Reply) -> Result<(), StepError> {
        let pod =
            self.pod.as_ref().ok_or_else(|| StepError::because(Kind::WrongState, "open socket", "", "there is no pod yet"))?;
        let fds = pod.tcp_sockets()?;
        self.reply(to, Body::SocketsReply(SocketsReply {}), fds);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> (Attached, OwnedFd) {
        let (theirs, ours) = channel().unwrap();
        (Attached { id: "a".into(), connection: 1, stdout: Some(ours), stderr: None, overrun: false }, theirs)
    }

    #[test]
    fn who_does_not_read_is_given_up_and_the_others_get_all() {
        let (slow, _unread) = client();
        let (fast, reader) = client();
        let mut clients = [slow, fast];
        let bytes = vec![7u8; 64 << 10];
        let mut buffer = vec![0u8; 64 << 10];
        for _ in 0..64 {
            tee(&mut clients, Stream::Stdout, &bytes);
            let mut read = 0;
            while read < bytes.len() {
                read += rustix::io::read(&reader, &mut buffer).unwrap();
            }
        }
        assert!(clients[0].overrun && clients[0].stdout.is_none());
        assert!(!clients[1].overrun && clients[1].stdout.is_some());
    }

    #[test]
    fn a_reader_that_has_gone_is_seen() {
        let (there, reader) = client();
        assert!(!there.abandoned());
        drop(reader);
        assert!(there.abandoned());
    }
}
