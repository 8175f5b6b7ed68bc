//! UpdateContainerResources: all of the fields that are given or none, in the kernel and in the record. Its `annotations` are left unread:
//! the CRI leaves their meaning to the runtime, none has one here, and NRI's UpdateContainer has no place for them.

use super::{Container, spec};
use crate::{
    error::{Error, Result},
    node::Node,
    nri, store,
};
use serde_json::{Value, json};
use std::sync::Arc;
use windlass_proto::{
    cri::LinuxContainerResources,
    monitor::{UpdateRequest, frame::Body},
    nri::LinuxResources,
};

/// Changes the limits of a created or running container, all of them or none. Plugins of NRI may have others.
pub async fn update(node: &Arc<Node>, container: &Container, given: LinuxContainerResources) -> Result<()> {
    let during = |error: Error| error.during(format_args!("update container {}", container.id));
    let adjusted =
        if container.is_exited() { None } else { nri::update_container(node, container, &given).await.map_err(during)? };
    match adjusted {
        None => change(node, container, given, json!({})).await.map_err(during)?,
        Some(resources) => update_to(node, container, &resources).await?,
    }
    nri::container_updated(node, container).await;
    Ok(())
}

/// The same in NRI's form, without asking plugins.
pub async fn update_to(node: &Node, container: &Container, resources: &LinuxResources) -> Result<()> {
    let during = |error: Error| error.during(format_args!("update container {}", container.id));
    let limits = spec::limits(resources, &node.config).map_err(during)?;
    change(node, container, limits.cri, limits.more).await.map_err(during)
}

/// `more`: what the CRI has no field for.
async fn change(node: &Node, container: &Container, mut given: LinuxContainerResources, more: Value) -> Result<()> {
    let _limits = container.limits.lock().await;
    if container.is_exited() {
        return Err(Error::precondition("it has exited"));
    }
    let before = container.look(|record| record.config.linux.as_ref().and_then(|linux| linux.resources.clone()));
    complete(&mut given, &before.unwrap_or_default());
    let mut oci = serde_json::to_value(spec::limits_of_container(&given)?)
        .map_err(|error| Error::internal(format!("encode resources: {error}")))?;
    let mut missing = spec::missing_controllers(&given, &node.tree);
    missing.extend(spec::more_missing(&more, &node.tree));
    spec::overlay(&mut oci, more.clone());
    spec::refuse_missing(node.config.cgroup.strict, &missing)?;
    let change = |record: &mut super::Record, missing: &[String]| {
        merge(record.config.linux.get_or_insert_default().resources.get_or_insert_default(), given.clone());
        lay_more(&mut record.more_limits, &more);
        for name in missing {
            if !record.not_enforced.contains(name) {
                record.not_enforced.push(name.clone());
            }
        }
    };
    let mut next = container.record();
    change(&mut next, &missing);
    // A disk that is full must be found before the kernel is told.
    let room = store::reserve(&container.path, &next)?;
    let monitor = node.pod(&container.pod_id)?.monitor()?;
    let (container_id, strict) = (container.id.clone(), node.config.cgroup.strict);
    let request = UpdateRequest { container_id, resources: oci.to_string(), strict, tell: true };
    if let (Body::UpdateReply(reply), _) = monitor.call(Body::Update(request)).await? {
        missing.extend(reply.not_enforced);
    }
    drop(room);
    missing.sort();
    missing.dedup();
    if !missing.is_empty() {
        tracing::warn!(pod = %container.pod_id, container = %container.id, limits = %missing.join(", "), "changed limits not enforced: this host's cgroup v2 tree lacks the controllers");
    }
    container.change_always(|record| change(record, &missing));
    Ok(())
}

/// Lays limits that the CRI has no field for over those of updates before.
fn lay_more(old: &mut Value, new: &Value) {
    if new.as_object().is_some_and(|new| !new.is_empty()) {
        if old.is_null() {
            *old = json!({});
        }
        spec::overlay(old, new.clone());
    }
}

/// A limit of memory or of memory and swap together means nothing without the other: what is not given stays as it was.
fn complete(given: &mut LinuxContainerResources, before: &LinuxContainerResources) {
    let (limit, both) = (given.memory_limit_in_bytes, given.memory_swap_limit_in_bytes);
    let (limit_before, both_before) = (before.memory_limit_in_bytes, before.memory_swap_limit_in_bytes);
    if both > 0 && limit == 0 {
        given.memory_limit_in_bytes = limit_before;
    } else if both == 0 && limit > 0 && both_before == -1 {
        given.memory_swap_limit_in_bytes = -1;
    } else if both == 0 && limit > 0 && limit_before > 0 && both_before >= limit_before {
        // As much swap as before.
        given.memory_swap_limit_in_bytes = limit + (both_before - limit_before);
    }
    if limit > 0
        && let Some(swap) = before.unified.get(spec::SWAP_KEY)
    {
        given.unified.entry(spec::SWAP_KEY.into()).or_insert_with(|| swap.clone());
    }
}

