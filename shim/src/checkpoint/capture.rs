//! Capturing: containers are held still, CRIU writes them, what they had written to their layers is copied, and they go on whatever happened.

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
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use windlass_proto::{
    cri::NamespaceMode,
    monitor::{Capture, CheckpointRequest, ResumeRequest, frame::Body},
};

/// Time of a checkpoint whose caller names none.
pub(super) const DEFAULT_LIMIT: Duration = Duration::from_secs(600);

/// A container and the empty directory that gets its checkpoint.
pub(super) struct Wanted {
    pub(super) container: Arc<Container>,
    pub(super) directory: PathBuf,
}

/// How long it may take, and whether anybody waits for it.
pub(super) struct Bounds {
    pub(super) deadline: Instant,
    pub(super) cancelled: CancellationToken,
}

impl Bounds {
    /// Fails when the time is over or the caller has gone.
    pub(super) fn check(&self) -> Result<()> {
        if self.cancelled.is_cancelled() || Instant::now() >= self.deadline {
            return Err(Error::new(Kind::Deadline, "the time for it is over, or the caller has gone"));
        }
        Ok(())
    }

    /// Runs `work` unless the time is over or the caller has gone.
    pub(super) async fn hold<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            done = timeout_at(self.deadline, work) => {
                done.unwrap_or_else(|_| Err(Error::new(Kind::Deadline, "the time for the checkpoint is over")))
            }
            () = self.cancelled.cancelled() => Err(Error::new(Kind::Deadline, "the caller has gone")),
        }
    }
}

/// Runs an operation to its end, which is soon when the caller has gone: it always lets containers go on and takes back its files.
pub(super) async fn to_its_end<T: Send + 'static, F>(limit: Option<Duration>, work: impl FnOnce(Bounds) -> F) -> Result<T>
where
    F: Future<Output = Result<T>> + Send + 'static,
{
    let cancelled = CancellationToken::new();
    let _guard = cancelled.clone().drop_guard();
    let deadline = Instant::now() + limit.unwrap_or(DEFAULT_LIMIT);
    let done = tokio::spawn(work(Bounds { deadline, cancelled })).await;
    done.unwrap_or_else(|error| Err(Error::internal(format!("the operation ended early: {error}"))))
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
    bounds.hold(files::pack(from, to)).await
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
    let outcome = bounds.hold(write(node, &monitor, wanted, request)).await;
    // One that was refused because of another must not end that other one.
    let busy = matches!(&outcome, Err(error) if error.kind == Kind::Precondition);
    let resumed = if busy { Ok(()) } else { monitor.call(Body::Resume(ResumeRequest {})).await.map(drop) };
    outcome.and(resumed.map_err(|error| error.during("let the containers go on")))
}

async fn write(node: &Node, monitor: &Monitor, wanted: &[Wanted], request: CheckpointRequest) -> Result<()> {
    // The caller's bound ends it.
    monitor.call_within(Body::Checkpoint(request), DEFAULT_LIMIT.saturating_mul(10)).await?;
    for one in wanted {
        let upper = node.container_directory(&one.container.id);
        let (record, directory) = (one.container.record(), one.directory.clone());
        let copy = move || {
            files::describe(&record, &upper, &directory)?;
            diff::write(&upper.join("upper"), &directory.join(files::DIFF))
        };
        let copied = tokio::task::spawn_blocking(copy).await;
        copied.map_err(|error| Error::internal(format!("copy the writable layer: {error}")))??;
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
