//! The CRI as a test speaks it: blocking calls, and configurations as kubelet makes them.

use crate::{daemon::Daemon, wait::until_within};
use anyhow::{Context, Result, ensure};
use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};
use tokio::runtime::Runtime;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};
use windlass_proto::cri::{self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient};

static SERIAL: AtomicUsize = AtomicUsize::new(1);

/// A connection to a daemon. Calls return the gRPC status, so that a test can look at its code.
pub struct Client {
    runtime: Runtime,
    runtime_service: RuntimeServiceClient<Channel>,
    image_service: ImageServiceClient<Channel>,
    limit: Option<Duration>,
}

/// Calls of one service, each blocking until its reply.
macro_rules! calls {
    ($($service:ident: $name:ident($request:ident) -> $reply:ident;)*) => {
        impl Client {
            $(pub fn $name(&self, request: cri::$request) -> Result<cri::$reply, Status> {
                let mut client = self.$service.clone();
                let mut request = tonic::Request::new(request);
                if let Some(limit) = self.limit {
                    request.set_timeout(limit);
                }
                self.runtime.block_on(client.$name(request)).map(tonic::Response::into_inner)
            })*
        }
    };
}

calls! {
    runtime_service: version(VersionRequest) -> VersionResponse;
    runtime_service: status(StatusRequest) -> StatusResponse;
    runtime_service: runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
    runtime_service: update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
    runtime_service: run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
    runtime_service: stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
    runtime_service: remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
    runtime_service: pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
    runtime_service: list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
    runtime_service: create_container(CreateContainerRequest) -> CreateContainerResponse;
    runtime_service: start_container(StartContainerRequest) -> StartContainerResponse;
    runtime_service: stop_container(StopContainerRequest) -> StopContainerResponse;
    runtime_service: remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
    runtime_service: list_containers(ListContainersRequest) -> ListContainersResponse;
    runtime_service: container_status(ContainerStatusRequest) -> ContainerStatusResponse;
    runtime_service: update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
    runtime_service: reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
    runtime_service: exec_sync(ExecSyncRequest) -> ExecSyncResponse;
    runtime_service: list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
    runtime_service: attach(AttachRequest) -> AttachResponse;
    runtime_service: port_forward(PortForwardRequest) -> PortForwardResponse;
    runtime_service: checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
    runtime_service: checkpoint_pod(CheckpointPodRequest) -> CheckpointPodResponse;
    runtime_service: restore_pod(RestorePodRequest) -> RestorePodResponse;
    runtime_service: container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
    runtime_service: pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
    runtime_service: list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
    runtime_service: list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
    runtime_service: list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
    runtime_service: update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse;
    image_service: list_images(ListImagesRequest) -> ListImagesResponse;
    image_service: image_status(ImageStatusRequest) -> ImageStatusResponse;
    image_service: pull_image(PullImageRequest) -> PullImageResponse;
    image_service: remove_image(RemoveImageRequest) -> RemoveImageResponse;
    image_service: image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
}

impl Client {
    pub fn connect(daemon: &Daemon) -> Result<Client> {
        Client::connect_to(&daemon.socket()).with_context(|| daemon.log())
    }

    /// Connects to any runtime's socket.
    pub fn connect_to(socket: &Path) -> Result<Client> {
        Client::connect_by(socket, None)
    }

    /// The same with a limit to every request, which the runtime is told.
    pub fn within(socket: &Path, limit: Duration) -> Result<Client> {
        Client::connect_by(socket, Some(limit))
    }

