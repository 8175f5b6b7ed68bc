//! Capturing: containers are held still, CRIU writes them, what they had written to their layers is copied, and they go on whatever happened.

use super::bounds::{Bounds, to_its_end};
use super::{SCRATCH, diff, files, program};
use crate::{
    container::{Container, State},
    error::{Error, Kind, Result},
    monitor::Monitor,
    node::{Node, new_id},
    pod::{Phase, Pod},
    store,
};
use std::{
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use windlass_proto::{
    cri::NamespaceMode,
    monitor::{Capture, CheckpointRequest, ResumeRequest, frame::Body},
};

/// The bounds of the operation end a capture, not the monitor's answer.
const UNBOUNDED: Duration = Duration::from_secs(24 * 3600);

/// A container and the empty directory that gets its checkpoint.
pub(super) struct Wanted {
    pub(super) container: Arc<Container>,
    pub(super) directory: PathBuf,
}

/// Writes a running container's checkpoint to the new archive `location`.
pub async fn container(node: Arc<Node>, container: Arc<Container>, location: PathBuf, limit: Option<Duration>) -> Result<()> {
    let name = container.look(|record| record.name().to_owned());
    to_its_end(limit, move |bounds| async move { archive(&node, container, &location, &bounds).await })
        .await
        .map_err(|error| error.during(format_args!("checkpoint container {name}")))
}

async fn archive(node: &Node, container: Arc<Container>, location: &Path, bounds: &Bounds) -> Result<()> {
    check_location(location)?;
    let pod = node.pod(&container.pod_id)?;
    let scratch = Scratch::make(node)?;
    let wanted = [Wanted { container, directory: scratch.0.clone() }];
    capture(node, &pod, &wanted, bounds).await?;
    let (from, to) = (scratch.0.clone(), location.to_owned());
    files::pack(from, to, bounds).await
}

fn check_location(location: &Path) -> Result<()> {
    let shown = location.display();
    if !location.is_absolute() || location.file_name().is_none() {
        return Err(Error::invalid(format!("location {shown:?} is not the absolute path of a file")));
    }
    if location.symlink_metadata().is_ok() {
        return Err(Error::invalid(format!("location {shown}: there is a file already")));
    }
    match location.parent() {
        Some(parent) if parent.is_dir() => Ok(()),
        _ => Err(Error::invalid(format!("location {shown}: its directory does not exist"))),
    }
}

/// A directory that goes with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn make(node: &Node) -> Result<Scratch> {
        let path = node.config.root.join(SCRATCH).join(new_id()?);
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(|error| Error::io(format_args!("create {}", path.display()), error))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = store::remove_tree(&self.0) {
            tracing::warn!(%error, "files of a checkpoint not removed");
        }
    }
}

/// Writes the checkpoints of running containers of one pod, all of one moment. They run again when this returns.
pub(super) async fn capture(node: &Node, pod: &Pod, wanted: &[Wanted], bounds: &Bounds) -> Result<()> {
    if pod.phase() != Phase::Ready {
        return Err(Error::precondition(format!("pod {} is not ready", pod.id)));
    }
    for one in wanted {
        check(node, pod, &one.container)?;
    }
    let criu = program(&node.config.checkpoint)?;
    let monitor = pod.monitor()?;
    let captures = wanted
        .iter()
        .map(|one| Capture { container_id: one.container.id.clone(), directory: one.directory.to_string_lossy().into_owned() });
    let request = CheckpointRequest { criu: criu.to_string_lossy().into_owned(), containers: captures.collect() };
    let outcome = write(node, &monitor, wanted, request, bounds).await;
    // One that was refused because of another must not end that other one.
    let busy = matches!(&outcome, Err(error) if error.kind == Kind::Precondition);
    let resumed = if busy { Ok(()) } else { monitor.call(Body::Resume(ResumeRequest {})).await.map(drop) };
    outcome.and(resumed.map_err(|error| error.during("let the containers go on")))
}

async fn write(node: &Node, monitor: &Monitor, wanted: &[Wanted], request: CheckpointRequest, bounds: &Bounds) -> Result<()> {
    bounds.hold(monitor.call_within(Body::Checkpoint(request), UNBOUNDED)).await?;
    for one in wanted {
        let bundle = node.container_directory(&one.container.id);
        let (record, directory) = (one.container.record(), one.directory.clone());
        let copy = move |stop| {
            files::describe(&record, &bundle, &directory)?;
            diff::write(&bundle.join("upper"), &directory.join(files::DIFF), stop)
        };
        bounds.blocking(copy).await?;
    }
    Ok(())
}

/// Refuses what cannot be captured, or could not be restored.
fn check(node: &Node, pod: &Pod, container: &Container) -> Result<()> {
    let record = container.record();
    let refuse = |why: &str| Err(Error::precondition(format!("container {} {why}", container.id)));
    if record.pod_id != pod.id {
        return Err(Error::invalid(format!("container {} is none of pod {}", container.id, pod.id)));
    }
    if !matches!(record.state, State::Running { .. }) {
        return refuse("is not running");
    }
    let handler = pod.look(|pod| pod.runtime_handler.clone());
    if node.config.handler(&handler).is_none_or(|program| !program.as_os_str().is_empty()) {
        return refuse(&format!("has the runtime handler {handler:?}: only the native one makes checkpoints"));
    }
    let options = record.namespaces(&pod.record());
    if options.pid() != NamespaceMode::Container {
        return refuse("shares its pid namespace (namespace_options.pid): only one with its own can be restored");
    }
    if crate::pod::userns::of(&options)?.is_some() {
        return refuse("has a user namespace (namespace_options.userns_options), which is not built for checkpoints");
    }
    Ok(())
}
