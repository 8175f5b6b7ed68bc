//! Mounts: the kernel's own file systems, the pod's files, and the volumes of the request, parents before children.

use super::{Input, text};
use crate::error::{Error, Kind, Result};
use serde_json::{Value, json};
use std::{fs, path::Path};
use windlass_proto::cri::{ContainerConfig, Mount, MountPropagation, NamespaceMode};

/// Mounts in the order in which they are made.
pub(super) fn build(input: &Input<'_>) -> Result<Vec<Value>> {
    let mut mounts = kernel(input);
    let mut volumes = pod_files(input);
    for mount in &input.config.mounts {
        volumes.push((normal(&mount.container_path), volume(input, mount)?));
    }
    // A volume over a directory comes before the ones inside it; equal paths keep the request's order.
    volumes.sort_by_key(|(path, _)| path.split('/').filter(|part| !part.is_empty()).count());
    mounts.retain(|mount| !volumes.iter().any(|(path, _)| mount["destination"] == path.as_str()));
    mounts.extend(volumes.into_iter().map(|(_, mount)| mount));
    Ok(mounts)
}

fn normal(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    format!("/{}", parts.join("/"))
}

fn kernel(input: &Input<'_>) -> Vec<Value> {
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
fn pod_files(input: &Input<'_>) -> Vec<(String, Value)> {
    let directory = input.node.pod_directory(&input.pod.id);
    let taken = |path: &str| input.config.mounts.iter().any(|mount| normal(&mount.container_path) == path);
    let mode = if input.security().readonly_rootfs { "ro" } else { "rw" };
    ["hosts", "hostname", "resolv.conf"]
        .into_iter()
        .map(|name| (format!("/etc/{name}"), directory.join(name)))
        .filter(|(path, _)| !taken(path))
        .map(|(path, source)| {
            let mount =
                json!({ "destination": path, "type": "bind", "source": text(&source), "options": ["bind", "rprivate", mode] });
            (path, mount)
        })
        .collect()
}

fn volume(input: &Input<'_>, mount: &Mount) -> Result<Value> {
    let target = &mount.container_path;
    if !target.starts_with('/') {
        return Err(Error::invalid(format!("config.mounts: container_path {target:?} is not absolute")));
    }
    if mount.image.as_ref().is_some_and(|image| !image.image.is_empty()) {
        let message = format!("ImageVolumeMountFailed: {target}: image volumes are not served yet");
        return Err(Error::new(Kind::Prefixed, message));
    }
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(Error::unimplemented(format!("config.mounts: {target}: id mappings are not served yet")));
    }
    if !mount.mount_options.is_empty() {
        return Err(Error::unimplemented(format!("config.mounts: {target}: mount_options are not served yet")));
    }
    let source = fs::canonicalize(&mount.host_path)
        .map_err(|error| Error::invalid(format!("config.mounts: host_path {:?} of {target}: {error}", mount.host_path)))?;
    let mut options = vec!["rbind"];
    options.push(match mount.propagation() {
        MountPropagation::PropagationPrivate => "rprivate",
        MountPropagation::PropagationHostToContainer => "rslave",
        MountPropagation::PropagationBidirectional if !input.privileged() => {
            return Err(Error::invalid(format!(
                "config.mounts: {target}: bidirectional propagation needs a privileged container"
            )));
        }
        MountPropagation::PropagationBidirectional => "rshared",
    });
    options.push(match (mount.readonly, mount.recursive_read_only) {
        (false, false) => "rw",
        (true, false) => "ro",
        (true, true) if mount.propagation() == MountPropagation::PropagationPrivate => "rro",
        (_, true) => {
            return Err(Error::invalid(format!(
                "config.mounts: {target}: recursive_read_only needs readonly and private propagation"
            )));
        }
    });
    check_propagation(&source, mount)?;
    Ok(json!({ "destination": target, "type": "bind", "source": text(&source), "options": options }))
}

/// A volume can only pass mounts on if the mount it lies on does: Bidirectional needs a shared one, HostToContainer a shared or slave one.
fn check_propagation(source: &Path, mount: &Mount) -> Result<()> {
    let needed: &[&str] = match mount.propagation() {
        MountPropagation::PropagationPrivate => return Ok(()),
        MountPropagation::PropagationHostToContainer => &["shared:", "master:"],
        MountPropagation::PropagationBidirectional => &["shared:"],
    };
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(|error| Error::io("read /proc/self/mountinfo", error))?;
    let covering = table
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            let point = fields.get(4)?.replace("\\040", " ");
            source.starts_with(&point).then_some((point.len(), fields))
        })
        .max_by_key(|(length, _)| *length);
    let shared = covering.is_some_and(|(_, fields)| {
        fields.iter().skip(6).take_while(|field| **field != "-").any(|field| needed.iter().any(|tag| field.starts_with(tag)))
    });
    if shared {
        return Ok(());
    }
    let message = format!(
        "config.mounts: host_path {:?} is not on a shared mount, so its mounts cannot be passed on; run `mount --make-shared` on it",
        mount.host_path
    );
    Err(Error::invalid(message))
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
