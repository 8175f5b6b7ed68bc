//! What belongs to no pod that is recorded: processes, cgroups, network namespaces, links, mounts and directories. Pods come and go while
//! this looks, so that only what is there twice is told.

use super::{Node, read, report::Report};
use crate::{cgroup::Tree, error::Result, network::look, store};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// The time in which a pod's end is done with what it leaves.
const SETTLE: Duration = Duration::from_secs(1);
/// Digits of a pod's id in the name of its network namespace.
const NETNS_DIGITS: usize = 32;

/// What was found, and what to do with it.
type Found = BTreeMap<String, String>;

pub(super) async fn check(node: &Node, report: &mut Report) {
    report.area("leftovers");
    let readable = fs::read_dir(node.config.root.join("pods"));
    if readable.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied) {
        return report.unseen("what belongs to no recorded pod", "run as root");
    }
    let mut found = match look(node) {
        Ok(found) => found,
        Err(error) => return report.unseen("what belongs to no recorded pod", error.to_string()),
    };
    if !found.is_empty() {
        tokio::time::sleep(SETTLE).await;
        match look(node) {
            Ok(again) => found.retain(|what, _| again.contains_key(what)),
            Err(error) => return report.unseen("what belongs to no recorded pod", error.to_string()),
        }
    }
    if found.is_empty() {
        report.ok("no process, cgroup, network namespace, link, mount or directory without its pod");
    }
    for (what, next) in found {
        report.warning(what, next);
    }
}

/// Ids of the pods that have records, and whether each is ready.
fn recorded(node: &Node) -> Result<BTreeMap<String, bool>> {
    let directory = node.config.root.join("pods");
    let ready = |id: &String| {
        let text = read(directory.join(id).join("record.json")).unwrap_or_default();
        let record: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        record["phase"] == "ready"
    };
    let with_ready = |id: String| {
        let ready = ready(&id);
        (id, ready)
    };
    Ok(store::entries(&directory)?.into_iter().map(with_ready).collect())
}

fn look(node: &Node) -> Result<Found> {
    let mut found = Found::new();
    // What is made comes before its record is looked at, so that a pod that is being made has one.
    let monitors = monitors(&node.config.state.join("pods"))?;
    let running = store::entries(&node.config.state.join("pods"))?;
    let namespaces = store::entries(&node.config.network.netns_dir)?;
    let groups = groups(node);
    let containers = store::entries(&node.config.root.join("containers"))?;
    let pods = recorded(node)?;
    let ids: Vec<String> = pods.keys().cloned().collect();
    processes(node, &monitors, &pods, &mut found);
    for id in running.iter().filter(|id| !pods.contains_key(*id)) {
        let path = node.config.state.join("pods").join(id);
        found.insert(
            format!("{} belongs to no recorded pod", path.display()),
            format!("once no monitor of it runs: rm -r {}", path.display()),
        );
    }
    let short: BTreeSet<&str> = ids.iter().filter_map(|id| id.get(..NETNS_DIGITS)).collect();
    for name in &namespaces {
        if name.strip_prefix("windlass-").is_some_and(|id| !short.contains(id)) {
            let path = node.config.network.netns_dir.join(name);
            found.insert(
                format!("network namespace {} belongs to no recorded pod", path.display()),
                format!("umount {0}; rm {0}", path.display()),
            );
        }
    }
    for (path, id) in groups.into_iter().filter(|(_, id)| !ids.iter().any(|pod| pod.starts_with(id)) && !containers.contains(id))
    {
        let processes = processes_in(&path);
        let next = format!("echo 1 > {0}/cgroup.kill; rmdir {0}", path.display());
        found.insert(
            format!("cgroup {} ({processes} processes) belongs to no recorded pod (it may be {id}'s)", path.display()),
            next,
        );
    }
    for id in containers {
        let path = node.config.root.join("containers").join(&id);
        if !path.join("record.json").exists() {
            let next = "the daemon removes it when it starts: systemctl restart windlass";
            found.insert(format!("{} has no record: its making was cut off", path.display()), next.to_owned());
        }
    }
    for id in &ids {
        let path = node.config.root.join("pods").join(id);
        if path.join("record.bad").exists() {
            let next = format!(
                "its processes, if there are any, are not stopped; keep {} for a report, end what is left, and rm -r it",
                path.display()
            );
            found.insert(format!("{} has a record that cannot be read", path.display()), next);
        }
    }
    for link in look::strays(&node.config.network.bridge, &ids).unwrap_or_default() {
        let next = format!("the daemon removes it when it starts (systemctl restart windlass), or: ip link delete {link}");
        found.insert(format!("link {link} belongs to no recorded pod"), next);
    }
    mounts(node, &mut found);
    Ok(found)
}

