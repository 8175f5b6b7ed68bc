//! What many pods cost: memory, lists and statistics.

use super::{
    Peer,
    life::{Running, down, up},
    rival::{Ground, Kind, Network},
    table::Table,
};
use crate::client::Client;
use anyhow::Result;
use std::{
    path::Path,
    time::{Duration, Instant},
};
use windlass_proto::cri;

/// Pods while memory is weighed, and while lists are timed: kubelet's default limit of a node.
const MEMORY_PODS: usize = 50;
const LIST_PODS: usize = 100;
const KUBELET_PODS: usize = 110;
const LIST_ROUNDS: usize = 30;
/// How long the load of a kubelet is watched.
const KUBELET_SECONDS: u32 = 15;

/// Measures one runtime after the other; prints the table.
pub(super) fn measure(ground: &Ground<'_>, kinds: &[Kind], wants: &dyn Fn(&str) -> bool) -> Result<()> {
    let mut table = Table::default();
    for kind in kinds {
        let peer = Peer::start(ground, *kind, Network::Own)?;
        let logs = tempfile::tempdir()?;
        let mut pods = Vec::new();
        let (fresh, _) = peer.rival.memory_kib();
        more(&peer, logs.path(), MEMORY_PODS, &mut pods)?;
        memory(&peer, fresh, &mut table);
        if wants("stats") {
            more(&peer, logs.path(), LIST_PODS, &mut pods)?;
            lists(&peer, &mut table);
            more(&peer, logs.path(), KUBELET_PODS, &mut pods)?;
            kubelet(&peer, &pods, &mut table);
        }
        for running in &pods {
            down(&peer.client, running, &mut |_, _| ())?;
        }
        peer.rival.stop()?;
    }
    println!("\nMany pods, one container each, median (p95)\n\n{}", table.markdown());
    Ok(())
}

fn more(peer: &Peer, logs: &Path, count: usize, pods: &mut Vec<Running>) -> Result<()> {
    while pods.len() < count {
        pods.push(up(&peer.client, &peer.image, logs, false, &mut |_, _| ())?);
    }
    Ok(())
}

fn memory(peer: &Peer, fresh: u64, table: &mut Table) {
    let (daemon, helpers) = peer.rival.memory_kib();
    let name = peer.rival.kind.name();
    table.add("MiB of the daemon, fresh", name, fresh as f64 / 1024.0);
    table.add(&format!("MiB of the daemon at {MEMORY_PODS} pods"), name, daemon as f64 / 1024.0);
    table.add("KiB for a pod: helpers", name, helpers as f64 / MEMORY_PODS as f64);
    let all = helpers + daemon.saturating_sub(fresh);
    table.add("KiB for a pod: helpers and the daemon's growth", name, all as f64 / MEMORY_PODS as f64);
}

fn lists(peer: &Peer, table: &mut Table) {
    let name = peer.rival.kind.name();
    let call = |title: &str, table: &mut Table, call: &dyn Fn(&Client) -> Result<usize, tonic::Status>| {
        for round in 0..=LIST_ROUNDS {
            let begin = Instant::now();
            match call(&peer.client) {
                Ok(count) if count < LIST_PODS => return println!("{name}: {title}: gave {count} of {LIST_PODS}"),
                Ok(_) if round > 0 => table.add(title, name, begin.elapsed().as_secs_f64() * 1e3),
                Ok(_) => {}
                Err(status) => return println!("{name}: {title}: {}", status.message()),
            }
        }
    };
    call(&format!("ListContainers of {LIST_PODS}, ms"), table, &|client| {
        client.list_containers(cri::ListContainersRequest::default()).map(|reply| reply.containers.len())
    });
    call(&format!("ListContainerStats of {LIST_PODS}, ms"), table, &|client| {
        client.list_container_stats(cri::ListContainerStatsRequest::default()).map(|reply| reply.stats.len())
    });
}

/// What kubelet asks without events: both lists each second, and a status of each pod and container each minute.
fn kubelet(peer: &Peer, pods: &[Running], table: &mut Table) {
    let (cpu, begin) = (peer.rival.cpu_seconds(), Instant::now());
    let mut next = pods.iter().cycle();
    for second in 0..KUBELET_SECONDS {
        let _ = peer.client.list_pod_sandbox(cri::ListPodSandboxRequest::default());
        let _ = peer.client.list_containers(cri::ListContainersRequest::default());
        for running in next.by_ref().take(pods.len().div_ceil(60)) {
            let _ = peer.client.pod(&running.pod);
            let _ = peer.client.container(&running.container);
        }
        if second % 10 == 0 {
            let _ = peer.client.list_container_stats(cri::ListContainerStatsRequest::default());
        }
        let due = begin + Duration::from_secs(1) * (second + 1);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let share = (peer.rival.cpu_seconds() - cpu) * 100.0 / begin.elapsed().as_secs_f64();
    table.add(
        &format!("CPU percent under the calls of a kubelet with {KUBELET_PODS} pods, idle pods included"),
        peer.rival.kind.name(),
        share,
    );
}
