//! Mounts: the kernel's own file systems, the pod's files, and the volumes of the request, parents before children.

use super::{Input, mapping, text};
use crate::container::{declared, image_volume};
use crate::error::{Error, Result};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use serde_json::{Value, json};
use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};
use windlass_proto::cri::{ContainerConfig, IdMapping, Mount, MountPropagation, NamespaceMode};

/// What `mount_options` of a volume may name.
const OPTIONS: [&str; 6] = ["noexec", "nodev", "nosuid", "noatime", "nodiratime", "nosymfollow"];

/// The pod's files that containers have in /etc.
pub(in crate::container) const POD_FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// Mounts in the order in which they are made.
pub(super) fn build(input: &Input) -> Result<Vec<Value>> {
    let mut mounts = kernel(input);
    let mut volumes = pod_files(input);
    for (index, mount) in input.config.mounts.iter().enumerate() {
        let made = if image_volume::is_image(mount) { image(input, index, mount) } else { volume(input, mount) };
        volumes.push((normal(&mount.container_path), made?));
    }
    // A volume over a directory comes before the ones inside it; equal paths keep the request's order.
    volumes.sort_by_key(|(path, _)| path.split('/').filter(|part| !part.is_empty()).count());
    mounts.retain(|mount| !volumes.iter().any(|(path, _)| mount["destination"] == path.as_str()));
    mounts.extend(declared_volumes(input));
    mounts.extend(volumes.into_iter().map(|(_, mount)| mount));
    Ok(mounts)
}

pub(in crate::container) fn normal(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    format!("/{}", parts.join("/"))
}

fn kernel(input: &Input) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let writable = if input.privileged() { "rw" } else { "ro" };
    let mut mounts = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", writable]),
        mount("/sys/fs/cgroup", "cgroup2", &["nosuid", "noexec", "nodev", "relatime", writable]),
    ];
    mounts.push(match input.namespaces().ipc() {
        NamespaceMode::Node => {
            json!({ "destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "rprivate"] })
        }
        _ => mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
    });
    mounts
}

/// hosts, hostname and resolv.conf of the pod, where the request mounts nothing of its own.
fn pod_files(input: &Input) -> Vec<(String, Value)> {
    let directory = input.node.pod_directory(&input.pod.id);
    let taken = |path: &str| input.config.mounts.iter().any(|mount| normal(&mount.container_path) == path);
    let mode = if input.security().readonly_rootfs { "ro" } else { "rw" };
    POD_FILES
        .into_iter()
        .map(|name| (format!("/etc/{name}"), directory.join(name)))
        .filter(|(path, _)| !taken(path))
        .map(|(path, source)| {
            let mount = own_bind(input, &path, &source, mode);
            (path, mount)
        })
        .collect()
}

/// Volumes that the image declares; before those of the request, which go over them.
fn declared_volumes(input: &Input) -> Vec<Value> {
    let sources = input.declared.iter().enumerate();
    sources.map(|(index, volume)| own_bind(input, &volume.target, &declared::source(&input.directory, index), "rw")).collect()
}

/// A mount of a place of ours, which has the ids that the container sees.
fn own_bind(input: &Input, target: &str, source: &Path, mode: &str) -> Value {
    let mut mount =
        json!({ "destination": target, "type": "bind", "source": text(source), "options": ["bind", "rprivate", mode] });
    // The same file system holds the layers, whose ids are mapped too.
    if let Ok(Some(users)) = input.users() {
        mount["uidMappings"] = mapping(&users.uids);
        mount["gidMappings"] = mapping(&users.gids);
    }
    mount
}

fn check_target(target: &str) -> Result<()> {
    if !target.starts_with('/') || normal(target) == "/" {
        return Err(Error::invalid(format!("config.mounts: container_path {target:?} is not absolute and below the root")));
    }
    Ok(())
}

fn volume(input: &Input, mount: &Mount) -> Result<Value> {
    let target = &mount.container_path;
    check_target(target)?;
    if !mount.image_sub_path.is_empty() {
        return Err(Error::invalid(format!("config.mounts: {target}: image_sub_path is set without image")));
    }
    let ids = id_mappings(input, mount)?;
    let named = format!("config.mounts: host_path {:?} of {target}", mount.host_path);
    let found = source(input, &named, &mount.host_path)?;
    let source = found.map_err(|error| Error::invalid(format!("{named}: {error}")))?;
    let mut options = vec!["rbind".to_owned()];
    options.push(propagation(input, mount)?.to_owned());
    options.push(read_only(mount)?.to_owned());
    options.extend(extra_options(mount)?);
    check_propagation(&source, mount)?;
    let mut made = json!({ "destination": target, "type": "bind", "source": text(&source), "options": options });
    if let Some((uids, gids)) = ids {
        made["uidMappings"] = mapping(&uids);
        made["gidMappings"] = mapping(&gids);
    }
    Ok(made)
}

/// Where a volume is. One that is not there becomes a directory, whatever the CRI says: kubelet leaves this to the runtime for a volume of
/// type hostPath without a `type`, containerd and CRI-O do it, and manifests (kind's of its network, for one) count on it.
fn source(input: &Input, named: &str, host_path: &str) -> Result<io::Result<PathBuf>> {
    let look = || input.looking.at(named, Path::new(host_path));
    look()?;
    match fs::canonicalize(host_path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && host_path.starts_with('/') => {
            // Nothing is made for a request that was given up.
            look()?;
            let made = fs::DirBuilder::new().recursive(true).mode(0o755).create(host_path);
            Ok(made.and_then(|()| fs::canonicalize(host_path)))
        }
        found => Ok(found),
    }
}

/// How a volume's ids are seen; only a pod with users of its own sees other ids than the host.
fn id_mappings(input: &Input, mount: &Mount) -> Result<Option<(IdMapping, IdMapping)>> {
    let refused = |why: &str| Err(Error::invalid(format!("config.mounts: {}: {why}", mount.container_path)));
    let users = input.users()?;
    if users.is_some() && mount.propagation() == MountPropagation::PropagationBidirectional {
        return refused("propagation is bidirectional, which a pod with users of its own cannot have");
    }
    match (mount.uid_mappings.as_slice(), mount.gid_mappings.as_slice()) {
        ([], []) => Ok(None),
        _ if users.is_none() => refused("uidMappings and gidMappings need a pod with a user namespace"),
        ([uids], [gids]) => Ok(Some((*uids, *gids))),
        _ => refused("uidMappings and gidMappings must have one mapping each"),
    }
}

/// A volume of an image, which is never written to.
fn image(input: &Input, index: usize, mount: &Mount) -> Result<Value> {
    let target = &mount.container_path;
    check_target(target)?;
    let mut options = ["rbind", "rprivate", "ro"].map(str::to_owned).to_vec();
    options.extend(extra_options(mount)?);
    let source = text(&image_volume::source(&input.directory, index));
    Ok(json!({ "destination": target, "type": "bind", "source": source, "options": options }))
}

fn propagation(input: &Input, mount: &Mount) -> Result<&'static str> {
    let target = &mount.container_path;
    Ok(match mount.propagation() {
        MountPropagation::PropagationPrivate => "rprivate",
        MountPropagation::PropagationHostToContainer => "rslave",
        MountPropagation::PropagationBidirectional if !input.privileged() => {
            return Err(Error::invalid(format!(
                "config.mounts: {target}: bidirectional propagation needs a privileged container"
            )));
        }
        MountPropagation::PropagationBidirectional => "rshared",
    })
}

