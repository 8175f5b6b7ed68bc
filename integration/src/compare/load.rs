//! What many pods cost: memory, lists, statistics and the calls of a kubelet.

use super::{
    Peer, kubelet,
    life::{Running, down, up},
    lists,
    rival::{Ground, Kind, Network},
    table::Table,
};
use anyhow::Result;
use std::path::Path;

/// Pods while memory is weighed, while lists are timed, and under the calls of a kubelet: its default limit of a node.
const MEMORY_PODS: usize = 50;
const LIST_PODS: usize = 100;
const KUBELET_PODS: usize = 110;
/// Pods of the part `many`.
const MANY_PODS: usize = 1000;

/// Measures one runtime after the other; prints the table.
pub(super) fn measure(ground: &Ground<'_>, kinds: &[Kind], wants: &dyn Fn(&str) -> bool) -> Result<()> {
    let mut table = Table::default();
    for kind in kinds {
        let crowd = &mut Crowd::start(ground, *kind)?;
        let (fresh, _) = crowd.peer.rival.memory_kib();
        if wants("memory") {
            crowd.grow(MEMORY_PODS)?;
            memory(&crowd.peer, fresh, &mut table);
        }
        if wants("stats") {
            crowd.grow(LIST_PODS)?;
            lists::measure(&crowd.peer, LIST_PODS, &mut table);
            crowd.grow(KUBELET_PODS)?;
            kubelet::measure(&crowd.peer, &crowd.pods, &mut table);
        }
        crowd.end()?;
    }
    println!("\nMany pods, one container each, median (p95)\n\n{}", table.markdown());
    Ok(())
}

/// Lists and statistics of as many pods as no kubelet has by default.
pub(super) fn many(ground: &Ground<'_>, kinds: &[Kind]) -> Result<()> {
    let mut table = Table::default();
    for kind in kinds {
        let crowd = &mut Crowd::start(ground, *kind)?;
        crowd.grow(MANY_PODS)?;
        lists::measure(&crowd.peer, MANY_PODS, &mut table);
        let (daemon, _) = crowd.peer.rival.memory_kib();
        table.add("MiB of the daemon", kind.name(), daemon as f64 / 1024.0);
        crowd.end()?;
    }
    println!("\n{MANY_PODS} pods, one container each, median (p95)\n\n{}", table.markdown());
    Ok(())
}

/// A runtime and the pods that it runs.
struct Crowd {
    peer: Peer,
    logs: tempfile::TempDir,
    pods: Vec<Running>,
}

impl Crowd {
    fn start(ground: &Ground<'_>, kind: Kind) -> Result<Crowd> {
        Ok(Crowd { peer: Peer::start(ground, kind, Network::Own)?, logs: tempfile::tempdir()?, pods: Vec::new() })
    }

    fn grow(&mut self, count: usize) -> Result<()> {
        let logs: &Path = self.logs.path();
        while self.pods.len() < count {
            self.pods.push(up(&self.peer.client, &self.peer.image, logs, false, &mut |_, _| ())?);
        }
        Ok(())
    }

    /// Ends the pods. The runtime ends with its [`Rival`](super::rival::Rival).
    fn end(&mut self) -> Result<()> {
        self.pods.drain(..).try_for_each(|running| down(&self.peer.client, &running, &mut |_, _| ()))
    }
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
