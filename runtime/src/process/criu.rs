//! A conversation with CRIU: the program runs as `criu swrk`, a child of the caller, and takes one request over a socket. Everything that
//! it does goes by that program; here is how it is asked, and what its failures say.

use super::{Context, Kind, StepError};
use prost::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketFlags, SocketType, recvmsg, socketpair,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use windlass_proto::criu::{Notify, Request, Response, Type};

/// Longest answer.
const ANSWER_LIMIT_BYTES: usize = 64 * 1024;

/// How long CRIU may take to put back what it touched, and to end.
const END_LIMIT: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

/// Of a log, as much as is searched for errors, and how many of them are told: the first ones, the others follow from them.
const LOG_LIMIT_BYTES: u64 = 4 << 20;
const ERRORS_MAX: usize = 3;

/// Where CRIU finds the programs that it runs (tar for a file system of its own).
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Name of CRIU's image directory in a checkpoint.
pub(super) const IMAGES: &str = "checkpoint";

/// What CRIU calls the pod's network namespace, as runc does.
pub(super) const NETWORK_KEY: &str = "extRootNetNS";

/// CRIU, ready for one request.
#[derive(Debug)]
pub(super) struct Criu {
    child: Child,
    socket: OwnedFd,
}

impl Criu {
    /// Starts it. It gets `inherited` under the same numbers.
    pub(super) fn start(program: &Path, inherited: &[BorrowedFd<'_>]) -> Result<Criu, StepError> {
        let (socket, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .context("make socket of", program.display())?;
        for fd in inherited.iter().copied().chain([other.as_fd()]) {
            fcntl_setfd(fd, FdFlags::empty()).context("pass descriptors to", program.display())?;
        }
        let mut command = Command::new(program);
        command.args(["swrk", &other.as_raw_fd().to_string()]).current_dir("/").env_clear().env("PATH", PATH);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Criu { child: spawned.context("run", program.display())?, socket })
    }

    /// Makes the request and hears it out; `notified` answers each notification. With `until` readable nobody wants it any more. On every
    /// failure CRIU puts back what it touched, and has ended when this returns.
    pub(super) fn ask(
        mut self,
        request: &Request,
        until: Option<BorrowedFd<'_>>,
        mut notified: impl FnMut(&Notify, Option<OwnedFd>) -> Result<(), StepError>,
    ) -> Result<(), Answer> {
        let outcome = self.converse(request, until, &mut notified);
        // Without its socket it fails at the next notification and undoes what it did.
        drop(self.socket);
        end(&mut self.child);
        outcome
    }

    fn converse(
        &self,
        request: &Request,
        until: Option<BorrowedFd<'_>>,
        notified: &mut impl FnMut(&Notify, Option<OwnedFd>) -> Result<(), StepError>,
    ) -> Result<(), Answer> {
        self.send(request)?;
        loop {
            if let Some(until) = until {
                let mut ready = [PollFd::new(&self.socket, PollFlags::IN), PollFd::from_borrowed_fd(until, PollFlags::IN)];
                match poll(&mut ready, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(Answer::Own(StepError::errno("wait for", "criu", errno.raw_os_error()))),
                }
                if !ready[1].revents().is_empty() {
                    return Err(Answer::Own(StepError::because(Kind::WrongState, "checkpoint", "", "it was given up")));
                }
                if ready[0].revents().is_empty() {
                    continue;
                }
            }
            let (answer, fd) = self.receive()?;
            if let Some(notify) = &answer.notify {
                notified(notify, fd).map_err(Answer::Own)?;
                self.send(&Request { r#type: Type::Notify.into(), opts: None, notify_success: Some(true) })?;
            } else if answer.success {
                return Ok(());
            } else {
                return Err(Answer::Criu(answer.cr_errmsg.unwrap_or_default()));
            }
        }
    }

    fn send(&self, request: &Request) -> Result<(), Answer> {
        let bytes = request.encode_to_vec();
        let sent = rustix::net::send(&self.socket, &bytes, SendFlags::NOSIGNAL).context("ask", "criu");
        sent.map(drop).map_err(Answer::Own)
    }

    fn receive(&self) -> Result<(Response, Option<OwnedFd>), Answer> {
        let mut bytes = vec![0; ANSWER_LIMIT_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                Ok(received) => break received.bytes,
                Err(Errno::CONNRESET) => break 0,
                Err(errno) => return Err(Answer::Own(StepError::errno("hear", "criu", errno.raw_os_error()))),
            }
        };
        if received == 0 {
            return Err(Answer::Criu("it ended without an answer".into()));
        }
        let fd = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let answer = Response::decode(bytes.get(..received).unwrap_or_default());
        let answer = answer.map_err(|error| Answer::Own(StepError::because(Kind::Internal, "hear", "criu", error)))?;
        Ok((answer, fd))
    }
}

/// Why CRIU did not do it.
#[derive(Debug)]
pub(super) enum Answer {
    /// The conversation failed, or was ended here.
    Own(StepError),
    /// CRIU says so: its first error, which may be one that it passed over.
    Criu(String),
}

impl Answer {
    /// As a failure of `step`. What CRIU said is in `log`.
    pub(super) fn explain(self, step: &str, object: &str, log: &Path) -> StepError {
        match self {
            Answer::Own(error) => error,
            Answer::Criu(first) => {
                let said = errors(log);
                StepError::because(
                    Kind::Internal,
                    step,
                    object,
                    format_args!("criu: {}", if said.is_empty() { first } else { said }),
                )
            }
        }
    }
}

/// Waits for the end, and kills what does not come to one.
fn end(child: &mut Child) {
    if let Ok(pidfd) = pidfd_open(Pid::from_child(child), PidfdFlags::empty())
        && !matches!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&END_LIMIT)), Ok(1))
    {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
    }
    let _ = child.wait();
}

