//! ContainerStats, PodSandboxStats and their lists. Files are read on a thread that may wait.

use super::{Service, status, view};
use crate::{
    container::{self, Container, State},
    node::{Node, now_ns},
    pod::{Phase, Pod},
    stats::{self, Sample, network},
};
use std::sync::Arc;
use tonic::Status;
use windlass_proto::cri;

/// Files of writable layers that one request looks at itself; what is more is counted in the background.
pub(super) const LAYER_BUDGET: usize = 2048;

/// What one request reads once for all pods.
struct Look {
    host: network::Host,
    budget: usize,
    layers_at: String,
}

impl Look {
    fn new(node: &Node) -> Look {
        let layers_at = node.config.root.join("containers").to_string_lossy().into_owned();
        Look { host: network::Host::default(), budget: LAYER_BUDGET, layers_at }
    }
}

fn value(value: u64) -> Option<cri::UInt64Value> {
    Some(cri::UInt64Value { value })
}

fn cpu(sample: &Sample) -> Option<cri::CpuUsage> {
    sample.cpu.map(|cpu| cri::CpuUsage {
        timestamp: sample.at_ns,
        usage_core_nano_seconds: value(cpu.usage_ns),
        usage_nano_cores: cpu.nano_cores.and_then(value),
        psi: sample.cpu_psi,
    })
}

fn memory(sample: &Sample) -> Option<cri::MemoryUsage> {
    sample.memory.map(|memory| cri::MemoryUsage {
        timestamp: sample.at_ns,
        working_set_bytes: value(memory.working_set_bytes),
        available_bytes: memory.available_bytes.and_then(value),
        usage_bytes: memory.usage_bytes.and_then(value),
        rss_bytes: value(memory.rss_bytes),
        page_faults: memory.page_faults.and_then(value),
        major_page_faults: memory.major_page_faults.and_then(value),
        psi: sample.memory_psi,
    })
}

fn swap(sample: &Sample) -> Option<cri::SwapUsage> {
    sample.swap.map(|swap| cri::SwapUsage {
        timestamp: sample.at_ns,
        swap_available_bytes: swap.available_bytes.and_then(value),
        swap_usage_bytes: value(swap.usage_bytes),
    })
}

fn io(sample: &Sample) -> Option<cri::IoUsage> {
    sample.io_psi.map(|psi| cri::IoUsage { timestamp: sample.at_ns, psi: Some(psi) })
}

/// When the container began to run; nothing unless it runs.
pub(super) fn running(record: &container::Record) -> Option<(i32, i64)> {
    match record.state {
        State::Running { pid, started_at_ns } => Some((pid, started_at_ns)),
        State::Created { .. } | State::Exited { .. } => None,
    }
}

fn attributes(record: &container::Record) -> cri::ContainerAttributes {
    cri::ContainerAttributes {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
    }
}

/// A container's figures and the sample that they come from; only its writable layer unless it runs.
fn of_container(node: &Node, pod: &Pod, container: &Container, look: &mut Look) -> (cri::ContainerStats, Option<Sample>) {
    let (attributes, running) = container.look(|record| (attributes(record), running(record)));
    let sample = running.and_then(|(_, started_at_ns)| node.stats.container(node, pod, container, started_at_ns));
    if container.is_exited() {
        // It may have ended while it was read.
        node.stats.ended(&container.id);
    }
    let layer = node.stats.layer(node, &container.id, &mut look.budget);
    let writable_layer = layer.map(|(size, at_ns)| cri::FilesystemUsage {
        timestamp: at_ns,
        fs_id: Some(cri::FilesystemIdentifier { mountpoint: look.layers_at.clone() }),
        used_bytes: value(size.bytes),
        inodes_used: value(size.inodes),
    });
    let stats = cri::ContainerStats {
        attributes: Some(attributes),
        cpu: sample.as_ref().and_then(cpu),
        memory: sample.as_ref().and_then(memory),
        writable_layer,
        swap: sample.as_ref().and_then(swap),
        io: sample.as_ref().and_then(io),
    };
    (stats, sample)
}

fn interface((name, traffic): &(String, network::Traffic)) -> cri::NetworkInterfaceUsage {
    cri::NetworkInterfaceUsage {
        name: name.clone(),
        rx_bytes: value(traffic.rx_bytes),
        rx_errors: value(traffic.rx_errors),
        tx_bytes: value(traffic.tx_bytes),
        tx_errors: value(traffic.tx_errors),
    }
}

