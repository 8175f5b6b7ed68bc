//! Start, stop, removal and log reopening of a container that exists.

use super::{Container, Exit, State};
use crate::{
    checkpoint,
    error::{Error, Kind, Result},
    events::EventKind,
    monitor::Monitor,
    node::{Node, now_ns},
    nri,
    pod::Phase,
    store,
    telemetry::{Clock, Phase as Timed, trace},
};
use std::{sync::Arc, time::Duration};
use tracing::Instrument;
use windlass_proto::monitor::{
    DeleteRequest, KillRequest, ReopenLogRequest, SignalRequest, StartRequest, StateRequest, container_state, frame::Body,
};

/// Longest wait for a killed container to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// Longest wait for a start: hooks of plugins and devices may take as long as they say, and a checkpoint is as large as its memory was.
const START_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Between two looks whether a killed container is gone.
const GONE_PAUSE: Duration = Duration::from_millis(20);

/// Exit code of a container whose program could not be started.
const START_ERROR_CODE: i32 = 128;

/// Opens the gate. A failure leaves the container exited with code 128, reason `StartError` and the cause as its message.
pub async fn start(node: &Node, container: &Container) -> Result<()> {
    let _turn = container.turn.lock().await;
    let _hold = node.nri.hold().await;
    let pid = match container.look(|record| record.state.clone()) {
        State::Created { pid } => pid,
        State::Running { .. } => return Err(Error::precondition(format!("container {} is running already", container.id))),
        State::Exited { .. } => return Err(Error::precondition(format!("container {} has exited", container.id))),
    };
    let monitor = node.pod(&container.pod_id)?.monitor()?;
    let started_at_ns = now_ns();
    let starting = container.ending.start(|exit| container.publish_end(node, exit));
    if let Err(error) = nri::start_container(node, container).await {
        let error = error.during(format_args!("start container {}", container.look(|record| record.name().to_owned())));
        starting.failed(|| publish_failure(node, container, &error));
        // It waits at its gate.
        let _ = monitor.call(Body::Kill(KillRequest { container_id: container.id.clone() })).await;
        return Err(error);
    }
    // Published before the gate opens, so that the exit of a short program always finds a running container.
    container.change(|record| record.state = State::Running { pid, started_at_ns })?;
    let clock = Clock::start(Timed::ContainerStart);
    match monitor.call_within(Body::Start(StartRequest { container_id: container.id.clone() }), START_LIMIT).await {
        Ok(_) => {
            clock.done();
            if container.look(|record| record.from_checkpoint) {
                find_process(container, &monitor).await;
                // What its memory was, and takes as much.
                let images = node.container_directory(&container.id).join(checkpoint::IMAGES);
                if let Err(error) = store::remove_tree(&images) {
                    tracing::warn!(container = %container.id, %error, "files of a restored checkpoint not removed");
                }
            }
            tracing::info!(pod = %container.pod_id, container = %container.id, pid, "container started");
            container.tell_started(node);
            drop(starting);
            nri::container_started(node, container).await;
            Ok(())
        }
        Err(error) => {
            let error = error.during(format_args!("start container {}", container.look(|record| record.name().to_owned())));
            if certain(container, &monitor, &error).await {
                starting.failed(|| publish_failure(node, container, &error));
            }
            Err(error)
        }
    }
}

/// Whether a start that has failed with this error has left no program that runs. Where that is not the monitor's own word it is made so.
async fn certain(container: &Container, monitor: &Monitor, error: &Error) -> bool {
    match error.kind {
        // The pod's own watcher kills what there is, and publishes.
        Kind::Unavailable => false,
        Kind::Deadline => match kill(container, monitor).await {
            Ok(()) => true,
            Err(why) => {
                tracing::error!(container = %container.id, error = %why, "a start without an answer: its program may run");
                false
            }
        },
        _ => true,
    }
}

/// Kills a container and waits until its monitor sees nothing of it any more, whatever its record says.
async fn kill(container: &Container, monitor: &Monitor) -> Result<()> {
    let gone = async {
        loop {
            match monitor.call(Body::Kill(KillRequest { container_id: container.id.clone() })).await {
                Err(error) if matches!(error.kind, Kind::Precondition | Kind::NotFound) => return Ok(()),
                outcome => outcome?,
            };
            let (reply, _) = monitor.call(Body::State(StateRequest {})).await?;
            let Body::StateReply(state) = reply else { return Ok(()) };
            let own = state.containers.iter().find(|one| one.container_id == container.id);
            if own.is_none_or(|own| own.phase() == container_state::Phase::Exited) {
                return Ok(());
            }
            tokio::time::sleep(GONE_PAUSE).await;
        }
    };
    let late = || format!("container {} did not end within {} s of being killed", container.id, KILL_LIMIT.as_secs());
    tokio::time::timeout(KILL_LIMIT, gone).await.map_err(|_| Error::new(Kind::Deadline, late()))?
}

