//! The listener for cAdvisor: what its three calls are answered, and whose socket is left alone. A real kubelet asks in `kubelet::guest`.

use anyhow::{Context, Result, ensure};
use std::{collections::HashMap, fs, os::unix::net::UnixListener, path::Path};
use tokio::runtime::Runtime;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};
use windlass_integration::{
    client::{Client, container, host_network, pod},
    daemon::Daemon,
    node,
    wait::until,
};
use windlass_proto::containerd::{
    containers::{Container, GetContainerRequest, containers_client::ContainersClient},
    tasks::{self, GetRequest, Process, tasks_client::TasksClient},
    version::{Empty, version_client::VersionClient},
};

/// cAdvisor's side.
struct Asker {
    runtime: Runtime,
    channel: Channel,
}

fn in_namespace<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", tonic::metadata::MetadataValue::from_static("k8s.io"));
    request
}

impl Asker {
    fn connect(socket: &Path) -> Result<Asker> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let channel = runtime.block_on(endpoint.connect())?;
        Ok(Asker { runtime, channel })
    }

    fn container(&self, id: &str) -> Result<Container, Status> {
        let request = in_namespace(GetContainerRequest { id: id.into() });
        let reply = self.runtime.block_on(ContainersClient::new(self.channel.clone()).get(request))?;
        reply.into_inner().container.ok_or_else(|| Status::internal("no container"))
    }

    fn process(&self, id: &str) -> Result<Process, Status> {
        let request = in_namespace(GetRequest { container_id: id.into() });
        let reply = self.runtime.block_on(TasksClient::new(self.channel.clone()).get(request))?;
        reply.into_inner().process.ok_or_else(|| Status::internal("no process"))
    }
}

fn configured(daemon: &mut Daemon) -> Result<std::path::PathBuf> {
    let socket = daemon.path("containerd.sock");
    daemon.configure(&format!("[cadvisor]\ncontainerd_socket = {socket:?}\n"))?;
    Ok(socket)
}

#[test]
fn the_three_calls_tell_of_containers_and_pods() {
    node::run(|| {
        let mut daemon = Daemon::start(&[])?;
        daemon.stop()?;
        let socket = configured(&mut daemon)?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        let asker = Asker::connect(&socket)?;
        let version = asker.runtime.block_on(VersionClient::new(asker.channel.clone()).version(Empty {}))?.into_inner();
        ensure!(!version.version.is_empty() && version.revision == "windlass", "{version:?}");

        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let labels: HashMap<String, String> = [("io.kubernetes.container.name".to_owned(), "main".to_owned())].into();
        let mut wanted = container(&config, "main", &["sleep", "1000"]);
        wanted.labels = labels.clone();
        let created = client.create(&id, &config, &wanted)?;

        let sandbox = asker.container(&id)?;
        ensure!(sandbox.labels["io.cri-containerd.kind"] == "sandbox" && sandbox.labels.get("app") == config.labels.get("app"));
        let status = |found: &Process| tasks::Status::try_from(found.status).ok();
        ensure!(status(&asker.process(&id)?) == Some(tasks::Status::Unknown), "nothing runs in the pod's network yet");
        ensure!(status(&asker.process(&created)?) == Some(tasks::Status::Created));
        client.start(&created)?;
        let told = asker.container(&created)?;
        ensure!(told.labels["io.cri-containerd.kind"] == "container" && told.labels["io.kubernetes.container.name"] == "main");
        ensure!(
            told.image == wanted.image.context("an image")?.image && told.created_at.is_some_and(|at| at.seconds > 1_700_000_000)
        );
        let spec: serde_json::Value = serde_json::from_slice(&told.spec.context("a spec")?.value)?;
        ensure!(spec["process"]["env"].is_array(), "{spec}");
        let (own, of_pod) = (asker.process(&created)?, asker.process(&id)?);
        ensure!(
            status(&own) == Some(tasks::Status::Running) && status(&of_pod) == Some(tasks::Status::Running),
            "{own:?} {of_pod:?}"
        );
        ensure!(own.pid == of_pod.pid && fs::read_to_string(format!("/proc/{}/net/dev", own.pid))?.contains("eth0:"), "{own:?}");

        for absent in ["0".repeat(64), created[..12].to_owned(), id[..12].to_owned(), String::new()] {
            let codes =
                (asker.container(&absent).map_err(|s| s.code()).err(), asker.process(&absent).map_err(|s| s.code()).err());
            ensure!(codes == (Some(Code::NotFound), Some(Code::NotFound)), "{absent:?}: {codes:?}");
        }
        client.stop(&created, 0)?;
        until("the end", || Ok((status(&asker.process(&created)?) == Some(tasks::Status::Stopped)).then_some(())))?;
        ensure!(asker.process(&created)?.exit_status == 137);

        // The host's interfaces are not a pod's.
        let host = host_network(pod(&daemon.path("logs")));
        let on_host = client.run(&host)?;
        let process = asker.process(&on_host)?;
        ensure!(process.pid == 0 && status(&process) == Some(tasks::Status::Running), "{process:?}");
        client.remove(&on_host)?;
        client.remove(&id)?;
        ensure!(asker.container(&id).err().map(|status| status.code()) == Some(Code::NotFound));
        daemon.stop()?;
        ensure!(!socket.exists(), "the socket stays");
        Ok(())
    })
    .expect("answers for cAdvisor");
}

#[test]
fn a_living_servers_socket_is_left_alone() {
    node::run(|| {
        let mut daemon = Daemon::prepare(&[])?;
        let socket = configured(&mut daemon)?;
        let living = UnixListener::bind(&socket)?;
        let refused = daemon.serve().err().context("it serves")?;
        ensure!(format!("{refused:#}").contains("containerd.sock: a server lives there"), "{refused:#}");
        ensure!(std::os::unix::net::UnixStream::connect(&socket).is_ok(), "the other server's socket is gone");
        // A killed server leaves its socket.
        drop(living);
        daemon.serve()?;
        Asker::connect(&socket)?;
        daemon.kill9()?;
        daemon.serve()?;
        Asker::connect(&socket)?;
        daemon.stop()
    })
    .expect("a socket of its own");
}
