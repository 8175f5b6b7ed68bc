//! Limits: the CRI's numbers as the OCI's, and which of them this host does not enforce.

use crate::{
    cgroup::Tree,
    error::{Error, Result},
};
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};
use windlass_proto::cri::LinuxContainerResources;

/// The OCI form of what is set; 0 and empty mean "not given" in the CRI.
pub(crate) fn resources(asked: &LinuxContainerResources) -> Result<LinuxResources> {
    let mut cpu = Map::new();
    if asked.cpu_shares < 0 || asked.cpu_period < 0 {
        return Err(Error::invalid(format!(
            "linux.resources: cpu_shares {} and cpu_period {} must not be negative",
            asked.cpu_shares, asked.cpu_period
        )));
    }
    for (name, value) in [("shares", asked.cpu_shares), ("quota", asked.cpu_quota), ("period", asked.cpu_period)] {
        if value != 0 {
            cpu.insert(name.into(), json!(value));
        }
    }
    for (name, value) in [("cpus", &asked.cpuset_cpus), ("mems", &asked.cpuset_mems)] {
        if !value.is_empty() {
            cpu.insert(name.into(), json!(value));
        }
    }
    // Memory and swap together.
    let (limit, both) = (asked.memory_limit_in_bytes, asked.memory_swap_limit_in_bytes);
    if both != 0 && both != -1 && (limit <= 0 || both < limit) {
        return Err(Error::invalid(format!(
            "linux.resources.memory_swap_limit_in_bytes {both} is less than memory_limit_in_bytes {limit}, or that is not set"
        )));
    }
    let mut memory = Map::new();
    for (name, value) in [("limit", asked.memory_limit_in_bytes), ("swap", asked.memory_swap_limit_in_bytes)] {
        if value != 0 {
            memory.insert(name.into(), json!(value));
        }
    }
    let mut resources = Map::new();
    if !cpu.is_empty() {
        resources.insert("cpu".into(), Value::Object(cpu));
    }
    if !memory.is_empty() {
        resources.insert("memory".into(), Value::Object(memory));
    }
    if !asked.hugepage_limits.is_empty() {
        let limits = asked.hugepage_limits.iter().map(|limit| json!({ "pageSize": limit.page_size, "limit": limit.limit }));
        resources.insert("hugepageLimits".into(), limits.collect());
    }
    if !asked.unified.is_empty() {
        resources.insert("unified".into(), json!(asked.unified));
    }
    serde_json::from_value(Value::Object(resources)).map_err(|error| Error::invalid(format!("linux.resources: {error}")))
}

/// Names of the requested limits whose controllers this host's tree lacks.
pub(crate) fn not_enforced(asked: &LinuxContainerResources, tree: &Tree) -> Vec<String> {
    let missing = tree.missing();
    let wanted = [
        ("cpu", asked.cpu_quota > 0 || asked.cpu_shares > 0),
        ("memory", asked.memory_limit_in_bytes > 0),
        ("cpuset", !asked.cpuset_cpus.is_empty() || !asked.cpuset_mems.is_empty()),
    ];
    wanted.into_iter().filter(|(name, wanted)| *wanted && missing.contains(name)).map(|(name, _)| name.to_owned()).collect()
}