/// Kills a container that runs though it has been said to have ended.
pub async fn end_again(container: Arc<Container>, monitor: Arc<Monitor>) {
    tracing::warn!(container = %container.id, "it runs, and has been said to have ended: killing it");
    if let Err(error) = kill(&container, &monitor).await {
        tracing::error!(container = %container.id, %error, "a container that was said to have ended runs on");
    }
}

/// A start whose daemon was killed in it goes on: the record says Running, the monitor that no program has been seen to run. Nobody waits
/// for it, as it may take long.
pub async fn resume_start(node: &Node, container: &Container, monitor: &Monitor) {
    let _turn = container.turn.lock().await;
    if !container.is_running() || node.container(&container.id).is_err() {
        return;
    }
    let starting = container.ending.start(|exit| container.publish_end(node, exit));
    match monitor.call_within(Body::Start(StartRequest { container_id: container.id.clone() }), START_LIMIT).await {
        Ok(_) => {
            tracing::info!(pod = %container.pod_id, container = %container.id, "a start that was cut off has come to its end")
        }
        // It runs since it was looked at, or its end is on its way here.
        Err(error) if error.kind == Kind::Precondition => {}
        Err(error) => {
            if certain(container, monitor, &error).await {
                starting.failed(|| publish_failure(node, container, &error));
            }
            return;
        }
    }
    find_process(container, monitor).await;
}

/// A program that could not be started is a container that has exited.
fn publish_failure(node: &Node, container: &Container, error: &Error) {
    let exit = Exit { code: START_ERROR_CODE, oom_killed: false, finished_at_ns: now_ns() };
    let state = State::Exited { started_at_ns: 0, exit, reason: "StartError".into(), message: error.message.clone() };
    container.change_always(|record| record.state = state.clone());
    container.tell_stopped(node);
}

/// Asks which process the container's first is: a restored one is another than the one that waited to restore it.
async fn find_process(container: &Container, monitor: &Monitor) {
    match monitor.call(Body::State(StateRequest {})).await {
        Ok((Body::StateReply(state), _)) => {
            let own = state.containers.iter().find(|one| one.container_id == container.id);
            own.into_iter().for_each(|state| container.adopt(state));
        }
        other => {
            tracing::warn!(container = %container.id, outcome = ?other.map(drop), "process of a container not known")
        }
    }
}

/// Stops a container: its stop signal, then after `timeout` the kernel's kill of its whole cgroup. A later call with a shorter timeout
/// shortens the wait, because each call kills at its own deadline. The signal is sent once, as many programs take a second one for haste.
pub async fn stop(node: &Arc<Node>, container: &Arc<Container>, timeout: Duration) -> Result<()> {
    end(node, container, timeout).await?;
    let (node, container) = (node.clone(), container.clone());
    // Told to all plugins also when the caller goes away now.
    let told = async move { nri::container_stopped(&node, &container).await };
    tokio::spawn(told.in_current_span()).await.map_err(|error| Error::internal(format!("tell plugins of the end: {error}")))
}

async fn end(node: &Arc<Node>, container: &Arc<Container>, timeout: Duration) -> Result<()> {
    if container.is_exited() {
        return Ok(());
    }
    let monitor = node.pod(&container.pod_id)?.monitor();
    let monitor = match monitor {
        Ok(monitor) => monitor,
        // The pod's own watcher kills and publishes; this call only waits for it.
        Err(error) => return wait(container).await.map_err(|_| error),
    };
    let created = container.look(|record| matches!(record.state, State::Created { .. }));
    if !timeout.is_zero() && !created {
        let waiting = tracing::info_span!(target: trace::TARGET, "wait for the end", container = %container.id);
        if send_stop_signal(container, &monitor, timeout).await
            && tokio::time::timeout(timeout, container.wait_exited()).instrument(waiting).await.is_ok()
        {
            return Ok(());
        }
    }
    match monitor.call(Body::Kill(KillRequest { container_id: container.id.clone() })).await {
        Ok(_) => {}
        Err(error) if matches!(error.kind, Kind::Precondition | Kind::NotFound | Kind::Unavailable) => {}
        Err(error) => return Err(error.during(format_args!("stop container {}", container.id))),
    }
    wait(container).await
}

