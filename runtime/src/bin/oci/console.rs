//! Terminals and the foreground: the master of a container's terminal goes to a console socket, or is copied from and to the caller's
//! own streams; signals that the caller gets go to the container.

use crate::{Outcome, failed, invalid, reap};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use windlass_runtime::pty::read_master;

/// What a console socket is told beside the descriptor: a name for messages, as its servers expect.
const NAME: &[u8] = b"/dev/ptmx";

/// Reads of what is left when the process has ended.
const LAST_READS: usize = 64;

/// Signals that are passed on. The others end or stop the caller as always.
const PASSED: [Signal; 7] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH];

/// A console socket goes with a terminal, and a terminal whose command returns with a console socket.
pub(crate) fn check(terminal: bool, socket: Option<&Path>, keep: bool) -> Outcome<()> {
    match (terminal, socket) {
        (true, None) if !keep => Err(invalid("process.terminal", "a detached container's terminal needs --console-socket")),
        (false, Some(_)) => Err(invalid("--console-socket", "the process has no terminal")),
        _ => Ok(()),
    }
}

/// Hands the master over.
pub(crate) fn send(socket: &Path, master: BorrowedFd<'_>) -> Outcome<()> {
    let hand = || {
        let stream = UnixStream::connect(socket)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let masters = [master];
        ancillary.push(SendAncillaryMessage::ScmRights(&masters));
        rustix::net::sendmsg(&stream, &[IoSlice::new(NAME)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    };
    hand().map_err(|error| failed("send terminal to", socket, &error))
}

/// The signals that are passed on, held back from this process.
pub(crate) struct Signals(SignalFd);

impl Signals {
    /// Before the container is made: none may be lost.
    pub(crate) fn hold() -> Outcome<Signals> {
        let mut set = SigSet::empty();
        PASSED.into_iter().for_each(|signal| set.add(signal));
        let make = || {
            set.thread_block()?;
            SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        };
        make().map(Signals).map_err(|errno| failed("hold", Path::new("signals"), &errno.into()))
    }
}

/// The caller's terminal in raw mode; as it was when dropped.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Raw {
        let stdin = std::io::stdin();
        let Some(before) = isatty(&stdin).then(|| tcgetattr(&stdin).ok()).flatten() else { return Raw(None) };
        let mut raw = before.clone();
        raw.make_raw();
        let _ = tcsetattr(&stdin, OptionalActions::Now, &raw);
        Raw(Some(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Waits for the end of a process, passing on signals and, with its `master`, what is typed and printed. Returns its exit code.
pub(crate) fn foreground(pidfd: &OwnedFd, master: Option<OwnedFd>, signals: &Signals) -> Outcome<i32> {
    let raw = master.as_ref().map(|_| Raw::enter());
    if let Some(master) = &master {
        resize(master);
    }
    let stdin = std::io::stdin();
    let (mut input, mut output) = (master.is_some(), master.is_some());
    loop {
        // What has ended is not looked at any more: poll takes a closed end for ready.
        let fds = [
            Some(pidfd.as_fd()),
            Some(signals.0.as_fd()),
            master.as_ref().filter(|_| output).map(AsFd::as_fd),
            Some(stdin.as_fd()).filter(|_| input),
        ];
        let ready = ready(&fds)?;
        if ready[1] {
            pass_on(pidfd, master.as_ref(), &signals.0);
        }
        if let Some(master) = &master {
            if ready[0] {
                let _ = rustix::io::ioctl_fionbio(master, true);
                copy_output(master, LAST_READS);
            } else if ready[2] {
                output = copy_output(master, 1);
            }
            if ready[3] {
                input = copy_input(master);
            }
        }
        if ready[0] {
            drop(raw);
            return reap(pidfd);
        }
    }
}

/// Waits until one of `fds` has something, and says which.
fn ready(fds: &[Option<BorrowedFd<'_>>; 4]) -> Outcome<[bool; 4]> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    match poll(&mut polled, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(failed("wait for", Path::new("process"), &errno.into())),
    }
    let mut polled = polled.iter();
    Ok(fds.map(|fd| fd.is_some() && polled.next().is_some_and(|polled| !polled.revents().is_empty())))
}

fn pass_on(pidfd: &OwnedFd, master: Option<&OwnedFd>, signals: &SignalFd) {
    while let Ok(Some(told)) = signals.read_signal() {
        let signal = i32::try_from(told.ssi_signo).ok().and_then(rustix::process::Signal::from_named_raw);
        match (signal, master) {
            (Some(rustix::process::Signal::WINCH), Some(master)) => resize(master),
            // One that has ended needs none.
            (Some(signal), _) => drop(rustix::process::pidfd_send_signal(pidfd, signal)),
            (None, _) => {}
        }
    }
}

/// The container's terminal has the size of the caller's.
fn resize(master: &OwnedFd) {
    if let Ok(size) = tcgetwinsize(std::io::stdin()) {
        let _ = tcsetwinsize(master, size);
    }
}

/// What the terminal's programs printed, at most `reads` times. False at its end.
fn copy_output(master: &OwnedFd, reads: usize) -> bool {
    let mut buffer = [0u8; 4096];
    for _ in 0..reads {
        match read_master(master, &mut buffer) {
            Ok(0) => return false,
            Ok(count) => write_all(std::io::stdout().as_fd(), buffer.get(..count).unwrap_or_default()),
            Err(errno) => return errno == Errno::INTR,
        }
    }
    true
}

/// False at the end of the caller's input.
fn copy_input(master: &OwnedFd) -> bool {
    let mut buffer = [0u8; 4096];
    match rustix::io::read(std::io::stdin(), &mut buffer) {
        Ok(0) => {
            // The terminal's own end of file.
            write_all(master.as_fd(), &[4]);
            false
        }
        Ok(count) => {
            write_all(master.as_fd(), buffer.get(..count).unwrap_or_default());
            true
        }
        Err(errno) => errno == Errno::INTR || errno == Errno::AGAIN,
    }
}

fn write_all(fd: BorrowedFd<'_>, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // Whoever reads has gone.
            Err(_) => return,
        }
    }
}