/// Run directories' ids, and the monitors that serve them.
fn monitors(directory: &Path) -> Result<Vec<(i64, String)>> {
    let mut found = Vec::new();
    for name in store::entries(Path::new("/proc"))? {
        let Ok(pid) = name.parse::<i64>() else { continue };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<String> = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        if words.first().is_some_and(|program| program == "windlass-monitor")
            && let Some(run) = words.iter().skip_while(|word| *word != "--dir").nth(1).map(PathBuf::from)
            && run.parent() == Some(directory)
            && let Some(id) = run.file_name()
        {
            found.push((pid, id.to_string_lossy().into_owned()));
        }
    }
    Ok(found)
}

fn processes(node: &Node, monitors: &[(i64, String)], pods: &BTreeMap<String, bool>, found: &mut Found) {
    for (pid, id) in monitors.iter().filter(|(_, id)| !pods.contains_key(id)) {
        let next = format!("kill {pid}, which ends its pod's processes");
        found.insert(format!("process {pid} is the monitor of pod {id}, which has no record"), next);
    }
    for (id, _) in pods.iter().filter(|(_, ready)| **ready) {
        let known = node.daemon.as_ref().and_then(|daemon| daemon.monitor(id));
        if known.is_none() && !monitors.iter().any(|(_, one)| one == id) {
            let next =
                "the daemon sees that when it starts, ends what is left of the pod and says so: systemctl restart windlass";
            found.insert(format!("pod {id} is recorded as ready, and its monitor is gone"), next.to_owned());
        }
    }
}

/// Cgroups that are named as those of pods and containers are, and the id in the name: below `cgroup.parent`, and scopes anywhere.
fn groups(node: &Node) -> Vec<(PathBuf, String)> {
    let Ok(tree) = Tree::find() else { return Vec::new() };
    let parent = tree.directory(&node.config.cgroup.parent);
    let mut found = Vec::new();
    walk(&tree.root, &parent, &mut found);
    found
}

fn walk(directory: &Path, parent: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let id = match name.strip_prefix("windlass-").and_then(|rest| rest.strip_suffix(".scope")) {
            Some(id) => Some(id),
            None if directory == parent => Some(name.strip_prefix("init-").unwrap_or(&name)),
            None => None,
        };
        match id.filter(|id| id.len() >= NETNS_DIGITS && id.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            Some(id) => {
                let id = id.to_owned();
                found.push((path, id));
            }
            None => walk(&path, parent, found),
        }
    }
}

fn processes_in(cgroup: &Path) -> usize {
    let below =
        fs::read_dir(cgroup).into_iter().flatten().flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let below: usize = below.map(|entry| processes_in(&entry.path())).sum();
    below + read(cgroup.join("cgroup.procs")).unwrap_or_default().lines().count()
}

/// Nothing of containers is ever mounted where the host sees it.
fn mounts(node: &Node, found: &mut Found) {
    let text = read("/proc/self/mountinfo").unwrap_or_default();
    for path in text.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
        let below = ["pods", "containers"]
            .iter()
            .any(|name| path.starts_with(node.config.root.join(name)) || path.starts_with(node.config.state.join(name)));
        if below {
            found.insert(format!("something is mounted at {}", path.display()), format!("umount {}", path.display()));
        }
    }
}
