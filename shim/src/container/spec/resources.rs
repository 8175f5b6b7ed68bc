//! Limits: the CRI's numbers as the OCI's, and which of them this host does not enforce.

use crate::{
    cgroup::Tree,
    error::{Error, Result},
};
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};
use windlass_proto::cri::LinuxContainerResources;

/// The key of `unified` that limits swap alone.
pub(crate) const SWAP_KEY: &str = "memory.swap.max";

/// The same for a container: a limit of memory that says nothing of swap leaves none, as other runtimes have it.
pub(crate) fn of_container(asked: &LinuxContainerResources) -> Result<LinuxResources> {
    let mut asked = asked.clone();
    if asked.memory_limit_in_bytes > 0 && asked.memory_swap_limit_in_bytes == 0 && !asked.unified.contains_key(SWAP_KEY) {
        asked.memory_swap_limit_in_bytes = asked.memory_limit_in_bytes;
    }
    resources(&asked)
}

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

/// Names of the requested limits whose controllers this host's tree lacks. Swap is the memory controller's.
pub(crate) fn not_enforced(asked: &LinuxContainerResources, tree: &Tree) -> Vec<String> {
    let wanted = [
        ("cpu", "cpu", asked.cpu_quota > 0 || asked.cpu_shares > 0),
        ("memory", "memory", asked.memory_limit_in_bytes > 0),
        ("swap", "memory", asked.memory_swap_limit_in_bytes > 0),
        ("cpuset", "cpuset", !asked.cpuset_cpus.is_empty() || !asked.cpuset_mems.is_empty()),
        ("hugetlb", "hugetlb", !asked.hugepage_limits.is_empty()),
    ];
    let missing = wanted.into_iter().filter(|(_, controller, wanted)| *wanted && !tree.has(controller));
    missing.map(|(name, _, _)| name.to_owned()).collect()
}

/// Refuses limits that this host cannot enforce, where the configuration wants that.
pub(crate) fn refuse_missing(strict: bool, missing: &[String]) -> Result<()> {
    if strict && !missing.is_empty() {
        let why = format!("this host cannot enforce {} and cgroup.strict is set", missing.join(", "));
        return Err(Error::unimplemented(why));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_proto::cri::HugepageLimit;

    #[test]
    fn a_limit_of_memory_leaves_no_swap_unless_it_says_so() {
        let memory = |limit, both, unified: &[&str]| {
            let unified = unified.iter().map(|key| ((*key).to_owned(), "5".to_owned())).collect();
            let asked = LinuxContainerResources {
                memory_limit_in_bytes: limit,
                memory_swap_limit_in_bytes: both,
                unified,
                ..Default::default()
            };
            let made = of_container(&asked).expect("valid");
            made.memory().as_ref().and_then(oci_spec::runtime::LinuxMemory::swap)
        };
        assert_eq!(memory(100, 0, &[]), Some(100));
        assert_eq!(memory(100, 150, &[]), Some(150));
        assert_eq!(memory(100, -1, &[]), Some(-1));
        assert_eq!(memory(100, 0, &["memory.swap.max"]), None);
        assert_eq!(memory(0, 0, &[]), None);
        assert_eq!(memory(-1, 0, &[]), None);
    }

    #[test]
    fn what_no_controller_enforces_is_named() {
        let pages = vec![HugepageLimit { page_size: "2MB".into(), limit: 0 }];
        let all = LinuxContainerResources {
            cpu_quota: 1,
            memory_limit_in_bytes: 1,
            memory_swap_limit_in_bytes: 1,
            cpuset_cpus: "0".into(),
            hugepage_limits: pages,
            ..Default::default()
        };
        let with = |controllers: &[&str]| {
            let tree = Tree { root: "/".into(), controllers: controllers.iter().map(|name| (*name).to_owned()).collect() };
            not_enforced(&all, &tree)
        };
        assert_eq!(with(&[]), ["cpu", "memory", "swap", "cpuset", "hugetlb"]);
        assert_eq!(with(&["cpu", "cpuset", "hugetlb"]), ["memory", "swap"]);
        assert!(with(&["cpu", "cpuset", "memory", "hugetlb"]).is_empty());
    }
}
