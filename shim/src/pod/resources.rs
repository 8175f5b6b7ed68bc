//! What a pod may use as a whole. Its cgroup is kubelet's, which writes it itself: the numbers are recorded, and enforced only where this
//! runtime had to make that cgroup.

use super::{Phase, Pod, Record, scope};
use crate::{
    container::{limits, merge, missing_controllers, refuse_missing},
    error::{Error, Kind, Result},
    node::Node,
    nri, store,
};
use windlass_proto::{
    cri::{LinuxContainerResources, PodSandboxConfig},
    monitor::{UpdatePodRequest, frame::Body},
};

/// Takes what kubelet has decided for a ready pod. All or nothing.
pub async fn update(
    node: &Node,
    pod: &Pod,
    overhead: Option<LinuxContainerResources>,
    resources: Option<LinuxContainerResources>,
) -> Result<()> {
    let during = |error: Error| error.during(format_args!("update pod {}", pod.id));
    if pod.phase() == Phase::Ready {
        nri::update_pod(node, pod, overhead.as_ref(), resources.as_ref()).await.map_err(during)?;
    }
    change(node, pod, overhead, resources).await.map_err(during)?;
    nri::pod_updated(node, pod).await;
    Ok(())
}

async fn change(
    node: &Node,
    pod: &Pod,
    overhead: Option<LinuxContainerResources>,
    resources: Option<LinuxContainerResources>,
) -> Result<()> {
    let _turn = pod.turn.lock().await;
    if pod.phase() != Phase::Ready {
        return Err(Error::precondition("it is not ready"));
    }
    let mut next = pod.record();
    let linux = next.config.linux.get_or_insert_default();
    for (old, new) in [(&mut linux.overhead, overhead), (&mut linux.resources, resources)] {
        if let Some(new) = new {
            merge(old.get_or_insert_default(), new);
        }
    }
    let path = node.pod_directory(&pod.id).join("record.json");
    let room = store::reserve(&path, &next)?;
    enforce(node, pod, &next.config).await?;
    drop(room);
    pod.change_always(node, |record| record.config.linux.clone_from(&next.config.linux));
    Ok(())
}

/// Writes the pod's limits where this runtime made the pod's cgroup.
pub(super) async fn enforce(node: &Node, pod: &Pod, config: &PodSandboxConfig) -> Result<()> {
    let Some(wanted) = together(config) else { return Ok(()) };
    let oci = limits(&wanted)?;
    let Some(cgroup) = pod.look(Record::made_cgroup).map(|path| node.tree.directory(&path)) else { return Ok(()) };
    let mut missing = missing_controllers(&wanted, &node.tree);
    let strict = node.config.cgroup.strict;
    refuse_missing(strict, &missing)?;
    let resources = serde_json::to_string(&oci).map_err(|error| Error::internal(format!("encode resources: {error}")))?;
    let request = UpdatePodRequest { cgroup: cgroup.to_string_lossy().into_owned(), resources, strict, tell: true };
    match pod.monitor()?.call(Body::UpdatePod(request)).await {
        Ok((reply, _)) => {
            if let Body::UpdateReply(reply) = reply {
                missing.extend(reply.not_enforced);
            }
            missing.sort();
            missing.dedup();
            if !missing.is_empty() {
                tracing::warn!(pod = %pod.id, limits = %missing.join(", "), "limits of the pod not enforced: this host's cgroup v2 tree lacks the controllers");
            }
            scope::keep_limits(node, pod, &cgroup).await;
            Ok(())
        }
        Err(error) if error.kind == Kind::Unimplemented && !strict => {
            tracing::warn!(pod = %pod.id, "limits of the pod not enforced: its monitor is of an earlier version");
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// What the containers and the pod itself may use together; nothing when nothing is given.
fn together(config: &PodSandboxConfig) -> Option<LinuxContainerResources> {
    let linux = config.linux.as_ref()?;
    let (mut sum, overhead) = match (&linux.resources, &linux.overhead) {
        (None, None) | (None, Some(_)) => return None,
        (Some(resources), overhead) => (resources.clone(), overhead.clone().unwrap_or_default()),
    };
    let plus = |a: i64, b: i64| if a > 0 && b > 0 { a.saturating_add(b) } else { a };
    sum.cpu_shares = plus(sum.cpu_shares, overhead.cpu_shares);
    sum.memory_limit_in_bytes = plus(sum.memory_limit_in_bytes, overhead.memory_limit_in_bytes);
    if sum.memory_swap_limit_in_bytes > 0 {
        sum.memory_swap_limit_in_bytes = plus(sum.memory_swap_limit_in_bytes, overhead.memory_limit_in_bytes);
    }
    if sum.cpu_quota > 0 && overhead.cpu_quota > 0 {
        let period = |of: i64| if of > 0 { of } else { 100_000 };
        let scaled =
            i128::from(overhead.cpu_quota) * i128::from(period(sum.cpu_period)) / i128::from(period(overhead.cpu_period));
        sum.cpu_quota = plus(sum.cpu_quota, i64::try_from(scaled).unwrap_or(i64::MAX));
    }
    // Of processes, not of a group.
    sum.oom_score_adj = 0;
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_proto::cri::LinuxPodSandboxConfig;

    #[test]
    fn overhead_is_added_in_the_pods_own_period() {
        let resources = LinuxContainerResources {
            cpu_quota: 25_000,
            cpu_period: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 1000,
            ..Default::default()
        };
        let overhead =
            LinuxContainerResources { cpu_quota: 10_000, cpu_shares: 100, memory_limit_in_bytes: 24, ..Default::default() };
        let config = |resources, overhead| PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig { resources, overhead, ..Default::default() }),
            ..Default::default()
        };
        let sum = together(&config(Some(resources), Some(overhead.clone()))).expect("given");
        assert_eq!((sum.cpu_quota, sum.cpu_period, sum.cpu_shares, sum.memory_limit_in_bytes), (30_000, 50_000, 612, 1024));
        let unlimited = together(&config(Some(LinuxContainerResources::default()), Some(overhead.clone()))).expect("given");
        assert_eq!(unlimited, LinuxContainerResources::default(), "no limit and overhead is no limit");
        assert!(together(&config(None, Some(overhead))).is_none());
    }
}
