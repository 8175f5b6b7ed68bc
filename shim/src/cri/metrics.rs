//! ListMetricDescriptors and ListPodSandboxMetrics: cAdvisor's container metrics as kubelet passes them on, with the labels that it gives
//! them itself where cAdvisor is its source. What one metric is stands in `stats::FAMILIES`; here it gets its labels.

use super::{
    Service,
    stats::{LAYER_BUDGET, aside, running},
};
use crate::{
    container::Container,
    node::{Node, now_ns},
    pod::{self, Phase, Pod},
    stats::{Disk, FAMILIES, Figures, network},
};
use std::sync::Arc;
use tonic::Status;
use windlass_proto::cri;

/// Labels of every metric, in this order and before its own.
const LABELS: [&str; 6] = ["id", "name", "image", "pod", "namespace", "container"];

pub(super) fn descriptors() -> Vec<cri::MetricDescriptor> {
    let descriptor = |family: &crate::stats::Family| cri::MetricDescriptor {
        name: family.name.to_owned(),
        help: family.help.to_owned(),
        label_keys: LABELS.iter().chain(family.labels).map(|&label| label.to_owned()).collect(),
    };
    FAMILIES.iter().map(descriptor).collect()
}

/// What one request reads once for all pods.
struct Look {
    host: network::Host,
    disk: Option<Disk>,
    budget: usize,
}

/// The time of values that are read for the request, as the CRI wants it. These are, but for half a second and for the sizes of large layers,
/// which are counted in the background. Kubelet passes any other time on, and a series with a time of its own is never stale to Prometheus:
/// it would tell what an ended container had for five minutes more.
const LIVE: i64 = 0;

/// All values that are known of one container or pod.
fn metrics(figures: &Figures<'_>, labels: &[String; 6]) -> Vec<cri::Metric> {
    let mut found = Vec::with_capacity(FAMILIES.len());
    for family in &FAMILIES {
        let kind = if family.counter { cri::MetricType::Counter } else { cri::MetricType::Gauge };
        family.values(figures, &mut |own, value| {
            found.push(cri::Metric {
                name: family.name.to_owned(),
                timestamp: LIVE,
                metric_type: kind.into(),
                label_values: labels.iter().cloned().chain(own.iter().map(|&label| label.to_owned())).collect(),
                value: Some(cri::UInt64Value { value }),
            });
        });
    }
    found
}

fn seconds(at_ns: i64) -> u64 {
    u64::try_from(at_ns / 1_000_000_000).unwrap_or(0)
}

/// Pod and namespace.
fn names(record: &pod::Record) -> [String; 2] {
    record.config.metadata.as_ref().map(|meta| [meta.name.clone(), meta.namespace.clone()]).unwrap_or_default()
}

/// Of a running container; nothing when it has ended meanwhile.
fn of_container(node: &Node, pod: &Pod, container: &Container, look: &mut Look) -> Option<cri::ContainerMetrics> {
    let (init, started_at_ns) = container.look(running)?;
    let read = node.stats.container_in_detail(node, pod, container, (init, started_at_ns));
    if container.is_exited() {
        node.stats.ended(&container.id);
        return None;
    }
    let (sample, detail) = read?;
    let layer = node.stats.layer(node, &container.id, &mut look.budget).map(|(size, _)| size);
    let figures = Figures {
        now_seconds: seconds(sample.at_ns),
        created_seconds: seconds(container.look(|record| record.created_at_ns)),
        began_seconds: seconds(started_at_ns),
        sample: Some(&sample),
        detail: Some(&detail),
        layer: layer.zip(look.disk.as_ref()),
        traffic: &[],
    };
    let ([pod_name, namespace], cgroup) = pod.look(|record| (names(record), record.container_path(&container.id)));
    let (image, name) = container.look(|record| (record.image_name.clone(), record.name().to_owned()));
    let id = container.id.clone();
    let labels = [cgroup, id.clone(), image, pod_name, namespace, name];
    Some(cri::ContainerMetrics { container_id: id, metrics: metrics(&figures, &labels) })
}

/// Of a ready pod: its interfaces, the use of its own cgroup where it has one, and its containers. A sum of the containers would be told
/// twice by every query that sums.
fn of_pod(node: &Node, pod: &Pod, look: &mut Look) -> Option<cri::PodSandboxMetrics> {
    let containers: Vec<Arc<Container>> = node.containers_of(&pod.id);
    let pids: Vec<i32> = containers.iter().filter_map(|container| container.look(running)).map(|(pid, _)| pid).collect();
    let container_metrics = containers.iter().filter_map(|container| of_container(node, pod, container, look)).collect();
    let own = node.stats.pod_in_detail(node, pod);
    if pod.phase() != Phase::Ready {
        node.stats.ended(&pod.id);
        return None;
    }
    let record = pod.record();
    let traffic = network::of(&record, &pids, &look.host);
    let at_ns = own.as_ref().map_or_else(now_ns, |(sample, _)| sample.at_ns);
    let figures = Figures {
        now_seconds: seconds(at_ns),
        created_seconds: seconds(record.created_at_ns),
        began_seconds: seconds(record.created_at_ns),
        sample: own.as_ref().map(|(sample, _)| sample),
        detail: own.as_ref().map(|(_, detail)| detail.as_ref()),
        layer: None,
        traffic: &traffic,
    };
    let [pod_name, namespace] = names(&record);
    let cgroup = record.own_cgroup().unwrap_or_else(|| record.monitor_path());
    let labels = [cgroup, record.id.clone(), String::new(), pod_name, namespace, String::new()];
    Some(cri::PodSandboxMetrics { pod_sandbox_id: record.id, metrics: metrics(&figures, &labels), container_metrics })
}

impl Service {
    /// Of ready pods.
    pub(super) async fn metrics_of_pods(&self) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
        let node = self.node.clone();
        aside(move || {
            let disk = Disk::of(&node.config.root.join("containers"));
            let mut look = Look { host: network::Host::default(), disk, budget: LAYER_BUDGET };
            let ready = node.pods().into_iter().filter(|pod| pod.phase() == Phase::Ready);
            ready.filter_map(|pod| of_pod(&node, &pod, &mut look)).collect()
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Detail;

    #[test]
    fn every_value_has_a_label_for_each_key_of_its_descriptor() {
        let traffic = [("eth0".to_owned(), network::Traffic::default())];
        let detail = Detail { cpu: [("usage_usec".to_owned(), 1)].into(), ..Detail::default() };
        let figures = Figures { detail: Some(&detail), traffic: &traffic, ..Figures::default() };
        let found = metrics(&figures, &["i", "n", "m", "p", "s", "c"].map(str::to_owned));
        let descriptors = descriptors();
        assert!(found.len() > 10 && descriptors.len() == FAMILIES.len());
        for metric in &found {
            let descriptor = descriptors.iter().find(|one| one.name == metric.name).expect("described");
            assert_eq!(metric.label_values.len(), descriptor.label_keys.len(), "{}", metric.name);
        }
        let usage = found.iter().find(|metric| metric.name == "container_cpu_usage_seconds_total").expect("told");
        assert_eq!(usage.label_values, ["i", "n", "m", "p", "s", "c", "total"]);
        assert_eq!((usage.timestamp, usage.metric_type()), (LIVE, cri::MetricType::Counter));
    }
}
