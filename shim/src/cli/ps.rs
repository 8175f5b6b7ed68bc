//! `windlass ps`: pods with their containers, and what they use.

use super::{
    Place,
    client::{Client, answer, parsed},
    output::{Format, NOTHING, age, json, line, row, short, size, table},
};
use crate::error::{Error, Result};
use clap::Args;
use serde::Serialize;
use std::collections::HashMap;
use windlass_proto::cri;

/// `windlass ps ...`
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: Place,
    /// Only pods whose id, or a container's, begins so
    id: Option<String>,
    /// Only pods of this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// Only pods with this in their name
    #[arg(long)]
    name: Option<String>,
    /// Only pods with this label; several must all hold
    #[arg(short, long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Only pods and containers that run
    #[arg(long)]
    running: bool,
    /// Whole ids
    #[arg(long)]
    no_trunc: bool,
    /// Print nothing but the ids of pods
    #[arg(short, long)]
    quiet: bool,
    /// How to print results
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// A pod as it is shown.
#[derive(Debug, Serialize)]
struct Pod {
    id: String,
    namespace: String,
    name: String,
    uid: String,
    /// `Ready` or `NotReady`.
    state: String,
    attempt: u32,
    created_at_ns: i64,
    addresses: Vec<String>,
    runtime_handler: String,
    labels: HashMap<String, String>,
    #[serde(flatten)]
    usage: Usage,
    monitor_pid: Option<u64>,
    cgroup: Option<String>,
    containers: Vec<Container>,
}

/// A container as it is shown.
#[derive(Debug, Serialize)]
struct Container {
    id: String,
    name: String,
    /// `Created`, `Running` or `Exited`.
    state: &'static str,
    attempt: u32,
    created_at_ns: i64,
    started_at_ns: i64,
    finished_at_ns: i64,
    exit_code: Option<i32>,
    reason: String,
    message: String,
    image: String,
    #[serde(flatten)]
    usage: Usage,
}

/// What something uses; nothing where it is not known.
#[derive(Debug, Default, Clone, Copy, Serialize)]
pub(super) struct Usage {
    /// Thousandths of a processor.
    pub(super) cpu_millicores: Option<u64>,
    pub(super) memory_bytes: Option<u64>,
}

impl Usage {
    pub(super) fn of(cpu: Option<&cri::CpuUsage>, memory: Option<&cri::MemoryUsage>) -> Usage {
        let nano_cores = cpu.and_then(|cpu| cpu.usage_nano_cores.as_ref());
        Usage {
            cpu_millicores: nano_cores.map(|nano| nano.value / 1_000_000),
            memory_bytes: memory.and_then(|memory| memory.working_set_bytes.as_ref()).map(|bytes| bytes.value),
        }
    }

    pub(super) fn cells(self) -> [String; 2] {
        let nothing = || NOTHING.to_owned();
        [self.cpu_millicores.map_or_else(nothing, |cpu| format!("{cpu}m")), self.memory_bytes.map_or_else(nothing, size)]
    }
}

/// The labels of `KEY=VALUE`.
fn labels(words: &[String]) -> Result<HashMap<String, String>> {
    let one = |word: &String| {
        let pair = word.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        pair.ok_or_else(|| Error::invalid(format!("--label {word:?} is not KEY=VALUE")))
    };
    words.iter().map(one).collect()
}

/// Runs the command to its end.
pub(super) async fn run(options: Options) -> Result<()> {
    let label_selector = labels(&options.label)?;
    let (_, mut client) = Client::of(options.place.clone()).await?;
    let filter = cri::PodSandboxFilter { label_selector: label_selector.clone(), ..Default::default() };
    let mut pods = answer(client.runtime.list_pod_sandbox(cri::ListPodSandboxRequest { filter: Some(filter) })).await?.items;
    pods.retain(|pod| wanted(pod, &options));
    // By name, the latest of one name first.
    pods.sort_by_key(|pod| (super::client::pod_name(pod), -pod.created_at));
    let filter = cri::PodSandboxStatsFilter { label_selector, ..Default::default() };
    let stats = answer(client.runtime.list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest { filter: Some(filter) })).await?;
    let stats: HashMap<String, cri::PodSandboxStats> =
        stats.stats.into_iter().filter_map(|stats| Some((stats.attributes.as_ref()?.id.clone(), stats))).collect();
    let mut shown = Vec::new();
    for pod in pods {
        // One that has gone in between is none.
        let id = pod.id.clone();
        let Some(status) = client.pod_if_there(&id).await? else { continue };
        let pod = described(pod, status, stats.get(&id), options.running);
        let id = options.id.as_deref().unwrap_or_default();
        if pod.id.starts_with(id) || pod.containers.iter().any(|container| container.id.starts_with(id)) {
            shown.push(pod);
        }
    }
    match options.format {
        Format::Json => json(&shown),
        Format::Text if options.quiet => shown.iter().try_for_each(|pod| line(&pod.id)),
        Format::Text => print(&shown, options.no_trunc),
    }
}

