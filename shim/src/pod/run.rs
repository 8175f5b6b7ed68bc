//! RunPodSandbox: from a configuration to a ready pod, or to nothing.
//!
//! It checks the configuration, records `Creating`, starts the monitor and lets it make the namespaces, attaches the network while it
//! writes the files and sets the limits, and records `Ready`. A step that fails takes back what the steps before it made, by the same code
//! that stops and removes a pod.

use super::{Phase, Pod, Record, check_modes, files, namespace_modes, network, resources, scope, stop, userns, watch};
use crate::{
    config::Account,
    error::{Error, Kind, Result},
    events::EventKind,
    monitor::Monitor,
    node::{Node, new_id, now_ns},
    nri,
    telemetry::{Clock, Phase as Timed},
};
use rustix::fd::OwnedFd;
use std::{collections::HashMap, fs, path::Path, sync::Arc, time::Duration};
use tracing::Instrument;
use windlass_proto::{
    cri::{NamespaceMode, PodSandboxConfig},
    frame::PROTOCOL_VERSION,
    monitor::{SetupRequest, SysctlsRequest, frame::Body},
};

/// Pauses before a pod that could not be run, nor taken back, is taken back: the first, and the longest.
const TAKE_BACK_FIRST: Duration = Duration::from_millis(250);
const TAKE_BACK_LAST: Duration = Duration::from_secs(64);

/// Runs a pod; returns its id. A call with the metadata of a run under way, or of a ready pod, gets that pod.
pub async fn run(node: Arc<Node>, config: PodSandboxConfig, runtime_handler: String) -> Result<String> {
    let key = check(&config).map_err(|error| match error.kind {
        // Nothing is wrong with the request, whose fields name themselves.
        Kind::Internal => error.during(format_args!("run pod {}", named(&config))),
        _ => error,
    })?;
    check_handler(&node, &config, &runtime_handler)?;
    let operation_node = node.clone();
    let operation_key = key.clone();
    node.joined(key, move || async move {
        let name = named(&config);
        let node = operation_node;
        if let Some(existing) = node.pods().into_iter().find(|pod| pod.look(|record| key_of(&record.config)) == operation_key) {
            return match existing.phase() {
                Phase::Ready => Ok(existing.id.clone()),
                Phase::Creating | Phase::NotReady => Err(Error::new(
                    Kind::AlreadyExists,
                    format!("run pod {name}: pod {} has the same name, namespace, uid and attempt; remove it first", existing.id),
                )),
            };
        }
        let id = new_id()?;
        let span = tracing::info_span!("run", pod = %id, name = %name);
        create(node, id, config, runtime_handler)
            .instrument(span)
            .await
            .map_err(|error| error.during(format_args!("run pod {name}")))
    })
    .await
}

fn named(config: &PodSandboxConfig) -> String {
    config.metadata.as_ref().map(|meta| format!("{}/{}", meta.namespace, meta.name)).unwrap_or_default()
}

fn key_of(config: &PodSandboxConfig) -> String {
    let meta = config.metadata.clone().unwrap_or_default();
    format!("pod/{}/{}/{}/{}", meta.namespace, meta.name, meta.uid, meta.attempt)
}

fn check_handler(node: &Node, config: &PodSandboxConfig, name: &str) -> Result<()> {
    let Some(program) = node.config.handler(name) else {
        return Err(Error::invalid(node.config.unknown_handler(name)));
    };
    if !program.as_os_str().is_empty() && userns::of(&namespace_modes(config))?.is_some() {
        return Err(Error::unimplemented(format!(
            "security_context.namespace_options.userns_options: runtime_handler {name:?} does not serve user namespaces, the native one does"
        )));
    }
    Ok(())
}

fn check(config: &PodSandboxConfig) -> Result<String> {
    let meta = config.metadata.as_ref().ok_or_else(|| Error::invalid("config.metadata is missing"))?;
    for (field, value) in [("name", &meta.name), ("namespace", &meta.namespace), ("uid", &meta.uid)] {
        if value.is_empty() {
            return Err(Error::invalid(format!("config.metadata.{field} is empty")));
        }
    }
    if config.hostname.len() > 64 {
        return Err(Error::invalid(format!("config.hostname has {} bytes, the kernel takes 64", config.hostname.len())));
    }
    if !config.log_directory.is_empty() && !config.log_directory.starts_with('/') {
        return Err(Error::invalid(format!("config.log_directory {:?} is not absolute", config.log_directory)));
    }
    check_security(config)?;
    network::port_mappings(config)?;
    Ok(key_of(config))
}

