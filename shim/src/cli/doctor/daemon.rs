//! The daemon: whether one answers, of which version it and its monitors are, and what it was started with.

use super::{Node, read, report::Report};
use crate::cli::client::{Client, answer, parsed};
use serde_json::Value;
use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::Path,
};
use windlass_proto::cri;

/// What a daemon that answers has.
pub(super) struct Daemon {
    /// Its ready pods, and their monitors.
    monitors: HashMap<String, i64>,
    /// All of its pods.
    pub(super) pods: BTreeSet<String>,
    /// What it was started with; nothing from another runtime.
    pub(super) config: Value,
    pub(super) pid: Option<i64>,
}

/// The capability without which pods get less than they ask for (capabilities(7)).
const CAP_SYS_RESOURCE: u32 = 24;

pub(super) async fn check(node: &Node, report: &mut Report) -> Option<Daemon> {
    report.area("daemon");
    let socket = &node.config.socket;
    let shown = socket.display();
    if let Err(error) = UnixStream::connect(socket) {
        match error.kind() {
            std::io::ErrorKind::PermissionDenied => report.unseen(format!("the daemon at {shown}"), "run as root"),
            std::io::ErrorKind::NotFound => report.warning(
                format!("no daemon serves: {shown} is not there; pods that were running go on"),
                "systemctl start windlass; if it does not start, journalctl -u windlass says why",
            ),
            _ => report.warning(
                format!("no daemon serves: {shown} was left by one that was killed ({error}); pods that were running go on"),
                "systemctl start windlass, which replaces the socket; journalctl -u windlass says why it ended",
            ),
        }
        return None;
    }
    match look(node, report).await {
        Ok(daemon) => Some(daemon),
        Err(error) => {
            report.error(
                format!("something listens at {shown} and does not answer as a runtime: {error}"),
                "see journalctl -u windlass; `systemctl restart windlass` disturbs no pod",
            );
            None
        }
    }
}

