//! A container's requests and its output: created, started, signalled, deleted here; its end is in `reap`.

use super::attach::{self, Attached};
use super::note::note;
use super::poll::Source;
use super::server::{Monitor, Reply};
use crate::cgroup::{self, Cgroup};
use crate::log::{ContainerLog, Stream, now_ns};
use crate::process::{self, Child, Context, Kind, Message, PidNamespace, PodNamespaces, Report, Spawn, Stdio, StepError, hooks};
use crate::pty;
use oci_spec::runtime::LinuxResources;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use windlass_proto::monitor::{
    CreateReply, CreateRequest, Exit, UpdatePodRequest, UpdateReply, UpdateRequest, create_request::PidMode, frame::Body,
};

/// Longest id of a container or an exec; both become file names.
const ID_LIMIT_BYTES: usize = 128;

/// Read from a container's output at once, and for how many times before others have a turn.
const OUTPUT_READ_BYTES: usize = 16 * 1024;
const OUTPUT_READS_MAX: usize = 4;

/// A whole pipe is drained at the end, and not more: something outside the container may go on writing.
const DRAIN_READS_MAX: usize = 256;

/// How long Delete waits for the kernel to end killed processes.
pub(super) const DELETE_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a container is between Create and Delete.
#[derive(Debug)]
pub(super) enum Phase {
    /// Its child builds the root.
    Creating(Reply),
    /// It failed to; waits for the child's end.
    CreateFailed(Option<Reply>, StepError),
    /// At the gate.
    Created,
    /// The gate is open and exec has not been seen.
    Starting(Reply),
    /// exec failed; waits for the child's end.
    StartFailed(Reply, StepError),
    /// The program runs, and its poststart hooks do.
    Started { to: Reply, started_at_ns: i64 },
    /// The program runs.
    Running { started_at_ns: i64 },
    /// Ended, and nothing of it is left but its cgroup's directory.
    Exited { exit: Exit, started_at_ns: i64 },
}

/// The first process was reaped; its cgroup may not be empty yet.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) code: i32,
    pub(super) signal: i32,
    pub(super) finished_at_ns: i64,
    /// EXITED is published then at the latest.
    pub(super) deadline: Instant,
}

pub(super) struct Container {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    pub(super) cgroup: Cgroup,
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    pub(super) report: Option<Report>,
    pub(super) phase: Phase,
    pub(super) ended: Option<Ended>,
    /// Everybody who waits for its Delete, and until when.
    pub(super) deleting: Option<(Vec<Reply>, Instant)>,
    /// Held open so that the program's standard input does not end.
    pub(super) stdin: Option<OwnedFd>,
    /// Its input ends with the first attached client that ends its own.
    pub(super) stdin_once: bool,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
    pub(super) terminal: bool,
    pub(super) attached: Vec<Attached>,
    pub(super) log: Option<ContainerLog>,
    /// The bundle has poststart or poststop hooks, and the latter did not run yet.
    pub(super) later_hooks: bool,
    /// Start restores the processes of a checkpoint.
    restores: bool,
    /// Processes that memory had cost it when it was last asked to end.
    oom_kills_before: u64,
}

impl Container {
    /// Whether requests may still act on its processes.
    fn lives(&self) -> bool {
        let phase = matches!(self.phase, Phase::Created | Phase::Starting(_) | Phase::Started { .. } | Phase::Running { .. });
        phase && self.ended.is_none()
    }

    /// It is about to be asked to end: whom memory has cost it so far did not end it.
    fn on_asked_to_end(&mut self) {
        if self.ended.is_none() {
            self.oom_kills_before = self.cgroup.oom_kills();
        }
    }

    /// Whether memory is why it ends with this code. A success is no such end, whoever of its processes was killed.
    pub(super) fn is_oom_killed(&self, code: i32) -> bool {
        code != 0 && self.cgroup.oom_kills() > self.oom_kills_before
    }

    /// Whether what it does next waits for its poststart or poststop hooks, whose report is the one that is watched.
    pub(super) fn hooks_run(&self) -> bool {
        self.report.is_some() && matches!(self.phase, Phase::Started { .. } | Phase::Exited { .. })
    }
}

/// Refuses an id that is not a plain file name.
pub(super) fn check_id(id: &str) -> Result<(), StepError> {
    let plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if id.is_empty() || id.len() > ID_LIMIT_BYTES || id.starts_with('.') || !plain {
        return Err(StepError::because(Kind::Invalid, "check id", format_args!("{id:?}"), "letters, digits, _ . and - only"));
    }
    Ok(())
}

