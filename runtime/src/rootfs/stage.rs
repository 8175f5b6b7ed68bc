//! The root of a container for CRIU, which mounts by itself and wants to know from where.

use super::target::{Made, open_or_make};
use super::{Ground, Root, Sources, attach, open_path};
use crate::bundle::RootfsPlan;
use crate::process::{Context, PodNamespaces, StepError};
use crate::sys::mount_attr::{MountAttr, mount_setattr};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::mount::{OpenTreeFlags, open_tree};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Where things are, in the caller's mount namespace.
#[derive(Debug)]
pub(crate) struct Staged {
    /// The root alone.
    pub(crate) root: PathBuf,
    /// The root with all that the container has mounted.
    whole: PathBuf,
}

impl Staged {
    /// Where the mount is from which `mount` of the container is made.
    pub(crate) fn at(&self, mount: &str) -> PathBuf {
        self.whole.join(mount.trim_start_matches('/'))
    }
}

/// Enters a mount namespace of the caller's own, which nothing leaves, and a cgroup namespace if the container has one; mounts there the root
/// at `rootfs` of the bundle, and at `mounts` the root as the container's own program would find it.
pub(crate) fn stage(bundle: &Path, spec: &Spec, plan: &RootfsPlan, pod: &PodNamespaces<'_>) -> Result<Staged, StepError> {
    let ground = Ground { bundle, spec, plan: Some(plan), shm: pod.shm, user: None, layers: pod.layers };
    let sources = Sources::open(&ground)?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let alone = open_tree(&sources.root, "", clone).context("mount root", "")?;
    let staged = Staged { root: bundle.join("rootfs"), whole: bundle.join("mounts") };
    for place in [&staged.root, &staged.whole] {
        std::fs::create_dir_all(place).context("create", place.display())?;
    }
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    let own_cgroup = namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup);
    let cgroup = if own_cgroup { CloneFlags::CLONE_NEWCGROUP } else { CloneFlags::empty() };
    unshare(CloneFlags::CLONE_NEWNS | cgroup).context("make namespaces", "Mount, Cgroup")?;
    let root = Root::attach(open_path(&staged.whole)?.as_fd(), spec, Some(plan), sources.root)?;
    root.mount_all(spec, sources.mounts)?;
    root.populate_dev(spec, false)?;
    if spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false) {
        // CRIU binds the terminal there.
        open_or_make(root.as_fd(), Path::new("/dev/console"), Made::File)?;
    }
    root.restrict(spec)?;
    attach(alone.as_fd(), open_path(&staged.root)?.as_fd()).context("mount on", staged.root.display())?;
    if root.readonly {
        let read_only = MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() };
        mount_setattr(alone.as_fd(), false, &read_only).context("make read-only", staged.root.display())?;
    }
    Ok(staged)
}
