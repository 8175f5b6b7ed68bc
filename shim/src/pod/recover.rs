//! What a starting daemon does with the pods of the one before it: reconnect to the living, finish the dead, disturb nobody.

use super::{Phase, Pod, Record, network, run, stop, watch};
use crate::{
    checkpoint,
    container::{self, Container},
    error::{Kind, Result},
    monitor::Monitor,
    node::Node,
    store,
    telemetry::{self, Repair},
};
use serde::de::DeserializeOwned;
use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};
use windlass_proto::monitor::{ContainerState, DeleteRequest, StateRequest, container_state, frame::Body};

/// Longest wait at start for the end of pods that were not finished.
const UNFINISHED_LIMIT: Duration = Duration::from_secs(10);

/// Longest wait for one answer of a monitor that is found again.
const STATE_LIMIT: Duration = Duration::from_secs(15);

/// Before a monitor that could not be reached, but is there, is tried again.
const RECONNECT_PAUSES: [Duration; 3] = [Duration::from_millis(20), Duration::from_millis(200), Duration::from_secs(2)];

/// Loads every record and makes it agree with what runs. Fails, having changed nothing, if the system does not give all of them: what is not
/// known would be taken for unfinished.
pub async fn recover(node: &Arc<Node>) -> Result<()> {
    let pods = records::<Record>(&node.config.root.join("pods"))?;
    let containers = records::<container::Record>(&node.config.root.join("containers"))?;
    if let Err(error) = store::remove_tree(&node.config.root.join(checkpoint::SCRATCH)) {
        tracing::warn!(%error, "files of unfinished checkpoints not removed");
    }
    for (id, record) in pods {
        match record {
            Some(record) => node.insert_pod(Arc::new(Pod::new(record))),
            // Its making came as far as its directories.
            None if store::entries(&node.pod_directory(&id))?.iter().all(|name| name == "record.tmp") => {
                remove_directories(node, &id)
            }
            None => tracing::warn!(pod = %id, "pod directory without a readable record is left alone"),
        }
    }
    let mut unfinished_containers = Vec::new();
    for (id, record) in containers {
        match record {
            Some(record) if node.pod(&record.pod_id).is_ok() => {
                node.insert_container(Arc::new(Container::restored(node, record)))
            }
            // Its making did not come as far as a record, or its pod is gone. A monitor may be making it still.
            _ => unfinished_containers.push(id),
        }
    }
    let (mut unfinished, mut ready) = (Vec::new(), Vec::new());
    for pod in node.pods() {
        match pod.phase() {
            Phase::Creating => {
                node.forget_pod(&pod.id);
                unfinished.push(tokio::spawn(take_back(node.clone(), pod.clone())));
            }
            // Beside one another: a monitor that hangs keeps only its own pod.
            Phase::Ready => ready.push(reconnect(node, pod)),
            Phase::NotReady => {}
        }
    }
    futures_util::future::join_all(ready).await;
    // A plugin that hangs must not keep the node from serving; what is not done goes on.
    let _ = tokio::time::timeout(UNFINISHED_LIMIT, futures_util::future::join_all(unfinished)).await;
    for id in unfinished_containers {
        telemetry::repaired(Repair::UnfinishedContainer);
        if let Err(error) = store::remove_tree(&node.container_directory(&id)) {
            tracing::warn!(container = %id, %error, "unfinished container not removed");
        }
    }
    for pod in node.pods() {
        let record = pod.record();
        // The configuration was checked when the pod was run.
        let ports = network::port_mappings(&record.config).unwrap_or_default();
        if let Some(network) = record.network.as_ref().filter(|_| record.network_attached)
            && !node.network.adopt(record.network_kind, &pod.id, &record.name(), network, &ports)
        {
            tracing::error!(pod = %pod.id, addresses = ?network.ips, "another pod holds this pod's address or ports");
        }
    }
    let attached = |record: &Record| record.network_attached.then(|| (record.id.clone(), record.network_kind));
    node.network.reconcile(&node.pods().iter().filter_map(|pod| pod.look(attached)).collect());
    // Only now are the layers of every container held.
    node.images.collect_unused();
    Ok(())
}

/// What is in the directories below this one, by their names; none where there is no record yet, or no good one.
fn records<T: DeserializeOwned>(directory: &Path) -> Result<Vec<(String, Option<T>)>> {
    let record = |id: String| Ok((id.clone(), store::read(&directory.join(id).join("record.json"))?));
    store::entries(directory)?.into_iter().map(record).collect()
}

