//! keyctl(2) with KEYCTL_JOIN_SESSION_KEYRING. Errnos: ENOSYS, EPERM (a seccomp profile), EDQUOT (the user's key quota).

use rustix::io::Errno;

/// Leaves the inherited session keyring for a new anonymous one.
pub fn new_session() -> Result<(), Errno> {
    const JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring; the kernel reads nothing through it.
    match unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<libc::c_char>()) } {
        -1 => Err(super::process::last_errno()),
        _ => Ok(()),
    }
}
