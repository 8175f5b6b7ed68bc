//! The three calls of containerd's API that kubelet's own cAdvisor makes, for a kubelet that does not take its metrics from the CRI: without an
//! answer to them, cAdvisor knows no labels of a container. Serves nothing unless `cadvisor.containerd_socket` is set, and nothing but these
//! calls: no other client of containerd finds what it needs here.
//!
//! cAdvisor asks for each cgroup whose name has 64 hexadecimal digits. A container's is its id; what it calls a sandbox, and takes a pod's interfaces
//! from, is here the group that has the pod's id. There is no process that lives as long as the pod in its network, so a sandbox's process is
//! that of its oldest running container: once that has ended, cAdvisor, which asks once, gives the pod's interfaces no more.

use crate::{
    container::{self, State},
    error::{Error, Result as Outcome},
    node::Node,
    pod::{self, Phase, Pod},
    service,
};
use std::{
    collections::HashMap,
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::sleep;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};
use windlass_proto::containerd::{
    containers::{
        Any, Container, GetContainerRequest, GetContainerResponse, Timestamp,
        containers_server::{Containers, ContainersServer},
    },
    tasks::{
        self, GetRequest, GetResponse, Process,
        tasks_server::{Tasks, TasksServer},
    },
    version::{
        Empty, VersionResponse,
        version_server::{Version, VersionServer},
    },
};

/// The one namespace of containerd in which Kubernetes' containers are.
const NAMESPACE: &str = "k8s.io";
/// Tells a sandbox from a container (containerd, internal/cri/labels).
const KIND: &str = "io.cri-containerd.kind";
/// A runtime configuration of whose fields cAdvisor reads only the environment, and that only where it is told to look for variables: they may
/// hold secrets, and are left out.
const SPEC: &str = r#"{"ociVersion":"1.2.1","process":{"env":[],"cwd":"/","user":{"uid":0,"gid":0}}}"#;
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// Longest wait for a container that is being made, and between two looks for it: cAdvisor waits for two seconds.
const CREATION_LIMIT: Duration = Duration::from_millis(1500);
const CREATION_PAUSE: Duration = Duration::from_millis(20);

/// Serves until it is dropped, and removes the socket then.
pub struct Listener {
    serving: tokio::task::JoinHandle<()>,
    socket: std::path::PathBuf,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.serving.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Serves at the configured socket; nothing when there is none. Fails where somebody else serves there: a containerd that lives keeps its socket.
pub fn start(node: &Arc<Node>) -> Outcome<Option<Listener>> {
    let socket = node.config.cadvisor.containerd_socket.clone();
    if socket.as_os_str().is_empty() {
        return Ok(None);
    }
    check(&socket)?;
    let listener = service::bind(&socket)
        .map_err(|error| Error::io(format_args!("listen on cadvisor.containerd_socket {}", socket.display()), error))?;
    let answers = Answers(node.clone());
    let served = tonic::transport::Server::builder()
        .add_service(ContainersServer::new(answers.clone()))
        .add_service(TasksServer::new(answers.clone()))
        .add_service(VersionServer::new(answers))
        .serve_with_incoming(UnixListenerStream::new(listener));
    tracing::info!(socket = %socket.display(), "serving cAdvisor");
    let serving = tokio::spawn(async move {
        if let Err(error) = served.await {
            tracing::error!(%error, "cAdvisor is served no more");
        }
    });
    Ok(Some(Listener { serving, socket }))
}

fn check(socket: &Path) -> Outcome<()> {
    let name = format!("cadvisor.containerd_socket {}", socket.display());
    if !socket.is_absolute() {
        return Err(Error::invalid(format!("{name} is not an absolute path")));
    }
    match UnixStream::connect(socket) {
        Ok(_) => Err(Error::precondition(format!("{name}: a server lives there already, likely containerd"))),
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) => Ok(()),
        Err(error) => Err(Error::io(format_args!("look for a server at {name}"), error)),
    }
}

#[derive(Clone)]
struct Answers(Arc<Node>);

/// A namespace is part of every call (containerd, pkg/namespaces).
fn in_namespace<T>(request: Request<T>) -> Result<T, Status> {
    match request.metadata().get("containerd-namespace").and_then(|value| value.to_str().ok()) {
        Some(NAMESPACE) => Ok(request.into_inner()),
        Some(other) => Err(Status::not_found(format!("namespace {other:?} has no containers; they are in {NAMESPACE:?}"))),
        None => Err(Status::failed_precondition("containerd-namespace is required")),
    }
}

fn described(id: &str, kind: &str, mut labels: HashMap<String, String>, image: String, created_at_ns: i64) -> Container {
    labels.insert(KIND.into(), kind.into());
    Container {
        id: id.to_owned(),
        labels,
        image,
        spec: Some(Any { type_url: SPEC_TYPE.into(), value: SPEC.into() }),
        created_at: Some(Timestamp {
            seconds: created_at_ns.div_euclid(1_000_000_000),
            nanos: i32::try_from(created_at_ns.rem_euclid(1_000_000_000)).unwrap_or(0),
        }),
    }
}

fn of_container(record: &container::Record) -> Container {
    described(&record.id, "container", record.config.labels.clone(), record.image_name.clone(), record.created_at_ns)
}

fn of_pod(record: &pod::Record) -> Container {
    described(&record.id, "sandbox", record.config.labels.clone(), String::new(), record.created_at_ns)
}

