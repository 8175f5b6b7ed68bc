//! RuntimeService.

use super::{
    Service, deadline, status,
    stream::{Batches, EventStream, batches},
    verbose, view,
};
use crate::{
    cgroup::Driver,
    checkpoint,
    config::NATIVE_HANDLER,
    container::{self, Container},
    error::{Kind, Result as Outcome, known},
    pod,
};
use std::{collections::HashMap, sync::Arc, time::Duration};
use tonic::{Request, Response, Status};
use windlass_proto::cri::{self, runtime_service_server::RuntimeService};

type Reply<T> = Result<Response<T>, Status>;

/// Version of the kubelet's runtime API: kubelet accepts this one only.
const KUBELET_API_VERSION: &str = "0.1.0";

/// What an id that is gone already means for stop and remove: success.
fn gone_is_fine<T>(found: Outcome<T>) -> Outcome<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn seconds(field: &str, value: i64) -> Result<Duration, Status> {
    let value = u64::try_from(value).map_err(|_| Status::invalid_argument(format!("{field} {value} is negative")))?;
    Ok(Duration::from_secs(value))
}

impl Service {
    fn container(&self, id: &str) -> Result<Arc<Container>, Status> {
        self.node.container(id).map_err(status::of)
    }

    fn pod_list(&self, filter: &cri::PodSandboxFilter) -> Result<Vec<cri::PodSandbox>, Status> {
        let wanted = filter.state.as_ref().map(|wanted| known::<cri::PodSandboxState>("filter.state", wanted.state));
        let state = wanted.transpose().map_err(status::of)?;
        let wanted = |record: &pod::Record| {
            record.id.starts_with(&filter.id)
                && state.is_none_or(|state| state == view::pod_state(record.phase))
                && view::labels_match(&record.config.labels, &filter.label_selector)
        };
        Ok(self.node.pods().iter().filter_map(|pod| pod.look(|record| wanted(record).then(|| view::pod(record)))).collect())
    }

    fn container_list(&self, filter: &cri::ContainerFilter) -> Result<Vec<cri::Container>, Status> {
        let wanted = filter.state.as_ref().map(|wanted| known::<cri::ContainerState>("filter.state", wanted.state));
        let state = wanted.transpose().map_err(status::of)?;
        let in_scope = |record: &container::Record| {
            record.id.starts_with(&filter.id)
                && record.pod_id.starts_with(&filter.pod_sandbox_id)
                && view::labels_match(&record.config.labels, &filter.label_selector)
        };
        let all = self.node.containers();
        let found = all.iter().filter_map(|container| container.look(|record| in_scope(record).then(|| view::container(record))));
        Ok(found.filter(|container| state.is_none_or(|state| state == container.state())).collect())
    }

    /// What this node is, for a person: `crictl info`.
    fn node_info(&self) -> HashMap<String, String> {
        let node = &self.node;
        let cgroup = serde_json::json!({
            "driver": node.driver.describe(), "root": node.tree.root, "controllers": node.tree.controllers, "notEnforced": node.tree.missing(),
        });
        HashMap::from([
            ("config".to_owned(), serde_json::json!(node.config).to_string()),
            ("cgroup".to_owned(), cgroup.to_string()),
            ("network".to_owned(), node.network.describe().to_string()),
            ("nri".to_owned(), node.nri.describe().to_string()),
            (
                "daemon".to_owned(),
                serde_json::json!({ "pid": std::process::id(), "streaming": self.streaming.origin() }).to_string(),
            ),
            ("apparmor".to_owned(), node.apparmor.describe()),
            ("selinux".to_owned(), node.selinux.describe()),
            ("pods".to_owned(), node.pods().len().to_string()),
            ("containers".to_owned(), node.containers().len().to_string()),
        ])
    }
}

