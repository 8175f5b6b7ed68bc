//! The systemd scope of a pod, and the slice that was made for it alone. Without a scope there is nothing to do here but for the parent.

use super::{Pod, Record};
use crate::{
    cgroup,
    error::{Error, Result},
    node::Node,
    telemetry::{Clock, Phase as Timed},
};
use std::{
    path::Path,
    time::{Duration, Instant},
};
use tokio::process::Child;

/// Longest wait for systemd to find that a scope is empty, before it is told to stop it.
const BY_ITSELF: Duration = Duration::from_secs(2);

/// Starts the pod's scope with its monitor in it.
pub(super) async fn start(node: &Node, pod: &Pod, monitor: &Child) -> Result<()> {
    let record = pod.record();
    if record.scope.is_empty() {
        return Ok(());
    }
    let timed = Clock::start(Timed::PodScope);
    let systemd = node.driver.systemd().ok_or_else(|| Error::internal("a scope without systemd"))?;
    let pid = monitor.id().ok_or_else(|| Error::internal("the monitor has ended"))?;
    systemd.start_scope(&record.scope, record.slice(), &format!("Windlass pod {}", record.name()), pid).await?;
    // Where the monitor went is the kernel's word; the rest of the pod is made beside it.
    let (found, wanted) = (cgroup::of_process(pid)?, record.cgroup());
    if found != wanted {
        return Err(Error::internal(format!("systemd has {} at {found}, not at {wanted}", record.scope)));
    }
    timed.done();
    Ok(())
}

/// Has systemd keep the limits that were written into the pod's scope. They hold already, whatever comes of this.
pub(super) async fn keep_limits(node: &Node, pod: &Pod, cgroup: &Path) {
    let scope = pod.look(|record| record.scope.clone());
    if let Some(systemd) = node.driver.systemd().filter(|_| !scope.is_empty())
        && let Err(error) = systemd.keep_limits(&scope, cgroup).await
    {
        tracing::warn!(pod = %pod.id, %error, "limits of the pod hold until systemd reads its units again");
    }
}

/// Waits until the scope of an ended pod is gone, and removes the parent that was made for the pod.
pub(super) async fn end(node: &Node, pod: &Pod) -> Result<()> {
    let record = pod.record();
    if !record.scope.is_empty() {
        end_scope(node, &record).await?;
    }
    if record.made_parent {
        let removed = if record.scope.is_empty() {
            let directory = node.tree.directory(&record.cgroup_parent);
            cgroup::remove(&directory).map_err(|error| Error::io(format_args!("remove {}", directory.display()), error))
        } else {
            cgroup::stop_slice(&node.driver, &node.tree, &record.cgroup_parent).await
        };
        if let Err(error) = removed {
            tracing::warn!(pod = %pod.id, %error, "cgroup parent of the pod not removed");
        }
    }
    Ok(())
}

/// A scope ends by itself when its last process has, and its directory goes with it. One that does not is stopped.
async fn end_scope(node: &Node, record: &Record) -> Result<()> {
    let directory = node.tree.directory(&record.cgroup());
    if gone(&directory, BY_ITSELF).await {
        return Ok(());
    }
    tracing::warn!(pod = %record.id, scope = %record.scope, "the scope does not end by itself; stopping it");
    if let Some(systemd) = node.driver.systemd() {
        systemd.stop(&record.scope).await?;
    }
    cgroup::remove(&directory).map_err(|error| Error::io(format_args!("remove {}", directory.display()), error))
}

async fn gone(directory: &Path, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while directory.exists() {
        if Instant::now() > deadline {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    true
}
