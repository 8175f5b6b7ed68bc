//! Standard streams of a child.

use super::{Context, Stdio, StepError};
use rustix::fs::{Gid, Mode, OFlags, Uid, fchown, fstat, makedev, open};
use rustix::io::{Errno, dup2, fcntl_dupfd_cloexec};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Puts the streams on 0, 1 and 2. With a terminal they are /dev/null until there is a root with a devpts. Before other
/// descriptors are closed.
pub(super) fn install(stdio: &Stdio) -> Result<(), StepError> {
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).context("open", "/dev/null")?;
    let (stdin, stdout, stderr) = match stdio {
        Stdio::Null | Stdio::Terminal => (null.as_fd(), null.as_fd(), null.as_fd()),
        Stdio::Fds { stdin, stdout, stderr } => (stdin.as_ref().unwrap_or(&null).as_fd(), stdout.as_fd(), stderr.as_fd()),
    };
    put([stdin, stdout, stderr]).context("set standard streams", "")
}

/// Puts a terminal on all three and makes it the controlling one.
pub(super) fn install_terminal(slave: BorrowedFd<'_>) -> Result<(), StepError> {
    crate::sys::terminal::make_controlling(slave).context("set controlling terminal", "")?;
    put([slave, slave, slave]).context("set standard streams", "")
}

fn put(streams: [BorrowedFd<'_>; 3]) -> Result<(), Errno> {
    // Copies above 2 first: one stream may sit where another has to go.
    let mut copies = Vec::with_capacity(3);
    for stream in streams {
        copies.push(fcntl_dupfd_cloexec(stream, 3)?);
    }
    let [stdin, stdout, stderr] = copies.as_slice() else { return Err(Errno::BADF) };
    let mut targets = crate::sys::descriptors::standard().map(ManuallyDrop::new);
    let [zero, one, two] = &mut targets;
    dup2_onto(stdin, zero)?;
    dup2_onto(stdout, one)?;
    dup2_onto(stderr, two)
}

fn dup2_onto(from: &OwnedFd, to: &mut OwnedFd) -> Result<(), Errno> {
    dup2(from, to)
}

/// Where a stream is the host's /dev/null, puts the container's in its place, after the root was changed: a checkpoint holds what is inside
/// alone. A root without one leaves the host's.
pub(super) fn own_null() -> Result<(), StepError> {
    let Ok(null) = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) else { return Ok(()) };
    let device = |fd: BorrowedFd<'_>| fstat(fd).map_or(0, |found| found.st_rdev);
    if device(null.as_fd()) != makedev(1, 3) {
        return Ok(());
    }
    let mut targets = crate::sys::descriptors::standard().map(ManuallyDrop::new);
    for target in targets.iter_mut().filter(|target| device(target.as_fd()) == makedev(1, 3)) {
        dup2_onto(&null, target).context("set standard streams", "/dev/null")?;
    }
    Ok(())
}

/// Gives pipes and terminals to the user, so that a program may open /dev/stdout or /proc/self/fd/1 again. Files that belong to
/// everybody (/dev/null) and file systems that refuse are passed over.
pub(super) fn give_to(uid: u32, gid: u32) -> Result<(), StepError> {
    for stream in crate::sys::descriptors::standard().map(ManuallyDrop::new) {
        let Ok(found) = fstat(stream.as_fd()) else { continue };
        if found.st_uid == uid || found.st_rdev == makedev(1, 3) {
            continue;
        }
        let group = if found.st_rdev == 0 { Some(Gid::from_raw(gid)) } else { None };
        match fchown(stream.as_fd(), Some(Uid::from_raw(uid)), group) {
            Ok(()) | Err(Errno::PERM | Errno::ROFS | Errno::INVAL) => {}
            Err(errno) => return Err(errno).context("give standard streams to", uid),
        }
    }
    Ok(())
}

/// Sets a terminal's first size, if the process names one. A refused size is no reason to fail.
pub(super) fn set_size(master: BorrowedFd<'_>, process: &oci_spec::runtime::Process) {
    if let Some(size) = process.console_size() {
        let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
        let size =
            rustix::termios::Winsize { ws_row: cells(size.height()), ws_col: cells(size.width()), ws_xpixel: 0, ws_ypixel: 0 };
        let _ = rustix::termios::tcsetwinsize(master, size);
    }
}
