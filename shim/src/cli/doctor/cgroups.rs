//! The cgroup tree, what of it enforces limits, and systemd, which may own it.

use super::{Node, output_of, read, report::Report};
use crate::{cgroup::Tree, config::DriverChoice};
use std::path::Path;

/// The first version of systemd whose scopes stay when a process in them is killed for memory (OOMPolicy=).
const SYSTEMD_OOM_POLICY: u32 = 253;

pub(super) async fn check(node: &Node, report: &mut Report) {
    report.area("cgroups");
    match Tree::find() {
        Ok(tree) => tree_of(node, &tree, report),
        Err(error) => report.error(
            format!("{error}: no pod can run"),
            "mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1",
        ),
    }
    systemd(node, report).await;
}

fn tree_of(node: &Node, tree: &Tree, report: &mut Report) {
    let root = tree.root.display();
    if rustix::fs::statvfs(&tree.root).is_ok_and(|about| about.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY)) {
        report.error(format!("{root} is mounted read-only: no pod can run"), format!("mount -o remount,rw {root}"));
    }
    let missing = tree.missing();
    if missing.is_empty() {
        report.ok(format!("cgroup v2 at {root} has {}", tree.controllers.join(", ")));
    } else {
        let what = format!("cgroup v2 at {root} lacks {}: limits of {} are not enforced", missing.join(", "), limits(&missing));
        let next = remedy(&read("/proc/cgroups").unwrap_or_default(), &missing);
        if node.config.cgroup.strict {
            report.error(format!("{what}, and pods that have some are refused (cgroup.strict)"), next);
        } else {
            report.warning(what, next);
        }
    }
    if missing.is_empty() && !tree.has("io") {
        report.warning(
            format!("cgroup v2 at {root} lacks io: classes of block I/O are refused"),
            "boot with cgroup v2 alone, if pods use such classes",
        );
    }
    let parent = tree.directory(&node.config.cgroup.parent);
    let given = read(parent.join("cgroup.controllers"));
    if let Some(given) = given {
        let held: Vec<&str> = ["cpu", "cpuset", "memory", "pids"]
            .into_iter()
            .filter(|name| tree.has(name) && !given.split(' ').any(|have| have == *name))
            .collect();
        if held.is_empty() {
            report.ok(format!("{} exists", parent.display()));
        } else {
            report.warning(
                format!(
                    "{} is not given {}: limits of pods without a parent of their own are not enforced",
                    parent.display(),
                    held.join(", ")
                ),
                format!(
                    "echo {} > {}",
                    held.iter().map(|name| format!("+{name}")).collect::<Vec<_>>().join(" "),
                    parent.with_file_name("cgroup.subtree_control").display()
                ),
            );
        }
    }
}

/// What limits a person knows these controllers by.
fn limits(controllers: &[&str]) -> String {
    let said = controllers.iter().map(|controller| match *controller {
        "cpu" => "processor time",
        "cpuset" => "processors",
        "pids" => "processes",
        other => other,
    });
    said.collect::<Vec<_>>().join(", ")
}

/// What brings missing controllers back, by `/proc/cgroups`: name, hierarchy of cgroup v1, number of groups, whether it is on.
fn remedy(table: &str, missing: &[&str]) -> String {
    let row = |name: &str| {
        let line = table.lines().find(|line| line.split_whitespace().next() == Some(name))?;
        let fields: Vec<&str> = line.split_whitespace().collect();
        Some((*fields.get(1)? != "0", *fields.get(3)? == "1"))
    };
    if missing.iter().any(|name| matches!(row(name), Some((true, _)))) {
        return "they are mounted as cgroup v1: boot with systemd.unified_cgroup_hierarchy=1 (or cgroup_no_v1=all without systemd)".into();
    }
    if missing.contains(&"memory") && matches!(row("memory"), Some((_, false))) {
        return "the memory controller is off: boot with cgroup_enable=memory".into();
    }
    "boot a kernel with them, or have them delegated to this machine's cgroup".into()
}

