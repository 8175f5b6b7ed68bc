//! `windlass status`: how the running daemon is.

use super::{
    Place,
    client::{Client, answer, parsed},
    output::{Format, line, moment, pretty, size, span},
};
use crate::error::Result;
use clap::Args;
use serde_json::{Value, json};
use std::{fs, path::Path, time::SystemTime};
use windlass_proto::cri::{self, image_service_client::ImageServiceClient};

/// `windlass status ...`
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: Place,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// What a process has in memory: its share of what it shares where that may be read (root's), else all that is resident.
pub(super) fn memory_bytes(pid: u64) -> Option<u64> {
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
    };
    field("smaps_rollup", "Pss:").or_else(|| field("status", "VmRSS:")).map(|kibibytes| kibibytes * 1024)
}

/// When a process started, in seconds since the epoch (proc_pid_stat(5), field 22, in ticks of 10 ms since the machine's start).
fn started(pid: u64) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let ticks: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    let boot: u64 = fs::read_to_string("/proc/stat").ok()?.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok())?;
    Some(boot + ticks / 100)
}

/// Runs the command to its end.
pub(super) async fn run(options: Options) -> Result<()> {
    let (config, mut client) = Client::of(options.place).await?;
    let status = gather(&mut client).await?;
    match options.format {
        Format::Json => pretty(&status),
        Format::Text => print(&status, &config.socket),
    }
}

async fn gather(client: &mut Client) -> Result<Value> {
    let version = answer(client.runtime.version(cri::VersionRequest::default())).await?;
    let status = answer(client.runtime.status(cri::StatusRequest { verbose: true })).await?;
    let (pods, containers) = (client.pods().await?, client.containers().await?);
    let mut images = ImageServiceClient::new(client.channel.clone());
    let images = answer(images.list_images(cri::ListImagesRequest::default())).await?.images;
    let ready: Vec<&cri::PodSandbox> = pods.iter().filter(|pod| pod.state() == cri::PodSandboxState::SandboxReady).collect();
    let mut monitors = Vec::new();
    for pod in &ready {
        if let Some(reply) = client.pod_if_there(&pod.id).await? {
            monitors.extend(parsed(&reply.info, "info")["monitorPid"].as_u64());
        }
    }
    let running = containers.iter().filter(|one| one.state() == cri::ContainerState::ContainerRunning).count();
    let daemon = parsed(&status.info, "daemon");
    let pid = daemon["pid"].as_u64();
    let text = |key: &str| status.info.get(key).cloned().unwrap_or_default();
    Ok(json!({
        "version": version.runtime_version,
        "pid": pid,
        "startedAt": pid.and_then(started),
        "memoryBytes": pid.and_then(memory_bytes),
        "monitors": { "count": monitors.len(), "memoryBytes": monitors.iter().filter_map(|pid| memory_bytes(*pid)).sum::<u64>() },
        "pods": { "all": pods.len(), "ready": ready.len() },
        "containers": { "all": containers.len(), "running": running },
        "images": { "count": images.len(), "bytes": images.iter().map(|image| image.size).sum::<u64>() },
        "conditions": status.status.map(|status| status.conditions).unwrap_or_default(),
        "network": parsed(&status.info, "network"),
        "cgroup": parsed(&status.info, "cgroup"),
        "apparmor": text("apparmor"),
        "selinux": text("selinux"),
        "handlers": status.runtime_handlers.iter().map(|handler| &handler.name).collect::<Vec<_>>(),
        "streaming": daemon["streaming"],
        "root": parsed(&status.info, "config")["root"],
    }))
}

fn print(status: &Value, socket: &Path) -> Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let list = |value: &Value| {
        value.as_array().into_iter().flatten().map(|one| one.as_str().unwrap_or("-").to_owned()).collect::<Vec<_>>().join(", ")
    };
    let bytes = |value: &Value| value.as_u64().map_or_else(|| "-".to_owned(), size);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default();
    let up = status["startedAt"].as_u64().map_or_else(
        || "-".to_owned(),
        |at| {
            let at_ns = i64::try_from(at).unwrap_or_default().saturating_mul(1_000_000_000);
            format!("{} (since {})", span(now.saturating_sub(at)), moment(at_ns))
        },
    );
    let say = |name: &str, value: String| line(format_args!("{name:<12} {value}"));
    say("version", text(&status["version"]))?;
    say("process", format!("{}, up {up}", status["pid"]))?;
    say("socket", socket.display().to_string())?;
    for condition in status["conditions"].as_array().into_iter().flatten() {
        let holds = if condition["status"] == true { "yes".to_owned() } else { format!("NO: {}", text(&condition["message"])) };
        let name = text(&condition["type"]);
        say(&name.strip_suffix("Ready").map_or_else(|| name.clone(), |what| format!("{} up", what.to_lowercase())), holds)?;
    }
    say("pods", format!("{} ready of {}", status["pods"]["ready"], status["pods"]["all"]))?;
    say("containers", format!("{} running of {}", status["containers"]["running"], status["containers"]["all"]))?;
    say("images", format!("{} ({})", status["images"]["count"], bytes(&status["images"]["bytes"])))?;
    say(
        "memory",
        format!(
            "daemon {}, {} monitors {}",
            bytes(&status["memoryBytes"]),
            status["monitors"]["count"],
            bytes(&status["monitors"]["memoryBytes"])
        ),
    )?;
    say("network", network(&status["network"]))?;
    let cgroup = &status["cgroup"];
    say("cgroups", format!("{} in {}", text(&cgroup["driver"]), text(&cgroup["root"])))?;
    if cgroup["notEnforced"].as_array().is_some_and(|missing| !missing.is_empty()) {
        say("not enforced", format!("limits of {}", list(&cgroup["notEnforced"])))?;
    }
    say("apparmor", text(&status["apparmor"]))?;
    say("selinux", text(&status["selinux"]))?;
    say("handlers", list(&status["handlers"]).trim_start_matches(", ").to_owned())?;
    say("streaming", text(&status["streaming"]))?;
    say("root", text(&status["root"]))
}

fn network(network: &Value) -> String {
    let subnets = network["subnets"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join(", ");
    let cni = &network["cni"]["network"];
    match network["attaches"].as_str() {
        Some("cni") => match (cni["name"].as_str(), cni["file"].as_str()) {
            (Some(name), Some(file)) => format!("CNI {name} of {file}"),
            _ => format!("CNI, with no valid network in {}", network["cni"]["directory"].as_str().unwrap_or_default()),
        },
        _ => format!("built-in bridge, {subnets}"),
    }
}