async fn look(node: &Node, report: &mut Report) -> crate::error::Result<Daemon> {
    let mut client = Client::connect(&node.config).await?;
    let version = answer(client.runtime.version(cri::VersionRequest::default())).await?;
    let own = env!("CARGO_PKG_VERSION");
    if version.runtime_name != "windlass" {
        report.error(
            format!("{} answers as {} {}", node.config.socket.display(), version.runtime_name, version.runtime_version),
            "name Windlass's socket by --socket, or give it another one than that runtime's",
        );
        return Ok(Daemon { monitors: HashMap::new(), pods: BTreeSet::new(), config: Value::Null, pid: None });
    }
    match version.runtime_version.as_str() {
        same if same == own => report.ok(format!("windlass {own} answers at {}", node.config.socket.display())),
        other => report.warning(
            format!("the daemon is windlass {other}, and this program {own}: it was not restarted after the upgrade"),
            "systemctl restart windlass, which disturbs no pod",
        ),
    }
    let status = answer(client.runtime.status(cri::StatusRequest { verbose: true })).await?;
    for condition in status.status.map(|status| status.conditions).unwrap_or_default() {
        if condition.status {
            report.ok(format!("{} holds", condition.r#type));
        } else {
            report.error(
                format!("{}: {}: {}", condition.r#type, condition.reason, condition.message),
                "kubelet starts no pods until it holds",
            );
        }
    }
    let config = parsed(&status.info, "config");
    let pid = parsed(&status.info, "daemon")["pid"].as_i64();
    configuration(node, &config, pid, report);
    if let Some(pid) = pid {
        process(node, pid, report);
    }
    let network = parsed(&status.info, "network");
    let owed = network["cni"]["owedDetachments"].as_u64().unwrap_or_default();
    if owed > 0 {
        report.warning(
            format!("{owed} pods that are gone are still attached: a plugin's DEL fails, and is tried again until it succeeds"),
            "journalctl -u windlass says what the plugin answers",
        );
    }
    let (pods, monitors) = pods(&mut client).await?;
    ages(node, &monitors, report);
    Ok(Daemon { monitors, pods, config, pid })
}

/// Its pods, and the monitors of those that are ready.
async fn pods(client: &mut Client) -> crate::error::Result<(BTreeSet<String>, HashMap<String, i64>)> {
    let (pods, mut monitors) = (client.pods().await?, HashMap::new());
    let ids = pods.iter().map(|pod| pod.id.clone()).collect();
    for pod in pods.into_iter().filter(|pod| pod.state() == cri::PodSandboxState::SandboxReady) {
        if let Some(reply) = client.pod_if_there(&pod.id).await?
            && let Some(pid) = parsed(&reply.info, "info")["monitorPid"].as_i64()
        {
            monitors.insert(pod.id, pid);
        }
    }
    Ok((ids, monitors))
}

/// Fields in which the daemon's configuration and that of the file and flags differ.
fn configuration(node: &Node, running: &Value, pid: Option<i64>, report: &mut Report) {
    let mut changed = Vec::new();
    differences("", &serde_json::json!(node.config), running, &mut changed);
    // A daemon may have flags that this program was not given.
    let command = pid.and_then(|pid| fs::read(format!("/proc/{pid}/cmdline")).ok()).unwrap_or_default();
    changed.retain(|field| !flagged(field, &command));
    if running.is_object() && !changed.is_empty() {
        report.warning(
            format!(
                "the configuration was changed after the daemon's start, or flags lead elsewhere: it has other values of {}",
                changed.join(", ")
            ),
            "systemctl restart windlass, which disturbs no pod",
        );
    }
}

/// Whether a flag of this command line goes over the file's field.
fn flagged(field: &str, command: &[u8]) -> bool {
    let flags: &[&str] = match field {
        "root" => &["--root"],
        "state" | "nri.socket_path" => &["--state"],
        "socket" => &["--socket", "--state"],
        "log_level" => &["--log-level"],
        "network.cni_conf_dir" => &["--cni-conf-dir"],
        "network.cni_bin_dir" => &["--cni-bin-dir"],
        "images.registry_config_dir" => &["--registry-config-dir"],
        _ => &[],
    };
    let words = command.split(|byte| *byte == 0).map(String::from_utf8_lossy);
    words.into_iter().any(|word| flags.contains(&word.split('=').next().unwrap_or_default()))
}

fn differences(path: &str, one: &Value, other: &Value, found: &mut Vec<String>) {
    match (one.as_object(), other.as_object()) {
        (Some(one), Some(other)) => {
            for name in one.keys().chain(other.keys().filter(|name| !one.contains_key(*name))) {
                let field = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                let (one, other) = (one.get(name).unwrap_or(&Value::Null), other.get(name).unwrap_or(&Value::Null));
                differences(&field, one, other, found);
            }
        }
        _ if one == other => {}
        _ => found.push(path.to_owned()),
    }
}

/// What the daemon's process has that pods inherit or lack.
fn process(node: &Node, pid: i64, report: &mut Report) {
    let Some(status) = read(format!("/proc/{pid}/status")) else { return };
    let value = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim).unwrap_or_default()
    };
    if value("NoNewPrivs") == "1" {
        report.error(
            "the daemon has no_new_privs, which containers inherit: setuid programs do not work in them",
            "take NoNewPrivileges= and the like out of its unit",
        );
    }
    if value("Seccomp") != "0" {
        report.warning(
            "the daemon is under a seccomp filter, which containers inherit",
            "take SystemCallFilter= out of its unit, or start it outside of a container",
        );
    }
    let bounding = u64::from_str_radix(value("CapBnd"), 16).unwrap_or(u64::MAX);
    if bounding & (1 << CAP_SYS_RESOURCE) == 0 {
        report.warning(
            "the daemon may not have CAP_SYS_RESOURCE: negative oom_score_adj and raised resource limits are not given to containers",
            "give it all capabilities (CapabilityBoundingSet= of its unit, --privileged of a container around it)",
        );
    }
    if !node.root {
        return report.unseen("the daemon's mount namespace", "run as root");
    }
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    if namespace(&pid.to_string()) != namespace("1") {
        report.warning(
            "the daemon is in another mount namespace than the first process: mounts that are made later on the host may not reach pods",
            "take PrivateMounts=, PrivateTmp= and Protect...= out of its unit; in a container around it this is as it should be",
        );
    }
}

/// Monitors that execute another program than new pods get.
fn ages(node: &Node, monitors: &HashMap<String, i64>, report: &mut Report) {
    let identity = |path: &Path| fs::metadata(path).map(|about| (about.dev(), about.ino())).ok();
    let Some(new) = identity(&node.config.monitor_path()) else { return };
    let others: Vec<&str> = monitors
        .iter()
        .filter(|(_, pid)| identity(Path::new(&format!("/proc/{pid}/exe"))).is_some_and(|old| old != new))
        .map(|(pod, _)| crate::cli::output::short(pod))
        .collect();
    if others.is_empty() {
        report.ok(format!("{} monitors, all of this version", monitors.len()));
    } else {
        report.ok(format!(
            "{} of {} monitors are of an earlier build, which is as it should be after an upgrade; their pods get the new one when they are made anew: {}",
            others.len(),
            monitors.len(),
            others.join(" ")
        ));
    }
}

impl Daemon {
    /// The monitor of a ready pod.
    pub(super) fn monitor(&self, pod: &str) -> Option<i64> {
        self.monitors.get(pod).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_the_daemon_go_over_the_file() {
        let command = b"windlass\0serve\0--state\0/run/x\0--log-level=debug\0";
        for (field, expected) in [
            ("state", true),
            ("socket", true),
            ("nri.socket_path", true),
            ("log_level", true),
            ("root", false),
            ("cgroup.parent", false),
        ] {
            assert_eq!(flagged(field, command), expected, "{field}");
        }
    }

    #[test]
    fn fields_that_differ_are_named() {
        let mut found = Vec::new();
        let (one, other) =
            (serde_json::json!({"a": 1, "b": {"c": [1], "d": 2}}), serde_json::json!({"a": 1, "b": {"c": [2]}, "e": 0}));
        differences("", &one, &other, &mut found);
        assert_eq!(found, ["b.c", "b.d", "e"]);
    }
}
