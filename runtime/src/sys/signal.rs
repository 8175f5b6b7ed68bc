//! sigaction(2), sigprocmask(2) and pidfd_send_signal(2): a program starts with default dispositions and nothing blocked. SIG_IGN survives exec, and
//! Rust's runtime ignores SIGPIPE.

use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sends a signal by its number in the kernel, 1 to 64, real-time signals included (the C library's types leave out those it keeps for itself).
/// EINVAL for a number that is none, ESRCH for a process that has ended.
pub fn send(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    // SAFETY: the descriptor lives through the call; no siginfo and no flags are given.
    let sent =
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0) };
    if sent == 0 { Ok(()) } else { Err(super::process::last_errno()) }
}

/// Sets every signal to its default disposition and unblocks all.
pub fn reset_all() {
    // The kernel's own struct, all zero: SIG_DFL, no flags, no restorer, empty mask. 32 bytes on every 64-bit architecture, or fewer.
    let default = [0u64; 4];
    for signal in 1..=64 {
        // SAFETY: SIG_DFL installs no handler, so no code of ours can run in signal context; the struct lives through the call. The
        // raw call is used because the C library refuses 32 and 33, which may be inherited as ignored. The kernel refuses SIGKILL
        // and SIGSTOP with EINVAL, which changes nothing.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null::<u64>(), size_of::<u64>()) };
    }
    // SAFETY: the set is plain memory that sigemptyset initialises; the null pointer asks for no old set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}
