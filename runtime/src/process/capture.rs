//! Writing what containers are: a copy of the caller waits until all of them are held still, then has CRIU write each. None of them runs
//! between that moment and when the caller lets them go on, so what is written is one moment of all.

use super::criu::{Criu, IMAGES, NETWORK_KEY};
use super::report::ChildReport;
use super::{Child, Context, Kind, Report, StepError};
use crate::cgroup::Cgroup;
use crate::sys;
use crate::sys::clone::{Forked, fork};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use windlass_proto::criu::{CgroupMode, NetworkLock, Options, Request, Type};

/// How long processes may take to be still.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);

/// Largest deleted file that is still open, as its content goes along.
const GHOST_LIMIT_BYTES: u32 = 1 << 30;

/// How much CRIU logs: errors, warnings and what it does.
const LOG_LEVEL: i32 = 3;

/// Standard streams of a container, as CRIU names them: `/dev/null`, `pipe:[INODE]`, a terminal. The file has this name in the checkpoints
/// of other runtimes too.
pub(super) const STREAMS_FILE: &str = "descriptors.json";

/// What is not in the checkpoint and has to be there for a restore; beside the images.
pub(super) const OUTSIDE_FILE: &str = "windlass.json";

/// The content of [`OUTSIDE_FILE`].
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Outside {
    /// Mount points, each the name that CRIU knows it by.
    pub(super) mounts: BTreeSet<String>,
}

/// A running container that is held still, or is about to be.
#[derive(Debug)]
pub struct Captured {
    /// Its id.
    pub id: String,
    /// Its first process.
    pub pid: i32,
    /// Absolute path of its leaf in the cgroup v2 tree.
    pub cgroup: PathBuf,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Absolute directory that gets `checkpoint/`, `dump.log` and `stats-dump`.
    pub directory: PathBuf,
    /// Inodes of the pipes that are its standard input, output and error; `None` for what is none.
    pub pipes: [Option<u64>; 3],
}

/// Starts to write what `containers` are. Their freezing has begun. One message comes by the report: Ready when all is written, or Failed. Its
/// gate is the way to give up: what runs is ended, and CRIU puts everything back. The caller must be single-threaded.
pub fn capture(criu: &Path, containers: &[Captured]) -> Result<Child, StepError> {
    let (report, child_report) = Report::pair(true).context("make report socket", "")?;
    // SAFETY: this library's processes have a single thread (module documentation of `process`).
    match unsafe { fork() }.context("fork", "")? {
        Forked::Parent { pid, pidfd } => Ok(Child { pid, pidfd, report }),
        Forked::Child => {
            drop(report);
            let run = std::panic::AssertUnwindSafe(|| capture_all(criu, containers, &child_report));
            // A panic must not unwind into the parent's code in the child.
            match std::panic::catch_unwind(run) {
                Ok(Ok(())) => drop(child_report.ready(None, Vec::new(), false)),
                Ok(Err(error)) => child_report.failed(error),
                Err(_) => child_report.failed(StepError::because(Kind::Internal, "checkpoint", "", "panicked")),
            }
            sys::process::exit_now(0)
        }
    }
}

fn capture_all(criu: &Path, containers: &[Captured], report: &ChildReport) -> Result<(), StepError> {
    // SAFETY: the child runs nothing of the parent's code any more; of the parent's descriptors it uses those kept here.
    unsafe { sys::descriptors::close_all_but(&[0, 1, 2, report.as_fd().as_raw_fd()]) }.context("close descriptors", "")?;
    sys::signal::reset_all();
    for container in containers {
        if !Cgroup::open(&container.cgroup)?.freeze(true, FREEZE_LIMIT)? {
            let why = format_args!("its processes are not still after {} s", FREEZE_LIMIT.as_secs());
            return Err(StepError::because(Kind::Internal, "freeze", &container.id, why));
        }
    }
    containers.iter().try_for_each(|container| container.dump(criu, report))
}

