//! mount_setattr(2), Linux 5.12. Errnos to expect: EINVAL (propagation of something that is no mount), EPERM (a locked flag).

use super::process::last_errno;
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct mount_attr`: attributes to set, attributes to clear, and a propagation (MS_PRIVATE, MS_SLAVE, MS_SHARED or 0).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MountAttr {
    /// MOUNT_ATTR_* to set.
    pub set: u64,
    /// MOUNT_ATTR_* to clear.
    pub clear: u64,
    /// Propagation type to change to, 0 keeps it.
    pub propagation: u64,
    /// User namespace of an idmapped mount, with MOUNT_ATTR_IDMAP.
    pub userns_fd: u64,
}

/// Changes the mount that `mount` refers to, and with `recursive` all below it.
pub fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> Result<(), Errno> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    let size = size_of::<MountAttr>();
    // SAFETY: the empty path is a C string, `attr` points to `size` bytes of the kernel's layout, both live through the call.
    let done =
        unsafe { libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), c"".as_ptr(), flags, std::ptr::from_ref(attr), size) };
    match done {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}
