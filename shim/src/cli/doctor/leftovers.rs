//! What belongs to no pod that is recorded: processes, cgroups, network namespaces, links, mounts and directories. Pods come and go while
//! this looks, so that only what is there twice is told. Nothing is told where the records may be another daemon's, and nothing that a live
//! monitor holds is to be removed before it.

use super::{Node, monitors, monitors::Monitor, read, report::Report};
use crate::{
    cgroup::Tree,
    error::Result,
    network::look,
    pod,
    store::{self, Kept},
};
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
const WHAT: &str = "what belongs to no recorded pod";
const LEAD: &str = "lead this command to the daemon's directories (--config, --root, --state), or mount what they are on";

/// What was found, and what to do with it.
type Found = BTreeMap<String, String>;

pub(super) async fn check(node: &Node, report: &mut Report) {
    report.area("leftovers");
    if !node.taken {
        return report.unseen(format!("{WHAT}: the configuration does not say where records are"), "correct it first");
    }
    if !node.root {
        return report.unseen(WHAT, "run as root");
    }
    if let Some(why) = elsewhere(node) {
        return report.unseen(format!("{WHAT}: {why}"), LEAD);
    }
    let mut found = match look(node) {
        Ok(found) => found,
        Err(error) => return report.unseen(WHAT, error.to_string()),
    };
    if !found.is_empty() {
        tokio::time::sleep(SETTLE).await;
        match look(node) {
            Ok(again) => found.retain(|what, _| again.contains_key(what)),
            Err(error) => return report.unseen(WHAT, error.to_string()),
        }
    }
    if found.is_empty() {
        return report.ok("no process, cgroup, network namespace, link, mount or directory without its pod");
    }
    if let Some(why) = unfounded(node) {
        return report.unseen(format!("{WHAT}: {why}"), LEAD);
    }
    for (what, next) in found {
        report.warning(what, next);
    }
}

/// Why the directories of this configuration are not those of the daemon that answers.
fn elsewhere(node: &Node) -> Option<String> {
    let running = &node.daemon.as_ref()?.config;
    let own = serde_json::json!(node.config);
    ["/root", "/state", "/network/netns_dir", "/cgroup/parent"].into_iter().find_map(|field| {
        let (own, running) = (own.pointer(field)?, running.pointer(field)?);
        let name = field.trim_start_matches('/').replace('/', ".");
        (own != running).then(|| format!("the daemon that answers has {name} = {running}, and this is {own}"))
    })
}

/// Why the records that are there do not tell what is left over.
fn unfounded(node: &Node) -> Option<String> {
    let directory = node.config.root.join("pods");
    let shown = directory.display();
    if !directory.is_dir() {
        return Some(format!("{shown} is not there"));
    }
    let recorded: BTreeSet<String> = store::entries(&directory).ok()?.into_iter().collect();
    if let Some(daemon) = &node.daemon
        && !daemon.pods.is_empty()
        && daemon.pods.is_disjoint(&recorded)
    {
        return Some(format!("{shown} has none of the daemon's pods"));
    }
    let run = node.config.state.join("pods");
    let live: Vec<Monitor> = monitors::all().into_iter().filter(|monitor| monitor.serves(&run)).collect();
    (!live.is_empty() && live.iter().all(|monitor| !recorded.contains(&monitor.id)))
        .then(|| format!("monitors run, and {shown} has a record of none of their pods"))
}

/// The pods of the records and of the daemon, and the pod directories that have no record to go by.
struct Pods {
    /// Whether each is ready.
    known: BTreeMap<String, bool>,
    newer: BTreeMap<String, u32>,
    /// What is wrong with the record.
    unclear: BTreeMap<String, &'static str>,
}

impl Pods {
    fn read(node: &Node) -> Result<Pods> {
        let directory = node.config.root.join("pods");
        let mut pods = Pods { known: BTreeMap::new(), newer: BTreeMap::new(), unclear: BTreeMap::new() };
        for id in store::entries(&directory)? {
            let path = directory.join(&id).join("record.json");
            match store::look::<pod::Record>(&path)? {
                Kept::Whole(record) => drop(pods.known.insert(id, record.phase == pod::Phase::Ready)),
                Kept::Newer(version) => drop(pods.newer.insert(id, version)),
                Kept::Absent if !path.with_extension("bad").exists() => drop(pods.unclear.insert(id, "has no record")),
                Kept::Absent | Kept::Damaged(_) => drop(pods.unclear.insert(id, "has a record that cannot be read")),
            }
        }
        // What the daemon holds is nobody's leftover, whatever the disk says of it.
        for id in node.daemon.iter().flat_map(|daemon| &daemon.pods) {
            pods.known.entry(id.clone()).or_insert(false);
        }
        Ok(pods)
    }