fn check_security(config: &PodSandboxConfig) -> Result<()> {
    let Some(security) = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref()) else { return Ok(()) };
    if security.run_as_group.is_some() && security.run_as_user.is_none() {
        return Err(Error::invalid("config.linux.security_context.run_as_group is set without run_as_user"));
    }
    let modes = namespace_modes(config);
    check_modes("config.linux.security_context.namespace_options", &modes)?;
    userns::of(&modes).map(drop)
}

async fn create(node: Arc<Node>, id: String, config: PodSandboxConfig, runtime_handler: String) -> Result<String> {
    let own_network = namespace_modes(&config).network() != NamespaceMode::Node;
    let taken: Vec<String> = node.pods().iter().map(|pod| pod.look(|record| record.selinux_categories.clone())).collect();
    let asked = config.linux.as_ref().map(|linux| linux.cgroup_parent.as_str()).unwrap_or_default();
    let place = node.driver.place(asked, &node.config.cgroup.parent, &id)?;
    let mut record = Record {
        netns: if own_network {
            node.config.network.netns_dir.join(format!("windlass-{}", &id[..32]))
        } else {
            Default::default()
        },
        cgroup_parent: place.parent,
        scope: place.scope,
        monitor_parent: match node.config.monitor.account {
            Account::Pod => String::new(),
            Account::System => node.driver.place("", &node.config.cgroup.parent, &id)?.parent,
        },
        selinux_categories: node.selinux.categories(&id, &taken),
        id: id.clone(),
        config,
        runtime_handler,
        created_at_ns: now_ns(),
        phase: Phase::Creating,
        network_attached: false,
        network_kind: node.network.kind(),
        network: None,
        leaf_has_id: true,
        removed_cpu_ns: 0,
        made_parent: false,
    };
    record.made_parent = record.owns_parent() && !node.tree.directory(&record.cgroup_parent).exists();
    let pod = Arc::new(Pod::new(record));
    node.begin_pod(&pod);
    let _turn = pod.turn.lock().await;
    let mut told = false;
    match build(&node, &pod, own_network, &mut told).await {
        Ok(()) => {
            tracing::info!(addresses = ?pod.look(|record| record.network.as_ref().map(|n| n.ips.clone())), "pod is ready");
            Ok(id)
        }
        Err(error) => {
            tracing::warn!(%error, "pod could not be run");
            node.forget_pod(&pod.id);
            if let Err(undo) = stop::erase(&node, &pod).await {
                tracing::error!(error = %undo, "pod not wholly taken back; it is tried again");
                tokio::spawn(take_back(node.clone(), pod.clone()).in_current_span());
            }
            if told {
                nri::pod_removed(&node, &pod.record()).await;
            }
            Err(error)
        }
    }
}

/// Tries again to take back what could not be. What this cannot do either the next start does.
pub(super) async fn take_back(node: Arc<Node>, pod: Arc<Pod>) {
    let mut pause = TAKE_BACK_FIRST;
    while pause <= TAKE_BACK_LAST {
        tokio::time::sleep(pause).await;
        pause *= 2;
        let _turn = pod.turn.lock().await;
        match stop::erase(&node, &pod).await {
            Ok(()) => return,
            Err(error) => tracing::error!(%error, "pod still not wholly taken back"),
        }
    }
}

