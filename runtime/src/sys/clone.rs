//! clone3(2), Linux 5.3; CLONE_INTO_CGROUP since 5.7.
//! Errnos to expect: EBUSY (the cgroup has controllers enabled for children), EOPNOTSUPP (a threaded or invalid cgroup),
//! EAGAIN (pids.max or RLIMIT_NPROC), ENOSPC (too many nested pid namespaces), ENOMEM (the pid namespace's init has gone).

use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// From linux/sched.h; the libc crate's constant is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of the clone the caller is on.
#[derive(Debug)]
pub enum Forked {
    /// The new process, with a copy of everything.
    Child,
    /// The caller: the child's pid in its pid namespace, and a close-on-exec pidfd.
    Parent {
        /// Process id.
        pid: i32,
        /// Refers to it until reaped.
        pidfd: OwnedFd,
    },
}

/// Forks into `cgroup`, with a new pid namespace if asked. The end is told by SIGCHLD.
///
/// # Safety
/// The calling process must have a single thread: the child goes on with a copy of its memory, where a lock that another
/// thread held would stay locked for ever.
pub unsafe fn fork_into(cgroup: BorrowedFd<'_>, new_pid_namespace: bool) -> Result<Forked, Errno> {
    let new = if new_pid_namespace { libc::CLONE_NEWPID as u64 } else { 0 };
    // SAFETY: the caller vouches for the single thread.
    unsafe { clone(new | CLONE_INTO_CGROUP, cgroup.as_raw_fd(), libc::SIGCHLD) }
}

/// Forks without a change of anything.
///
/// # Safety
/// As for [`fork_into`].
pub unsafe fn fork() -> Result<Forked, Errno> {
    // SAFETY: the caller vouches for the single thread.
    unsafe { clone(0, 0, libc::SIGCHLD) }
}

/// Forks the first process of a new pid namespace as a child of the caller's own parent, which reaps it.
///
/// # Safety
/// As for [`fork_into`].
pub unsafe fn fork_first_sibling() -> Result<Forked, Errno> {
    // The signal at its end is the caller's own, CLONE_PARENT allows no other.
    // SAFETY: the caller vouches for the single thread.
    unsafe { clone(libc::CLONE_NEWPID as u64 | libc::CLONE_PARENT as u64, 0, 0) }
}

/// # Safety
/// As for [`fork_into`].
unsafe fn clone(flags: u64, cgroup: libc::c_int, signal: libc::c_int) -> Result<Forked, Errno> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: every field of clone_args is an integer, for which zero means "not used".
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags | libc::CLONE_PIDFD as u64;
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = signal as u64;
    arguments.cgroup = cgroup as u64;
    // SAFETY: without CLONE_VM the child gets a copy of this stack and memory, as from fork; `arguments` and `pidfd` live
    // until the call returns. The caller vouches for the single thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    match pid {
        0 => Ok(Forked::Child),
        pid if pid > 0 => {
            // SAFETY: the kernel has just stored a new descriptor there that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Forked::Parent { pid: pid as i32, pidfd })
        }
        _ => Err(super::process::last_errno()),
    }
}
