//! The daemon's end of a pod's monitor: starting the program, the connection, calls and events.
//!
//! A [`Monitor`] is one connection. Replies are matched by id; events go to the pod in the order they came. When the
//! connection ends every waiting call fails and the event channel closes: the pod then decides whether the monitor is lost.

mod socket;

use crate::{
    error::{Error, Kind, Result},
    telemetry::trace,
};
use rustix::fd::{BorrowedFd, OwnedFd};
use std::{
    collections::HashMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    sync::{mpsc, oneshot},
};
use tracing::Instrument;
use windlass_proto::{
    frame::{self, SOCKET_FILE},
    monitor::{Failure, Frame, failure, frame::Body},
};

/// Longest wait for an answer to a request that the monitor answers from its own state.
pub const CALL_LIMIT: Duration = Duration::from_secs(60);

/// Events that wait for the pod. A full channel holds back this connection's reader only.
const EVENT_QUEUE: usize = 256;

/// A reply and the descriptors that came with it.
pub type Reply = (Body, Vec<OwnedFd>);

/// Calls that wait for their replies; once the connection has ended, why it did.
enum Calls {
    Waiting(HashMap<u64, oneshot::Sender<Reply>>),
    Ended(Error),
}

type Pending = Arc<Mutex<Calls>>;

const POISON: &str = "never poisoned: no panic while held";

/// A connection to one monitor.
pub struct Monitor {
    stream: Arc<UnixStream>,
    pending: Pending,
    next_id: AtomicU64,
    /// One writer at a time, so that frames do not mix.
    writing: Arc<tokio::sync::Mutex<()>>,
}

/// The opened monitor program. Pods of one daemon all run the same one, whatever a package upgrade does to the path.
pub struct Program {
    file: std::fs::File,
}

impl Program {
    /// Opens the program to be executed by descriptor.
    pub fn open(path: &Path) -> Result<Program> {
        let file = std::fs::File::open(path).map_err(|error| {
            Error::io(
                format_args!(
                    "open monitor program {} (install the package again, or set monitor.path in the configuration)",
                    path.display()
                ),
                error,
            )
        })?;
        Ok(Program { file })
    }

    /// Starts a monitor for the pod whose run directory is given and connects to it. It keeps the tree of layers, and its socket is there
    /// before it: the next daemon finds it however early this one is killed. Until the process is
    /// dropped its number is nobody else's; tokio reaps it if it ends while this daemon lives, and init afterwards.
    pub fn start(&self, run_directory: &Path, layers: BorrowedFd<'_>) -> Result<(Arc<Monitor>, mpsc::Receiver<Body>, Child)> {
        use std::os::{fd::AsRawFd, unix::fs::PermissionsExt};
        let failed = |error: std::io::Error| Error::io("start monitor", error);
        let directory = open_directory(run_directory)?;
        let listener = std::os::unix::net::UnixListener::bind(socket_in(&directory)).map_err(failed)?;
        std::fs::set_permissions(socket_in(&directory), std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let mut command = Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        command
            .arg0("windlass-monitor")
            .arg("--dir")
            .arg(run_directory)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(layers.try_clone_to_owned().map_err(failed)?))
            .stderr(Stdio::from(OwnedFd::from(listener)));
        let process = command.spawn().map_err(failed)?;
        let (monitor, events) = Monitor::over(UnixStream::from_std(ours).map_err(failed)?);
        Ok((monitor, events, process))
    }
}

fn open_directory(path: &Path) -> Result<std::fs::File> {
    std::fs::File::open(path).map_err(|error| Error::io(format_args!("open {}", path.display()), error))
}

/// A monitor's socket by way of its directory's descriptor: a socket's address takes 107 bytes (unix(7)), and a state directory may lie deep.
fn socket_in(directory: &std::fs::File) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET_FILE}", directory.as_raw_fd()))
}

