//! The root of a container for another OCI runtime, which wants paths in place of descriptors.

use super::overlay::{Look, compose, image_volume};
use super::{attach, open_path};
use crate::bundle::RootfsPlan;
use crate::cgroup;
use crate::process::{Context, PodNamespaces, StepError};
use crate::security::mount_label;
use crate::sys::mount_attr::{MountAttr, mount_setattr};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::Spec;
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Where runtimes look for the cgroup tree.
pub(crate) const CGROUP: &str = "/sys/fs/cgroup";

/// Enters a mount namespace of the caller's own, which nothing leaves, and mounts there: the overlay at `rootfs` and the image volumes at
/// their sources in the bundle, the pod's shared memory at `shm`, and on a hybrid host the cgroup v2 tree in place of the other ones.
pub(crate) fn expose(bundle: &Path, spec: &Spec, plan: &RootfsPlan, pod: &PodNamespaces<'_>) -> Result<(), StepError> {
    let look = Look { label: mount_label(spec), user: None, tree: pod.layers };
    let mut made: Vec<(OwnedFd, std::path::PathBuf)> = vec![(compose(plan, look)?, bundle.join("rootfs"))];
    for volume in &plan.image_volumes {
        made.push((image_volume(volume, look)?, volume.source.clone()));
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if let Some(shm) = pod.shm {
        let path = bundle.join("shm");
        std::fs::create_dir_all(&path).context("create", path.display())?;
        let clone = open_tree(shm, "", flags | OpenTreeFlags::AT_EMPTY_PATH).context("mount", "the pod's /dev/shm")?;
        made.push((clone, path));
    }
    let tree = cgroup::mount_point()?;
    if tree != Path::new(CGROUP) {
        made.push((open_tree(CWD, &tree, flags).context("mount", tree.display())?, CGROUP.into()));
    }
    unshare(CloneFlags::CLONE_NEWNS).context("make namespace", "Mount")?;
    // What the host mounts later still comes in, for volumes that ask for it.
    let slave = MountAttr { propagation: libc::MS_SLAVE, ..MountAttr::default() };
    mount_setattr(open_path(Path::new("/"))?.as_fd(), true, &slave).context("make slave", "/")?;
    for (mount, place) in made {
        attach(mount.as_fd(), open_path(&place)?.as_fd()).context("mount on", place.display())?;
    }
    Ok(())
}
