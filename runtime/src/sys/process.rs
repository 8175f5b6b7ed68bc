//! _exit(2) and errno. exit(3) would run the handlers of the process that was forked.

use rustix::io::Errno;

/// Ends the process at once, without handlers or destructors.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit takes an integer and does not return; nothing of this process is used afterwards.
    unsafe { libc::_exit(code) }
}

/// The error of the last failed C call of this thread.
pub(super) fn last_errno() -> Errno {
    Errno::from_raw_os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}
