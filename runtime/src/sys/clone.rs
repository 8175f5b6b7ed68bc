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
    let mut pidfd: libc::c_int = -1;
    let mut flags = libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP;
    if new_pid_namespace {
        flags |= libc::CLONE_NEWPID as u64;
    }
    // SAFETY: every field of clone_args is an integer, for which zero means "not used".
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags;
    arguments.pidfd = &raw mut pidfd as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = cgroup.as_raw_fd() as u64;
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
