//! One directory of the cgroup v2 tree.

use crate::process::StepError;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the v2 tree is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on a hybrid host.
pub fn mount_point() -> Result<PathBuf, StepError> {
    Ok(PathBuf::new())
}

/// A cgroup that stays until [`Cgroup::remove`]; dropping it leaves the directory.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the directory and its parents if absent, and enables cpu, memory, pids, cpuset, io and hugetlb as far as they
    /// are available in every ancestor below the v2 root. `path` is absolute and below [`mount_point`].
    pub fn create(path: &Path) -> Result<Cgroup, StepError> {
        Self::open(path)
    }

    /// Makes the directory alone, with nothing enabled in its parent: the sub-cgroup of an exec.
    pub fn create_child(&self, name: &str) -> Result<Cgroup, StepError> {
        Self::open(&self.path.join(name))
    }

    /// Opens one that exists.
    pub fn open(path: &Path) -> Result<Cgroup, StepError> {
        Err(StepError::errno("open cgroup", path.display(), libc::ENOENT))
    }

    /// Absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Kills every process in it and below (cgroup.kill). One that is gone is done already.
    pub fn kill(&self) -> Result<(), StepError> {
        Ok(())
    }

    /// Whether a process lives in it or below. A removed one is empty.
    pub fn populated(&self) -> Result<bool, StepError> {
        Ok(false)
    }

    /// Waits until nothing lives in it or below. False at the deadline.
    pub fn wait_empty(&self, timeout: Duration) -> Result<bool, StepError> {
        Ok(timeout.is_zero())
    }

    /// Removes it and everything below. EBUSY while processes live there; one that is gone is done already.
    pub fn remove(&self) -> Result<(), StepError> {
        Ok(())
    }

    /// `oom_kill` of memory.events; 0 where the memory controller is absent.
    pub fn oom_kills(&self) -> u64 {
        0
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}