/// Sends the stop signal, unless an earlier stop has, by this daemon or one before it; waits `limit` for one that is about to. `false`: it
/// cannot be sent.
async fn send_stop_signal(container: &Container, monitor: &Monitor, limit: Duration) -> bool {
    let Ok(_sending) = tokio::time::timeout(limit, container.stopping.lock()).await else { return false };
    let (sent, signal) = container.look(|record| (record.stop_signal_sent, record.stop_signal));
    if sent {
        return true;
    }
    match monitor.call(Body::Signal(SignalRequest { container_id: container.id.clone(), signal })).await {
        Ok(_) => {
            container.change_always(|record| record.stop_signal_sent = true);
            return true;
        }
        Err(error) if matches!(error.kind, Kind::Precondition | Kind::NotFound) => {}
        Err(error) => tracing::warn!(container = %container.id, %error, "stop signal not sent"),
    }
    false
}

async fn wait(container: &Container) -> Result<()> {
    tokio::time::timeout(KILL_LIMIT, container.wait_exited()).await.map_err(|_| {
        Error::new(
            Kind::Deadline,
            format!("container {} did not end within {} s of being killed", container.id, KILL_LIMIT.as_secs()),
        )
    })
}

/// Removes a container, killing it first if it lives. Concurrent calls wait for one another and all succeed.
pub async fn remove(node: &Arc<Node>, container: &Arc<Container>) -> Result<()> {
    // Before its turn: a start that hangs ends with it.
    if container.is_running() {
        stop(node, container, Duration::ZERO).await?;
    }
    let _turn = container.turn.lock().await;
    if node.container(&container.id).is_err() {
        return Ok(());
    }
    stop(node, container, Duration::ZERO).await?;
    if let Ok(pod) = node.pod(&container.pod_id) {
        // One that an earlier daemon saw end was not read yet, and its cgroup goes now.
        node.stats.note_ended(node, &pod, &container.id, &mut pod.ended());
    }
    if let Ok(monitor) = node.pod(&container.pod_id).and_then(|pod| pod.monitor()) {
        match monitor.call(Body::Delete(DeleteRequest { container_id: container.id.clone() })).await {
            Ok(_) => {}
            Err(error) if matches!(error.kind, Kind::Unavailable | Kind::NotFound) => {}
            Err(error) => return Err(error.during(format_args!("remove container {}", container.id))),
        }
    }
    let _ = std::fs::remove_file(node.run_directory(&container.pod_id).join("exits").join(format!("{}.json", container.id)));
    let removed = nri::to_be_removed(node, container);
    store::remove_tree(&node.container_directory(&container.id))?;
    forget(node, container);
    if let Some((pod, shown)) = removed {
        nri::container_removed(node, pod, shown).await;
    }
    if let Ok(pod) = node.pod(&container.pod_id) {
        node.tell(&pod, &container.id, EventKind::ContainerDeletedEvent);
    }
    tracing::info!(pod = %container.pod_id, container = %container.id, "container removed");
    Ok(())
}

/// Drops it from the lists. What it used stays its pod's.
fn forget(node: &Node, container: &Container) {
    let Ok(pod) = node.pod(&container.pod_id) else {
        node.forget_container(&container.id);
        return node.stats.forget(&container.id);
    };
    let removed_ns = {
        let mut ended = pod.ended();
        node.forget_container(&container.id);
        ended.removed(&container.id)
    };
    node.stats.forget(&container.id);
    if pod.look(|record| record.phase == Phase::Ready && record.removed_cpu_ns != removed_ns)
        && let Err(error) = pod.change(node, |record| record.removed_cpu_ns = removed_ns)
    {
        tracing::warn!(pod = %pod.id, %error, "processor time of a removed container not written");
    }
}

/// Makes the container write to a new file at its log path, after kubelet has moved the old one away.
pub async fn reopen_log(node: &Node, container: &Container) -> Result<()> {
    if !container.is_running() {
        return Err(Error::precondition(format!("container {} is not running", container.id)));
    }
    let monitor = node.pod(&container.pod_id)?.monitor()?;
    let request = Body::ReopenLog(ReopenLogRequest { container_id: container.id.clone() });
    monitor
        .call(request)
        .await
        .map(|_| ())
        .map_err(|error| error.during(format_args!("reopen log of container {}", container.id)))
}
