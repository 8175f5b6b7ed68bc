//! The mounts of `config.json`.

use super::dev;
use super::options::{Options, clear_with_atime, parse};
use super::overlay::{self, file_system, image_volume};
use super::target::{Made, is_directory, open_or_make};
use super::{Root, attach};
use crate::bundle::RootfsPlan;
use crate::cgroup;
use crate::namespace::User;
use crate::process::{Context, Kind, StepError};
use crate::security::{label_queues, mount_label, mount_option};
use crate::sys::mount_attr::{MountAttr, mount_setattr};
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// What a root is made from.
#[derive(Debug, Clone, Copy)]
pub struct Ground<'a> {
    /// Absolute directory of the bundle.
    pub bundle: &'a Path,
    /// Its `config.json`.
    pub spec: &'a Spec,
    /// Its `rootfs.json`.
    pub plan: Option<&'a RootfsPlan>,
    /// The pod's shared memory, a detached tmpfs.
    pub shm: Option<BorrowedFd<'a>>,
    /// The user namespace that the container will live in.
    pub user: Option<&'a User>,
    /// A tree with layers that are mounted already.
    pub layers: Option<BorrowedFd<'a>>,
}

impl<'a> Ground<'a> {
    fn look(&self) -> overlay::Look<'a> {
        overlay::Look { label: mount_label(self.spec), user: self.user, tree: self.layers }
    }
}

/// Detached mounts that are made or cloned while the host is in reach.
#[derive(Debug)]
pub struct Sources {
    pub(crate) root: OwnedFd,
    pub(crate) mounts: Prepared,
}

/// Every mount of `config.json` with its parsed options, and what was made of it already.
#[derive(Debug)]
pub(crate) struct Prepared(Vec<(Options, Option<OwnedFd>)>);

impl Sources {
    /// Composes the root and image volumes, clones the bind sources, and the pod's `shm` for a tmpfs on /dev/shm. In the host's mount
    /// namespace.
    pub fn open(ground: &Ground<'_>) -> Result<Sources, StepError> {
        let root = open_root(ground)?;
        let mut mounts = Vec::new();
        for mount in ground.spec.mounts().iter().flatten() {
            check(mount)?;
            let mut options = parse(mount.options().as_deref().unwrap_or_default())?;
            if mount.typ().as_deref() == Some("bind") {
                options.bind = Some(options.bind.unwrap_or(false));
            }
            let fd = match (ground.shm, options.bind) {
                (Some(shm), None) if mount.destination() == Path::new("/dev/shm") => {
                    options.bind = Some(false);
                    let clone = open_tree(shm, "", CLONE | OpenTreeFlags::AT_EMPTY_PATH);
                    Some(clone.context("mount", "the pod's /dev/shm")?)
                }
                (_, Some(recursive)) => Some(open_source(ground, mount, &options, recursive)?),
                (_, None) => prepare(ground, mount, &mut options)?,
            };
            mounts.push((options, fd));
        }
        Ok(Sources { root, mounts: Prepared(mounts) })
    }
}

fn open_root(ground: &Ground<'_>) -> Result<OwnedFd, StepError> {
    if let Some(plan) = ground.plan {
        return overlay::compose(plan, ground.look());
    }
    let path = ground.spec.root().as_ref().map(|root| root.path().clone());
    let path = path.ok_or_else(|| StepError::because(Kind::Invalid, "mount root", "", "config.json has no root"))?;
    overlay::ready(&ground.bundle.join(path))
}