/// The monitor's and the child's ends of a container's streams.
struct Streams {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    child: Stdio,
}

impl Streams {
    fn make(request: &CreateRequest) -> Result<Streams, StepError> {
        if request.terminal {
            return Ok(Streams { stdin: None, stdout: None, stderr: None, child: Stdio::Terminal });
        }
        let (stdout, child_stdout) = pipe()?;
        let (stderr, child_stderr) = pipe()?;
        for end in [&stdout, &stderr] {
            rustix::io::ioctl_fionbio(end, true).context("make", "pipe")?;
        }
        let (child_stdin, stdin) =
            if request.stdin { pipe().map(|(read, write)| (Some(read), Some(write)))? } else { (None, None) };
        let child = Stdio::Fds { stdin: child_stdin, stdout: child_stdout, stderr: child_stderr };
        Ok(Streams { stdin, stdout: Some(stdout), stderr: Some(stderr), child })
    }
}

/// Writes limits; returns what is not enforced, which `strict` refuses before anything is written.
fn apply_limits(cgroup: &Path, limits: &LinuxResources, strict: bool) -> Result<Vec<String>, StepError> {
    let missing = if strict { cgroup::unavailable(cgroup, limits)? } else { Vec::new() };
    if !missing.is_empty() {
        let why = "this host cannot enforce them and cgroup.strict is set";
        return Err(StepError::because(Kind::Unsupported, "set limits of", missing.join(", "), why));
    }
    cgroup::apply(cgroup, limits)
}

pub(super) fn pipe() -> Result<(OwnedFd, OwnedFd), StepError> {
    pipe_with(PipeFlags::CLOEXEC).context("make", "pipe")
}

impl Monitor {
    pub(super) fn container_key(&self, id: &str) -> Option<u64> {
        self.containers.iter().find(|(_, container)| container.id == id).map(|(key, _)| *key)
    }

    /// The container that a request names, if it lives.
    pub(super) fn living(&mut self, step: &str, id: &str) -> Result<(u64, &mut Container), StepError> {
        let found = self.containers.iter_mut().find(|(_, container)| container.id == id);
        let (key, container) = found.ok_or_else(|| StepError::because(Kind::NotFound, step, id, "no such container"))?;
        if !container.lives() {
            return Err(StepError::because(Kind::WrongState, step, id, "the container is not running"));
        }
        Ok((*key, container))
    }

    pub(super) fn create(&mut self, to: Reply, request: &CreateRequest) -> Result<(), StepError> {
        check_id(&request.container_id)?;
        if self.container_key(&request.container_id).is_some() {
            return Err(StepError::because(Kind::WrongState, "create", &request.container_id, "it exists"));
        }
        let streams = Streams::make(request)?;
        let log = if request.log_path.is_empty() { None } else { Some(ContainerLog::open(Path::new(&request.log_path))?) };
        let cgroup = Cgroup::create(Path::new(&request.cgroup))?;
        let Streams { stdin, stdout, stderr, child } = streams;
        let spawned = self.spawn(request, &cgroup, child).inspect_err(|_| {
            if let Err(error) = cgroup.remove() {
                note(format_args!("undo create: {error}"));
            }
        })?;
        let Child { pid, pidfd, report } = spawned;
        let key = self.new_key();
        let container = Container {
            id: request.container_id.clone(),
            bundle: PathBuf::from(&request.bundle),
            cgroup,
            pid,
            pidfd,
            report: Some(report),
            phase: Phase::Creating(to),
            ended: None,
            deleting: None,
            stdin,
            stdin_once: request.stdin_once,
            stdout,
            stderr,
            terminal: request.terminal,
            attached: Vec::new(),
            log,
            later_hooks: false,
            restores: request.restore.is_some(),
            oom_kills_before: 0,
        };
        let watched = self.watch(key, &container);
        self.containers.insert(key, container);
        if let Err(error) = watched {
            // Answered when its child was reaped.
            self.on_failed(key, error);
        }
        Ok(())
    }