    /// Of what pod something is that has this id, or the beginning of one, in its name. `None`: of one that the daemon holds or leaves alone.
    fn owner(&self, id: &str) -> Option<String> {
        if self.known.keys().chain(self.newer.keys()).any(|pod| pod.starts_with(id)) {
            return None;
        }
        let unclear = self.unclear.iter().find(|(pod, _)| pod.starts_with(id));
        Some(unclear.map_or_else(|| "no recorded pod".to_owned(), |(pod, why)| format!("pod {pod}, which {why}")))
    }
}

fn look(node: &Node) -> Result<Found> {
    let mut found = Found::new();
    let run = node.config.state.join("pods");
    // What is made comes before its record is looked at, so that a pod that is being made has one.
    let monitors = monitors::all();
    let running = store::entries(&run)?;
    let namespaces: Vec<(PathBuf, String)> = store::entries(&node.config.network.netns_dir)?
        .into_iter()
        .filter_map(|name| Some((node.config.network.netns_dir.join(&name), name.strip_prefix("windlass-")?.to_owned())))
        .filter(|(_, id)| id.len() == NETNS_DIGITS && monitors::hexadecimal(id))
        .collect();
    let groups = groups(node);
    let containers = store::entries(&node.config.root.join("containers"))?;
    let pods = Pods::read(node)?;
    processes(node, &monitors, &pods, &mut found);
    directories(node, &pods, &running, &mut found);
    for (path, id) in &namespaces {
        if let Some(owner) = pods.owner(id)
            && let Some(next) =
                remedy(node, &monitors, |monitor| monitor.id.starts_with(id), || format!("umount {0}; rm {0}", path.display()))
        {
            found.insert(format!("network namespace {} belongs to {owner}", path.display()), next);
        }
    }
    for (path, id) in groups.iter().filter(|(_, id)| !containers.contains(id)) {
        let Some(owner) = pods.owner(id) else { continue };
        let processes = processes_in(path);
        let holds = |monitor: &Monitor| monitor.id.starts_with(id.as_str()) || processes.contains(&monitor.pid);
        if let Some(next) = remedy(node, &monitors, holds, || format!("echo 1 > {0}/cgroup.kill; rmdir {0}", path.display())) {
            let what = format!("cgroup {} ({} processes) belongs to {owner} (it may be {id}'s)", path.display(), processes.len());
            found.insert(what, next);
        }
    }
    newer(&pods, &monitors, &namespaces, &groups, node, &mut found);
    for id in containers {
        let path = node.config.root.join("containers").join(&id);
        if !path.join("record.json").exists() {
            let next = "the daemon removes it when it starts: systemctl restart windlass";
            found.insert(format!("{} has no record: its making was cut off", path.display()), next.to_owned());
        }
    }
    // Those that a live monitor holds go with it.
    let held: Vec<String> =
        pods.known.keys().chain(pods.newer.keys()).cloned().chain(monitors.iter().map(|monitor| monitor.id.clone())).collect();
    for link in look::strays(&node.config.network.bridge, &held).unwrap_or_default() {
        let next = format!("the daemon removes it when it starts (systemctl restart windlass), or: ip link delete {link}");
        found.insert(format!("link {link} belongs to no recorded pod"), next);
    }
    mounts(node, &mut found);
    Ok(found)
}

/// What to do with something: `remove` it, or end the monitor first that holds it. `None`: a monitor of other directories does.
fn remedy(
    node: &Node,
    monitors: &[Monitor],
    holds: impl Fn(&Monitor) -> bool,
    remove: impl FnOnce() -> String,
) -> Option<String> {
    let run = node.config.state.join("pods");
    match monitors.iter().find(|monitor| holds(monitor)) {
        None => Some(remove()),
        Some(monitor) if monitor.serves(&run) && monitor.proven(node) => {
            Some(format!("it is held by process {}; once that has ended, look again", monitor.pid))
        }
        Some(_) => None,
    }
}

