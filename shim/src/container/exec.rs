//! ExecSync: a process beside the container's own, its output collected within bounds, its whole cgroup killed at the deadline.

use super::{Container, Exit};
use crate::{
    error::{Error, Kind, Result},
    monitor::Monitor,
    node::{Node, new_id},
    streaming::Wanted,
};
use rustix::fd::OwnedFd;
use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};
use tokio::{io::AsyncReadExt, net::unix::pipe, sync::oneshot};
use windlass_proto::monitor::{ExecRequest, KillExecRequest, frame::Body};

/// Most output of both streams together. Kubelet takes 16 MiB for the whole reply (cri-client), framing included.
const OUTPUT_LIMIT_BYTES: usize = 15 << 20;
/// How long output is read after the process has ended, because a process it left behind may hold the pipe open.
const DRAIN_LIMIT: Duration = Duration::from_millis(300);
/// How long the killed processes of an exec may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What an exec gave.
#[derive(Debug, Default)]
pub struct Output {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
}

/// Who waits for an exec's end, and the monitor that will tell it.
type Waiter = (oneshot::Sender<Exit>, Arc<Monitor>);

/// Execs that have not ended, as far as this daemon knows.
static WAITING: LazyLock<Mutex<HashMap<String, Waiter>>> = LazyLock::new(Mutex::default);
const POISON: &str = "never poisoned: no panic while held";

/// The monitor says that an exec has ended.
pub fn finished(exec_id: &str, exit: Exit) {
    if let Some((waiter, _)) = WAITING.lock().expect(POISON).remove(exec_id) {
        let _ = waiter.send(exit);
    }
}

/// A monitor is gone: nobody will tell how its execs ended.
pub fn lost() {
    WAITING.lock().expect(POISON).retain(|_, (_, monitor)| !monitor.is_closed());
}

/// Forgets the waiter however the call ends. An exec whose caller goes away before its end has nobody to run for and is killed.
struct Waiting(String);

impl Drop for Waiting {
    fn drop(&mut self) {
        let left = WAITING.lock().expect(POISON).remove(&self.0);
        if let (Some((_, monitor)), Ok(runtime)) = (left, tokio::runtime::Handle::try_current()) {
            let id = std::mem::take(&mut self.0);
            runtime.spawn(async move { kill(&monitor, &id).await });
        }
    }
}

/// An exec that runs: where its streams are, and when it ends.
pub(super) struct Started {
    pub(super) monitor: Arc<Monitor>,
    pub(super) id: String,
    /// In the order of the protocol: stdin, stdout, stderr, those that were wanted; with a terminal its master alone.
    pub(super) descriptors: std::vec::IntoIter<OwnedFd>,
    /// Fails when the pod ends first.
    pub(super) exit: oneshot::Receiver<Exit>,
    _waiting: Waiting,
}

impl Started {
    /// Kills everything that the exec has started and that has not left its cgroup.
    pub(super) async fn kill(&self) {
        kill(&self.monitor, &self.id).await;
    }
}

async fn kill(monitor: &Monitor, id: &str) {
    let kill = Body::KillExec(KillExecRequest { exec_id: id.to_owned(), signal: 0 });
    match monitor.call_within(kill, KILL_LIMIT).await {
        Ok(_) => {}
        Err(error) if matches!(error.kind, Kind::NotFound | Kind::Unavailable) => {}
        Err(error) => tracing::warn!(exec = %id, %error, "exec not killed"),
    }
}

/// Starts `command` beside the container's own process, with these streams.
pub(super) async fn start(node: &Node, container: &Container, command: Vec<String>, wanted: Wanted) -> Result<Started> {
    if command.is_empty() {
        return Err(Error::invalid("cmd is empty"));
    }
    if !container.is_running() {
        return Err(Error::precondition(format!("container {} is not running", container.id)));
    }
    let monitor = node.pod(&container.pod_id)?.monitor()?;
    let id = new_id()?[..16].to_owned();
    let (sender, exit) = oneshot::channel();
    WAITING.lock().expect(POISON).insert(id.clone(), (sender, monitor.clone()));
    let waiting = Waiting(id.clone());
    let process = super::spec::exec_process(&node.container_directory(&container.id), command, wanted.tty)?;
    let request = ExecRequest {
        container_id: container.id.clone(),
        exec_id: id.clone(),
        process,
        stdin: wanted.stdin,
        stdout: wanted.stdout,
        stderr: wanted.stderr,
        terminal: wanted.tty,
    };
    let during = |error: Error| error.during(format_args!("exec in container {}", container.id));
    let (_, descriptors) = monitor.call(Body::Exec(request)).await.map_err(during)?;
    Ok(Started { monitor, id, descriptors: descriptors.into_iter(), exit, _waiting: waiting })
}

