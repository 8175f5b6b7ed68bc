//! The loop and the requests. What a request does is in the file of its object; here it is found, refused or answered.

use super::checkpoint::Checkpoint;
use super::connection::{Connection, Lost};
use super::container::{Container, Phase};
use super::exec::Exec;
use super::note::note;
use super::pod::{self, Pod};
use super::poll::{Poll, Source};
use crate::process::{Context, Kind, StepError};
use nix::sys::signalfd::SignalFd;
use rustix::io::Errno;
use rustix::net::SocketFlags;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use windlass_proto::frame::{PROTOCOL_VERSION, SOCKET_FILE};
use windlass_proto::monitor::{
    ContainerState, Empty, Failure, Frame, SetupReply, SetupRequest, ShutdownRequest, StateReply, container_state, frame::Body,
};

/// Connections through the listening socket, besides the one given at the start.
const CONNECTIONS_MAX: usize = 5;

/// How long the last reply may take to be read before the monitor ends.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// Who waits for an answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reply {
    pub(super) connection: u64,
    pub(super) id: u64,
}

pub(super) struct Monitor {
    pub(super) directory: PathBuf,
    pub(super) poll: Poll,
    signals: SignalFd,
    listener: OwnedFd,
    connections: BTreeMap<u64, Connection>,
    /// It runs in its own cgroup.
    settled: bool,
    /// The tree of mounted layers, for containers and for the next daemon.
    pub(super) layers: Option<OwnedFd>,
    pub(super) pod: Option<Pod>,
    pub(super) containers: BTreeMap<u64, Container>,
    pub(super) execs: BTreeMap<u64, Exec>,
    pub(super) checkpoint: Option<Checkpoint>,
    last_key: u64,
    pub(super) shutdown: Option<Reply>,
}

impl Monitor {
    pub(super) fn new(
        directory: PathBuf,
        signals: SignalFd,
        listener: OwnedFd,
        control: OwnedFd,
        layers: Option<OwnedFd>,
    ) -> std::io::Result<Monitor> {
        let poll = Poll::new()?;
        poll.add(&listener, Source::Listener)?;
        poll.add(&signals, Source::Signals)?;
        let mut monitor = Monitor {
            directory,
            poll,
            signals,
            listener,
            connections: BTreeMap::new(),
            settled: false,
            layers,
            pod: None,
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            checkpoint: None,
            last_key: 0,
            shutdown: None,
        };
        monitor.connect(control)?;
        Ok(monitor)
    }

    /// A number never used before.
    pub(super) fn new_key(&mut self) -> u64 {
        self.last_key += 1;
        self.last_key
    }

    /// Serves until a Shutdown is done.
    pub(super) fn run(mut self) -> std::io::Result<()> {
        loop {
            let now = Instant::now();
            let due = self.next_check(now);
            for source in self.poll.wait(due.map(|at| at.saturating_duration_since(now)))? {
                match source {
                    Source::Listener => self.accept(),
                    Source::Signals => self.on_child(),
                    Source::Connection(key) => self.on_connection(key),
                    Source::ContainerReport(key) => self.on_container_report(key),
                    Source::Output(key, stream) => self.on_output(key, stream),
                    Source::ExecReport(key) => self.on_exec_report(key),
                    Source::CheckpointReport(_) => self.on_checkpoint_report(),
                }
            }
            self.check_due(Instant::now());
            if self.pod.is_none() && self.connections.is_empty() {
                // Nobody knows of it, and there is nothing that it holds.
                let _ = std::fs::remove_file(self.directory.join(SOCKET_FILE));
                return Ok(());
            }
            if pod::is_astray() {
                return Err(std::io::Error::other("it is in a namespace of its pod"));
            }
            if let Some(reply) = self.shutdown
                && self.containers.is_empty()
                && self.execs.is_empty()
            {
                self.end(reply);
                return Ok(());
            }
        }
    }

    fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.listener, flags) {
            Ok(socket) => {
                let peer = rustix::net::sockopt::socket_peercred(&socket);
                if self.connections.len() >= CONNECTIONS_MAX || !peer.is_ok_and(|peer| peer.uid.is_root()) {
                    note("a connection was refused: too many, or not from root");
                } else if let Err(error) = self.connect(socket) {
                    note(format_args!("accept: {error}"));
                }
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(errno) => note(format_args!("accept: {errno}")),
        }
    }

    fn connect(&mut self, socket: OwnedFd) -> std::io::Result<()> {
        let key = self.new_key();
        let connection = Connection::new(socket)?;
        self.poll.add(&connection, Source::Connection(key))?;
        self.connections.insert(key, connection);
        Ok(())
    }

    fn on_connection(&mut self, key: u64) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let flushed = connection.flush();
        let (frames, received) = connection.receive();
        for frame in frames {
            self.request(Reply { connection: key, id: frame.id }, frame.body);
        }
        self.keep(key, flushed.and(received));
    }

    /// Drops a connection that is lost, and watches the right events of one that is not.
    fn keep(&mut self, key: u64, state: Result<(), Lost>) {
        let Some(connection) = self.connections.get(&key) else { return };
        match state {
            Ok(()) => self.poll.want_output(connection, Source::Connection(key), connection.has_output()),
            Err(lost) => {
                if let Lost::Broken(cause) = lost {
                    note(format_args!("a connection was dropped: {cause}"));
                }
                self.poll.remove(connection);
                self.connections.remove(&key);
                self.kill_execs_of(key);
                self.detach_all_of(key);
                self.end_checkpoint_of(key);
            }
        }
    }

    pub(super) fn connected(&self, key: u64) -> bool {
        self.connections.contains_key(&key)
    }

    /// Answers. A connection that is gone takes the answer and its descriptors with it.
    pub(super) fn reply(&mut self, to: Reply, body: Body, fds: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&to.connection) else { return };
        let state = connection.send(&Frame { id: to.id, body: Some(body) }, fds);
        self.keep(to.connection, state);
    }

    pub(super) fn done(&mut self, to: Reply) {
        self.reply(to, Body::Done(Empty {}), Vec::new());
    }

    pub(super) fn fail(&mut self, to: Reply, error: StepError) {
        self.reply(to, Body::Failure(Failure::from(error)), Vec::new());
    }

    /// Tells every connection.
    pub(super) fn event(&mut self, body: Body) {
        let frame = Frame { id: 0, body: Some(body) };
        for key in self.connections.keys().copied().collect::<Vec<_>>() {
            let state = self.connections.get_mut(&key).map_or(Ok(()), |connection| connection.send(&frame, Vec::new()));
            self.keep(key, state);
        }
    }

    fn request(&mut self, to: Reply, body: Option<Body>) {
        let makes = matches!(body, Some(Body::Setup(_) | Body::Create(_) | Body::Start(_) | Body::Exec(_) | Body::Checkpoint(_)));
        if makes && self.shutdown.is_some() {
            return self.fail(to, StepError::because(Kind::WrongState, "serve", "", "the pod is shutting down"));
        }
        let result = match body {
            Some(Body::Setup(request)) => self.setup(to, &request),
            Some(Body::State(_)) => {
                let layers = self.layers.as_ref().map(OwnedFd::try_clone).transpose();
                layers.context("give", "the tree of layers").map(|layers| {
                    let state = Body::StateReply(self.state());
                    self.reply(to, state, layers.into_iter().collect());
                })
            }
            Some(Body::Create(request)) => self.create(to, &request),
            Some(Body::Start(request)) => self.start(to, &request.container_id),
            Some(Body::Signal(request)) => self.signal(to, &request.container_id, request.signal),
            Some(Body::Kill(request)) => self.kill(to, &request.container_id),
            Some(Body::Delete(request)) => self.delete(to, &request.container_id),
            Some(Body::Exec(request)) => self.exec(to, &request),
            Some(Body::KillExec(request)) => self.kill_exec(to, &request.exec_id, request.signal),
            Some(Body::ReopenLog(request)) => self.reopen_log(to, &request.container_id),
            Some(Body::Attach(request)) => self.attach(to, &request),
            Some(Body::Detach(request)) => self.detach(to, &request),
            Some(Body::CloseStdin(request)) => self.close_stdin(to, &request.container_id),
            Some(Body::Sockets(_)) => self.sockets(to),
            Some(Body::Update(request)) => self.update(to, &request),
            Some(Body::UpdatePod(request)) => self.update_pod(to, &request),
            Some(Body::Sysctls(request)) => self.sysctls(to, &request.sysctls),
            Some(Body::Checkpoint(request)) => self.checkpoint(to, &request),
            Some(Body::Resume(_)) => self.resume(to),
            Some(Body::Shutdown(request)) => self.begin_shutdown(to, &request),
            _ => Err(StepError::because(Kind::Unsupported, "serve", "", "not a request that this monitor knows")),
        };
        if let Err(error) = result {
            self.fail(to, error);
        }
    }

    fn setup(&mut self, to: Reply, request: &SetupRequest) -> Result<(), StepError> {
        if request.protocol_version != PROTOCOL_VERSION {
            let why = format!("protocol {}, this monitor speaks {PROTOCOL_VERSION}", request.protocol_version);
            return Err(StepError::because(Kind::Unsupported, "set up", &request.pod_id, why));
        }
        if let Some(pod) = &self.pod {
            return Err(StepError::because(Kind::WrongState, "set up", &request.pod_id, format!("holds pod {}", pod.id)));
        }
        pod::check(request)?;
        if !self.settled {
            pod::settle(Path::new(&request.monitor_cgroup))?;
            self.settled = true;
            // A signal descriptor is watched for the process that adds it (signalfd(2)), which was another one.
            self.poll.remove(&self.signals);
            self.poll.add(&self.signals, Source::Signals).context("watch signals", "")?;
        }
        let (pod, socket) = Pod::setup(request)?;
        let reply = SetupReply {
            protocol_version: PROTOCOL_VERSION,
            monitor_pid: own_pid(),
            version: env!("CARGO_PKG_VERSION").into(),
            init_pid: pod.init_pid(),
        };
        self.pod = Some(pod);
        self.reply(to, Body::SetupReply(reply), socket.into_iter().collect());
        Ok(())
    }

    fn sysctls(&mut self, to: Reply, sysctls: &HashMap<String, String>) -> Result<(), StepError> {
        let pod = self.pod.as_ref().ok_or_else(|| StepError::because(Kind::WrongState, "set sysctls", "", "no pod is set up"))?;
        pod.write_net_sysctls(sysctls)?;
        self.done(to);
        Ok(())
    }

    fn state(&self) -> StateReply {
        let containers = self.containers.values().map(|container| {
            let (phase, pid, exit, started_at_ns) = match &container.phase {
                Phase::Creating(_) | Phase::CreateFailed(..) => (container_state::Phase::Creating, container.pid, None, 0),
                Phase::Created | Phase::Starting(_) | Phase::StartFailed(..) => {
                    (container_state::Phase::Created, container.pid, None, 0)
                }
                Phase::Running { started_at_ns } | Phase::Started { started_at_ns, .. } => {
                    (container_state::Phase::Running, container.pid, None, *started_at_ns)
                }
                Phase::Exited { exit, started_at_ns } => (container_state::Phase::Exited, 0, Some(*exit), *started_at_ns),
            };
            ContainerState { container_id: container.id.clone(), phase: phase.into(), pid, exit, started_at_ns }
        });
        StateReply {
            pod_id: self.pod.as_ref().map(|pod| pod.id.clone()).unwrap_or_default(),
            monitor_pid: own_pid(),
            containers: containers.collect(),
            version: env!("CARGO_PKG_VERSION").into(),
            init_pid: self.pod.as_ref().map_or(0, Pod::init_pid),
            layers: self.layers.is_some(),
        }
    }

    fn on_child(&mut self) {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        self.reap();
    }

    fn begin_shutdown(&mut self, to: Reply, request: &ShutdownRequest) -> Result<(), StepError> {
        if self.shutdown.is_some() {
            return Err(StepError::because(Kind::WrongState, "shut down", "", "already under way"));
        }
        if let Some(pod) = self.pod.as_mut().filter(|_| request.keep_netns) {
            pod.leave_pin();
        }
        self.shutdown = Some(to);
        for key in self.containers.keys().copied().collect::<Vec<_>>() {
            self.begin_delete(key, None);
        }
        Ok(())
    }

    /// Gives back the pod, answers, and waits a little for the answer to be read.
    fn end(&mut self, to: Reply) {
        if let Some(mut pod) = self.pod.take() {
            pod.release();
        }
        let _ = std::fs::remove_file(self.directory.join(SOCKET_FILE));
        self.done(to);
        let deadline = Instant::now() + FAREWELL_TIMEOUT;
        while self.connections.values().any(Connection::has_output) && Instant::now() < deadline {
            let ready = self.poll.wait(Some(Duration::from_millis(20))).unwrap_or_default();
            for source in ready {
                if let Source::Connection(key) = source
                    && let Some(connection) = self.connections.get_mut(&key)
                {
                    let state = connection.flush();
                    self.keep(key, state);
                }
            }
        }
    }
}

fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}
