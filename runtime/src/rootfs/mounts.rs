//! The mounts of `config.json`.

use super::options::{Options, clear_with_atime, parse};
use super::overlay::{file_system, image_volume};
use super::target::{Made, is_directory, open_or_make};
use super::{Root, attach};
use crate::bundle::RootfsPlan;
use crate::process::{Context, Kind, StepError};
use crate::security::{mount_label, mount_option};
use crate::sys::mount_attr::{MountAttr, mount_setattr};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// Every mount of `config.json` with its parsed options, and clones of the bind sources.
#[derive(Debug)]
pub struct Sources {
    mounts: Vec<(Options, Option<OwnedFd>)>,
}

impl Sources {
    /// Clones the bind sources, composes image volumes, clones the pod's `shm` for a tmpfs on /dev/shm. In the host's mount
    /// namespace.
    pub fn open(
        bundle: &Path,
        spec: &Spec,
        plan: Option<&RootfsPlan>,
        shm: Option<BorrowedFd<'_>>,
    ) -> Result<Sources, StepError> {
        let mut mounts = Vec::new();
        for mount in spec.mounts().iter().flatten() {
            check(mount)?;
            let mut options = parse(mount.options().as_deref().unwrap_or_default())?;
            if mount.typ().as_deref() == Some("bind") {
                options.bind = Some(options.bind.unwrap_or(false));
            }
            let fd = match (shm, options.bind) {
                (Some(shm), None) if mount.destination() == Path::new("/dev/shm") => {
                    options.bind = Some(false);
                    let clone = open_tree(shm, "", CLONE | OpenTreeFlags::AT_EMPTY_PATH);
                    Some(clone.context("mount", "the pod's /dev/shm")?)
                }
                (_, Some(recursive)) => Some(open_source(bundle, (mount, mount_label(spec)), plan, recursive)?),
                (_, None) => None,
            };
            mounts.push((options, fd));
        }
        Ok(Sources { mounts })
    }
}

fn check(mount: &Mount) -> Result<(), StepError> {
    let destination = mount.destination();
    let refuse = |kind, why| Err(StepError::because(kind, "mount", destination.display(), why));
    if !destination.is_absolute() || destination == Path::new("/") {
        return refuse(Kind::Invalid, "the destination must be absolute and below the root");
    }
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        return refuse(Kind::Unsupported, "idmapped mounts are not built yet");
    }
    Ok(())
}

fn open_source(
    bundle: &Path,
    (mount, label): (&Mount, Option<&str>),
    plan: Option<&RootfsPlan>,
    recursive: bool,
) -> Result<OwnedFd, StepError> {
    let step = "mount";
    let destination = mount.destination().display();
    let Some(source) = mount.source() else {
        return Err(StepError::because(Kind::Invalid, step, destination, "a bind mount without a source"));
    };
    let source = bundle.join(source);
    if let Some(volume) = plan.and_then(|plan| plan.image_volumes.iter().find(|volume| volume.source == source)) {
        return image_volume(volume, label).map_err(|mut error| {
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
    pub fn mount_all(&self, spec: &Spec, sources: Sources) -> Result<(), StepError> {
        for (mount, (options, source)) in spec.mounts().iter().flatten().zip(sources.mounts) {
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
        let target = open_or_make(self.as_fd(), mount.destination(), made)?;
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
    file_system(typ, &data, attr).map_err(|mut error| {
        error.object = format!("on {destination} {}", error.object).trim_end().to_owned();
        error
    })
}
