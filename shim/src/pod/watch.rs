//! What a monitor says on its own: exits and memory kills; and what its silence means.

use super::{Phase, Pod};
use crate::{
    cgroup,
    container::{self, Exit},
    error::{Error, Result},
    events::EventKind,
    monitor::Monitor,
    node::{Node, now_ns},
    telemetry::{self, Repair},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::mpsc;
use windlass_proto::monitor::frame::Body;

/// Longest wait for processes that were killed because their monitor is gone.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// Follows a monitor until its connection ends.
pub(super) fn events(node: Arc<Node>, pod: Arc<Pod>, monitor: Arc<Monitor>, mut events: mpsc::Receiver<Body>) {
    tokio::spawn(async move {
        while let Some(event) = events.recv().await {
            match event {
                Body::ContainerExited(event) => {
                    if let (Ok(container), Some(exit)) = (node.container(&event.container_id), event.exit) {
                        container.exited(&node, container::exit_of(exit));
                    }
                }
                Body::ExecExited(event) => {
                    if let Some(exit) = event.exit {
                        container::exec::finished(&event.exec_id, container::exit_of(exit));
                    }
                }
                Body::OomKilled(event) => {
                    telemetry::OOM_KILLS.add(1);
                    tracing::warn!(pod = %pod.id, container = %event.container_id, kills = event.count, "process killed for memory");
                }
                other => tracing::warn!(pod = %pod.id, ?other, "unexpected message from the monitor"),
            }
        }
        drop(monitor);
        container::exec::lost();
        if pod.phase() == Phase::Ready {
            let _turn = pod.turn.lock().await;
            if pod.phase() == Phase::Ready && pod.monitor().is_err() {
                tracing::error!(pod = %pod.id, "the pod's monitor is gone; killing its containers");
                telemetry::repaired(Repair::LostMonitor);
                if let Err(error) = lost(&node, &pod).await {
                    tracing::error!(pod = %pod.id, %error, "not all of the pod is gone; its stop does the rest");
                }
                node.tell(&pod, &pod.id, EventKind::ContainerStoppedEvent);
            }
        }
    });
}

/// The monitor is gone: kills every process of the pod, and says of the containers whose processes have ended that they have. The caller
/// holds the pod's turn. Whatever fails, the rest is done; the first failure is the error, and a further call does what is left.
pub(super) async fn lost(node: &Node, pod: &Pod) -> Result<()> {
    pod.set_monitor(None);
    let record = pod.record();
    let containers = node.containers_of(&pod.id);
    let own: Vec<_> = containers.iter().map(|container| record.container_cgroup(node, &container.id)).collect();
    let leaves = || [record.init_cgroup(node), record.monitor_cgroup(node)].into_iter().chain(own.iter().cloned());
    // A monitor that has not come to its leaf is in the scope itself, which is the pod's alone.
    let killed = if record.scope.is_empty() { leaves().collect() } else { vec![node.tree.directory(&record.cgroup())] };
    let mut outcome = Ok(());
    let mut living = Vec::new();
    for cgroup in killed {
        if let Err(error) = cgroup::kill(&cgroup, KILL_LIMIT).await {
            outcome = outcome.and(Err(Error::io(format_args!("kill cgroup {}", cgroup.display()), error)));
            living.push(cgroup);
        }
    }
    for (container, leaf) in containers.iter().zip(&own) {
        if !living.iter().any(|cgroup| leaf.starts_with(cgroup)) {
            let exit = container::recorded_exit(node, &pod.id, &container.id).unwrap_or_else(|| Exit::unknown(now_ns()));
            container.exited(node, exit);
        }
    }
    for leaf in leaves() {
        let removed = cgroup::remove(&leaf);
        outcome = outcome.and(removed.map_err(|error| Error::io(format_args!("remove cgroup {}", leaf.display()), error)));
    }
    pod.change_always(node, |record| record.phase = Phase::NotReady);
    node.stats.ended(&pod.id);
    outcome
}