/// File systems that are not made where the container is. Without a cgroup namespace of its own the host's cgroups are shown: a fresh mount of
/// them would reset `nsdelegate` and `memory_recursiveprot` of the one tree. And those that a user namespace may not make as they have to
/// be: /dev with device nodes, sysfs without a network namespace of its own, in whose place the host's is shown.
fn prepare(ground: &Ground<'_>, mount: &Mount, options: &mut Options) -> Result<Option<OwnedFd>, StepError> {
    let namespaces = ground.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    let own = |typ| namespaces.iter().any(|namespace| namespace.typ() == typ);
    let shown = match (mount.typ().as_deref().unwrap_or_default(), ground.user) {
        ("cgroup" | "cgroup2", _) if !own(LinuxNamespaceType::Cgroup) && options.data.is_empty() => cgroup::mount_point()?,
        ("tmpfs", Some(user)) if mount.destination() == Path::new("/dev") => {
            for (key, id) in [("uid", user.host_uid(0)?), ("gid", user.host_gid(0)?)] {
                options.data.push((key.into(), Some(id.to_string())));
            }
            let made = new_file_system(mount, options, mount_label(ground.spec))?;
            dev::make_nodes(made.as_fd(), ground.spec, user)?;
            return Ok(Some(made));
        }
        ("sysfs", Some(_)) if !own(LinuxNamespaceType::Network) => "/sys".into(),
        _ => return Ok(None),
    };
    options.bind = Some(false);
    open_tree(CWD, &shown, CLONE).context("mount", format_args!("the host's {}", shown.display())).map(Some)
}

fn check(mount: &Mount) -> Result<(), StepError> {
    let destination = mount.destination();
    let refuse = |kind, why| Err(StepError::because(kind, "mount", destination.display(), why));
    if !destination.is_absolute() || destination == Path::new("/") {
        return refuse(Kind::Invalid, "the destination must be absolute and below the root");
    }
    Ok(())
}

/// A bind source with its ids mapped, if it is asked for.
fn open_source(ground: &Ground<'_>, mount: &Mount, options: &Options, recursive: bool) -> Result<OwnedFd, StepError> {
    let source = clone_source(ground, mount, recursive)?;
    let (uids, gids) = (mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref());
    let listed = uids.is_some_and(|list| !list.is_empty()) || gids.is_some_and(|list| !list.is_empty());
    if listed || options.map_ids.is_some() {
        let all = options.map_ids.unwrap_or(false);
        User::map_mount_with(ground.user, source.as_fd(), (uids, gids), all).map_err(|mut error| {
            let path = mount.source().as_ref().map(|path| path.display().to_string()).unwrap_or_default();
            error.object = format!("{path} on {}", mount.destination().display());
            error
        })?;
    }
    Ok(source)
}

fn clone_source(ground: &Ground<'_>, mount: &Mount, recursive: bool) -> Result<OwnedFd, StepError> {
    let Ground { bundle, plan, .. } = *ground;
    let step = "mount";
    let destination = mount.destination().display();
    let Some(source) = mount.source() else {
        return Err(StepError::because(Kind::Invalid, step, destination, "a bind mount without a source"));
    };
    let source = bundle.join(source);
    if let Some(volume) = plan.and_then(|plan| plan.image_volumes.iter().find(|volume| volume.source == source)) {
        return image_volume(volume, ground.look()).map_err(|mut error| {
            error.object = format!("image volume on {destination}: {}", error.object);
            error
        });
    }
    let flags = if recursive { CLONE | OpenTreeFlags::AT_RECURSIVE } else { CLONE };
    let cloned = if plan.is_some_and(|plan| plan.sources_resolved) {
        open_resolved(&source).and_then(|fd| open_tree(fd, "", flags | OpenTreeFlags::AT_EMPTY_PATH))
    } else {
        open_tree(CWD, &source, flags)
    };
    cloned.context(step, format!("{} on {destination}", source.display())).map_err(|mut error| {
        if error.errno == libc::ELOOP {
            error.message = "a link has taken the place of a part of this path".into();
        }
        let missing = [libc::ENOENT, libc::ENOTDIR, libc::ELOOP].contains(&error.errno);
        if missing { error.kind(Kind::Invalid) } else { error }
    })
}

/// Opens a path that has no links. As a directory first: only that makes an automounter mount what belongs there.
fn open_resolved(path: &Path) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let open = |flags| openat2(CWD, path, OFlags::PATH | OFlags::CLOEXEC | flags, Mode::empty(), resolve);
    match open(OFlags::DIRECTORY) {
        Err(Errno::NOTDIR) => open(OFlags::empty()),
        other => other,
    }
}