async fn systemd(node: &Node, report: &mut Report) {
    report.area("systemd");
    let chosen = node.config.cgroup.driver;
    if !Path::new("/run/systemd/system").exists() {
        match chosen {
            DriverChoice::Systemd => report.error(
                "cgroup.driver is \"systemd\", and systemd is not the first process here: the daemon does not start",
                "set cgroup.driver = \"auto\" or \"cgroupfs\"",
            ),
            _ => report.ok("systemd is not the first process: cgroups are made by this runtime alone (cgroupfs)"),
        }
        return;
    }
    if chosen == DriverChoice::Cgroupfs {
        report.warning(
            "systemd owns the cgroup tree, and cgroup.driver is \"cgroupfs\": what either sets may be undone by the other",
            "set cgroup.driver = \"auto\"",
        );
    }
    let said = output_of("systemctl", &["show", "--property=Version"]).await;
    let version = said.as_deref().and_then(|text| text.trim().strip_prefix("Version=")).map(str::to_owned);
    match version.as_deref().map(|text| (text, number(text))) {
        Some((text, Some(version))) if version >= SYSTEMD_OOM_POLICY => report.ok(format!("systemd {text} answers")),
        Some((text, _)) => report.warning(
            format!(
                "systemd {text} ends a whole pod when one of its processes is killed for memory (before {SYSTEMD_OOM_POLICY})"
            ),
            "upgrade systemd, or set cgroup.driver = \"cgroupfs\"",
        ),
        None => report
            .warning("systemctl does not answer: with cgroup.driver = \"systemd\" pods cannot be made", "see `systemctl status`"),
    }
    unit(report).await;
}

/// `252.38-1~deb12u1` as 252.
fn number(version: &str) -> Option<u32> {
    version.split(|byte: char| !byte.is_ascii_digit()).next()?.parse().ok()
}

/// What the unit says that pods would not outlive, or inherit.
async fn unit(report: &mut Report) {
    let properties = "--property=LoadState,KillMode,Delegate,NoNewPrivileges,PrivateMounts,ProtectSystem,PrivateTmp,ProtectHome";
    let Some(text) = output_of("systemctl", &["show", "windlass.service", properties]).await else { return };
    for (says, next) in troubles(&text) {
        report.error(says, next);
    }
    if text.lines().any(|line| line == "LoadState=loaded") && troubles(&text).is_empty() {
        report.ok("windlass.service leaves pods alone when it stops, and gives them nothing to inherit");
    }
}

fn troubles(text: &str) -> Vec<(String, String)> {
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default();
    if value("LoadState") != "loaded" {
        return Vec::new();
    }
    let mut found = Vec::new();
    let next = |line: &str| {
        format!("`systemctl edit windlass` and write {line} below [Service], then systemctl daemon-reload and restart windlass")
    };
    if value("KillMode") != "process" {
        found.push((
            format!("windlass.service has KillMode={}: a restart of the daemon ends every pod", value("KillMode")),
            next("KillMode=process"),
        ));
    }
    if value("Delegate") != "yes" {
        found.push(("windlass.service has no Delegate=yes: systemd may take its cgroup apart".into(), next("Delegate=yes")));
    }
    for (name, bad, means) in [
        ("NoNewPrivileges", "yes", "no container can raise its rights, as setuid programs do"),
        ("PrivateMounts", "yes", "volumes do not reach pods, nor pods' mounts the host"),
        ("PrivateTmp", "yes", "volumes below /tmp are not those of the host"),
        ("ProtectSystem", "strict", "the daemon cannot write"),
        ("ProtectSystem", "full", "volumes below /etc and /usr are read-only"),
        ("ProtectHome", "yes", "volumes below /home are empty"),
    ] {
        if value(name) == bad {
            found.push((
                format!("windlass.service has {name}={bad}, which containers inherit: {means}"),
                next(&format!("{name}=no")),
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_controllers_have_a_remedy() {
        let table = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t3\t1\t1\nmemory\t0\t1\t0\npids\t0\t1\t1\n";
        for (missing, word) in
            [(&["cpu"][..], "unified_cgroup_hierarchy"), (&["memory"], "cgroup_enable=memory"), (&["pids"], "delegated")]
        {
            assert!(remedy(table, missing).contains(word), "{missing:?}: {}", remedy(table, missing));
        }
        assert_eq!(limits(&["cpu", "memory"]), "processor time, memory");
    }

    #[test]
    fn a_unit_that_harms_pods_is_told() {
        let good = "LoadState=loaded\nKillMode=process\nDelegate=yes\nNoNewPrivileges=no\nPrivateMounts=no\nProtectSystem=no\n";
        assert!(troubles(good).is_empty());
        assert!(troubles("LoadState=not-found\nKillMode=control-group\n").is_empty());
        let bad = good.replace("KillMode=process", "KillMode=control-group").replace("PrivateMounts=no", "PrivateMounts=yes");
        let found = troubles(&bad);
        assert!(
            found.len() == 2 && found[0].0.contains("ends every pod") && found[1].1.contains("PrivateMounts=no"),
            "{found:?}"
        );
        assert_eq!(number("252.38-1~deb12u1"), Some(252));
    }
}
