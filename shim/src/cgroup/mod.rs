//! The daemon's view of the cgroup v2 tree: where it is, who makes the groups in it, and the last resort of killing a leaf
//! whose monitor is gone. Limits are the monitor's work.

mod driver;
mod place;
mod private;
mod systemd;

pub use driver::Driver;

use crate::error::{Error, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use std::{
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// A process may come into a cgroup right after it was killed.
const KILL_AGAIN: Duration = Duration::from_millis(50);
/// Before what has failed is tried again.
const FAILED_PAUSE: Duration = Duration::from_millis(2);

/// The mounted cgroup v2 tree.
#[derive(Debug, Clone)]
pub struct Tree {
    /// `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid host.
    pub root: PathBuf,
    /// Controllers of the tree's root.
    pub controllers: Vec<String>,
}

/// Controllers that enforce what the CRI can ask for.
const WANTED: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];

impl Tree {
    /// Finds the tree by its own files.
    pub fn find() -> io::Result<Tree> {
        for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
            let controllers = match fs::read_to_string(Path::new(root).join("cgroup.controllers")) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                controllers => controllers?,
            };
            return Ok(Tree { root: root.into(), controllers: controllers.split_whitespace().map(str::to_owned).collect() });
        }
        Err(io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 tree at /sys/fs/cgroup or /sys/fs/cgroup/unified; mount one"))
    }

    /// Controllers whose limits this host cannot enforce.
    pub fn missing(&self) -> Vec<&'static str> {
        WANTED.into_iter().filter(|name| !self.has(name)).collect()
    }

    /// Whether limits of this controller can be enforced.
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|have| have == controller)
    }

    /// Absolute directory of a cgroup path that begins with `/`.
    pub fn directory(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}

/// Kills everything below `directory` and waits until it is empty. An absent cgroup is empty.
pub async fn kill(directory: &Path, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        // What fails now is tried again: nothing may be said of the processes before they are known to be gone.
        let failed = match populated(directory) {
            Ok(false) => return Ok(()),
            Ok(true) => match fs::write(directory.join("cgroup.kill"), "1") {
                Err(error) => Some(error),
                Ok(()) => left(directory, KILL_AGAIN).await.err(),
            },
            Err(error) => Some(error),
        };
        if Instant::now() > deadline {
            let outlive = || io::Error::new(io::ErrorKind::TimedOut, format!("processes in {} do not end", directory.display()));
            return Err(failed.unwrap_or_else(outlive));
        }
        if failed.is_some() {
            tokio::time::sleep(FAILED_PAUSE).await;
        }
    }
}

/// Waits until no process is in the cgroup or below it; false at the limit. An absent cgroup is empty.
pub async fn left(directory: &Path, limit: Duration) -> io::Result<bool> {
    let events = match fs::File::open(directory.join("cgroup.events")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        opened => opened?,
    };
    if !is_populated(&events)? {
        return Ok(true);
    }
    tokio::task::spawn_blocking(move || wait_until_left(&events, limit)).await.map_err(io::Error::other)?
}

/// The kernel marks the file as changed with POLLPRI (cgroup v2, "cgroup.events").
fn wait_until_left(events: &fs::File, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    while is_populated(events)? {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Ok(false);
        }
        let rest = Timespec { tv_sec: rest.as_secs().cast_signed(), tv_nsec: rest.subsec_nanos().into() };
        match poll(&mut [PollFd::new(events, PollFlags::PRI)], Some(&rest)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(true)
}

/// True while a process is in the cgroup or below it. None is in an absent one.
pub fn populated(directory: &Path) -> io::Result<bool> {
    match fs::File::open(directory.join("cgroup.events")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        events => is_populated(&events?),
    }
}

fn is_populated(events: &fs::File) -> io::Result<bool> {
    let mut text = [0; 256];
    match events.read_at(&mut text, 0) {
        Ok(length) => Ok(text[..length].split(|byte| *byte == b'\n').any(|line| line == b"populated 1")),
        // It was removed while it was open.
        Err(error) if error.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Path in the v2 tree of the cgroup that a process is in.
pub fn of_process(pid: u32) -> Result<String> {
    let file = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&file).map_err(|error| Error::io(format_args!("read {file}"), error))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    path.map(str::to_owned).ok_or_else(|| Error::internal(format!("{file} has no line of cgroup v2")))
}

/// Stops the slice at this path of the tree if nothing is in it: stopping one ends everything that is.
pub async fn stop_slice(driver: &Driver, tree: &Tree, path: &str) -> Result<()> {
    let directory = tree.directory(path);
    let (Some(systemd), Some(slice)) = (driver.systemd(), path.rsplit('/').next().filter(|last| last.ends_with(".slice"))) else {
        return Ok(());
    };
    let empty = |listing: fs::ReadDir| !listing.flatten().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    if fs::read_dir(&directory).is_ok_and(empty) && !populated(&directory).unwrap_or(true) {
        systemd.stop(slice).await?;
    }
    Ok(())
}

/// Removes an empty cgroup and the ones below it. An absent one is fine.
pub fn remove(directory: &Path) -> io::Result<()> {
    let listing = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        listing => listing?,
    };
    for entry in listing {
        let entry = entry?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_names_what_cannot_be_enforced() {
        let tree = Tree { root: "/sys/fs/cgroup".into(), controllers: vec!["cpu".into(), "pids".into(), "io".into()] };
        assert_eq!(tree.missing(), ["cpuset", "memory"]);
        assert_eq!(tree.directory("/kubepods/pod1"), Path::new("/sys/fs/cgroup/kubepods/pod1"));
    }

    #[tokio::test]
    async fn an_absent_cgroup_is_empty_and_removed() {
        let absent = Path::new("/sys/fs/cgroup/windlass-test-that-is-not-there");
        assert!(!populated(absent).expect("none"));
        assert!(left(absent, Duration::ZERO).await.expect("nobody is there"));
        remove(absent).expect("nothing to remove");
    }
}
