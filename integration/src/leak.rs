//! What a test may not leave behind, as lists that are compared before and after.

use crate::{
    client::{Client, pod},
    daemon::Daemon,
    node::output_of,
    wait::{pause, until},
};
use anyhow::{Result, ensure};
use std::{collections::BTreeSet, fs, path::Path};

/// Everything that a runtime makes and could forget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// What is there once a first pod has come and gone: it makes what the daemon keeps, as bridge, rules, parent cgroup and pipes.
    pub fn warm(daemon: &Daemon, client: &Client) -> Result<Snapshot> {
        let warm = client.run(&pod(&daemon.path("logs")))?;
        client.remove(&warm)?;
        Snapshot::take(daemon)
    }

    /// What is there now, in the namespaces of the calling thread.
    pub fn take(daemon: &Daemon) -> Result<Snapshot> {
        let mut found = BTreeSet::new();
        let mut note = |kind: &str, what: String| found.insert(format!("{kind} {what}"));
        for line in fs::read_to_string("/proc/thread-self/mountinfo")?.lines() {
            note("mount", line.split(' ').skip(3).collect::<Vec<_>>().join(" "));
        }
        for line in output_of("ip", &["-o", "link"])?.lines() {
            // The bridge is the daemon's, not a pod's; its flags change with its ports.
            note("link", line.split(": ").nth(1).unwrap_or(line).to_owned());
        }
        for line in output_of("nft", &["list", "ruleset"])?.lines() {
            note("nft", uncounted(line));
        }
        for name in names(Path::new("/run/netns")) {
            note("netns", name);
        }
        for pid in daemon.monitors() {
            note("monitor", pid.to_string());
        }
        // Not their files: systemd gives a slice controllers, and takes them, when it likes.
        walk(&daemon.cgroup_directory(), &mut |path| {
            if Path::new(&path.to_string()).is_dir() {
                note("cgroup", path.to_string());
            }
        });
        for directory in ["pods", "containers", "network/cni", "checkpoints"] {
            walk(&daemon.root().join(directory), &mut |path| {
                note("file", path.to_string());
            });
        }
        walk(&daemon.state().join("pods"), &mut |path| {
            // The monitor makes this directory with the first exit; the pod's end removes it.
            if !path.to_string().ends_with("/exits") {
                note("file", path.to_string());
            }
        });
        if let Some(pid) = daemon.pid() {
            for target in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten().filter_map(|entry| fs::read_link(entry.path()).ok())
            {
                let target = target.to_string_lossy().into_owned();
                // Sockets come and go with clients; what could leak has a name of its own kind.
                if !target.starts_with("socket:") {
                    note("descriptor", target);
                }
            }
        }
        Ok(Snapshot(found))
    }

    /// The same but for one kind.
    #[must_use]
    pub fn without(mut self, kind: &str) -> Snapshot {
        self.0.retain(|what| what.split(' ').next() != Some(kind));
        self
    }

    /// Whether anything in it has this in its name.
    pub fn names(&self, part: &str) -> bool {
        self.0.iter().any(|what| what.contains(part))
    }

    /// Fails, listing the differences, unless everything is the same soon: streams are closed, and what is not looked at again is deleted,
    /// behind a reply.
    pub fn expect_again(&self, daemon: &Daemon) -> Result<()> {
        let mut last = Ok(());
        let again = until("everything as before", || {
            last = self.expect_same(&Snapshot::take(daemon)?);
            if last.is_err() {
                pause();
            }
            Ok(last.is_ok().then_some(()))
        });
        again.or(last)
    }

    /// Fails, listing the differences, unless `after` is the same.
    pub fn expect_same(&self, after: &Snapshot) -> Result<()> {
        let left: Vec<_> = after.0.difference(&self.0).collect();
        let lost: Vec<_> = self.0.difference(&after.0).collect();
        ensure!(left.is_empty() && lost.is_empty(), "left behind: {left:#?}\nlost: {lost:#?}");
        Ok(())
    }
}

/// A rule without what it has counted, which changes by itself.
fn uncounted(rule: &str) -> String {
    let words: Vec<&str> = rule.split_whitespace().collect();
    let counted = |index: usize| index > 0 && matches!(words[index - 1], "packets" | "bytes");
    let kept: Vec<&str> = words.iter().enumerate().filter(|(index, _)| !counted(*index)).map(|(_, word)| *word).collect();
    kept.join(" ")
}

fn names(directory: &Path) -> Vec<String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn walk(directory: &Path, note: &mut dyn FnMut(std::path::Display<'_>)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        note(entry.path().display());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !entry.path().ends_with("rootfs") {
            walk(&entry.path(), note);
        }
    }
}