/// Runs `command` in the container. `timeout` `None` waits for ever; at its end the exec is killed and the error is `Deadline`.
pub async fn sync(node: &Node, container: &Container, command: Vec<String>, timeout: Option<Duration>) -> Result<Output> {
    let first = command.first().cloned().unwrap_or_default();
    let wanted = Wanted { stdout: true, stderr: true, ..Wanted::default() };
    let mut started = start(node, container, command, wanted).await?;
    let (Some(stdout), Some(stderr)) = (started.descriptors.next(), started.descriptors.next()) else {
        return Err(Error::internal("the monitor gave no pipes"));
    };
    let mut output = Output::default();
    let run = collect(&mut output, stdout, stderr, &mut started.exit);
    let result = match timeout {
        Some(limit) => tokio::time::timeout(limit, run).await,
        None => Ok(run.await),
    };
    match result {
        Ok(Ok(exit)) => {
            output.exit_code = exit.code;
            Ok(output)
        }
        Ok(Err(error)) => Err(error.during(format_args!("exec in container {}", container.id))),
        Err(_) => {
            let end = async {
                started.kill().await;
                // Its caller may look at once whether it is gone.
                if !started.exit.is_terminated() {
                    let _ = (&mut started.exit).await;
                }
            };
            let _ = tokio::time::timeout(KILL_LIMIT, end).await;
            let seconds = timeout.unwrap_or_default().as_secs_f64();
            Err(Error::new(Kind::Deadline, format!("exec {first:?} did not end within {seconds} s and was killed")))
        }
    }
}

async fn collect(output: &mut Output, stdout: OwnedFd, stderr: OwnedFd, exit: &mut oneshot::Receiver<Exit>) -> Result<Exit> {
    let pipe = |descriptor: OwnedFd| {
        rustix::io::ioctl_fionbio(&descriptor, true).map_err(|error| Error::io("exec pipe", error))?;
        pipe::Receiver::from_owned_fd(descriptor).map_err(|error| Error::io("exec pipe", error))
    };
    let (mut stdout, mut stderr) = (pipe(stdout)?, pipe(stderr)?);
    let left = std::sync::atomic::AtomicUsize::new(OUTPUT_LIMIT_BYTES);
    let both = async {
        tokio::join!(read_bounded(&mut stdout, &mut output.stdout, &left), read_bounded(&mut stderr, &mut output.stderr, &left))
    };
    tokio::pin!(both);
    let ended = || Error::new(Kind::Unavailable, "the pod ended while the command ran");
    tokio::select! {
        (stdout, stderr) = &mut both => {
            stdout.and(stderr).map_err(|error| Error::io("read the command's output", error))?;
            exit.await.map_err(|_| ended())
        }
        exit = &mut *exit => {
            let exit = exit.map_err(|_| ended())?;
            if let Ok((stdout, stderr)) = tokio::time::timeout(DRAIN_LIMIT, both).await {
                stdout.and(stderr).map_err(|error| Error::io("read the command's output", error))?;
            }
            Ok(exit)
        }
    }
}

/// Reads to the end; what goes over the limit is thrown away while the command runs on.
async fn read_bounded(
    pipe: &mut pipe::Receiver,
    into: &mut Vec<u8>,
    left: &std::sync::atomic::AtomicUsize,
) -> std::io::Result<()> {
    use std::sync::atomic::Ordering::Relaxed;
    let mut chunk = vec![0u8; 16 << 10];
    loop {
        let count = match pipe.read(&mut chunk).await {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        let take = count.min(left.load(Relaxed));
        left.fetch_sub(take, Relaxed);
        into.extend_from_slice(chunk.get(..take).unwrap_or_default());
    }
}