impl Captured {
    fn dump(&self, criu: &Path, report: &ChildReport) -> Result<(), StepError> {
        let images = self.directory.join(IMAGES);
        fs::create_dir_all(&images).context("make directory", images.display())?;
        let spec = crate::bundle::read_config(&self.bundle)?;
        let outside = Outside { mounts: self.outside_mounts(&spec)? };
        let write = |name: &str, json: String| fs::write(images.join(name), json).context("write", images.join(name).display());
        write(OUTSIDE_FILE, serde_json::json!(outside).to_string())?;
        write(STREAMS_FILE, serde_json::json!(self.streams()).to_string())?;
        let (images_fd, work_fd) = (crate::rootfs::open_path(&images)?, crate::rootfs::open_path(&self.directory)?);
        let mut external: Vec<String> = outside.mounts.iter().map(|mount| format!("mnt[{mount}]:{mount}")).collect();
        external.extend(self.pipes.iter().flatten().map(|inode| format!("pipe:[{inode}]")));
        let inode = |pid: &str| {
            let path = format!("/proc/{pid}/ns/net");
            fs::metadata(&path).context("look at", &path).map(|found| found.ino())
        };
        let network = inode(&self.pid.to_string())?;
        if network != inode("self")? {
            external.push(format!("net[{network}]:{NETWORK_KEY}"));
        }
        let options = Options {
            images_dir_fd: images_fd.as_raw_fd(),
            work_dir_fd: Some(work_fd.as_raw_fd()),
            pid: Some(self.pid),
            leave_running: Some(true),
            file_locks: Some(true),
            log_level: Some(LOG_LEVEL),
            log_file: Some("dump.log".into()),
            notify_scripts: Some(true),
            manage_cgroups_mode: Some(CgroupMode::Ignore.into()),
            ghost_limit: Some(GHOST_LIMIT_BYTES),
            external,
            freeze_cgroup: Some(self.cgroup.display().to_string()),
            orphan_pts_master: Some(true),
            // The restored pod has another address: connections end there, and go on here.
            tcp_close: Some(true),
            network_lock: Some(NetworkLock::Skip.into()),
            ..Options::default()
        };
        let request = Request { r#type: Type::Dump.into(), opts: Some(options), notify_success: None };
        Criu::start(criu, &[])?
            .ask(&request, Some(report.as_fd()), |_, _| Ok(()))
            .map_err(|answer| answer.explain("checkpoint", &self.id, &self.directory.join("dump.log")))
    }

    fn streams(&self) -> Vec<String> {
        let link = |fd: usize| fs::read_link(format!("/proc/{}/fd/{fd}", self.pid)).unwrap_or_default();
        let own = |(fd, pipe): (usize, &Option<u64>)| match pipe {
            Some(inode) => format!("pipe:[{inode}]"),
            None => link(fd).display().to_string(),
        };
        self.pipes.iter().enumerate().map(own).collect()
    }

    /// The mounts that are made anew for a restored container: its volumes, its devices, what hides parts of /proc and /sys. The others are
    /// CRIU's: the root, file systems of the kernel, and what a program mounted by itself.
    fn outside_mounts(&self, spec: &Spec) -> Result<BTreeSet<String>, StepError> {
        let path = format!("/proc/{}/mountinfo", self.pid);
        let text = fs::read_to_string(&path).context("read", &path)?;
        let masked = spec.linux().as_ref().and_then(|linux| linux.masked_paths().as_deref()).unwrap_or_default();
        let made = |typ: &str| !["proc", "sysfs", "devpts", "mqueue"].contains(&typ);
        let listed = spec.mounts().iter().flatten().filter(|mount| made(mount.typ().as_deref().unwrap_or_default()));
        let listed: Vec<&Path> = listed.map(|mount| mount.destination().as_path()).collect();
        let outside = |point: &Path, typ: &str| {
            let masks = masked.iter().any(|path| Path::new(path) == point);
            point != Path::new("/") && made(typ) && (masks || listed.iter().any(|at| point.starts_with(at)))
        };
        let found = mounts(&text);
        Ok(found.into_iter().filter(|(point, typ)| outside(Path::new(point), typ)).map(|(point, _)| point).collect())
    }
}

/// Mount points and types of a mountinfo (proc_pid_mountinfo(5)).
pub(super) fn mounts(mountinfo: &str) -> Vec<(String, String)> {
    let of = |line: &str| {
        let (fields, rest) = line.split_once(" - ")?;
        Some((unescaped(fields.split(' ').nth(4)?), rest.split(' ').next()?.to_owned()))
    };
    mountinfo.lines().filter_map(of).collect()
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescaped(text: &str) -> String {
    let pairs = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    pairs.iter().fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}
