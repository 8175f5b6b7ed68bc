//! What restored processes may do. CRIU gives them what the checkpoint says, whoever wrote it; they may have no more than the configuration
//! of now gives. Ids and the rules of a seccomp filter cannot be judged so: a program changes its ids, and a filter is a program.

use super::{Context, Kind, StepError};
use crate::cgroup::Cgroup;
use crate::security::bounding_set;
use oci_spec::runtime::Spec;
use rustix::process::{Pid, Signal, kill_process};
use std::path::Path;

/// The sets of capabilities in /proc/PID/status (proc_pid_status(5)).
const SETS: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];

/// What a configuration allows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowed {
    capabilities: u64,
    no_new_privileges: bool,
    filtered: bool,
}

impl Allowed {
    pub(super) fn by(spec: &Spec) -> Allowed {
        let process = spec.process().as_ref();
        Allowed {
            capabilities: bounding_set(process.and_then(|process| process.capabilities().as_ref())),
            no_new_privileges: process.and_then(|process| process.no_new_privileges()).unwrap_or(false),
            filtered: spec.linux().as_ref().is_some_and(|linux| linux.seccomp().is_some()),
        }
    }

    /// Looks at every thread of another pid namespace in the cgroup. Kills them all if one has more than it may: they do not run yet.
    pub(super) fn check(self, cgroup: &Path) -> Result<(), StepError> {
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap_or_default();
        let own = namespace("self");
        let mut pids = Cgroup::open(cgroup)?.processes()?;
        pids.retain(|pid| namespace(&pid.to_string()) != own);
        let checked = pids.iter().try_for_each(|pid| self.check_process(*pid));
        if checked.is_err() {
            for pid in pids.into_iter().filter_map(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        checked
    }

    fn check_process(self, pid: i32) -> Result<(), StepError> {
        let directory = format!("/proc/{pid}/task");
        for thread in std::fs::read_dir(&directory).context("list", &directory)?.flatten() {
            let path = thread.path().join("status");
            let status = std::fs::read_to_string(&path).context("read", path.display())?;
            if let Some(why) = self.excess(&status) {
                return Err(StepError::because(Kind::Invalid, "restore", "security_context", why));
            }
        }
        Ok(())
    }

    fn excess(self, status: &str) -> Option<String> {
        let value =
            |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap_or_default().trim();
        for set in SETS {
            let more = u64::from_str_radix(value(set), 16).unwrap_or(u64::MAX) & !self.capabilities;
            if more != 0 {
                return Some(format!("the checkpoint has capabilities that the configuration has not ({set}: {more:#x})"));
            }
        }
        if self.no_new_privileges && value("NoNewPrivs") != "1" {
            return Some("the configuration has no_new_privs, the checkpoint has not".into());
        }
        if self.filtered && value("Seccomp") != "2" {
            return Some("the configuration has a seccomp profile, the checkpoint has none".into());
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_is_allowed_is_found() {
        let status = |cap: &str, nnp: u8, seccomp: u8| {
            let sets: String = SETS.iter().map(|set| format!("{set}:\t{cap}\n")).collect();
            format!("Name:\tx\n{sets}NoNewPrivs:\t{nnp}\nSeccomp:\t{seccomp}\nSeccomp_filters:\t0\n")
        };
        let allowed = Allowed { capabilities: 0x5, no_new_privileges: true, filtered: true };
        assert_eq!(allowed.excess(&status("0000000000000005", 1, 2)), None);
        for (cap, nnp, seccomp, part) in [
            ("000001ffffffffff", 1, 2, "CapInh"),
            ("0000000000000002", 1, 2, "0x2"),
            ("0000000000000000", 0, 2, "no_new_privs"),
            ("0000000000000000", 1, 0, "seccomp"),
            ("nonsense", 1, 2, "CapInh"),
        ] {
            let why = allowed.excess(&status(cap, nnp, seccomp)).expect(part);
            assert!(why.contains(part), "{why}");
        }
    }
}