fn read_only(mount: &Mount) -> Result<&'static str> {
    let target = &mount.container_path;
    Ok(match (mount.readonly, mount.recursive_read_only) {
        (false, false) => "rw",
        (true, false) => "ro",
        (true, true) if mount.propagation() == MountPropagation::PropagationPrivate => "rro",
        (_, true) => {
            return Err(Error::invalid(format!(
                "config.mounts: {target}: recursive_read_only needs readonly and private propagation"
            )));
        }
    })
}

/// `mount_options` in the form that holds for everything mounted below as well: a volume that may not be executed from has no corner
/// where it may.
fn extra_options(mount: &Mount) -> Result<Vec<String>> {
    let served = |option: &String| match OPTIONS.contains(&option.as_str()) {
        true => Ok(format!("r{option}")),
        false => Err(Error::invalid(format!(
            "config.mounts: {}: mount_options: {option:?} is none of {}",
            mount.container_path,
            OPTIONS.join(", ")
        ))),
    };
    mount.mount_options.iter().map(served).collect()
}

/// A volume can only pass mounts on if the mount it lies on does: Bidirectional needs a shared one, HostToContainer a shared or slave one.
fn check_propagation(source: &Path, mount: &Mount) -> Result<()> {
    let needed: &[&str] = match mount.propagation() {
        MountPropagation::PropagationPrivate => return Ok(()),
        MountPropagation::PropagationHostToContainer => &["shared:", "master:"],
        MountPropagation::PropagationBidirectional => &["shared:"],
    };
    check_shared(source, needed)
        .map_err(|error| error.during(format_args!("config.mounts: host_path {:?} of {}", mount.host_path, mount.container_path)))
}

/// Refuses a place whose mount is in no peer group of one of these kinds: what is mounted there cannot be passed on.
pub(super) fn check_shared(source: &Path, needed: &[&str]) -> Result<()> {
    let found = statx(CWD, source, AtFlags::empty(), StatxFlags::MNT_ID)
        .map_err(|error| Error::io(format_args!("look at {}", source.display()), error))?;
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(|error| Error::io("read /proc/self/mountinfo", error))?;
    let id = found.stx_mnt_id.to_string();
    let tags = table.lines().map(|line| line.split(' ')).find(|fields| fields.clone().next() == Some(&id));
    let shared = tags.is_some_and(|fields| {
        fields.skip(6).take_while(|field| *field != "-").any(|field| needed.iter().any(|tag| field.starts_with(tag)))
    });
    if shared {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{} is not on a shared mount, so its mounts cannot be passed on; run `mount --make-shared` on it",
        source.display()
    )))
}

/// `shared` or `slave` for the root when a volume asks for more than privacy (the root must not stop what a volume passes on).
pub(super) fn root_propagation(config: &ContainerConfig) -> Option<&'static str> {
    let asks = |propagation| config.mounts.iter().any(|mount| mount.propagation() == propagation);
    if asks(MountPropagation::PropagationBidirectional) {
        Some("rshared")
    } else if asks(MountPropagation::PropagationHostToContainer) {
        Some("rslave")
    } else {
        None
    }
}
