//! close_range(2), Linux 5.9; CLOSE_RANGE_CLOEXEC since 5.11. No errnos for valid ranges.

use super::process::last_errno;
use rustix::io::Errno;
use std::os::fd::RawFd;

/// Closes every descriptor but `keep` (numbers; need not be sorted).
///
/// # Safety
/// Nothing in this process may use or drop a descriptor outside `keep` afterwards. A forked child that never returns to the
/// code that owns them satisfies this.
pub unsafe fn close_all_but(keep: &[RawFd]) -> Result<(), Errno> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    keep.sort_unstable();
    let mut first = 0u32;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1, 0)?;
        }
        first = first.max(fd + 1);
    }
    close_range(first, u32::MAX, 0)
}

/// Makes every descriptor from `first` on close at exec.
pub fn close_on_exec_from(first: u32) -> Result<(), Errno> {
    close_range(first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, last: u32, flags: u32) -> Result<(), Errno> {
    // SAFETY: the call takes three integers and touches no memory; that the closed descriptors are not used any more is
    // promised by the caller of `close_all_but`, and the close-on-exec flag invalidates none.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// Descriptors 0, 1 and 2 as values for `dup2`, which wants the one it replaces. Never drop them.
pub fn standard() -> [std::os::fd::OwnedFd; 3] {
    use std::os::fd::FromRawFd;
    // SAFETY: the standard descriptors belong to the process as a whole, no `OwnedFd` of another owner closes them; the caller keeps
    // these values from being dropped (ManuallyDrop), so they close nothing either.
    [0, 1, 2].map(|fd| unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
}
