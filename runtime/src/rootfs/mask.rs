//! Paths that a container must not read or write, and its read-only root.

use super::overlay::file_system;
use super::target::{is_directory, open_host};
use super::{Root, attach, open_in_root};
use crate::process::{Context, StepError};
use crate::sys::mount_attr::{MountAttr, mount_setattr};
use oci_spec::runtime::Spec;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

const CLONE: OpenTreeFlags =
    OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC).union(OpenTreeFlags::AT_EMPTY_PATH);
const READONLY: MountAttr = MountAttr { set: libc::MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, userns_fd: 0 };

impl Root {
    /// Step 6: `linux.maskedPaths`, `linux.readonlyPaths` and `root.readonly`. Paths that the kernel or image does not have are
    /// passed over.
    pub fn restrict(&self, spec: &Spec) -> Result<(), StepError> {
        let linux = spec.linux().as_ref();
        let mut covers = Covers::default();
        for path in linux.and_then(|linux| linux.masked_paths().as_ref()).into_iter().flatten() {
            if let Some(target) = self.existing(path, "mask")? {
                covers.mask(target.as_fd()).context("mask", path)?;
            }
        }
        for path in linux.and_then(|linux| linux.readonly_paths().as_ref()).into_iter().flatten() {
            if let Some(target) = self.existing(path, "make read-only")? {
                let clone = open_tree(&target, "", CLONE | OpenTreeFlags::AT_RECURSIVE).context("make read-only", path)?;
                mount_setattr(clone.as_fd(), false, &READONLY).context("make read-only", path)?;
                attach(clone.as_fd(), target.as_fd()).context("make read-only", path)?;
            }
        }
        if self.readonly {
            mount_setattr(self.as_fd(), false, &READONLY).context("make read-only", "/")?;
        }
        Ok(())
    }

    fn existing(&self, path: &str, step: &str) -> Result<Option<OwnedFd>, StepError> {
        match open_in_root(self.as_fd(), Path::new(path), OFlags::PATH) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(errno).context(step, path),
        }
    }
}

/// What is put over masked paths, made once and cloned: the host's /dev/null, and an empty read-only tmpfs.
#[derive(Default)]
struct Covers {
    file: Option<OwnedFd>,
    directory: Option<OwnedFd>,
}

impl Covers {
    fn mask(&mut self, target: BorrowedFd<'_>) -> std::io::Result<()> {
        if is_directory(target)? {
            // A clone of a mount that is attached, so that it works on kernels that cannot clone a detached one.
            let fresh = match &self.directory {
                Some(attached) => open_tree(attached, "", CLONE)?,
                None => {
                    let options = [("size", Some("4k".into())), ("mode", Some("0755".into())), ("nr_inodes", Some("2".into()))];
                    let attr = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
                    file_system("tmpfs", &options, attr).map_err(|error| std::io::Error::from_raw_os_error(error.errno))?
                }
            };
            attach(fresh.as_fd(), target)?;
            self.directory.get_or_insert(fresh);
            return Ok(());
        }
        if self.file.is_none() {
            self.file = Some(open_host(Path::new("/dev/null"), OFlags::PATH)?);
        }
        if let Some(null) = &self.file {
            attach(open_tree(null, "", CLONE)?.as_fd(), target)?;
        }
        Ok(())
    }
}