fn process(id: &str, pid: i32, status: tasks::Status, exit_code: i32) -> Process {
    Process {
        id: id.to_owned(),
        pid: u32::try_from(pid).unwrap_or(0),
        status: status.into(),
        exit_status: u32::try_from(exit_code).unwrap_or(255),
    }
}

fn process_of_container(record: &container::Record) -> Process {
    match &record.state {
        State::Created { pid } => process(&record.id, *pid, tasks::Status::Created, 0),
        State::Running { pid, .. } => process(&record.id, *pid, tasks::Status::Running, 0),
        State::Exited { exit, .. } => process(&record.id, 0, tasks::Status::Stopped, exit.code),
    }
}

/// What an id names.
enum Named {
    Container(Arc<container::Container>),
    Pod(Arc<Pod>),
}

impl Answers {
    /// By the whole id: cAdvisor asks for whatever has the form of one.
    fn find(&self, id: &str) -> Option<Named> {
        let container = self.0.container(id).ok().filter(|found| found.id == id).map(Named::Container);
        let pod = || self.0.pod(id).ok().filter(|found| found.id == id).or_else(|| self.0.unfinished(id)).map(Named::Pod);
        container.or_else(pod)
    }

    /// The same. cAdvisor asks as soon as it sees a group, once, and a container's is there before the container is: it is waited for.
    async fn found(&self, id: &str) -> Result<Named, Status> {
        let deadline = Instant::now() + CREATION_LIMIT;
        loop {
            match self.find(id) {
                Some(found) => return Ok(found),
                None if self.0.operations() == 0 || Instant::now() > deadline => break,
                None => sleep(CREATION_PAUSE).await,
            }
        }
        // The last operation may have ended between the two looks.
        self.find(id).ok_or_else(|| Status::not_found(format!("container {id:?} in namespace {NAMESPACE:?}: not found")))
    }

    /// A process in the pod's network: unknown until there is one, and cAdvisor asks again. On the host's network there is none: its interfaces
    /// are not the pod's.
    fn process_of_pod(&self, pod: &Pod) -> Process {
        match pod.phase() {
            Phase::Creating => return process(&pod.id, 0, tasks::Status::Unknown, 0),
            Phase::NotReady => return process(&pod.id, 0, tasks::Status::Stopped, 0),
            Phase::Ready => {}
        }
        if pod.host_network() {
            return process(&pod.id, 0, tasks::Status::Running, 0);
        }
        let running = self.0.containers_of(&pod.id).into_iter().filter_map(|container| {
            container.look(|record| match record.state {
                State::Running { pid, started_at_ns } => Some((started_at_ns, pid)),
                State::Created { .. } | State::Exited { .. } => None,
            })
        });
        match running.min() {
            Some((_, pid)) => process(&pod.id, pid, tasks::Status::Running, 0),
            None => process(&pod.id, 0, tasks::Status::Unknown, 0),
        }
    }
}

#[tonic::async_trait]
impl Containers for Answers {
    async fn get(&self, request: Request<GetContainerRequest>) -> Result<Response<GetContainerResponse>, Status> {
        let id = in_namespace(request)?.id;
        let container = match self.found(&id).await? {
            Named::Container(container) => container.look(of_container),
            Named::Pod(pod) => pod.look(of_pod),
        };
        Ok(Response::new(GetContainerResponse { container: Some(container) }))
    }
}

#[tonic::async_trait]
impl Tasks for Answers {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let id = in_namespace(request)?.container_id;
        let process = match self.found(&id).await? {
            Named::Container(container) => container.look(process_of_container),
            Named::Pod(pod) => self.process_of_pod(&pod),
        };
        Ok(Response::new(GetResponse { process: Some(process) }))
    }
}

#[tonic::async_trait]
impl Version for Answers {
    async fn version(&self, _: Request<Empty>) -> Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse { version: env!("CARGO_PKG_VERSION").into(), revision: "windlass".into() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_somebody_serves_is_left_alone_and_a_dead_one_is_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("containerd.sock");
        assert!(check(&path).is_ok(), "nothing there");
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("bind");
        let error = check(&path).expect_err("somebody serves");
        assert!(error.message.contains("containerd.sock: a server lives there"), "{error}");
        drop(listener);
        assert!(check(&path).is_ok(), "what a killed server left");
        assert!(check(Path::new("containerd.sock")).is_err());
    }

    #[test]
    fn calls_outside_of_the_namespace_are_refused() {
        let call = |namespace: Option<&'static str>| {
            let mut request = Request::new(());
            if let Some(namespace) = namespace {
                request.metadata_mut().insert("containerd-namespace", namespace.parse().expect("a value"));
            }
            in_namespace(request).map_err(|status| status.code())
        };
        assert_eq!(call(Some("k8s.io")), Ok(()));
        assert_eq!(call(Some("moby")), Err(tonic::Code::NotFound));
        assert_eq!(call(None), Err(tonic::Code::FailedPrecondition));
    }

    #[test]
    fn the_configuration_is_one_that_cadvisor_can_read() {
        let spec: serde_json::Value = serde_json::from_str(SPEC).expect("JSON");
        assert!(spec["process"]["env"].as_array().is_some_and(Vec::is_empty));
        let found = described("i", "sandbox", HashMap::new(), String::new(), 1_500_000_001);
        assert_eq!(found.created_at, Some(Timestamp { seconds: 1, nanos: 500_000_001 }));
        assert_eq!(found.labels.get(KIND).map(String::as_str), Some("sandbox"));
    }
}