/// Use of a pod without a cgroup of its own: its living containers', its init's, and the time of containers that have ended.
fn sum(node: &Node, pod: &Pod, living: &[Arc<Container>], mut samples: Vec<Sample>, ended: &mut stats::Ended) -> Sample {
    let exited = node.containers_of(&pod.id).into_iter().filter(|container| container.is_exited());
    exited.for_each(|container| node.stats.note_ended(node, pod, &container.id, ended));
    samples.extend(node.stats.init(node, pod));
    let living: Vec<&str> = living.iter().map(|container| container.id.as_str()).collect();
    stats::sum(&samples, ended.sum_ns(&living))
}

fn of_pod(node: &Node, pod: &Pod, look: &mut Look) -> cri::PodSandboxStats {
    // From before the living are listed, so that each container is counted once.
    let mut ended = pod.look(|record| record.own_cgroup().is_none()).then(|| pod.ended());
    let (living, pids): (Vec<Arc<Container>>, Vec<i32>) = node
        .containers_of(&pod.id)
        .into_iter()
        .filter_map(|container| container.look(running).map(|(pid, _)| (container.clone(), pid)))
        .unzip();
    let (mut containers, mut samples) = (Vec::new(), Vec::new());
    for container in &living {
        let (stats, sample) = of_container(node, pod, container, look);
        containers.push(stats);
        samples.extend(sample);
    }
    let live = pod.phase() == Phase::Ready;
    let whole = live
        .then(|| match &mut ended {
            Some(ended) => Some(sum(node, pod, &living, samples, ended)),
            None => node.stats.pod(node, pod),
        })
        .flatten();
    drop(ended);
    if pod.phase() != Phase::Ready {
        node.stats.ended(&pod.id);
    }
    let record = pod.record();
    let interfaces = if live { network::of(&record, &pids, &look.host) } else { Vec::new() };
    let at_ns = now_ns();
    let network = interfaces.split_first().map(|(first, others)| cri::NetworkUsage {
        timestamp: at_ns,
        default_interface: Some(interface(first)),
        interfaces: others.iter().map(interface).collect(),
    });
    let process = whole.as_ref().and_then(|sample| sample.processes);
    cri::PodSandboxStats {
        attributes: Some(cri::PodSandboxAttributes {
            id: record.id,
            metadata: record.config.metadata,
            labels: record.config.labels,
            annotations: record.config.annotations,
        }),
        linux: Some(cri::LinuxPodSandboxStats {
            cpu: whole.as_ref().and_then(cpu),
            memory: whole.as_ref().and_then(memory),
            network,
            process: process.map(|count| cri::ProcessUsage { timestamp: at_ns, process_count: value(count) }),
            containers,
            io: whole.as_ref().and_then(io),
        }),
        windows: None,
    }
}

pub(super) async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Status::internal(format!("read statistics: {error}")))
}

impl Service {
    pub(super) async fn stats_of_container(&self, id: &str) -> Result<cri::ContainerStats, Status> {
        let node = self.node.clone();
        let container = node.container(id).map_err(status::of)?;
        let pod = node.pod(&container.pod_id).map_err(status::of)?;
        aside(move || of_container(&node, &pod, &container, &mut Look::new(&node)).0).await
    }

    /// Of running containers, as kubelet and crictl expect.
    pub(super) async fn stats_of_containers(
        &self,
        filter: cri::ContainerStatsFilter,
    ) -> Result<Vec<cri::ContainerStats>, Status> {
        let node = self.node.clone();
        aside(move || {
            let wanted = |record: &container::Record| {
                running(record).is_some()
                    && record.id.starts_with(&filter.id)
                    && record.pod_id.starts_with(&filter.pod_sandbox_id)
                    && view::labels_match(&record.config.labels, &filter.label_selector)
            };
            let mut look = Look::new(&node);
            let chosen = node.containers().into_iter().filter(|container| container.look(wanted));
            let stats = |container: Arc<Container>| {
                let pod = node.pod(&container.pod_id).ok()?;
                Some(of_container(&node, &pod, &container, &mut look).0)
            };
            chosen.filter_map(stats).collect()
        })
        .await
    }

    pub(super) async fn stats_of_pod(&self, id: &str) -> Result<cri::PodSandboxStats, Status> {
        let node = self.node.clone();
        let pod = node.pod(id).map_err(status::of)?;
        aside(move || of_pod(&node, &pod, &mut Look::new(&node))).await
    }

    /// Of ready pods.
    pub(super) async fn stats_of_pods(&self, filter: cri::PodSandboxStatsFilter) -> Result<Vec<cri::PodSandboxStats>, Status> {
        let node = self.node.clone();
        aside(move || {
            let mut look = Look::new(&node);
            let chosen = node.pods().into_iter().filter(|pod| {
                pod.look(|record| {
                    record.phase == Phase::Ready
                        && record.id.starts_with(&filter.id)
                        && view::labels_match(&record.config.labels, &filter.label_selector)
                })
            });
            chosen.map(|pod| of_pod(&node, &pod, &mut look)).collect()
        })
        .await
    }
}
