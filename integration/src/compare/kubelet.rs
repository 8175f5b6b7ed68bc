//! The calls of a kubelet that has nothing to do, at their cadence, and what they cost the runtime.
//!
//! The cadence is that of kubelet 1.37 without events: pkg/kubelet/pleg/generic.go relists each second, pkg/kubelet/kubelet.go asks for
//! the runtime's status each five seconds (`updateRuntimeUp`) and syncs each pod about once a minute, which asks for the status of the pod
//! and of its containers; the eviction manager takes statistics each ten seconds, with the image file system; images are listed each half
//! minute (pkg/kubelet/images/image_gc_manager.go).

use super::{Peer, life::Running, table::Table};
use std::time::{Duration, Instant};
use windlass_proto::cri;

/// How long it is watched: whole rounds of all that is asked.
const SECONDS: u32 = 60;

/// Adds the rows: the same pods without a call, and under them.
pub(super) fn measure(peer: &Peer, pods: &[Running], table: &mut Table) {
    let name = peer.rival.kind.name();
    let idle = share(peer, SECONDS / 2, |_| ());
    table.add(&format!("CPU percent of one core: {} idle pods", pods.len()), name, idle);
    let mut next = pods.iter().cycle();
    let busy = share(peer, SECONDS, |second| ask(peer, second, next.by_ref().take(pods.len().div_ceil(60))));
    table.add("CPU percent of one core: the same under the calls of a kubelet", name, busy);
    table.add("CPU percent of one core: the calls alone", name, busy - idle);
}

/// Share of one core, in percent, that everything of the runtime takes in these seconds.
fn share(peer: &Peer, seconds: u32, mut each: impl FnMut(u32)) -> f64 {
    let (cpu, begin) = (peer.rival.cpu_seconds(), Instant::now());
    for second in 0..seconds {
        each(second);
        let due = begin + Duration::from_secs(1) * (second + 1);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    (peer.rival.cpu_seconds() - cpu) * 100.0 / begin.elapsed().as_secs_f64()
}

/// What a kubelet asks in one second. An answer of a runtime that refuses one of them costs what it costs.
fn ask<'a>(peer: &Peer, second: u32, synced: impl Iterator<Item = &'a Running>) {
    let client = &peer.client;
    let _ = client.list_pod_sandbox(cri::ListPodSandboxRequest::default());
    let _ = client.list_containers(cri::ListContainersRequest::default());
    for running in synced {
        let _ = client.pod(&running.pod);
        let _ = client.container(&running.container);
    }
    if second.is_multiple_of(5) {
        let _ = client.status(cri::StatusRequest::default());
    }
    if second.is_multiple_of(10) {
        let _ = client.list_container_stats(cri::ListContainerStatsRequest::default());
        let _ = client.image_fs_info(cri::ImageFsInfoRequest::default());
    }
    if second.is_multiple_of(30) {
        let _ = client.list_images(cri::ListImagesRequest::default());
    }
}
