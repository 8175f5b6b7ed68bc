//! What the kernel says of a process and of a cgroup: `/proc` and the cgroup tree. A file that is not there says nothing.

use super::read;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, fs, path::Path};

/// Limits and use of a cgroup, as the kernel has them in force.
const LIMIT_FILES: [&str; 16] = [
    "cpu.max",
    "cpu.weight",
    "cpuset.cpus.effective",
    "memory.min",
    "memory.low",
    "memory.high",
    "memory.max",
    "memory.swap.max",
    "memory.oom.group",
    "memory.current",
    "memory.peak",
    "pids.max",
    "pids.current",
    "io.max",
    "cgroup.freeze",
    "cgroup.controllers",
];
/// Counters of events, of which those that are not zero are told.
const EVENT_FILES: [&str; 3] = ["memory.events", "pids.events", "cpu.stat"];
/// Namespaces of a process.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
/// Lines of `status` that tell what a process may do.
const STATUS_LINES: [&str; 10] = ["Name", "State", "Uid", "Gid", "NSpid", "VmRSS", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp"];
/// Processes that are told.
const PROCESSES_MAX: usize = 200;

/// Limits in force, current use, and what was counted.
pub(super) fn limits(cgroup: &Path) -> Value {
    let mut found: Map<String, Value> =
        LIMIT_FILES.iter().filter_map(|file| Some(((*file).to_owned(), json!(read(&cgroup.join(file))?)))).collect();
    for file in EVENT_FILES {
        let text = read(&cgroup.join(file)).unwrap_or_default();
        let counted: Map<String, Value> = text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter(|(_, value)| *value != "0")
            .map(|(name, value)| (name.to_owned(), json!(value)))
            .collect();
        if !counted.is_empty() {
            found.insert(file.to_owned(), Value::Object(counted));
        }
    }
    Value::Object(found)
}

/// A process: what it executes, what it may do, how many descriptors it has open.
pub(super) fn process(pid: i64) -> Value {
    let directory = Path::new("/proc").join(pid.to_string());
    let mut found = Map::from_iter([("pid".to_owned(), json!(pid))]);
    found.insert("command".to_owned(), json!(command(&directory)));
    let program = fs::read_link(directory.join("exe")).ok();
    found.insert("program".to_owned(), json!(program.map(|path| path.to_string_lossy().into_owned())));
    let status = read(&directory.join("status")).unwrap_or_default();
    for (name, value) in status.lines().filter_map(|line| line.split_once(':')) {
        if STATUS_LINES.contains(&name) {
            found.insert(name.to_owned(), json!(value.split_whitespace().collect::<Vec<_>>().join(" ")));
        }
    }
    found.insert("oomScoreAdj".to_owned(), json!(read(&directory.join("oom_score_adj"))));
    found.insert(
        "securityLabel".to_owned(),
        json!(read(&directory.join("attr/current")).map(|text| text.trim_end_matches('\0').to_owned())),
    );
    found.insert("openFiles".to_owned(), json!(fs::read_dir(directory.join("fd")).ok().map(Iterator::count)));
    Value::Object(found)
}

fn command(directory: &Path) -> Option<String> {
    let words = fs::read(directory.join("cmdline")).ok()?;
    let words: Vec<String> = words.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    Some(words.join(" ").trim_end().to_owned())
}

/// Each namespace, and whether it is that of this program, which runs on the host.
pub(super) fn namespaces(pid: i64) -> Value {
    let link = |pid: &str, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).ok();
    let found = NAMESPACES.iter().filter_map(|name| {
        let own = link(&pid.to_string(), name)?;
        let whose = if link("self", name).is_some_and(|host| host == own) { ", the host's" } else { "" };
        Some(((*name).to_owned(), json!(format!("{}{whose}", own.display()))))
    });
    Value::Object(found.collect())
}

/// The processes of a cgroup and of those below it: their commands, and where one waits that cannot be killed.
pub(super) fn processes(cgroup: &Path) -> Value {
    let mut pids = Vec::new();
    collect(cgroup, &mut pids);
    pids.truncate(PROCESSES_MAX);
    let told = pids.into_iter().map(|pid| {
        let directory = Path::new("/proc").join(pid.to_string());
        let stat = read(&directory.join("stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').next()).unwrap_or_default().to_owned();
        let stuck = (state == "D").then(|| read(&directory.join("wchan"))).flatten();
        json!({ "pid": pid, "state": state, "command": command(&directory), "waitsIn": stuck })
    });
    Value::Array(told.collect())
}

fn collect(cgroup: &Path, pids: &mut Vec<i64>) {
    let text = read(&cgroup.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i64>().ok()));
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if pids.len() < PROCESSES_MAX && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), pids);
        }
    }
}

/// What is mounted where, in the order of the mounts.
pub(super) fn mounts(pid: i64) -> Value {
    let text = read(&Path::new("/proc").join(pid.to_string()).join("mountinfo")).unwrap_or_default();
    Value::Array(text.lines().filter_map(mount).collect())
}

/// A line of mountinfo (proc_pid_mountinfo(5)).
fn mount(line: &str) -> Option<Value> {
    let (before, after) = line.split_once(" - ")?;
    let before: Vec<&str> = before.split(' ').collect();
    let mut after = after.split(' ');
    let fields: BTreeMap<&str, &str> = BTreeMap::from([
        ("at", *before.get(4)?),
        ("of", *before.get(3)?),
        ("options", *before.get(5)?),
        ("type", after.next()?),
        ("source", after.next()?),
    ]);
    Some(json!(fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let found = mount(line).expect("a mount");
        let expected = json!({ "at": "/mnt2", "of": "/mnt1", "options": "rw,noatime", "type": "ext3", "source": "/dev/root" });
        assert_eq!(found, expected);
        assert_eq!(mount("36 35 98:0 /"), None);
    }

    #[test]
    fn this_process_is_told() {
        let own = process(i64::from(std::process::id()));
        assert!(own["command"].as_str().is_some_and(|command| !command.is_empty()) && own["State"].is_string(), "{own}");
        assert!(namespaces(i64::from(std::process::id()))["net"].as_str().is_some_and(|text| text.starts_with("net:[")));
    }
}
