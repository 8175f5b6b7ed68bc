//! One directory of the cgroup v2 tree.

use crate::process::{Context, Kind, StepError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where a v2 tree may be mounted: alone, or beside v1 trees on a hybrid host.
const MOUNTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// statfs type of cgroup v2.
const CGROUP2_MAGIC: i64 = 0x6367_7270;

/// The controllers that are enabled for containers.
const CONTROLLERS: [&str; 6] = ["cpu", "memory", "pids", "cpuset", "io", "hugetlb"];

/// How often a path is made before it is given up that loses a parent meanwhile.
const CREATE_TRIES: u32 = 5;

/// How long a process that is ending may take to leave its cgroup.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);

/// How often removal of a directory that the kernel still counts as busy is tried, 1 ms apart: a process leaves its cgroup a
/// moment before its end is complete.
const REMOVE_TRIES: u32 = 50;

/// Where the v2 tree is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on a hybrid host.
pub fn mount_point() -> Result<PathBuf, StepError> {
    for candidate in MOUNTS {
        match rustix::fs::statfs(candidate) {
            Err(Errno::NOENT) => {}
            found if found.context("look at", candidate)?.f_type == CGROUP2_MAGIC => return Ok(candidate.into()),
            _ => {}
        }
    }
    let why = format!("no cgroup v2 tree at {}", MOUNTS.join(" or "));
    Err(StepError::because(Kind::Unsupported, "find cgroups", "", why))
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
        let root = mount_point()?;
        let invalid = |why: &str| StepError::because(Kind::Invalid, "make cgroup", path.display(), why);
        let below = path.strip_prefix(&root).map_err(|_| invalid("not below the cgroup v2 tree"))?;
        let parts: Vec<_> = below.components().collect();
        if parts.is_empty() || !parts.iter().all(|part| matches!(part, std::path::Component::Normal(_))) {
            return Err(invalid("must name a directory below the cgroup v2 tree"));
        }
        let make = || {
            let (mut at, mut new) = (root.clone(), false);
            for part in &parts {
                enable_controllers(&at);
                at.push(part);
                new = make_directory(&at)?;
            }
            Self::open_made(path, new)
        };
        // An empty parent may be removed by somebody at this moment.
        let mut made = make();
        for _ in 1..CREATE_TRIES {
            if made.as_ref().is_err_and(|error| error.errno == libc::ENOENT) {
                made = make();
            }
        }
        made
    }

    /// Makes the directory alone, with nothing enabled in its parent: the sub-cgroup of an exec.
    pub fn create_child(&self, name: &str) -> Result<Cgroup, StepError> {
        let path = self.path.join(name);
        let new = make_directory(&path)?;
        Self::open_made(&path, new)
    }

    /// One that was just made does not stay when it cannot be opened.
    fn open_made(path: &Path, new: bool) -> Result<Cgroup, StepError> {
        Self::open(path).inspect_err(|_| {
            if new {
                let _ = fs::remove_dir(path);
            }
        })
    }

    /// Opens one that exists.
    pub fn open(path: &Path) -> Result<Cgroup, StepError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(path, flags, Mode::empty()).context("open cgroup", path.display())?;
        Ok(Cgroup { path: path.into(), directory })
    }

    /// As [`Cgroup::create`], but with nothing enabled in its parent when this process is in that: true then. It would become the root of a
    /// threaded subtree (cgroup-v2, "Threads"), in which no process can be.
    pub fn create_beside_own(path: &Path) -> Result<(Cgroup, bool), StepError> {
        let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = text.lines().find_map(|line| line.strip_prefix("0::/"));
        let own = own.map(|own| mount_point().map(|root| root.join(own))).transpose()?;
        match (own, path.file_name().and_then(|name| name.to_str())) {
            (Some(own), Some(name)) if path.parent() == Some(&own) => Ok((Self::create(&own)?.create_child(name)?, true)),
            _ => Ok((Self::create(path)?, false)),
        }
    }

    /// Enables the controllers in its parent once the processes in that have left it, which they are about to.
    pub fn enable_when_alone(&self) -> Result<(), StepError> {
        let Some(parent) = self.path.parent() else { return Ok(()) };
        let deadline = Instant::now() + LEAVE_LIMIT;
        loop {
            // All in one write: with any controller but cpu, cpuset and pids among them a process is an error, and no threaded root.
            let wanted: Vec<String> = not_enabled(parent).into_iter().map(|name| format!("+{name}")).collect();
            let alone = fs::read_to_string(parent.join("cgroup.procs")).is_ok_and(|text| text.is_empty());
            let written = alone.then(|| fs::write(parent.join("cgroup.subtree_control"), wanted.join(" ")));
            match written {
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) if error.raw_os_error() != Some(libc::EBUSY) => {
                    enable_controllers(parent);
                    return Ok(());
                }
                _ if Instant::now() > deadline => {
                    return Err(StepError::errno("enable controllers in", parent.display(), libc::EBUSY));
                }
                _ => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// Absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Kills every process in it and below (cgroup.kill). One that is gone is done already.
    pub fn kill(&self) -> Result<(), StepError> {
        gone_is_done(fs::write(self.path.join("cgroup.kill"), "1")).context("kill cgroup", self.path.display())
    }

    /// Whether a process lives in it or below. A removed one is empty.
    pub fn populated(&self) -> Result<bool, StepError> {
        match fs::read_to_string(self.path.join("cgroup.events")) {
            Ok(text) => Ok(value_of(&text, "populated") != Some(0)),
            Err(error) => gone_is_done(Err(error)).context("read cgroup.events of", self.path.display()).map(|()| false),
        }
    }

    /// Waits until nothing lives in it or below. False at the deadline.
    pub fn wait_empty(&self, timeout: Duration) -> Result<bool, StepError> {
        self.wait_for("populated", 0, timeout)
    }

    /// Waits until a line of cgroup.events has this value, or the cgroup is gone.
    fn wait_for(&self, key: &str, wanted: u64, timeout: Duration) -> Result<bool, StepError> {
        let deadline = Instant::now() + timeout;
        let object = self.path.display();
        let mut events = match File::open(self.path.join("cgroup.events")) {
            Ok(file) => file,
            Err(error) => return gone_is_done(Err(error)).context("open cgroup.events of", &object).map(|()| true),
        };
        loop {
            let mut text = String::new();
            match events.rewind().and_then(|()| events.read_to_string(&mut text)) {
                Ok(_) if value_of(&text, key) != Some(wanted) => {}
                Ok(_) => return Ok(true),
                Err(error) => return gone_is_done(Err(error)).context("read cgroup.events of", &object).map(|()| true),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // The kernel marks the file as changed with POLLPRI.
            let mut polled = [PollFd::new(&events, PollFlags::PRI)];
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut polled, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno).context("wait for cgroup", &object),
            }
        }
    }

    /// Whether its processes are held still, by themselves or with a parent's.
    pub fn frozen(&self) -> Result<bool, StepError> {
        let text = fs::read_to_string(self.path.join("cgroup.freeze")).context("read cgroup.freeze of", self.path.display())?;
        Ok(text.trim() == "1")
    }

    /// Holds its processes still, or lets them go on, and waits until all follow. False at the deadline.
    pub fn freeze(&self, frozen: bool, timeout: Duration) -> Result<bool, StepError> {
        let wanted = u64::from(frozen);
        fs::write(self.path.join("cgroup.freeze"), wanted.to_string()).context("freeze cgroup", self.path.display())?;
        self.wait_for("frozen", wanted, timeout)
    }

    /// Process ids of what lives in it and below.
    pub fn processes(&self) -> Result<Vec<i32>, StepError> {
        let mut found = Vec::new();
        processes_below(&self.path, &mut found).context("list processes of", self.path.display())?;
        found.sort_unstable();
        Ok(found)
    }

    /// Removes it and everything below. EBUSY while processes live there; one that is gone is done already.
    pub fn remove(&self) -> Result<(), StepError> {
        remove_tree(&self.path).context("remove cgroup", self.path.display())
    }

    /// `oom_kill` of memory.events; 0 where the memory controller is absent.
    pub fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        value_of(&text, "oom_kill").unwrap_or(0)
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// Whether it was made: false if it was there.
fn make_directory(path: &Path) -> Result<bool, StepError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        other => other.context("make cgroup", path.display()).map(|()| true),
    }
}

