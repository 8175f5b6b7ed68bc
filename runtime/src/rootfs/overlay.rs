//! The root's first mount, an overlay of layers or a directory that is ready; and volumes made of layers.

use super::{layer, open_in_root};
use crate::bundle::{ImageVolume, RootfsPlan};
use crate::namespace::User;
use crate::process::{Context, Kind, StepError};
use crate::security::mount_option;
use crate::sys::mount_attr::{MountAttr, mount_setattr};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, open_tree,
};
use std::collections::{HashMap, hash_map::Entry};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// How layers are shown.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Look<'a> {
    /// SELinux label of the mount.
    pub(super) label: Option<&'a str>,
    /// Whose mappings they are seen through.
    pub(super) user: Option<&'a User>,
    /// A tree with layers that are mounted already.
    pub(super) tree: Option<BorrowedFd<'a>>,
}

/// Composes the overlay as a detached mount. A single layer without an upper directory is mounted by itself, because overlayfs
/// wants two. With a user namespace, layers are seen through its mappings; what is changed lies in `upper` with the host's ids, because
/// overlayfs' own work there is done by the host's root.
pub(super) fn compose(plan: &RootfsPlan, look: Look<'_>) -> Result<OwnedFd, StepError> {
    let Look { label, user, .. } = look;
    if let (None, [only]) = (&plan.upper, plan.lower.as_slice()) {
        return match user {
            _ if layer::is_image(only) => layer::image(only, look),
            Some(user) => mapped(only, user),
            None => ready(only),
        };
    }
    let mut options: Vec<(&str, Value)> = vec![("source", Value::Text("windlass".into()))];
    let text = |path: &Path| Value::Text(path.display().to_string());
    // Held until the overlay has clones of its own: a detached mount ends with its descriptor.
    let mut stores = HashMap::new();
    for lower in &plan.lower {
        let value = match user {
            _ if layer::is_image(lower) => Value::Fd(layer::image(lower, look)?),
            Some(user) => Value::Fd(mapped_layer(lower, user, &mut stores)?),
            None => text(lower),
        };
        options.push(("lowerdir+", value));
    }
    if let (Some(upper), Some(work)) = (&plan.upper, &plan.work) {
        if let Some(user) = user {
            let (uid, gid) = (user.host_uid(0)?, user.host_gid(0)?);
            std::os::unix::fs::chown(upper, Some(uid), Some(gid)).context("give to the container's root", upper.display())?;
        }
        options.push(("upperdir", text(upper)));
        options.push(("workdir", text(work)));
        if plan.volatile {
            options.push(("volatile", Value::Flag));
        }
    }
    options.extend(mount_option(label, "overlay").map(|(key, value)| (key, value.map_or(Value::Flag, Value::Text))));
    make("overlay", &options, MountAttrFlags::empty())
}

/// Layers of one store lie side by side: one mapped clone of their directory, kept in `stores`, serves all.
fn mapped_layer<'p>(layer: &'p Path, user: &User, stores: &mut HashMap<&'p Path, OwnedFd>) -> Result<OwnedFd, StepError> {
    let (Some(directory), Some(name)) = (layer.parent(), layer.file_name()) else {
        return Err(StepError::because(Kind::Invalid, "mount layer", layer.display(), "must name a directory below another"));
    };
    let store = match stores.entry(directory) {
        Entry::Occupied(there) => there.into_mut(),
        Entry::Vacant(place) => place.insert(mapped(directory, user)?),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(store, name, flags, Mode::empty()).context("open layer", layer.display())
}

/// A clone of a directory, seen through the mappings.
fn mapped(path: &Path, user: &User) -> Result<OwnedFd, StepError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = open_tree(CWD, path, flags).context("clone", path.display())?;
    user.map_mount(clone.as_fd(), false).map_err(|mut error| {
        error.object = path.display().to_string();
        error
    })?;
    Ok(clone)
}

/// A volume of layers as a detached mount that nobody can write through, of the whole image or of one path in it. The overlay has
/// no upper directory; a single layer is the layer's own directory, so it is made read-only as well.
pub(super) fn image_volume(volume: &ImageVolume, look: Look<'_>) -> Result<OwnedFd, StepError> {
    let read_only = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
    let plan = RootfsPlan { lower: volume.lower.clone(), ..RootfsPlan::default() };
    let whole = compose(&plan, look)?;
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

/// What an option of a file system has behind its name.
pub(super) enum Value {
    Flag,
    Text(String),
    Fd(OwnedFd),
}

/// [`make`] with texts alone.
pub(super) fn file_system(typ: &str, options: &[(&str, Option<String>)], attr: MountAttrFlags) -> Result<OwnedFd, StepError> {
    let value = |text: &Option<String>| text.clone().map_or(Value::Flag, Value::Text);
    make(typ, &options.iter().map(|(key, text)| (*key, value(text))).collect::<Vec<_>>(), attr)
}

/// Makes a detached mount of a new file system. The kernel's own words about a refused option become the error's message.
pub(super) fn make(typ: &str, options: &[(&str, Value)], attr: MountAttrFlags) -> Result<OwnedFd, StepError> {
    let step = format!("mount {typ}");
    let context = fsopen(typ, FsOpenFlags::FSOPEN_CLOEXEC).context(&step, "")?;
    for (key, value) in options {
        let set = match value {
            Value::Text(text) => fsconfig_set_string(context.as_fd(), *key, text.as_str()),
            Value::Fd(fd) => fsconfig_set_fd(context.as_fd(), *key, fd),
            Value::Flag => fsconfig_set_flag(context.as_fd(), *key),
        };
        let object = if let Value::Text(text) = value { format!("{key}={text}") } else { (*key).to_owned() };
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