/// The first errors of a log, without times and places of CRIU's source.
fn errors(log: &Path) -> String {
    let mut text = Vec::new();
    if let Ok(file) = File::open(log) {
        let _ = file.take(LOG_LIMIT_BYTES).read_to_end(&mut text);
    }
    let text = String::from_utf8_lossy(&text);
    text.lines().filter_map(told).take(ERRORS_MAX).collect::<Vec<_>>().join("; ")
}

/// `(00.213734) Error (criu/files-reg.c:1790): Can't lookup` has `Can't lookup` to tell.
fn told(line: &str) -> Option<&str> {
    let (_, rest) = line.split_once(" Error (")?;
    let (_, message) = rest.split_once("): ")?;
    // The last two are of what it tries, and does without.
    let empty = ["Dumping FAILED", "Restoring FAILED", "rlimit: Can't setup RLIMIT_NOFILE", "tun: Unable to create tun"];
    Some(message.trim()).filter(|message| !empty.iter().any(|start| message.starts_with(start)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_told_without_what_only_criu_understands() {
        let directory = tempfile::tempdir().expect("directory");
        let log = directory.path().join("log");
        let text = "(00.07) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n\
                    (00.21) Warn  (criu/x.c:1): passed over\n\
                    (00.21) Error (criu/files-reg.c:1790): Can't lookup mount=24 for fd=0 path=/dev/null\n\
                    (00.31) Error (criu/cr-dump.c:2111): Dumping FAILED.\n";
        std::fs::write(&log, text).expect("written");
        let error = Answer::Criu("rlimit".into()).explain("checkpoint", "c", &log);
        assert_eq!(error.message, "criu: Can't lookup mount=24 for fd=0 path=/dev/null");
        let error = Answer::Criu("first".into()).explain("checkpoint", "c", Path::new("/nonexistent"));
        assert_eq!(error.message, "criu: first");
    }

    #[test]
    fn a_program_that_is_no_criu_is_an_error() {
        let request = Request { r#type: Type::Dump.into(), opts: None, notify_success: None };
        let criu = Criu::start(Path::new("/bin/true"), &[]).expect("runs");
        assert!(criu.ask(&request, None, |_, _| Ok(())).is_err());
        assert_eq!(Criu::start(Path::new("/nonexistent"), &[]).expect_err("absent").errno, libc::ENOENT);
    }
}