fn remove_directories(node: &Node, id: &str) {
    telemetry::repaired(Repair::UnfinishedPod);
    for directory in [node.run_directory(id), node.pod_directory(id)] {
        if let Err(error) = store::remove_tree(&directory) {
            tracing::warn!(pod = %id, %error, "unfinished pod not removed");
        }
    }
}

async fn take_back(node: Arc<Node>, pod: Arc<Pod>) {
    tracing::info!(pod = %pod.id, "taking back a pod that was not finished");
    let erased = {
        let _turn = pod.turn.lock().await;
        reconnect_for_shutdown(&node, &pod).await;
        telemetry::repaired(Repair::UnfinishedPod);
        stop::erase(&node, &pod).await
    };
    if let Err(error) = erased {
        tracing::error!(pod = %pod.id, %error, "unfinished pod not wholly taken back; it is tried again");
        // Not part of the start, which waits for this.
        tokio::spawn(run::take_back(node, pod));
    }
}

async fn reconnect_for_shutdown(node: &Node, pod: &Pod) {
    if let Ok((monitor, _events)) = Monitor::connect(&node.run_directory(&pod.id)).await {
        pod.set_monitor(Some(monitor));
    }
}

async fn reconnect(node: &Arc<Node>, pod: Arc<Pod>) {
    let _turn = pod.turn.lock().await;
    let pod = &pod;
    let mut outcome = connect(node, pod).await;
    for pause in RECONNECT_PAUSES {
        // A monitor that lives is not given up for what may be otherwise in a moment.
        match &outcome {
            Err(error) if error.kind != Kind::NotFound => {
                tracing::warn!(pod = %pod.id, %error, "the pod's monitor is asked again");
                tokio::time::sleep(pause).await;
                outcome = connect(node, pod).await;
            }
            _ => break,
        }
    }
    match outcome {
        Ok(()) => tracing::info!(pod = %pod.id, name = %pod.look(Record::name), "reconnected"),
        Err(error) => {
            tracing::warn!(pod = %pod.id, name = %pod.look(Record::name), %error, "the pod's monitor is gone");
            telemetry::repaired(Repair::LostMonitor);
            if let Err(error) = watch::lost(node, pod).await {
                tracing::error!(pod = %pod.id, %error, "not all of the pod is gone; its stop does the rest");
            }
        }
    }
}

async fn connect(node: &Arc<Node>, pod: &Arc<Pod>) -> Result<()> {
    let (monitor, events) = Monitor::connect(&node.run_directory(&pod.id)).await?;
    let (reply, descriptors) = monitor.call_within(Body::State(StateRequest {}), STATE_LIMIT).await?;
    // All monitors of one line of daemons have the same.
    descriptors.into_iter().for_each(|tree| node.images.adopt_layer_tree(tree));
    let mut states: HashMap<String, ContainerState> = match reply {
        Body::StateReply(state) => state.containers.into_iter().map(|state| (state.container_id.clone(), state)).collect(),
        _ => HashMap::new(),
    };
    pod.set_monitor(Some(monitor.clone()));
    let mut cut_off = Vec::new();
    for container in node.containers_of(&pod.id) {
        let exit = match states.remove(&container.id) {
            Some(state) if state.phase() == container_state::Phase::Exited => state.exit.map(container::exit_of),
            Some(state) if state.phase() != container_state::Phase::Running && container.is_running() => {
                cut_off.push(container);
                continue;
            }
            Some(_) if container.is_exited() => {
                tokio::spawn(container::end_again(container, monitor.clone()));
                continue;
            }
            Some(state) => {
                container.adopt(&state);
                continue;
            }
            None => container::recorded_exit(node, &pod.id, &container.id),
        };
        container.exited(node, exit.unwrap_or_else(|| container::Exit::unknown(crate::node::now_ns())));
    }
    for id in states.into_keys() {
        if let Err(error) = monitor.call(Body::Delete(DeleteRequest { container_id: id.clone() })).await {
            tracing::warn!(pod = %pod.id, container = %id, %error, "unfinished container not removed");
        }
    }
    watch::events(node.clone(), pod.clone(), monitor.clone(), events);
    for container in cut_off {
        let (node, monitor) = (node.clone(), monitor.clone());
        tokio::spawn(async move { container::resume_start(&node, &container, &monitor).await });
    }
    Ok(())
}