impl Root {
    /// Step 4: attaches `sources` and makes the file systems of `config.json`, in its order.
    pub(crate) fn mount_all(&self, spec: &Spec, sources: Prepared) -> Result<(), StepError> {
        for (mount, (options, source)) in spec.mounts().iter().flatten().zip(sources.0) {
            let fd = match source {
                Some(fd) => fd,
                None => new_file_system(mount, &options, mount_label(spec))?,
            };
            self.place(mount, &options, fd.as_fd())?;
        }
        Ok(())
    }

    fn place(&self, mount: &Mount, options: &Options, fd: BorrowedFd<'_>) -> Result<(), StepError> {
        let object = mount.destination().display();
        let made = if is_directory(fd).context("mount", &object)? { Made::Directory } else { Made::File };
        if options.bind.is_some() {
            let own = MountAttr { set: options.set, clear: clear_with_atime(options.set, options.clear), ..MountAttr::default() };
            let all = MountAttr {
                set: options.set_all,
                clear: clear_with_atime(options.set_all, options.clear_all),
                ..MountAttr::default()
            };
            for (attr, recursive) in [(own, false), (all, true)] {
                if attr != MountAttr::default() {
                    mount_setattr(fd, recursive, &attr).context("set mount options of", &object)?;
                }
            }
        }
        let target = open_or_make(self.as_fd(), mount.destination(), made).map_err(unusable)?;
        if is_directory(target.as_fd()).context("mount", &object)? != (made == Made::Directory) {
            let why = if made == Made::Directory {
                "a directory cannot be mounted over a file"
            } else {
                "a file cannot be mounted over a directory"
            };
            return Err(StepError::because(Kind::Invalid, "mounts: mount on", &object, why));
        }
        attach(fd, target.as_fd()).context("mount", format!("on {object}"))?;
        // A volume is private unless asked: an unmount on the host must not take it from the container, nor the reverse.
        let (propagation, all) = match options.propagation {
            0 => (libc::MS_PRIVATE, true),
            given => (given, options.propagation_all),
        };
        let attr = MountAttr { propagation, ..MountAttr::default() };
        mount_setattr(fd, all, &attr).context("set propagation of", &object)
    }
}

/// A mount point that the root cannot have is the request's fault.
fn unusable(mut error: StepError) -> StepError {
    let faults =
        [libc::ENOTDIR, libc::ELOOP, libc::ENAMETOOLONG, libc::ENOENT, libc::EPERM, libc::EACCES, libc::EROFS, libc::EINVAL];
    if !faults.contains(&error.errno) {
        return error;
    }
    error.step = format!("mounts: {}", error.step);
    error.kind(Kind::Invalid)
}

fn new_file_system(mount: &Mount, options: &Options, label: Option<&str>) -> Result<OwnedFd, StepError> {
    let destination = mount.destination().display().to_string();
    let Some(typ) = mount.typ().as_deref().filter(|typ| !typ.is_empty()) else {
        return Err(StepError::because(Kind::Invalid, "mount", destination, "neither a type nor bind"));
    };
    // Version 1 trees are never shown: `cgroup` is an older word for the same wish.
    let typ = if typ == "cgroup" { "cgroup2" } else { typ };
    let source = mount.source().as_ref().map_or_else(|| typ.to_owned(), |source| source.display().to_string());
    let mut data = vec![("source", Some(source))];
    data.extend(options.data.iter().map(|(key, value)| (key.as_str(), value.clone())));
    if !options.data.iter().any(|(key, _)| key == "context") {
        data.extend(mount_option(label, typ));
    }
    let attr = MountAttrFlags::from_bits_retain((options.set | options.set_all) as u32);
    let made = file_system(typ, &data, attr).map_err(|mut error| {
        error.object = format!("on {destination} {}", error.object).trim_end().to_owned();
        error
    })?;
    label_queues(label, typ, made.as_fd())?;
    Ok(made)
}