/// `told`: that plugins of NRI have heard of it.
async fn build(node: &Arc<Node>, pod: &Arc<Pod>, own_network: bool, told: &mut bool) -> Result<()> {
    prepare_directories(node, pod)?;
    let (whole, making) = (Clock::start(Timed::Pod), Clock::start(Timed::PodMonitor));
    let (monitor, events, process) =
        node.program.start(&node.run_directory(&pod.id), node.images.layer_tree().map_err(Error::of_image)?)?;
    pod.set_monitor(Some(monitor.clone()));
    scope::start(node, pod, &process).await?;
    let route_socket = setup(node, pod, &monitor).await?;
    making.done();
    // The network needs none of this, and so is made beside it.
    let rest = async {
        resources::enforce(node, pod, &pod.record().config).await?;
        files::write(&node.pod_directory(&pod.id), &pod.record())?;
        prepare_logs(node, pod).await
    };
    let network = if own_network {
        let socket = route_socket.ok_or_else(|| Error::internal("the monitor gave no network socket"))?;
        let attaching = Clock::start(Timed::PodNetwork);
        let network = async { network::attach(node, pod, socket).await.inspect(|_| attaching.done()) };
        let (got, rest) = tokio::join!(network, rest);
        let got = got?;
        rest?;
        write_net_sysctls(pod, &monitor).await?;
        Some(got)
    } else {
        rest.await?;
        None
    };
    let ready = Record { network, phase: Phase::Ready, ..pod.record() };
    files::write_hosts(&node.pod_directory(&pod.id), &ready)?;
    let _hold = node.nri.hold().await;
    *told = true;
    nri::run_pod(node, &ready).await?;
    // Last: the next daemon takes a pod whose record says this as it is.
    pod.change(node, |record| *record = ready)?;
    whole.done();
    node.insert_pod(pod.clone());
    node.tell(pod, &pod.id, EventKind::ContainerCreatedEvent);
    node.tell(pod, &pod.id, EventKind::ContainerStartedEvent);
    watch::events(node.clone(), pod.clone(), monitor, events);
    Ok(())
}

/// The network's sysctls that are asked for; they are written before it is attached and after.
fn net_sysctls(config: &PodSandboxConfig) -> HashMap<String, String> {
    let all = config.linux.iter().flat_map(|linux| &linux.sysctls);
    let of_network = all.filter(|(name, _)| name.starts_with("net.") || name.starts_with("net/"));
    of_network.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// Interfaces are there now, and the request's word holds against a plugin's.
async fn write_net_sysctls(pod: &Pod, monitor: &Monitor) -> Result<()> {
    let sysctls = pod.look(|record| net_sysctls(&record.config));
    if !sysctls.is_empty() {
        monitor.call(Body::Sysctls(SysctlsRequest { sysctls })).await?;
    }
    Ok(())
}

fn prepare_directories(node: &Node, pod: &Pod) -> Result<()> {
    let directory = node.pod_directory(&pod.id);
    for path in [&directory, &node.run_directory(&pod.id)] {
        fs::create_dir_all(path).map_err(|error| Error::io(format_args!("create {}", path.display()), error))?;
    }
    pod.change(node, |_| {})
}

async fn prepare_logs(node: &Node, pod: &Pod) -> Result<()> {
    let logs = pod.look(|record| record.log_directory().to_owned());
    if logs.is_empty() {
        return Ok(());
    }
    let looking = node.lookups.begin(None);
    let own = looking.clone();
    let make = move || {
        own.at(format_args!("config.log_directory {logs:?}"), Path::new(&logs))?;
        fs::create_dir_all(&logs).map_err(|error| Error::io(format_args!("create log directory {logs}"), error))
    };
    looking.run(make).await
}

async fn setup(node: &Node, pod: &Pod, monitor: &Monitor) -> Result<Option<OwnedFd>> {
    let record = pod.record();
    let modes = namespace_modes(&record.config);
    let users = userns::of(&modes)?;
    let own_network = modes.network() != NamespaceMode::Node;
    let shared_pid = modes.pid() == NamespaceMode::Pod;
    let text = |path: std::path::PathBuf| path.to_string_lossy().into_owned();
    let request = SetupRequest {
        protocol_version: PROTOCOL_VERSION,
        pod_id: pod.id.clone(),
        monitor_cgroup: text(record.monitor_cgroup(node)),
        netns_path: text(record.netns.clone()),
        ipc: modes.ipc() != NamespaceMode::Node,
        uts: own_network,
        hostname: files::hostname(&record),
        shared_pid,
        init_cgroup: if shared_pid { text(record.init_cgroup(node)) } else { String::new() },
        sysctls: network::sysctls(&record),
        sysctls_again: own_network && !net_sysctls(&record.config).is_empty(),
        shm_size_bytes: node.config.containers.shm_size_bytes,
        uid_mappings: users.iter().map(|users| userns::mapping(&users.uids)).collect(),
        gid_mappings: users.iter().map(|users| userns::mapping(&users.gids)).collect(),
        mount_label: node.selinux.labels(&record.selinux_categories, super::selinux_options(&record.config), None, false)?.file,
    };
    let (_, mut descriptors) = monitor.call(Body::Setup(request)).await?;
    Ok(descriptors.pop())
}
