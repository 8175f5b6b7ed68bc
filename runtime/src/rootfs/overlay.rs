//! The root's first mount, an overlay of layers or a directory that is ready; and volumes made of layers.

use super::open_in_root;
use crate::bundle::{ImageVolume, RootfsPlan};
use crate::process::{Context, Kind, StepError};
use crate::security::mount_option;
use crate::sys::mount_attr::{MountAttr, mount_setattr};
use rustix::fs::{CWD, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount,
    fsopen, open_tree,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Composes the overlay as a detached mount. A single layer without an upper directory is mounted by itself, because overlayfs
/// wants two.
pub(super) fn compose(plan: &RootfsPlan, label: Option<&str>) -> Result<OwnedFd, StepError> {
    if let (None, [only]) = (&plan.upper, plan.lower.as_slice()) {
        return ready(only);
    }
    let mut options: Vec<(&str, Option<String>)> = vec![("source", Some("windlass".into()))];
    options.extend(plan.lower.iter().map(|lower| ("lowerdir+", Some(lower.display().to_string()))));
    if let (Some(upper), Some(work)) = (&plan.upper, &plan.work) {
        options.push(("upperdir", Some(upper.display().to_string())));
        options.push(("workdir", Some(work.display().to_string())));
        if plan.volatile {
            options.push(("volatile", None));
        }
    }
    options.extend(mount_option(label, "overlay"));
    file_system("overlay", &options, MountAttrFlags::empty())
}

/// A volume of layers as a detached mount that nobody can write through, of the whole image or of one path in it. The overlay has
/// no upper directory; a single layer is the layer's own directory, so it is made read-only as well.
pub(super) fn image_volume(volume: &ImageVolume, label: Option<&str>) -> Result<OwnedFd, StepError> {
    let read_only = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
    let plan = RootfsPlan { lower: volume.lower.clone(), ..RootfsPlan::default() };
    let whole = compose(&plan, label)?;
    let shown = match &volume.sub_path {
        None => whole,
        Some(path) => {
            let object = path.display();
            let found = open_in_root(whole.as_fd(), path, OFlags::PATH).context("find sub path", &object).map_err(|error| {
                let missing = [libc::ENOENT, libc::ENOTDIR, libc::ELOOP].contains(&error.errno);
                if missing { error.kind(Kind::Invalid) } else { error }
            })?;
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
            open_tree(found, "", flags).context("mount sub path", &object)?
        }
    };
    mount_setattr(shown.as_fd(), true, &read_only).context("make read-only", "")?;
    Ok(shown)
}

/// A clone of a directory with all that is mounted below, as a detached mount.
pub(super) fn ready(path: &Path) -> Result<OwnedFd, StepError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    open_tree(CWD, path, flags).context("mount root", path.display())
}

/// Makes a detached mount of a new file system. The kernel's own words about a refused option become the error's message.
pub(super) fn file_system(typ: &str, options: &[(&str, Option<String>)], attr: MountAttrFlags) -> Result<OwnedFd, StepError> {
    let step = format!("mount {typ}");
    let context = fsopen(typ, FsOpenFlags::FSOPEN_CLOEXEC).context(&step, "")?;
    for (key, value) in options {
        let set = match value {
            Some(value) => fsconfig_set_string(context.as_fd(), *key, value.as_str()),
            None => fsconfig_set_flag(context.as_fd(), *key),
        };
        let object = value.as_ref().map_or_else(|| (*key).to_owned(), |value| format!("{key}={value}"));
        set.map_err(|errno| explained(&step, &object, errno, context.as_fd()))?;
    }
    fsconfig_create(context.as_fd()).map_err(|errno| explained(&step, "", errno, context.as_fd()))?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attr).context(&step, "")
}

fn explained(step: &str, object: &str, errno: Errno, context: BorrowedFd<'_>) -> StepError {
    let mut error = StepError::errno(step, object, errno.raw_os_error());
    let mut text = [0u8; 512];
    if let Ok(count) = rustix::io::read(context, &mut text) {
        let words = String::from_utf8_lossy(text.get(..count).unwrap_or_default());
        error.message = words.trim().trim_start_matches("e ").into();
    }
    error
}
