//! The root file system of a container, built by the child in its own mount namespace. Everything below the root is reached by
//! descriptors and `openat2` that cannot leave it, so a hostile image never makes us touch the host.
//!
//! 1. [`Sources::open`], still in the host's mount namespace and with its rights: composes the overlay and clones every bind source,
//!    all detached. A clone keeps its peer group, which is what lets a Bidirectional volume's mounts reach the host. For a container in
//!    a user namespace ids are mapped here, and a /dev with its nodes is made, for inside nobody may.
//! 2. (the caller makes the mount namespace, and enters the user namespace)
//! 3. [`Root::attach`]: makes every mount of the copy private, attaches the overlay over the bundle's directory,
//!    which exists anyway: nothing is made on the host to mount on.
//! 4. [`Root::mount_all`]: the mounts of `config.json`, in order.
//! 5. [`Root::populate_dev`]: nodes and links.
//! 6. [`Root::restrict`]: masked, read-only, root read-only. After everything that must write below the root.
//! 7. [`Root::pivot`].

mod dev;
mod expose;
mod layer;
mod mask;
mod mounts;
mod options;
mod overlay;
mod stage;
mod target;

pub(crate) use dev::open_pty;
pub(crate) use expose::{CGROUP, expose};
pub use mounts::{Ground, Sources};
pub use options::{ATTRIBUTES as MOUNT_ATTRIBUTES, NAMES as MOUNT_OPTIONS};
pub(crate) use stage::{Staged, stage};
pub use target::{Made, open_in_root};

use crate::bundle::RootfsPlan;
use crate::process::{Context, Kind, StepError};
use crate::sys::mount_attr::{MountAttr, mount_setattr};
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags, open};
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A root that is mounted in the calling process's private mount namespace.
#[derive(Debug)]
pub struct Root {
    mount: OwnedFd,
    readonly: bool,
}

impl Root {
    /// Step 3. The calling process must have a mount namespace of its own; `place` is a directory of it.
    pub fn attach(place: BorrowedFd<'_>, spec: &Spec, plan: Option<&RootfsPlan>, mount: OwnedFd) -> Result<Root, StepError> {
        let private = MountAttr { propagation: libc::MS_PRIVATE, ..MountAttr::default() };
        let host = open_path(Path::new("/"))?;
        mount_setattr(host.as_fd(), true, &private).context("make private", "/")?;
        let wanted = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        attach(mount.as_fd(), place).context("attach root", "")?;
        mount_setattr(mount.as_fd(), true, &private).context("make private", "root")?;
        let readonly = wanted || plan.is_some_and(|plan| plan.readonly || plan.upper.is_none());
        Ok(Root { mount, readonly })
    }

    /// The root directory.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }

    /// Step 7: makes it `/` of the mount namespace and of the calling process; the host's tree is gone from view.
    pub fn pivot(&self, spec: &Spec) -> Result<(), StepError> {
        rustix::process::fchdir(&self.mount).context("change root", "")?;
        rustix::process::pivot_root(".", ".").context("change root", "")?;
        unmount(".", UnmountFlags::DETACH).context("detach the host's tree", "")?;
        rustix::process::chdir("/").context("change root", "")?;
        // Of the root mount alone: each volume has its own propagation, which a recursive change would undo.
        let wanted = spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_deref());
        let propagation = match wanted {
            None | Some("" | "private" | "rprivate" | "slave" | "rslave") => return Ok(()),
            Some("shared" | "rshared") => libc::MS_SHARED,
            Some("unbindable" | "runbindable") => libc::MS_UNBINDABLE,
            Some(other) => {
                return Err(StepError::because(Kind::Invalid, "set propagation of the root", other, "not a propagation"));
            }
        };
        let attr = MountAttr { propagation, ..MountAttr::default() };
        mount_setattr(self.mount.as_fd(), false, &attr).context("set propagation of the root", "")
    }
}

/// Attaches a detached mount on a file or directory.
fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), rustix::io::Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}

/// Opens a path of the host for use as a place.
pub(crate) fn open_path(path: &Path) -> Result<OwnedFd, StepError> {
    open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).context("open", path.display())
}
