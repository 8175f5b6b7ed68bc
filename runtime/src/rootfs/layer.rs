//! Layers that are EROFS images: one file each. The pod's daemon keeps them mounted in a tree, so that all containers share one page
//! cache; a layer that is not there is mounted for this container alone.

use super::overlay::{Look, Value, make};
use crate::process::StepError;
use rustix::fs::fstatfs;
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// `EROFS_SUPER_MAGIC_V1`
const MAGIC: u64 = 0xe0f5_e1e2;

/// Whether the layer is an image and no directory.
pub(super) fn is_image(layer: &Path) -> bool {
    layer.extension().is_some_and(|extension| extension == "erofs")
}

/// A detached mount of the image, as it is to be shown.
pub(super) fn image(layer: &Path, look: Look<'_>) -> Result<OwnedFd, StepError> {
    let mount = match look.tree.and_then(|tree| from_tree(tree, layer)) {
        Some(mount) => mount,
        None => {
            let source = Value::Text(layer.display().to_string());
            let attributes =
                MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
            make("erofs", &[("source", source)], attributes)?
        }
    };
    if let Some(user) = look.user {
        user.map_mount(mount.as_fd(), false).map_err(|mut error| {
            error.object = layer.display().to_string();
            error
        })?;
    }
    Ok(mount)
}

/// A clone of the layer's mount in the tree. Its mount point alone would be an empty directory.
fn from_tree(tree: BorrowedFd<'_>, layer: &Path) -> Option<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let clone = open_tree(tree, layer.file_stem()?, flags).ok()?;
    let mounted = fstatfs(&clone).is_ok_and(|found| u64::try_from(found.f_type).is_ok_and(|magic| magic == MAGIC));
    mounted.then_some(clone)
}