    fn spawn(&self, request: &CreateRequest, cgroup: &Cgroup, stdio: Stdio) -> Result<Child, StepError> {
        let invalid = |why: &str| StepError::because(Kind::Invalid, "create", &request.container_id, why);
        let pod = self.pod.as_ref().ok_or_else(|| invalid("the pod is not set up"))?;
        let pid = match request.pid_mode() {
            PidMode::Container if pod.has_user() => PidNamespace::NewInside,
            PidMode::Container => PidNamespace::New,
            PidMode::Node => PidNamespace::Host,
            PidMode::Pod => PidNamespace::Join(pod.pid_namespace().ok_or_else(|| invalid("no shared pid namespace"))?),
            PidMode::Target => {
                let target = self.containers.values().find(|container| container.id == request.target_container_id);
                let target = target.filter(|target| target.lives()).ok_or_else(|| invalid("the target is not running"))?;
                PidNamespace::Join(target.pidfd.as_fd())
            }
        };
        let spawn = Spawn {
            bundle: Path::new(&request.bundle),
            cgroup: cgroup.as_fd(),
            cgroup_path: cgroup.path(),
            pid,
            namespaces: PodNamespaces { layers: self.layers.as_ref().map(AsFd::as_fd), ..pod.namespaces() },
            stdio,
            id: &request.container_id,
        };
        match (&request.restore, request.runtime.as_str()) {
            (Some(_), runtime) if !runtime.is_empty() => Err(invalid("another runtime restores nothing")),
            (Some(restore), _) => process::create_from_checkpoint(Path::new(&restore.criu), &spawn),
            (None, "") => process::create(spawn),
            (None, program) => process::create_by(Path::new(program), &spawn),
        }
    }

    fn watch(&self, key: u64, container: &Container) -> Result<(), StepError> {
        let report = container.report.as_ref().map(AsFd::as_fd);
        let stdout = container.stdout.as_ref().map(AsFd::as_fd);
        let stderr = container.stderr.as_ref().map(AsFd::as_fd);
        let sources = [Source::ContainerReport(key), Source::Output(key, Stream::Stdout), Source::Output(key, Stream::Stderr)];
        for (fd, source) in [report, stdout, stderr].into_iter().zip(sources) {
            if let Some(fd) = fd {
                self.poll.add(fd, source).context("watch", &container.id)?;
            }
        }
        Ok(())
    }

    /// Takes every message of a container's child. Called once more when the child was reaped, before its end is dealt with.
    pub(super) fn on_container_report(&mut self, key: u64) {
        loop {
            let Some(container) = self.containers.get_mut(&key) else { return };
            let Some(report) = container.report.as_mut() else { return };
            let message = report.receive();
            match message {
                Ok(Message::WouldBlock) => return,
                Ok(Message::Ready { .. }) if container.hooks_run() => return self.on_hooks(key, Ok(())),
                Ok(Message::Failed(error)) if container.hooks_run() => return self.on_hooks(key, Err(error)),
                Ok(Message::Ready { console, not_enforced, later_hooks }) => {
                    container.later_hooks = later_hooks;
                    self.on_ready(key, console, not_enforced);
                }
                Ok(Message::Moved { pid, pidfd }) => (container.pid, container.pidfd) = (pid, pidfd),
                Ok(Message::Hooks { outcome }) => {
                    // The child waits for an outcome: without one it fails by itself.
                    if let Err(error) = hooks::serve(outcome, &container.bundle, &container.id, container.pid) {
                        note(format_args!("container {}: {error}", container.id));
                    }
                }
                Ok(Message::Executed) => return self.on_executed(key),
                Ok(Message::Failed(error)) => return self.on_failed(key, error),
                Err(error) => {
                    let error = StepError::because(Kind::Internal, "read report", &container.id, error);
                    return self.on_failed(key, error);
                }
            }
        }
    }

    fn on_ready(&mut self, key: u64, console: Option<OwnedFd>, not_enforced: Vec<String>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if let Some(master) = console {
            let _ = rustix::io::ioctl_fionbio(&master, true);
            let watched = self.poll.add(&master, Source::Output(key, Stream::Stdout)).context("watch terminal of", &container.id);
            container.stdout = Some(master);
            if let Err(error) = watched {
                return self.on_failed(key, error);
            }
        }
        if let Phase::Creating(to) = container.phase {
            container.phase = Phase::Created;
            let reply = CreateReply { pid: container.pid, not_enforced, restores: container.restores };
            self.reply(to, Body::CreateReply(reply), Vec::new());
        }
    }

