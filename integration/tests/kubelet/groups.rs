//! Kubelet's own control groups for its pods: below each other, or slices of systemd's.

use anyhow::{Context, Result};
use serde_json::Value;
use std::{
    fs,
    path::{Path, PathBuf},
};
use windlass_integration::{guest_tests::under_systemd, kubelet::container_status};

const TREE: &str = "/sys/fs/cgroup";
const PODS: &str = "kubepods";

/// Kubelet's group of all pods.
pub(crate) fn all_pods() -> PathBuf {
    Path::new(TREE).join(if under_systemd() { format!("{PODS}.slice") } else { PODS.into() })
}

/// Kubelet's group of a pod.
pub(crate) fn group_of(pod: &Value) -> Result<PathBuf> {
    let class = pod["status"]["qosClass"].as_str().context("a class")?.to_lowercase();
    // A static pod has its uid from kubelet, and another from the apiserver.
    let uid = [&pod["metadata"]["annotations"]["kubernetes.io/config.hash"], &pod["metadata"]["uid"]];
    let own = format!("pod{}", uid.iter().find_map(|uid| uid.as_str()).context("a uid")?);
    let parts = [PODS, &class, &own].into_iter().filter(|part| *part != "guaranteed");
    if !under_systemd() {
        return Ok(parts.fold(PathBuf::from(TREE), |group, part| group.join(part)));
    }
    let (mut group, mut slice) = (PathBuf::from(TREE), String::new());
    for part in parts {
        // In a slice's name a dash goes one level down.
        let separator = if slice.is_empty() { "" } else { "-" };
        slice = format!("{slice}{separator}{}", part.replace('-', "_"));
        group.push(format!("{slice}.slice"));
    }
    Ok(group)
}

/// The container's own group below its pod's, or below the scope there.
pub(crate) fn leaf_of(pod: &Value, name: &str) -> Result<PathBuf> {
    let status = container_status(pod, name).context("a status")?;
    let id = status["containerID"].as_str().and_then(|id| id.strip_prefix("windlass://")).context("an id")?;
    let group = group_of(pod)?;
    let below = fs::read_dir(&group).with_context(|| format!("list {}", group.display()))?.flatten().map(|entry| entry.path());
    let mut places = [group.clone()].into_iter().chain(below).map(|above| above.join(id));
    places.find(|leaf| leaf.is_dir()).with_context(|| format!("{id} is not below {}", group.display()))
}

/// A file of a group, without its last newline.
pub(crate) fn read(group: &Path, file: &str) -> Result<String> {
    let path = group.join(file);
    Ok(fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?.trim_end().to_owned())
}
