//! EROFS layers as directories: one mount for each layer, so that everybody who uses it shares its page cache. The mounts hang in a tree
//! of their own that belongs to no mount namespace (fsmount(2) on a tmpfs, Linux 6.15): nobody sees them, and they end with the last
//! descriptor of the tree's root. The daemon holds one, and so does each monitor, from which the next daemon gets it back.
//!
//! What containers read is cached as pages of the layer's files; the kernel reads it through the cache of the image's file, which then
//! has the same bytes once more. Those are let go of now and then (`layers`). The mount option `directio` would avoid them from the
//! begin, but then a container that starts behind its pull reads from the disk what is in memory, and 20,000 small files take three times as
//! long to read.

use super::erofs;
use super::error::ImageError;
use super::extract::Limits;
use rustix::fs::{AtFlags, Mode, OFlags, StatxAttributes, StatxFlags, mkdirat, openat, statx, unlinkat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, move_mount,
};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

const READ_ONLY: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_RDONLY.union(MountAttrFlags::MOUNT_ATTR_NODEV).union(MountAttrFlags::MOUNT_ATTR_NOSUID);

/// The tree; made when it is first used.
#[derive(Debug, Default)]
pub(super) struct Mounts {
    root: OnceLock<OwnedFd>,
    /// Held while something is mounted or taken away.
    changing: Mutex<()>,
}

impl Mounts {
    /// Takes over the tree of an earlier daemon; without effect where there is one already.
    pub(super) fn adopt(&self, root: OwnedFd) {
        let _ = self.root.set(root);
    }

    /// The tree's root, for those who shall keep it.
    pub(super) fn tree(&self) -> Result<&OwnedFd, ImageError> {
        if let Some(root) = self.root.get() {
            return Ok(root);
        }
        let _turn = self.turn();
        if self.root.get().is_none() {
            let made = make_root().map_err(|e| ImageError::io("make a tree for layers", e))?;
            let _ = self.root.set(made);
        }
        self.root.get().ok_or_else(|| ImageError::Io("make a tree for layers: lost".into()))
    }

    /// The root directory of a layer whose image is the file `image`, mounted unless it is; `name` is its place in the tree.
    pub(super) fn open(&self, name: &str, image: &Path) -> Result<OwnedFd, ImageError> {
        let tree = self.tree()?;
        let failed = |e: Errno| ImageError::io(format!("mount layer {}", image.display()), e);
        if let Some(found) = mounted(tree, name).map_err(failed)? {
            return Ok(found);
        }
        let _turn = self.turn();
        if let Some(found) = mounted(tree, name).map_err(failed)? {
            return Ok(found);
        }
        let mount = mount(image).map_err(failed)?;
        match mkdirat(tree, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(failed(e)),
        }
        move_mount(mount, "", tree, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed)?;
        mounted(tree, name).and_then(|found| found.ok_or(Errno::NOENT)).map_err(failed)
    }

    /// Takes a layer out of the tree; who uses it keeps it. One that is not mounted is fine.
    pub(super) fn forget(&self, name: &str) {
        let Some(tree) = self.root.get() else { return };
        let _turn = self.turn();
        // A mount in a tree that is not the caller's ends with its mount point's directory (rmdir since Linux 3.18).
        match unlinkat(tree, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => tracing::warn!(layer = name, %error, "layer not unmounted"),
        }
    }

    /// The layers that are mounted.
    pub(super) fn names(&self) -> Vec<String> {
        let Some(tree) = self.root.get() else { return Vec::new() };
        let opened = openat(tree, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let entries = opened.and_then(rustix::fs::Dir::read_from).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        names.filter(|name| !name.starts_with('.')).collect()
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn make_root() -> Result<OwnedFd, Errno> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("source", "windlass-layers"), ("mode", "0700"), ("size", "1m")] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)
}

/// The layer's root, if a layer is mounted there.
fn mounted(tree: &OwnedFd, name: &str) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = match openat(tree, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        other => other?,
    };
    let seen = statx(&found, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    Ok(seen.stx_attributes.contains(StatxAttributes::MOUNT_ROOT).then_some(found))
}

/// A detached mount of the image in a file (Linux 6.12).
fn mount(image: &Path) -> Result<OwnedFd, Errno> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", image)?;
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, READ_ONLY)
}

/// Why images in `directory` cannot be mounted by this kernel; `Ok` if they can.
pub(super) fn probe(directory: &Path) -> Result<(), ImageError> {
    let path = directory.join("tmp-probe.erofs");
    let failed = |e: std::io::Error| ImageError::io(format!("try an EROFS image in {}", directory.display()), e);
    let tried = (|| {
        let file = File::create(&path).map_err(failed)?;
        let empty = [0u8; 1024];
        erofs::build(&empty[..], &file, Limits { bytes: 0, entries: 1 }, None)?;
        let mounts = Mounts::default();
        let root = mounts.open("probe", &path)?;
        rustix::fs::fstat(root.as_fd()).map_err(|e| failed(e.into()))
    })();
    let _ = std::fs::remove_file(&path);
    tried.map(drop)
}