impl Monitor {
    /// Connects to a monitor that an earlier daemon started. [`Kind::NotFound`]: there is none.
    pub async fn connect(run_directory: &Path) -> Result<(Arc<Monitor>, mpsc::Receiver<Body>)> {
        let path = run_directory.join(SOCKET_FILE);
        let absent = |error: &std::io::Error| matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
        let failed = |error: std::io::Error| {
            let kind = if absent(&error) { Some(Kind::NotFound) } else { None };
            let error = Error::io(format_args!("connect {}", path.display()), error);
            Error { kind: kind.unwrap_or(error.kind), ..error }
        };
        let directory = std::fs::File::open(run_directory).map_err(failed)?;
        let connected = tokio::time::timeout(Duration::from_secs(5), UnixStream::connect(socket_in(&directory))).await;
        let stream = connected
            .map_err(|_| Error::new(Kind::Deadline, format!("connect {}: no answer in 5 s", path.display())))?
            .map_err(failed)?;
        Ok(Monitor::over(stream))
    }

    fn over(stream: UnixStream) -> (Arc<Monitor>, mpsc::Receiver<Body>) {
        let stream = Arc::new(stream);
        let pending: Pending = Arc::new(Mutex::new(Calls::Waiting(HashMap::new())));
        let (events, receiver) = mpsc::channel(EVENT_QUEUE);
        tokio::spawn(read_frames(stream.clone(), pending.clone(), events));
        let monitor = Monitor { stream, pending, next_id: AtomicU64::new(1), writing: Arc::default() };
        (Arc::new(monitor), receiver)
    }

    /// Sends a request and waits for its reply, at most `limit`.
    pub async fn call_within(&self, body: Body, limit: Duration) -> Result<Reply> {
        let span = tracing::info_span!(target: trace::TARGET, "monitor", otel.name = name(&body));
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        match &mut *self.pending.lock().expect(POISON) {
            Calls::Waiting(waiting) => waiting.insert(id, sender),
            Calls::Ended(error) => return Err(error.clone()),
        };
        let bytes = frame::encode(&Frame { id, body: Some(body) }).map_err(|error| Error::invalid(error.to_string()))?;
        let exchange = async {
            match self.send(bytes).await {
                // The reader finds the end, too, and perhaps the monitor's last word before it.
                Err(error) if !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    return Err(Error::io("send to the pod's monitor", error));
                }
                _ => {}
            }
            receiver.await.map_err(|_| self.ended().unwrap_or_else(lost))
        };
        let outcome = tokio::time::timeout(limit, exchange).instrument(span).await;
        if let Calls::Waiting(waiting) = &mut *self.pending.lock().expect(POISON) {
            waiting.remove(&id);
        }
        match outcome {
            Ok(Ok((Body::Failure(failure), _))) => Err(from_failure(failure)),
            Ok(reply) => reply,
            Err(_) => Err(Error::new(Kind::Deadline, format!("the pod's monitor gave no answer in {} s", limit.as_secs()))),
        }
    }

    /// Writes a frame. Once begun it is written to its end, even if the caller goes away: half a frame would spoil those after it.
    async fn send(&self, mut bytes: Vec<u8>) -> std::io::Result<()> {
        let turn = self.writing.clone().lock_owned().await;
        let written = socket::write_some(&self.stream, &bytes)?;
        if written == bytes.len() {
            return Ok(());
        }
        bytes.drain(..written);
        let stream = self.stream.clone();
        let rest = tokio::spawn(async move {
            let _turn = turn;
            // The rest of a frame that cannot be written would be missed by those after it.
            socket::write_all(&stream, &bytes).await.inspect_err(|_| socket::end(&stream))
        });
        rest.await.map_err(std::io::Error::other)?
    }

    /// Sends a request and waits for its reply, at most [`CALL_LIMIT`].
    pub async fn call(&self, body: Body) -> Result<Reply> {
        self.call_within(body, CALL_LIMIT).await
    }

    /// True once the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.ended().is_some()
    }

    /// Why the connection has ended.
    fn ended(&self) -> Option<Error> {
        match &*self.pending.lock().expect(POISON) {
            Calls::Waiting(_) => None,
            Calls::Ended(error) => Some(error.clone()),
        }
    }
}

