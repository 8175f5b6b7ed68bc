//! What is kept of a container between commands: a directory below --root with `state.json`, a copy of `config.json` as it was at
//! create, and the gate's socket until the container is started.

use crate::{Outcome, failed, invalid};
use oci_spec::runtime::Spec;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use windlass_runtime::bundle::read_config;
use windlass_runtime::cgroup::Cgroup;
use windlass_runtime::process::hooks::State;
use windlass_runtime::process::{Kind, StepError};

/// Version that this program writes.
pub(crate) const VERSION: u32 = 1;

/// `state.json` of a container. The start time tells a reused pid from ours.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) version: u32,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) cgroup: PathBuf,
    pub(crate) pid: i32,
    pub(crate) start_time: u64,
    /// RFC 3339.
    #[serde(default)]
    pub(crate) created: String,
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

impl Record {
    pub(crate) fn load(home: &Path) -> Outcome<Record> {
        let path = home.join("state.json");
        let text = fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                StepError::because(Kind::NotFound, "open container", home.display(), "does not exist")
            }
            _ => failed("read", &path, &error),
        })?;
        serde_json::from_slice(&text).map_err(|error| invalid(&path.display().to_string(), &error.to_string()))
    }

    pub(crate) fn store(&self, home: &Path) -> Outcome<()> {
        let text = serde_json::to_string(self).map_err(|error| invalid("state.json", &error.to_string()))?;
        let file = home.join("state.json");
        fs::write(&file, text).map_err(|error| failed("write", &file, &error))
    }

    /// The gate's socket is there until the container was started.
    pub(crate) fn status(&self, home: &Path) -> Status {
        if start_time(self.pid) != Some(self.start_time) {
            Status::Stopped
        } else if home.join("gate").exists() {
            Status::Created
        } else if Cgroup::open(&self.cgroup).and_then(|cgroup| cgroup.frozen()).unwrap_or(false) {
            Status::Paused
        } else {
            Status::Running
        }
    }

    /// Fails unless the status is `wanted`.
    pub(crate) fn require(&self, home: &Path, step: &str, wanted: &[Status]) -> Outcome<()> {
        let status = self.status(home);
        if wanted.contains(&status) {
            return Ok(());
        }
        Err(StepError::because(Kind::WrongState, step, &self.id, format!("the container is {}", status.name())))
    }

    /// The state as hooks and `state` tell it.
    pub(crate) fn state(&self, status: Status) -> State<'_> {
        let pid = if status == Status::Stopped { 0 } else { self.pid.unsigned_abs() };
        State { id: &self.id, status: status.name(), pid, bundle: &self.bundle }
    }

    /// `config.json` as it was at create.
    pub(crate) fn spec(&self, home: &Path) -> Outcome<Spec> {
        read_config(home)
    }

    /// The first process.
    pub(crate) fn open_process(&self) -> Outcome<OwnedFd> {
        let gone = || StepError::because(Kind::WrongState, "open process of", &self.id, "the container is stopped");
        let pid = Pid::from_raw(self.pid).ok_or_else(gone)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| gone())?;
        // Only now is the pid pinned: it must still be the one that was recorded.
        if start_time(self.pid) == Some(self.start_time) { Ok(pidfd) } else { Err(gone()) }
    }
}

/// Field 22 of /proc/PID/stat, `None` for a process that is gone or a zombie.
pub(crate) fn start_time(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.get(text.rfind(')')? + 2..)?.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}