fn wanted(pod: &cri::PodSandbox, options: &Options) -> bool {
    let meta = pod.metadata.clone().unwrap_or_default();
    options.namespace.as_ref().is_none_or(|namespace| *namespace == meta.namespace)
        && options.name.as_ref().is_none_or(|name| meta.name.contains(name.as_str()))
        && (!options.running || pod.state() == cri::PodSandboxState::SandboxReady)
}

fn described(
    pod: cri::PodSandbox,
    reply: cri::PodSandboxStatusResponse,
    stats: Option<&cri::PodSandboxStats>,
    running: bool,
) -> Pod {
    let info = parsed(&reply.info, "info");
    let meta = pod.metadata.clone().unwrap_or_default();
    let network = reply.status.and_then(|status| status.network).unwrap_or_default();
    let addresses = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|ip| ip.ip));
    let linux = stats.and_then(|stats| stats.linux.as_ref());
    let mut containers: Vec<Container> = reply
        .containers_statuses
        .into_iter()
        .filter(|status| !running || status.state() == cri::ContainerState::ContainerRunning)
        .map(|status| {
            let stats = linux.into_iter().flat_map(|linux| &linux.containers);
            let stats = stats.into_iter().find(|stats| stats.attributes.as_ref().is_some_and(|one| one.id == status.id));
            container(status, stats)
        })
        .collect();
    containers.sort_by_key(|container| (container.name.clone(), -container.created_at_ns));
    Pod {
        state: if pod.state() == cri::PodSandboxState::SandboxReady { "Ready" } else { "NotReady" }.to_owned(),
        namespace: meta.namespace,
        name: meta.name,
        uid: meta.uid,
        attempt: meta.attempt,
        created_at_ns: pod.created_at,
        addresses: addresses.filter(|address| !address.is_empty()).collect(),
        usage: Usage::of(linux.and_then(|linux| linux.cpu.as_ref()), linux.and_then(|linux| linux.memory.as_ref())),
        monitor_pid: info["monitorPid"].as_u64(),
        cgroup: info["cgroup"].as_str().map(str::to_owned),
        containers,
        id: pod.id,
        runtime_handler: pod.runtime_handler,
        labels: pod.labels,
    }
}

/// A container's state as people read it.
pub(super) fn state_name(state: cri::ContainerState) -> &'static str {
    match state {
        cri::ContainerState::ContainerCreated => "Created",
        cri::ContainerState::ContainerRunning => "Running",
        cri::ContainerState::ContainerExited => "Exited",
        cri::ContainerState::ContainerUnknown => "Unknown",
    }
}

fn container(status: cri::ContainerStatus, stats: Option<&cri::ContainerStats>) -> Container {
    let meta = status.metadata.clone().unwrap_or_default();
    let exited = status.state() == cri::ContainerState::ContainerExited;
    Container {
        state: state_name(status.state()),
        name: meta.name,
        attempt: meta.attempt,
        created_at_ns: status.created_at,
        started_at_ns: status.started_at,
        finished_at_ns: status.finished_at,
        exit_code: exited.then_some(status.exit_code),
        image: status.image.map(|image| image.image).unwrap_or_default(),
        usage: Usage::of(stats.and_then(|stats| stats.cpu.as_ref()), stats.and_then(|stats| stats.memory.as_ref())),
        id: status.id,
        reason: status.reason,
        message: status.message,
    }
}

fn print(pods: &[Pod], no_trunc: bool) -> Result<()> {
    let id = |id: &String| if no_trunc { id.clone() } else { short(id).to_owned() };
    let mut rows = vec![row(["POD / CONTAINER", "ID", "STATE", "AGE", "ATTEMPT", "CPU", "MEMORY", "ADDRESSES", "MONITOR"])];
    for pod in pods {
        let [cpu, memory] = pod.usage.cells();
        let addresses = if pod.addresses.is_empty() { NOTHING.to_owned() } else { pod.addresses.join(" ") };
        let monitor = pod.monitor_pid.map_or_else(|| NOTHING.to_owned(), |pid| pid.to_string());
        let name = format!("{}/{}", pod.namespace, pod.name);
        let (age, attempt) = (age(pod.created_at_ns), pod.attempt.to_string());
        rows.push(vec![name, id(&pod.id), pod.state.clone(), age, attempt, cpu, memory, addresses, monitor]);
        for container in &pod.containers {
            let [cpu, memory] = container.usage.cells();
            let since = container.finished_at_ns.max(container.started_at_ns).max(container.created_at_ns);
            let state = match container.exit_code {
                Some(code) => format!("{} {code} {}", container.state, container.reason).trim_end().to_owned(),
                None => container.state.to_owned(),
            };
            let (name, attempt) = (format!("  {}", container.name), container.attempt.to_string());
            rows.push(vec![name, id(&container.id), state, super::output::age(since), attempt, cpu, memory]);
        }
    }
    table(&rows)
}
