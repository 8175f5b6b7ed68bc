//! `windlass inspect`: all that is known of a pod or a container. What the daemon has comes over its socket, the rest from the kernel's own
//! files, which root may read.

mod kernel;

use super::{
    Place,
    client::{Client, Object, parsed, pod_name},
    output::{Format, line, moment, pretty},
    ps::state_name,
};
use crate::{config::Config, error::Result};
use clap::Args;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use windlass_proto::cri;

/// `windlass inspect ...`
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: Place,
    /// Beginning of the id of a pod or a container, NAMESPACE/POD, or NAMESPACE/POD/CONTAINER
    object: String,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// Parts in the order in which people read them.
type Parts = Vec<(&'static str, Value)>;

/// Runs the command to its end.
pub(super) async fn run(options: Options) -> Result<()> {
    let (config, mut client) = Client::of(options.place.clone()).await?;
    let parts = match client.find(&options.object).await? {
        Object::Pod(pod) => of_pod(&mut client, &pod).await?,
        Object::Container(container) => of_container(&mut client, &config, &container.id).await?,
    };
    match options.format {
        Format::Json => pretty(&parts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>()),
        Format::Text => parts.iter().try_for_each(|(name, value)| print(name, value, 0)),
    }
}

/// Nanoseconds since the epoch as a time; nothing for never.
fn time(ns: i64) -> Value {
    if ns > 0 { json!(moment(ns)) } else { Value::Null }
}

async fn of_pod(client: &mut Client, pod: &cri::PodSandbox) -> Result<Parts> {
    let reply = client.pod(&pod.id).await?;
    let info = parsed(&reply.info, "info");
    let network = reply.status.and_then(|status| status.network).unwrap_or_default();
    let meta = pod.metadata.clone().unwrap_or_default();
    let cgroup = info["cgroup"].as_str().map(PathBuf::from);
    let containers: Vec<Value> = reply
        .containers_statuses
        .iter()
        .map(|status| {
            let meta = status.metadata.clone().unwrap_or_default();
            let mut one =
                json!({ "id": status.id, "name": meta.name, "attempt": meta.attempt, "state": state_name(status.state()) });
            if status.state() == cri::ContainerState::ContainerExited {
                one["exitCode"] = json!(status.exit_code);
                one["reason"] = json!(status.reason);
                one["ended"] = time(status.finished_at);
            }
            one
        })
        .collect();
    let monitor = info["monitorPid"].as_i64();
    let addresses: Vec<&String> =
        std::iter::once(&network.ip).chain(network.additional_ips.iter().map(|ip| &ip.ip)).filter(|ip| !ip.is_empty()).collect();
    Ok(vec![
        ("kind", json!("pod")),
        ("id", json!(pod.id)),
        ("name", json!(pod_name(pod))),
        ("uid", json!(meta.uid)),
        ("attempt", json!(meta.attempt)),
        ("state", json!(if pod.state() == cri::PodSandboxState::SandboxReady { "Ready" } else { "NotReady" })),
        ("created", time(pod.created_at)),
        ("handler", json!(pod.runtime_handler)),
        (
            "network",
            json!({ "addresses": addresses, "namespace": info["netns"], "attachedBy": info["network_kind"], "details": info["network"] }),
        ),
        ("monitor", json!({ "pid": monitor, "cgroup": info["monitorCgroup"], "process": monitor.map(kernel::process) })),
        ("cgroup", json!(cgroup)),
        ("limits", cgroup.as_deref().map(kernel::limits).unwrap_or_default()),
        (
            "directories",
            json!({ "record": info["directory"], "run": info["runDirectory"], "logs": info["config"]["log_directory"] }),
        ),
        ("labels", json!(pod.labels)),
        ("annotations", json!(pod.annotations)),
        ("containers", json!(containers)),
    ])
}

async fn of_container(client: &mut Client, config: &Config, id: &str) -> Result<Parts> {
    let (status, info) = client.container(id).await?;
    let pod_id = info["sandboxID"].as_str().unwrap_or_default().to_owned();
    let pods = client.pods().await?;
    let pod = pods.iter().find(|pod| pod.id == pod_id).map(pod_name).unwrap_or_default();
    let meta = status.metadata.clone().unwrap_or_default();
    let pid = info["pid"].as_i64().filter(|pid| *pid > 0);
    let cgroup = info["cgroup"].as_str().map(PathBuf::from);
    let bundle = info["bundle"].as_str().map(PathBuf::from).unwrap_or_default();
    let exit = (status.state() == cri::ContainerState::ContainerExited).then(|| {
        json!({ "code": status.exit_code, "reason": status.reason, "message": status.message, "at": time(status.finished_at) })
    });
    let user = status.user.clone().unwrap_or_default().linux.unwrap_or_default();
    Ok(vec![
        ("kind", json!("container")),
        ("id", json!(status.id)),
        ("name", json!(format!("{pod}/{}", meta.name))),
        ("pod", json!(pod_id)),
        ("attempt", json!(meta.attempt)),
        ("state", json!(state_name(status.state()))),
        ("created", time(status.created_at)),
        ("started", time(status.started_at)),
        ("exit", json!(exit)),
        ("image", json!({ "name": status.image.map(|image| image.image), "id": status.image_id, "reference": status.image_ref })),
        ("user", json!({ "uid": user.uid, "gid": user.gid, "groups": user.supplemental_groups })),
        ("log", json!(status.log_path)),
        ("bundle", json!(bundle)),
        ("root", json!({ "writable": bundle.join("upper"), "layers": layers(config, &info["chainIDs"]) })),
        ("cgroup", json!(cgroup)),
        ("limits", cgroup.as_deref().map(kernel::limits).unwrap_or_default()),
        ("notEnforced", info["notEnforced"].clone()),
        ("process", json!(pid.map(kernel::process))),
        ("namespaces", json!(pid.map(kernel::namespaces))),
        ("processes", cgroup.as_deref().map(kernel::processes).unwrap_or_default()),
        ("mounts", json!(pid.map(kernel::mounts))),
        ("labels", json!(status.labels)),
        ("annotations", json!(status.annotations)),
    ])
}

/// Where layers are, the lowest first: an EROFS image or a directory each.
fn layers(config: &Config, chain_ids: &Value) -> Vec<PathBuf> {
    let directory = config.root.join("images/layers");
    let place = |id: &str| {
        let name = id.rsplit(':').next().unwrap_or(id);
        let image = directory.join(format!("{name}.erofs"));
        if image.exists() { image } else { directory.join(name) }
    };
    chain_ids.as_array().into_iter().flatten().filter_map(Value::as_str).map(place).collect()
}

/// A value with its name, indented; what is not known or empty is left out.
fn print(name: &str, value: &Value, depth: usize) -> Result<()> {
    let indent = "  ".repeat(depth);
    match value {
        Value::Null => Ok(()),
        Value::String(text) if text.is_empty() => Ok(()),
        Value::Array(items) if items.is_empty() => Ok(()),
        Value::Object(fields) if fields.is_empty() => Ok(()),
        Value::Object(fields) => {
            line(format_args!("{indent}{name}:"))?;
            fields.iter().try_for_each(|(name, value)| print(name, value, depth + 1))
        }
        Value::Array(items) => {
            line(format_args!("{indent}{name}:"))?;
            items.iter().try_for_each(|item| match item {
                Value::Object(fields) => {
                    let cells: Vec<String> = fields
                        .iter()
                        .filter(|(_, value)| !value.is_null())
                        .map(|(name, value)| format!("{name}={}", plain(value)))
                        .collect();
                    line(format_args!("{indent}  {}", cells.join(" ")))
                }
                other => line(format_args!("{indent}  {}", plain(other))),
            })
        }
        other => line(format_args!("{indent}{name}: {}", plain(other))),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Reads a small file of the kernel's. A process chooses its name and the paths of its mounts, which need not be text.
fn read(path: &Path) -> Option<String> {
    std::fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
}