    fn connect_by(socket: &Path, limit: Option<Duration>) -> Result<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?;
        let channel = runtime.block_on(endpoint.connect()).with_context(|| format!("connect {}", socket.display()))?;
        Ok(Client {
            runtime,
            // As kubelet has it.
            runtime_service: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(16 << 20),
            image_service: ImageServiceClient::new(channel),
            limit,
        })
    }

    /// Runs a pod; returns its id.
    pub fn run(&self, config: &cri::PodSandboxConfig) -> Result<String, Status> {
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        self.run_pod_sandbox(request).map(|reply| reply.pod_sandbox_id)
    }

    /// Creates a container; returns its id. The pod of a privileged one is told to be so, as kubelet does.
    pub fn create(&self, pod: &str, config: &cri::PodSandboxConfig, container: &cri::ContainerConfig) -> Result<String, Status> {
        let mut config = config.clone();
        if container.linux.as_ref().and_then(|linux| linux.security_context.as_ref()).is_some_and(|context| context.privileged) {
            config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        }
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.into(),
            config: Some(container.clone()),
            sandbox_config: Some(config),
        };
        self.create_container(request).map(|reply| reply.container_id)
    }

    pub fn start(&self, id: &str) -> Result<(), Status> {
        self.start_container(cri::StartContainerRequest { container_id: id.into() }).map(drop)
    }

    pub fn stop(&self, id: &str, timeout: i64) -> Result<(), Status> {
        self.stop_container(cri::StopContainerRequest { container_id: id.into(), timeout }).map(drop)
    }

    pub fn container(&self, id: &str) -> Result<cri::ContainerStatus, Status> {
        let reply = self.container_status(cri::ContainerStatusRequest { container_id: id.into(), verbose: false })?;
        reply.status.ok_or_else(|| Status::internal("no status"))
    }

    pub fn pod(&self, id: &str) -> Result<cri::PodSandboxStatus, Status> {
        let reply = self.pod_sandbox_status(cri::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: false })?;
        reply.status.ok_or_else(|| Status::internal("no status"))
    }

    pub fn exec(&self, id: &str, command: &[&str]) -> Result<cri::ExecSyncResponse, Status> {
        let cmd = command.iter().map(|word| (*word).to_owned()).collect();
        self.exec_sync(cri::ExecSyncRequest { container_id: id.into(), cmd, timeout: 20 })
    }

    /// Metrics of all pods, by the call that streams them.
    pub fn streamed_metrics(&self) -> Result<Vec<cri::PodSandboxMetrics>, Status> {
        let mut client = self.runtime_service.clone();
        self.runtime.block_on(async {
            let mut stream = client.stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest {}).await?.into_inner();
            let mut all = Vec::new();
            while let Some(message) = stream.message().await? {
                all.extend(message.pod_sandbox_metrics);
            }
            Ok(all)
        })
    }

    /// What a script prints in a container; fails unless it ends with 0.
    pub fn shell(&self, id: &str, script: &str) -> Result<String> {
        let run = self.exec(id, &["sh", "-c", script])?;
        ensure!(run.exit_code == 0, "{script}: {}", String::from_utf8_lossy(&run.stderr));
        Ok(String::from_utf8_lossy(&run.stdout).trim().to_owned())
    }

    /// Waits for a container's end, for 60 s at most.
    pub fn exited(&self, id: &str) -> Result<cri::ContainerStatus> {
        until_within(Duration::from_secs(60), "the container's end", || {
            let status = self.container(id)?;
            Ok((status.state() == cri::ContainerState::ContainerExited).then_some(status))
        })
    }

    /// A URL at which a command's streams are served.
    pub fn exec_url(&self, request: cri::ExecRequest) -> Result<String, Status> {
        let mut client = self.runtime_service.clone();
        self.runtime.block_on(client.exec(request)).map(|reply| reply.into_inner().url)
    }

    /// Stops and removes a pod with all that is in it.
    pub fn remove(&self, pod: &str) -> Result<(), Status> {
        self.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.into() })?;
        self.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod.into() }).map(drop)
    }
}

/// A pod as kubelet describes one: own network, own pid namespace for each container.
pub fn pod(logs: &Path) -> cri::PodSandboxConfig {
    let name = format!("pod-{}", SERIAL.fetch_add(1, Ordering::Relaxed));
    let options = cri::NamespaceOption { pid: cri::NamespaceMode::Container.into(), ..Default::default() };
    cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: name.clone(),
            uid: format!("uid-{name}"),
            namespace: "test".into(),
            attempt: 0,
        }),
        hostname: name.clone(),
        log_directory: logs.join(&name).to_string_lossy().into_owned(),
        labels: [("app".to_owned(), name)].into(),
        linux: Some(cri::LinuxPodSandboxConfig {
            security_context: Some(cri::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The same on the host's network.
pub fn host_network(mut pod: cri::PodSandboxConfig) -> cri::PodSandboxConfig {
    if let Some(options) = pod.linux.as_mut().and_then(|linux| linux.security_context.as_mut()?.namespace_options.as_mut()) {
        options.network = cri::NamespaceMode::Node.into();
    }
    pod.hostname = String::new();
    pod
}

/// A container of the busybox image that runs `command`.
pub fn container(pod: &cri::PodSandboxConfig, name: &str, command: &[&str]) -> cri::ContainerConfig {
    let options = pod.linux.as_ref().and_then(|linux| linux.security_context.as_ref()).and_then(|s| s.namespace_options.clone());
    cri::ContainerConfig {
        metadata: Some(cri::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(cri::ImageSpec { image: crate::image::BUSYBOX.into(), ..Default::default() }),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(cri::LinuxContainerConfig {
            security_context: Some(cri::LinuxContainerSecurityContext { namespace_options: options, ..Default::default() }),
            ..Default::default()
        }),
        ..Default::default()
    }
}