fn processes(node: &Node, monitors: &[Monitor], pods: &Pods, found: &mut Found) {
    let run = node.config.state.join("pods");
    for monitor in monitors.iter().filter(|monitor| monitor.serves(&run)) {
        let Monitor { pid, id, .. } = monitor;
        if let Some(owner) = pods.owner(id)
            && monitor.proven(node)
        {
            let why = if pods.unclear.contains_key(id) { owner } else { format!("pod {id}, which has no record") };
            found.insert(format!("process {pid} is the monitor of {why}"), format!("kill {pid}, which ends its pod's processes"));
        }
    }
    for (id, _) in pods.known.iter().filter(|(_, ready)| **ready) {
        let known = node.daemon.as_ref().and_then(|daemon| daemon.monitor(id));
        if known.is_none() && !monitors.iter().any(|monitor| monitor.id == *id) {
            let next =
                "the daemon sees that when it starts, ends what is left of the pod and says so: systemctl restart windlass";
            found.insert(format!("pod {id} is recorded as ready, and its monitor is gone"), next.to_owned());
        }
    }
}

/// Directories of pods, of those that run and of those that are recorded.
fn directories(node: &Node, pods: &Pods, running: &[String], found: &mut Found) {
    for id in running {
        let path = node.config.state.join("pods").join(id);
        if let Some(owner) = pods.owner(id) {
            let next = format!("once no monitor of it runs: rm -r {}", path.display());
            found.insert(format!("{} belongs to {owner}", path.display()), next);
        }
    }
    for (id, why) in &pods.unclear {
        let path = node.config.root.join("pods").join(id);
        let next = format!(
            "the daemon leaves it alone and stops nothing of it; keep {0} for a report, end what is left as said here, and rm -r {0}",
            path.display()
        );
        found.insert(format!("{} {why}", path.display()), next);
    }
}

/// Pods whose records only a newer daemon reads, each with what it has.
fn newer(
    pods: &Pods,
    monitors: &[Monitor],
    namespaces: &[(PathBuf, String)],
    groups: &[(PathBuf, String)],
    node: &Node,
    found: &mut Found,
) {
    for (id, version) in &pods.newer {
        let run = node.config.state.join("pods");
        let process = monitors.iter().filter(|monitor| monitor.id == *id && monitor.serves(&run));
        let process = process.map(|monitor| format!("process {}", monitor.pid));
        let places = namespaces.iter().chain(groups).filter(|(_, of)| id.starts_with(of.as_str()));
        let parts: Vec<String> = process.chain(places.map(|(path, _)| path.display().to_string())).collect();
        let parts = if parts.is_empty() { String::new() } else { format!("; it has {}", parts.join(", ")) };
        let path = node.config.root.join("pods").join(id);
        found.insert(
            format!(
                "{} has a record of version {version}, which is newer than {}: the pod is left alone{parts}",
                path.display(),
                store::RECORD_VERSION
            ),
            "install the newer package again, drain the node, then go back".to_owned(),
        );
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
        match id.filter(|id| id.len() >= NETNS_DIGITS && monitors::hexadecimal(id)) {
            Some(id) => {
                let id = id.to_owned();
                found.push((path, id));
            }
            None => walk(&path, parent, found),
        }
    }
}

fn processes_in(cgroup: &Path) -> Vec<i64> {
    let text = read(cgroup.join("cgroup.procs")).unwrap_or_default();
    let own = text.lines().filter_map(|line| line.parse().ok());
    let below =
        fs::read_dir(cgroup).into_iter().flatten().flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    own.chain(below.flat_map(|entry| processes_in(&entry.path()))).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_told_by_the_beginning_of_its_id() {
        let id = |digit: &str| digit.repeat(64);
        let pods = Pods {
            known: BTreeMap::from([(id("a"), true)]),
            newer: BTreeMap::from([(id("b"), 2)]),
            unclear: BTreeMap::from([(id("c"), "has no record")]),
        };
        for held in ["a", "b"] {
            assert_eq!(pods.owner(&id(held)[..NETNS_DIGITS]), None, "{held}");
        }
        assert_eq!(pods.owner(&id("c")[..NETNS_DIGITS]), Some(format!("pod {}, which has no record", id("c"))));
        assert_eq!(pods.owner(&id("d")).as_deref(), Some("no recorded pod"));
    }
}
