//! StopPodSandbox and RemovePodSandbox. Both need no living monitor, succeed on what is absent, and may be called any number of times.

use super::{Phase, Pod, network, scope, watch};
use crate::{
    cgroup, container,
    error::{Kind, Result},
    events::EventKind,
    node::Node,
    nri, store,
};
use std::{sync::Arc, time::Duration};
use windlass_proto::monitor::{ShutdownRequest, frame::Body};

/// Longest wait for a monitor to end its pod before the daemon does it.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(20);
/// Longest wait for a monitor that has answered to leave its cgroup.
const LEAVE_LIMIT: Duration = Duration::from_secs(5);

/// Ends every process of the pod and gives its network back.
pub async fn stop(node: &Arc<Node>, pod: &Arc<Pod>) -> Result<()> {
    let _turn = pod.turn.lock().await;
    let ended = stop_processes(node, pod).await;
    tell_stopped(node, pod).await;
    network::release(node, pod).await?;
    ended
}

/// Removes a pod with its containers. It is stopped first if it still runs.
pub async fn remove(node: &Arc<Node>, pod: &Arc<Pod>) -> Result<()> {
    {
        let _turn = pod.turn.lock().await;
        let ended = stop_processes(node, pod).await;
        tell_stopped(node, pod).await;
        ended?;
        network::release(node, pod).await?;
    }
    for container in node.containers_of(&pod.id) {
        container::remove(node, &container).await?;
    }
    let _turn = pod.turn.lock().await;
    erase(node, pod).await?;
    node.forget_pod(&pod.id);
    nri::pod_removed(node, &pod.record()).await;
    node.tell(pod, &pod.id, EventKind::ContainerDeletedEvent);
    tracing::info!(pod = %pod.id, "pod removed");
    Ok(())
}

/// Takes back everything a pod has, however far its making came. The caller holds the pod's turn.
pub(super) async fn erase(node: &Arc<Node>, pod: &Arc<Pod>) -> Result<()> {
    stop_processes(node, pod).await?;
    network::release(node, pod).await?;
    network::gone(node, pod).await?;
    scope::end(node, pod).await?;
    store::remove_tree(&node.run_directory(&pod.id))?;
    store::remove_tree(&node.pod_directory(&pod.id))
}

/// An error is what could not be taken back; a further call tries that again.
async fn stop_processes(node: &Arc<Node>, pod: &Arc<Pod>) -> Result<()> {
    let was_ready = pod.phase() == Phase::Ready;
    let monitor = pod.monitor();
    pod.change_always(node, |record| record.phase = Phase::NotReady);
    if let Ok(monitor) = monitor {
        match monitor.call_within(Body::Shutdown(ShutdownRequest { keep_netns: true }), SHUTDOWN_LIMIT).await {
            Ok(_) => leave(node, pod).await,
            Err(error) if error.kind == Kind::Unavailable => {}
            Err(error) => tracing::warn!(pod = %pod.id, %error, "the monitor did not end the pod; killing it"),
        }
    }
    // Does what is left, and nothing when the monitor has done its work.
    let lost = watch::lost(node, pod).await;
    if was_ready {
        node.tell(pod, &pod.id, EventKind::ContainerStoppedEvent);
    }
    lost
}

/// Plugins of NRI hear of the containers' ends first; the network is there still.
async fn tell_stopped(node: &Arc<Node>, pod: &Pod) {
    for container in node.containers_of(&pod.id) {
        nri::container_stopped(node, &container).await;
    }
    nri::pod_stopped(node, pod).await;
}

/// Waits until the monitor has left its cgroup, by the kernel's word.
async fn leave(node: &Node, pod: &Pod) {
    let leaf = pod.look(|record| record.monitor_cgroup(node));
    match cgroup::left(&leaf, LEAVE_LIMIT).await {
        Ok(true) => {}
        Ok(false) => tracing::warn!(pod = %pod.id, "the monitor does not leave its cgroup; killing it"),
        Err(error) => tracing::warn!(pod = %pod.id, %error, "the end of the monitor is not seen; killing it"),
    }
}