/// What a request asks, for traces.
fn name(request: &Body) -> &'static str {
    match request {
        Body::Setup(_) => "monitor: set up",
        Body::Create(_) => "monitor: create",
        Body::Start(_) => "monitor: start",
        Body::Signal(_) => "monitor: signal",
        Body::Kill(_) => "monitor: kill",
        Body::Delete(_) => "monitor: delete",
        Body::Exec(_) => "monitor: exec",
        Body::Update(_) => "monitor: update",
        Body::Shutdown(_) => "monitor: shut down",
        Body::Attach(_) => "monitor: attach",
        Body::Sockets(_) => "monitor: sockets",
        _ => "monitor: call",
    }
}

fn lost() -> Error {
    Error::new(Kind::Unavailable, "the pod's monitor is gone")
}

/// A monitor's failure as the daemon's error.
pub fn from_failure(failure: Failure) -> Error {
    let kind = match failure.kind() {
        failure::Kind::Internal | failure::Kind::Entrypoint => Kind::Internal,
        failure::Kind::Invalid => Kind::Invalid,
        failure::Kind::NotFound => Kind::NotFound,
        failure::Kind::WrongState => Kind::Precondition,
        failure::Kind::Unsupported => Kind::Unimplemented,
        failure::Kind::NoSpace => Kind::Exhausted,
    };
    let mut message = failure.step;
    if !failure.object.is_empty() {
        message = format!("{message} {}", failure.object);
    }
    if !failure.message.is_empty() {
        message = format!("{message}: {}", failure.message);
    }
    if failure.errno != 0 {
        message = format!("{message}: {}", std::io::Error::from_raw_os_error(failure.errno));
    }
    Error::new(kind, message)
}

async fn read_frames(stream: Arc<UnixStream>, pending: Pending, events: mpsc::Sender<Body>) {
    let mut reader = socket::Reader::default();
    let end = loop {
        match reader.next(&stream).await {
            // Its last word: it could not begin.
            Ok(Some((Frame { id: 0, body: Some(Body::Failure(failure)) }, _))) => {
                break from_failure(failure).during("start the pod's monitor");
            }
            Ok(Some((Frame { id: 0, body: Some(event) }, _))) => {
                if events.send(event).await.is_err() {
                    break lost();
                }
            }
            Ok(Some((Frame { id, body: Some(body) }, descriptors))) => {
                let waiter = match &mut *pending.lock().expect(POISON) {
                    Calls::Waiting(waiting) => waiting.remove(&id),
                    Calls::Ended(_) => None,
                };
                if let Some(waiter) = waiter {
                    let _ = waiter.send((body, descriptors));
                }
            }
            Ok(Some((Frame { body: None, .. }, _))) => {}
            Ok(None) => break lost(),
            Err(error) => {
                tracing::warn!(%error, "monitor connection ended");
                break Error::io("receive from the pod's monitor", error);
            }
        }
    };
    // Dropping the senders fails every call that still waits.
    *pending.lock().expect(POISON) = Calls::Ended(end);
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_proto::monitor::{Empty, ExecRequest, StateRequest};

    #[tokio::test]
    async fn a_call_that_is_given_up_half_written_spoils_no_other() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (monitor, _events) = Monitor::over(ours);
        let large = Body::Exec(ExecRequest { process: "x".repeat(4 << 20), ..ExecRequest::default() });
        // Nobody reads: it is given up when the socket is full.
        let given_up = monitor.call_within(large, Duration::from_millis(50)).await;
        assert_eq!(given_up.expect_err("no answer").kind, Kind::Deadline);
        let next = tokio::spawn(async move { monitor.call_within(Body::State(StateRequest {}), Duration::from_secs(10)).await });
        let mut reader = socket::Reader::default();
        for _ in 0..2 {
            let (frame, _) = reader.next(&theirs).await.expect("in step").expect("a frame");
            let answer = frame::encode(&Frame { id: frame.id, body: Some(Body::Done(Empty {})) }).expect("fits");
            socket::write_all(&theirs, &answer).await.expect("written");
        }
        assert!(matches!(next.await.expect("no panic"), Ok((Body::Done(_), _))));
    }
}