    fn on_executed(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if let Some(report) = container.report.take() {
            self.poll.remove(&report);
        }
        let Phase::Starting(to) = container.phase else { return };
        let started_at_ns = now_ns();
        if !container.later_hooks {
            container.phase = Phase::Running { started_at_ns };
            return self.done(to);
        }
        container.phase = Phase::Started { to, started_at_ns };
        let begun = hooks::begin_poststart(&container.bundle, &container.id, container.pid);
        self.follow_hooks(key, begun);
    }

    /// Watches the report of hooks that were begun.
    pub(super) fn follow_hooks(&mut self, key: u64, begun: Result<Report, StepError>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let watched = begun.and_then(|report| {
            self.poll.add(&report, Source::ContainerReport(key)).context("watch hooks of", &container.id).map(|()| report)
        });
        match watched {
            Ok(report) => container.report = Some(report),
            Err(error) => self.on_hooks(key, Err(error)),
        }
    }

    /// Poststart or poststop hooks have ended: a start or a delete goes on. A failed poststart hook ends the container.
    fn on_hooks(&mut self, key: u64, outcome: Result<(), StepError>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if let Some(report) = container.report.take() {
            self.poll.remove(&report);
        }
        match (&container.phase, outcome) {
            (Phase::Started { to, started_at_ns }, Ok(())) => {
                let (to, started_at_ns) = (*to, *started_at_ns);
                container.phase = Phase::Running { started_at_ns };
                self.done(to);
            }
            (Phase::Started { to, .. }, Err(error)) => {
                container.phase = Phase::StartFailed(*to, error);
                let _ = container.cgroup.kill();
            }
            (_, Err(error)) => note(format_args!("container {}: {error}", container.id)),
            (_, Ok(())) => {}
        }
        self.settle(key, Instant::now());
    }