fn condition(name: &str, ready: Result<(), String>, reason: &str) -> cri::RuntimeCondition {
    cri::RuntimeCondition {
        r#type: name.to_owned(),
        status: ready.is_ok(),
        reason: if ready.is_ok() { String::new() } else { reason.to_owned() },
        message: ready.err().unwrap_or_default(),
    }
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Reply<cri::VersionResponse> {
        Ok(Response::new(cri::VersionResponse {
            version: KUBELET_API_VERSION.into(),
            runtime_name: "windlass".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn run_pod_sandbox(&self, request: Request<cri::RunPodSandboxRequest>) -> Reply<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config = request.config.ok_or_else(|| Status::invalid_argument("config is missing"))?;
        let pod_sandbox_id = pod::run(self.node.clone(), config, request.runtime_handler).await.map_err(status::of)?;
        Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn stop_pod_sandbox(&self, request: Request<cri::StopPodSandboxRequest>) -> Reply<cri::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        if let Some(pod) = gone_is_fine(self.node.pod(&id)).map_err(status::of)? {
            let (node, id) = (self.node.clone(), pod.id.clone());
            let stop = async move { pod::stop(&node, &pod).await };
            let stopped = self.node.once(format!("stop pod {id}"), stop).await;
            stopped.map_err(|error| status::of(error.during(format_args!("stop pod {id}"))))?;
        }
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(&self, request: Request<cri::RemovePodSandboxRequest>) -> Reply<cri::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        if let Some(pod) = gone_is_fine(self.node.pod(&id)).map_err(status::of)? {
            let (node, id) = (self.node.clone(), pod.id.clone());
            let remove = async move { pod::remove(&node, &pod).await };
            let removed = self.node.once(format!("remove pod {id}"), remove).await;
            removed.map_err(|error| status::of(error.during(format_args!("remove pod {id}"))))?;
        }
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(&self, request: Request<cri::PodSandboxStatusRequest>) -> Reply<cri::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let pod = self.node.pod(&request.pod_sandbox_id).map_err(status::of)?;
        let mut info = HashMap::new();
        if request.verbose {
            info.insert("info".to_owned(), verbose::pod(&self.node, &pod.record()).to_string());
        }
        let statuses = self.node.containers_of(&pod.id).iter().map(|container| container.look(view::container_status)).collect();
        Ok(Response::new(cri::PodSandboxStatusResponse {
            status: Some(pod.look(view::pod_status)),
            info,
            containers_statuses: statuses,
            timestamp: crate::node::now_ns(),
        }))
    }

    async fn list_pod_sandbox(&self, request: Request<cri::ListPodSandboxRequest>) -> Reply<cri::ListPodSandboxResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        Ok(Response::new(cri::ListPodSandboxResponse { items: self.pod_list(&filter)? }))
    }

    async fn create_container(&self, request: Request<cri::CreateContainerRequest>) -> Reply<cri::CreateContainerResponse> {
        let limit = deadline::of(&request);
        let request = request.into_inner();
        let config = request.config.ok_or_else(|| Status::invalid_argument("config is missing"))?;
        let pod = self.node.pod(&request.pod_sandbox_id).map_err(status::of)?;
        let declared = request.sandbox_config.as_ref();
        let container_id = container::create(self.node.clone(), pod, config, declared, limit).await.map_err(status::of)?;
        Ok(Response::new(cri::CreateContainerResponse { container_id }))
    }

    async fn start_container(&self, request: Request<cri::StartContainerRequest>) -> Reply<cri::StartContainerResponse> {
        let container = self.container(&request.into_inner().container_id)?;
        let (node, id) = (self.node.clone(), container.id.clone());
        let start = async move { container::start(&node, &container).await };
        self.node.once(format!("start {id}"), start).await.map_err(status::of)?;
        Ok(Response::new(cri::StartContainerResponse {}))
    }

    async fn stop_container(&self, request: Request<cri::StopContainerRequest>) -> Reply<cri::StopContainerResponse> {
        let request = request.into_inner();
        let timeout = seconds("timeout", request.timeout.max(0))?;
        if let Some(container) = gone_is_fine(self.node.container(&request.container_id)).map_err(status::of)? {
            container::stop(&self.node, &container, timeout).await.map_err(status::of)?;
        }
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(&self, request: Request<cri::RemoveContainerRequest>) -> Reply<cri::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        if let Some(container) = gone_is_fine(self.node.container(&id)).map_err(status::of)? {
            let (node, id) = (self.node.clone(), container.id.clone());
            let remove = async move { container::remove(&node, &container).await };
            self.node.once(format!("remove {id}"), remove).await.map_err(status::of)?;
        }
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(&self, request: Request<cri::ListContainersRequest>) -> Reply<cri::ListContainersResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        Ok(Response::new(cri::ListContainersResponse { containers: self.container_list(&filter)? }))
    }

    async fn container_status(&self, request: Request<cri::ContainerStatusRequest>) -> Reply<cri::ContainerStatusResponse> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        let mut info = HashMap::new();
        if request.verbose {
            info.insert("info".to_owned(), verbose::container(&self.node, &container.record()).to_string());
        }
        Ok(Response::new(cri::ContainerStatusResponse { status: Some(container.look(view::container_status)), info }))
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Reply<cri::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        if let Some(resources) = request.linux {
            container::update(&self.node, &container, resources).await.map_err(status::of)?;
        }
        Ok(Response::new(cri::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<cri::ReopenContainerLogRequest>,
    ) -> Reply<cri::ReopenContainerLogResponse> {
        let container = self.container(&request.into_inner().container_id)?;
        container::reopen_log(&self.node, &container).await.map_err(status::of)?;
        Ok(Response::new(cri::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Reply<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        let timeout = seconds("timeout", request.timeout)?;
        let timeout = (!timeout.is_zero()).then_some(timeout);
        let output = container::exec::sync(&self.node, &container, request.cmd, timeout).await.map_err(status::of)?;
        Ok(Response::new(cri::ExecSyncResponse { stdout: output.stdout, stderr: output.stderr, exit_code: output.exit_code }))
    }

    async fn pod_sandbox_stats(&self, request: Request<cri::PodSandboxStatsRequest>) -> Reply<cri::PodSandboxStatsResponse> {
        // Kubelet asks for "" once, and NotFound is the right answer: Unimplemented would turn its CRI statistics off for good.
        let stats = self.stats_of_pod(&request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(cri::PodSandboxStatsResponse { stats: Some(stats) }))
    }

    async fn status(&self, request: Request<cri::StatusRequest>) -> Reply<cri::StatusResponse> {
        let conditions = vec![
            condition("RuntimeReady", Ok(()), ""),
            condition("NetworkReady", self.node.network.ready(), "NetworkPluginNotReady"),
        ];
        let features =
            cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: pod::userns::available() };
        let native = ["", NATIVE_HANDLER].map(|name| cri::RuntimeHandler { name: name.into(), features: Some(features) });
        let others = self.node.config.handlers.keys().map(|name| {
            let features = cri::RuntimeHandlerFeatures { recursive_read_only_mounts: true, user_namespaces: false };
            cri::RuntimeHandler { name: name.clone(), features: Some(features) }
        });
        let handlers = native.into_iter().chain(others).collect();
        Ok(Response::new(cri::StatusResponse {
            status: Some(cri::RuntimeStatus { conditions }),
            info: if request.into_inner().verbose { self.node_info() } else { HashMap::new() },
            runtime_handlers: handlers,
            features: Some(cri::RuntimeFeatures {
                supplemental_groups_policy: true,
                mount_options: true,
                user_namespaces_host_network: pod::userns::available(),
            }),
        }))
    }

    async fn runtime_config(&self, _: Request<cri::RuntimeConfigRequest>) -> Reply<cri::RuntimeConfigResponse> {
        let driver = match self.node.driver {
            Driver::Cgroupfs => cri::CgroupDriver::Cgroupfs,
            Driver::Systemd(_) => cri::CgroupDriver::Systemd,
        };
        let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: driver.into() };
        Ok(Response::new(cri::RuntimeConfigResponse { linux: Some(linux) }))
    }

    // Not built yet. Each says so by its own name.

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Reply<cri::ExecResponse> {
        let url = super::streams::exec(self, request.into_inner()).map_err(status::of)?;
        Ok(Response::new(cri::ExecResponse { url }))
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Reply<cri::AttachResponse> {
        let url = super::streams::attach(self, request.into_inner()).map_err(status::of)?;
        Ok(Response::new(cri::AttachResponse { url }))
    }

    async fn port_forward(&self, request: Request<cri::PortForwardRequest>) -> Reply<cri::PortForwardResponse> {
        let url = super::streams::port_forward(self, request.into_inner()).map_err(status::of)?;
        Ok(Response::new(cri::PortForwardResponse { url }))
    }

    async fn container_stats(&self, request: Request<cri::ContainerStatsRequest>) -> Reply<cri::ContainerStatsResponse> {
        let stats = self.stats_of_container(&request.into_inner().container_id).await?;
        Ok(Response::new(cri::ContainerStatsResponse { stats: Some(stats) }))
    }

    async fn list_container_stats(
        &self,
        request: Request<cri::ListContainerStatsRequest>,
    ) -> Reply<cri::ListContainerStatsResponse> {
        let stats = self.stats_of_containers(request.into_inner().filter.unwrap_or_default()).await?;
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Reply<cri::ListPodSandboxStatsResponse> {
        let stats = self.stats_of_pods(request.into_inner().filter.unwrap_or_default()).await?;
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<cri::UpdateRuntimeConfigRequest>,
    ) -> Reply<cri::UpdateRuntimeConfigResponse> {
        let network = request.into_inner().runtime_config.and_then(|config| config.network_config);
        let cidr = network.map(|network| network.pod_cidr).unwrap_or_default();
        pod::assign_subnets(&self.node, &cidr).await.map_err(status::of)?;
        Ok(Response::new(cri::UpdateRuntimeConfigResponse {}))
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Reply<cri::CheckpointContainerResponse> {
        let limit = deadline::of(&request);
        let request = request.into_inner();
        let timeout = Some(seconds("timeout", request.timeout)?).filter(|timeout| !timeout.is_zero());
        let limit = limit.into_iter().chain(timeout).min();
        let container = self.container(&request.container_id)?;
        checkpoint::container(self.node.clone(), container, request.location.into(), limit).await.map_err(status::of)?;
        Ok(Response::new(cri::CheckpointContainerResponse {}))
    }

    async fn checkpoint_pod(&self, request: Request<cri::CheckpointPodRequest>) -> Reply<cri::CheckpointPodResponse> {
        let limit = deadline::of(&request);
        let request = request.into_inner();
        let pod = self.node.pod(&request.pod_sandbox_id).map_err(status::of)?;
        let (output, ids) = (request.output_path.into(), request.container_ids);
        let done = checkpoint::capture_pod(self.node.clone(), pod, output, ids, request.options, limit).await;
        done.map_err(status::of)?;
        Ok(Response::new(cri::CheckpointPodResponse {}))
    }

    async fn restore_pod(&self, request: Request<cri::RestorePodRequest>) -> Reply<cri::RestorePodResponse> {
        let limit = deadline::of(&request);
        let request = request.into_inner();
        let config = request.config.ok_or_else(|| Status::invalid_argument("config is missing"))?;
        let restore = checkpoint::restore_pod(
            self.node.clone(),
            request.checkpoint_path.into(),
            config,
            request.runtime_handler,
            request.container_configs,
            request.options,
            limit,
        );
        let (pod_sandbox_id, restored_containers) = restore.await.map_err(status::of)?;
        Ok(Response::new(cri::RestorePodResponse { pod_sandbox_id, restored_containers }))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Reply<cri::ListMetricDescriptorsResponse> {
        Ok(Response::new(cri::ListMetricDescriptorsResponse { descriptors: super::metrics::descriptors() }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Reply<cri::ListPodSandboxMetricsResponse> {
        Ok(Response::new(cri::ListPodSandboxMetricsResponse { pod_metrics: self.metrics_of_pods().await? }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<cri::UpdatePodSandboxResourcesRequest>,
    ) -> Reply<cri::UpdatePodSandboxResourcesResponse> {
        let request = request.into_inner();
        let pod = self.node.pod(&request.pod_sandbox_id).map_err(status::of)?;
        pod::update(&self.node, &pod, request.overhead, request.resources).await.map_err(status::of)?;
        Ok(Response::new(cri::UpdatePodSandboxResourcesResponse {}))
    }

    type StreamPodSandboxesStream = Batches<cri::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<cri::StreamPodSandboxesRequest>,
    ) -> Reply<Self::StreamPodSandboxesStream> {
        let items = self.pod_list(&request.into_inner().filter.unwrap_or_default())?;
        Ok(batches(items, |pod_sandboxes| cri::StreamPodSandboxesResponse { pod_sandboxes }))
    }

    type StreamContainersStream = Batches<cri::StreamContainersResponse>;

    async fn stream_containers(&self, request: Request<cri::StreamContainersRequest>) -> Reply<Self::StreamContainersStream> {
        let items = self.container_list(&request.into_inner().filter.unwrap_or_default())?;
        Ok(batches(items, |containers| cri::StreamContainersResponse { containers }))
    }

    type StreamContainerStatsStream = Batches<cri::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<cri::StreamContainerStatsRequest>,
    ) -> Reply<Self::StreamContainerStatsStream> {
        let items = self.stats_of_containers(request.into_inner().filter.unwrap_or_default()).await?;
        Ok(batches(items, |container_stats| cri::StreamContainerStatsResponse { container_stats }))
    }

    type StreamPodSandboxStatsStream = Batches<cri::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<cri::StreamPodSandboxStatsRequest>,
    ) -> Reply<Self::StreamPodSandboxStatsStream> {
        let items = self.stats_of_pods(request.into_inner().filter.unwrap_or_default()).await?;
        Ok(batches(items, |pod_sandbox_stats| cri::StreamPodSandboxStatsResponse { pod_sandbox_stats }))
    }

    type GetContainerEventsStream = EventStream;

    async fn get_container_events(&self, _: Request<cri::GetEventsRequest>) -> Reply<Self::GetContainerEventsStream> {
        self.events()
    }

    type StreamPodSandboxMetricsStream = Batches<cri::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<cri::StreamPodSandboxMetricsRequest>,
    ) -> Reply<Self::StreamPodSandboxMetricsStream> {
        let items = self.metrics_of_pods().await?;
        Ok(batches(items, |pod_sandbox_metrics| cri::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }))
    }
}