/// One write for each, so that one that cannot be enabled does not keep the others off. What stays off is found out, and
/// reported, when a limit is applied.
fn enable_controllers(at: &Path) {
    for name in not_enabled(at) {
        let _ = fs::write(at.join("cgroup.subtree_control"), format!("+{name}"));
    }
}

/// Enables a controller beside [`CONTROLLERS`] from the root down to the parent of `cgroup`, as far as it is available.
pub(super) fn enable(cgroup: &Path, controller: &str) {
    let Ok(root) = mount_point() else { return };
    let Some(below) = cgroup.parent().and_then(|parent| parent.strip_prefix(&root).ok()) else { return };
    let mut at = root.clone();
    for part in std::iter::once(Path::new("")).chain(below.components().map(|part| Path::new(part.as_os_str()))) {
        at.push(part);
        let _ = fs::write(at.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// The controllers that are available in a cgroup and not enabled for those below it.
fn not_enabled(at: &Path) -> Vec<&'static str> {
    let available = fs::read_to_string(at.join("cgroup.controllers")).unwrap_or_default();
    let enabled = fs::read_to_string(at.join("cgroup.subtree_control")).unwrap_or_default();
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    CONTROLLERS.into_iter().filter(|name| has(&available, name) && !has(&enabled, name)).collect()
}

fn remove_tree(path: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) => return gone_is_done(Err(error)),
        Ok(entries) => entries,
    };
    for entry in entries {
        let Ok(entry) = entry else { break };
        if entry.file_type().is_ok_and(|typ| typ.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    let mut tries = 0;
    loop {
        match gone_is_done(fs::remove_dir(path)) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && tries < REMOVE_TRIES => {
                let empty =
                    fs::read_to_string(path.join("cgroup.events")).is_ok_and(|text| value_of(&text, "populated") == Some(0));
                if !empty {
                    return Err(error);
                }
                tries += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other,
        }
    }
}

fn processes_below(path: &Path, found: &mut Vec<i32>) -> std::io::Result<()> {
    let text = fs::read_to_string(path.join("cgroup.procs"))?;
    found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type().is_ok_and(|typ| typ.is_dir()) {
            gone_is_done(processes_below(&entry.path(), found))?;
        }
    }
    Ok(())
}

/// ENODEV comes from a file of a cgroup that was removed after it was opened.
fn gone_is_done(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        other => other,
    }
}

fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_made_killed_and_removed_with_what_is_below() {
        use std::io::Write;
        let top = mount_point().expect("a v2 tree").join(format!("windlass-unit-{}", std::process::id()));
        let cgroup = Cgroup::create(&top.join("leaf")).expect("made");
        let below = cgroup.create_child("exec").expect("made");
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().expect("sleep");
        let mut procs = File::create(below.path().join("cgroup.procs")).expect("procs");
        procs.write_all(sleeper.id().to_string().as_bytes()).expect("moved");
        assert!(cgroup.populated().expect("readable"));
        assert_eq!(cgroup.remove().expect_err("busy").errno, libc::EBUSY);
        assert!(!cgroup.wait_empty(Duration::from_millis(1)).expect("waited"));
        cgroup.kill().expect("killed");
        assert!(cgroup.wait_empty(Duration::from_secs(5)).expect("waited"));
        sleeper.wait().expect("reaped");
        Cgroup::open(&top).expect("there").remove().expect("removed");
        assert!(!top.exists());
        cgroup.kill().expect("gone is done");
        cgroup.remove().expect("gone is done");
        assert!(!cgroup.populated().expect("gone is empty"));
        assert_eq!(cgroup.oom_kills(), 0);
    }

    #[test]
    fn only_paths_below_the_v2_tree_are_made() {
        for path in ["/tmp/x", "/sys/fs/cgroup/unified/../memory/x"] {
            assert_eq!(Cgroup::create(Path::new(path)).expect_err(path).kind, Kind::Invalid, "{path}");
        }
    }
}