    /// The child ends by itself; killing its cgroup makes sure of it.
    fn on_failed(&mut self, key: u64, error: StepError) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if let Some(report) = container.report.take() {
            self.poll.remove(&report);
        }
        let _ = container.cgroup.kill();
        match container.phase {
            Phase::Creating(to) => container.phase = Phase::CreateFailed(Some(to), error),
            Phase::Starting(to) => container.phase = Phase::StartFailed(to, error),
            _ => note(format_args!("container {}: {error}", container.id)),
        }
    }

    pub(super) fn start(&mut self, to: Reply, id: &str) -> Result<(), StepError> {
        let first = if let Phase::Starting(first) = self.living("start", id)?.1.phase { Some(first) } else { None };
        let cut_off = first.is_some_and(|first| !self.connected(first.connection));
        let (_, container) = self.living("start", id)?;
        match container.phase {
            Phase::Created => {
                let gone = || StepError::because(Kind::WrongState, "start", id, "its process has ended");
                match container.report.as_mut().ok_or_else(gone)?.open_gate() {
                    Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                        return Err(gone());
                    }
                    opened => opened.context("open the gate of", id)?,
                }
            }
            // By a daemon that was killed: the one that came after it waits for the outcome.
            Phase::Starting(_) if cut_off => {}
            _ => return Err(StepError::because(Kind::WrongState, "start", id, "it was started")),
        }
        container.phase = Phase::Starting(to);
        Ok(())
    }

    pub(super) fn signal(&mut self, to: Reply, id: &str, signal: i32) -> Result<(), StepError> {
        let held = self.held(id);
        let (_, container) = self.living("signal", id)?;
        container.on_asked_to_end();
        send_signal(container.pidfd.as_fd(), signal, id)?;
        if !held && container.cgroup.frozen()? {
            // Nothing that is held still can obey. After a checkpoint it goes on, and does.
            container.cgroup.freeze(false, Duration::ZERO)?;
        }
        self.done(to);
        Ok(())
    }

    pub(super) fn kill(&mut self, to: Reply, id: &str) -> Result<(), StepError> {
        let key = self.container_key(id).ok_or_else(|| StepError::because(Kind::NotFound, "kill", id, "no such container"))?;
        if let Some(container) = self.containers.get_mut(&key) {
            container.on_asked_to_end();
            container.cgroup.kill()?;
        }
        self.done(to);
        Ok(())
    }

    pub(super) fn delete(&mut self, to: Reply, id: &str) -> Result<(), StepError> {
        match self.container_key(id) {
            Some(key) => self.begin_delete(key, Some(to)),
            None => self.done(to),
        }
        Ok(())
    }

    /// Kills what is left; the container is forgotten when nothing is.
    pub(super) fn begin_delete(&mut self, key: u64, to: Option<Reply>) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if let Err(error) = container.cgroup.kill() {
            note(format_args!("delete {}: {error}", container.id));
        }
        let deleting = container.deleting.get_or_insert_with(|| (Vec::new(), Instant::now() + DELETE_TIMEOUT));
        deleting.0.extend(to);
        self.settle(key, Instant::now());
    }

    pub(super) fn reopen_log(&mut self, to: Reply, id: &str) -> Result<(), StepError> {
        let (_, container) = self.living("reopen log", id)?;
        if let Some(log) = &mut container.log {
            log.reopen()?;
        }
        self.done(to);
        Ok(())
    }

    pub(super) fn update(&mut self, to: Reply, request: &UpdateRequest) -> Result<(), StepError> {
        let id = &request.container_id;
        let (_, container) = self.living("update", id)?;
        let limits: LinuxResources =
            serde_json::from_str(&request.resources).map_err(|error| StepError::because(Kind::Invalid, "update", id, error))?;
        let not_enforced = apply_limits(container.cgroup.path(), &limits, request.strict)?;
        self.updated(to, request.tell, not_enforced);
        Ok(())
    }

    pub(super) fn update_pod(&mut self, to: Reply, request: &UpdatePodRequest) -> Result<(), StepError> {
        let limits: LinuxResources = serde_json::from_str(&request.resources)
            .map_err(|error| StepError::because(Kind::Invalid, "update pod", &request.cgroup, error))?;
        let not_enforced = apply_limits(Path::new(&request.cgroup), &limits, request.strict)?;
        self.updated(to, request.tell, not_enforced);
        Ok(())
    }

    fn updated(&mut self, to: Reply, tell: bool, not_enforced: Vec<String>) {
        if tell { self.reply(to, Body::UpdateReply(UpdateReply { not_enforced }), Vec::new()) } else { self.done(to) }
    }

    pub(super) fn on_output(&mut self, key: u64, stream: Stream) {
        self.read_output(key, stream, OUTPUT_READS_MAX);
    }

    /// Logs what is left in the pipes and closes everything that the container's end makes useless.
    pub(super) fn drain(&mut self, key: u64) {
        for stream in [Stream::Stdout, Stream::Stderr] {
            self.read_output(key, stream, DRAIN_READS_MAX);
            self.close_output(key, stream);
        }
        let Some(container) = self.containers.get_mut(&key) else { return };
        container.stdin = None;
        if let Some(mut log) = container.log.take() {
            log.end();
            if log.dropped_bytes() > 0 {
                note(format_args!("container {}: {} bytes of its log were dropped", container.id, log.dropped_bytes()));
            }
        }
    }

    fn read_output(&mut self, key: u64, stream: Stream, reads_max: usize) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let mut buffer = [0u8; OUTPUT_READ_BYTES];
        for _ in 0..reads_max {
            let fd = match stream {
                Stream::Stdout => &container.stdout,
                Stream::Stderr => &container.stderr,
            };
            let Some(fd) = fd else { return };
            let read = if container.terminal { pty::read_master(fd, &mut buffer) } else { rustix::io::read(fd, &mut buffer) };
            match read {
                Ok(0) => return self.close_output(key, stream),
                Ok(count) => {
                    let bytes = buffer.get(..count).unwrap_or_default();
                    if let Some(log) = &mut container.log {
                        log.push(stream, bytes);
                    }
                    attach::tee(&mut container.attached, stream, bytes);
                    if count < OUTPUT_READ_BYTES && !container.terminal {
                        return;
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => {}
                Err(errno) => {
                    note(format_args!("read output of {}: {errno}", container.id));
                    return self.close_output(key, stream);
                }
            }
        }
    }

    fn close_output(&mut self, key: u64, stream: Stream) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let closed = match stream {
            Stream::Stdout => container.stdout.take(),
            Stream::Stderr => container.stderr.take(),
        };
        if let Some(fd) = closed {
            self.poll.remove(&fd);
        }
        attach::end(&mut container.attached, stream);
    }
}

/// Sends a signal to a process that may have ended a moment ago.
pub(super) fn send_signal(pidfd: BorrowedFd<'_>, signal: i32, object: &str) -> Result<(), StepError> {
    match crate::sys::signal::send(pidfd, signal) {
        Err(Errno::INVAL) => Err(StepError::because(Kind::Invalid, "signal", object, format!("no signal {signal}"))),
        // It ended and waits to be reaped: the event is under way.
        Err(Errno::SRCH) => Ok(()),
        other => other.context("signal", object),
    }
}