/// Lays the set fields of `new` over `old`; zero and empty mean "not given" in the CRI. The OOM score is of processes, not of the cgroup, and
/// stays what they were started with.
pub fn merge(old: &mut LinuxContainerResources, new: LinuxContainerResources) {
    let number = |old: &mut i64, new: i64| {
        if new != 0 {
            *old = new;
        }
    };
    number(&mut old.cpu_period, new.cpu_period);
    number(&mut old.cpu_quota, new.cpu_quota);
    number(&mut old.cpu_shares, new.cpu_shares);
    number(&mut old.memory_limit_in_bytes, new.memory_limit_in_bytes);
    number(&mut old.memory_swap_limit_in_bytes, new.memory_swap_limit_in_bytes);
    for (old, new) in [(&mut old.cpuset_cpus, new.cpuset_cpus), (&mut old.cpuset_mems, new.cpuset_mems)] {
        if !new.is_empty() {
            *old = new;
        }
    }
    for new in new.hugepage_limits {
        match old.hugepage_limits.iter_mut().find(|old| old.page_size == new.page_size) {
            Some(old) => *old = new,
            None => old.hugepage_limits.push(new),
        }
    }
    old.unified.extend(new.unified);
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_proto::cri::HugepageLimit;

    #[test]
    fn what_is_not_given_stays() {
        let pages = |size: &str, limit| HugepageLimit { page_size: size.into(), limit };
        let mut old = LinuxContainerResources {
            cpu_quota: 5000,
            oom_score_adj: 10,
            hugepage_limits: vec![pages("2MB", 1), pages("1GB", 2)],
            unified: [("memory.high".to_owned(), "5".to_owned())].into(),
            ..Default::default()
        };
        let new = LinuxContainerResources {
            cpu_shares: 7,
            oom_score_adj: 900,
            hugepage_limits: vec![pages("1GB", 3)],
            cpuset_cpus: "0".into(),
            ..Default::default()
        };
        merge(&mut old, new);
        assert_eq!((old.cpu_quota, old.cpu_shares, old.oom_score_adj, old.cpuset_cpus.as_str()), (5000, 7, 10, "0"));
        assert_eq!(old.hugepage_limits, [pages("2MB", 1), pages("1GB", 3)]);
        assert_eq!(old.unified.len(), 1);
    }

    #[test]
    fn more_limits_stay_until_others_are_given() {
        let mut more = Value::Null;
        lay_more(&mut more, &json!({}));
        assert!(more.is_null());
        lay_more(&mut more, &json!({ "pids": { "limit": 5 }, "memory": { "reservation": 7 } }));
        lay_more(&mut more, &json!({ "pids": { "limit": -1 }, "blockIO": null }));
        assert_eq!(more, json!({ "pids": { "limit": -1 }, "memory": { "reservation": 7 }, "blockIO": null }));
    }

    #[test]
    fn memory_and_swap_complete_each_other() {
        let both = |limit, both| LinuxContainerResources {
            memory_limit_in_bytes: limit,
            memory_swap_limit_in_bytes: both,
            ..Default::default()
        };
        for (given, before, expected) in [
            ((0, 150), (100, 120), (100, 150)),
            ((200, 0), (100, 120), (200, 220)),
            ((200, 0), (100, 0), (200, 0)),
            ((200, 0), (100, -1), (200, -1)),
            ((-1, 0), (100, 120), (-1, 0)),
            ((200, 300), (100, 120), (200, 300)),
        ] {
            let mut completed = both(given.0, given.1);
            complete(&mut completed, &both(before.0, before.1));
            assert_eq!(completed, both(expected.0, expected.1), "{given:?} over {before:?}");
        }
        let swap = |limit: i64, value: &str| LinuxContainerResources {
            unified: [(spec::SWAP_KEY.to_owned(), value.to_owned())].into(),
            ..both(limit, 0)
        };
        for (given, expected) in [(both(200, 0), swap(200, "5")), (swap(200, "7"), swap(200, "7")), (both(0, 0), both(0, 0))] {
            let mut completed = given;
            complete(&mut completed, &swap(100, "5"));
            assert_eq!(completed, expected);
        }
    }
}
