//! sigaction(2) and sigprocmask(2): a program starts with default dispositions and nothing blocked. SIG_IGN survives exec, and
//! Rust's runtime ignores SIGPIPE.

/// Sets every signal to its default disposition and unblocks all.
pub fn reset_all() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL installs no handler, so no code of ours can run in signal context. The C library refuses its own
        // reserved numbers, and the kernel SIGKILL and SIGSTOP, with EINVAL, which changes nothing.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: the set is plain memory that sigemptyset initialises; the null pointer asks for no old set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}
