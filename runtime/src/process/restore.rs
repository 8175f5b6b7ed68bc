//! A container that CRIU restores: a copy of the caller makes the container's root and its mounts where CRIU finds them, in a mount namespace
//! of its own, and waits at the gate in the container's place. Then it has CRIU make the processes; the first of them becomes a child of
//! this copy, and of the caller when the copy has ended.

use super::capture::{OUTSIDE_FILE, Outside, STREAMS_FILE, mounts};
use super::criu::{Criu, IMAGES, NETWORK_KEY};
use super::privileges::Allowed;
use super::report::ChildReport;
use super::{Child, Context, Kind, PidNamespace, Report, Spawn, Stdio, StepError};
use crate::bundle::{self, read_config, read_rootfs_plan};
use crate::rootfs::{self, Staged};
use crate::sys::clone::{Forked, fork_into};
use crate::{cgroup, security, sys};
use oci_spec::runtime::Spec;
use rustix::fs::Mode;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use windlass_proto::criu::{CgroupMode, InheritFd, JoinNamespace, NetworkLock, Notify, Options, Request, Type};

/// The log of a restore, in the bundle.
const LOG: &str = "restore.log";

/// How much CRIU logs: errors, warnings and what it does.
const LOG_LEVEL: i32 = 3;

/// As [`super::create`], of the checkpoint in the bundle's `checkpoint/`: opening the gate restores its processes. The caller must be
/// single-threaded, and the reaper of what its children leave.
pub fn create_from_checkpoint(criu: &Path, spawn: &Spawn<'_>) -> Result<Child, StepError> {
    if !matches!(spawn.pid, PidNamespace::New) {
        let why = "a restored container has a pid namespace of its own";
        return Err(StepError::because(Kind::Unsupported, "restore", spawn.id, why));
    }
    let (report, child_report) = Report::pair(true).context("make report socket", "")?;
    // SAFETY: this library's processes have a single thread (module documentation of `process`).
    match unsafe { fork_into(spawn.cgroup, false) }.context("clone into", spawn.cgroup_path.display())? {
        Forked::Parent { pid, pidfd } => Ok(Child { pid, pidfd, report }),
        Forked::Child => {
            drop(report);
            let run = std::panic::AssertUnwindSafe(|| Restorer { criu, spawn, report: &child_report }.run());
            // A panic must not unwind into the parent's code in the child.
            let error = match std::panic::catch_unwind(run) {
                Ok(Ok(())) => sys::process::exit_now(0),
                Ok(Err(error)) => error,
                Err(_) => StepError::because(Kind::Internal, "restore", spawn.id, "panicked"),
            };
            child_report.failed(error);
            sys::process::exit_now(1)
        }
    }
}

struct Restorer<'a> {
    criu: &'a Path,
    spawn: &'a Spawn<'a>,
    report: &'a ChildReport,
}

impl Restorer<'_> {
    fn run(&self) -> Result<(), StepError> {
        self.close_others()?;
        rustix::process::setsid().context("make session", "")?;
        sys::signal::reset_all();
        rustix::process::umask(Mode::empty());
        let spec = read_config(self.spawn.bundle)?;
        bundle::check(&spec)?;
        let missing = || StepError::because(Kind::Invalid, "read", self.spawn.bundle.display(), "no rootfs.json");
        let plan = read_rootfs_plan(self.spawn.bundle)?.ok_or_else(missing)?;
        let outside = self.outside(&spec)?;
        let not_enforced = self.limits(&spec)?;
        let staged = rootfs::stage(self.spawn.bundle, &spec, &plan, &self.spawn.namespaces)?;
        check_mounts(&staged, &spec, &outside)?;
        self.report.ready(None, not_enforced, false).context("report", "")?;
        if !self.report.wait_at_gate().context("wait at the gate", "")? {
            return Ok(());
        }
        self.restore(&staged, &outside, Allowed::by(&spec)).map_err(|error| error.kind(Kind::Entrypoint))
    }

    fn close_others(&self) -> Result<(), StepError> {
        let pod = &self.spawn.namespaces;
        let mut keep = vec![0, 1, 2, self.report.as_fd().as_raw_fd()];
        keep.extend([pod.net, pod.ipc, pod.uts, pod.shm, pod.layers].into_iter().flatten().map(|fd| fd.as_raw_fd()));
        keep.extend(self.streams().into_iter().flatten().map(|fd| fd.as_raw_fd()));
        // SAFETY: the child runs nothing of the parent's code any more; of the parent's descriptors it uses those kept here.
        unsafe { sys::descriptors::close_all_but(&keep) }.context("close descriptors", "")
    }

    fn limits(&self, spec: &Spec) -> Result<Vec<String>, StepError> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        cgroup::restrict(
            self.spawn.cgroup_path,
            resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default(),
        )?;
        let score = spec.process().as_ref().and_then(|process| process.oom_score_adj());
        security::set_oom_score(score.unwrap_or(0))?;
        resources.map_or(Ok(Vec::new()), |resources| cgroup::apply(self.spawn.cgroup_path, resources))
    }

    /// The container's ends of its streams.
    fn streams(&self) -> [Option<BorrowedFd<'_>>; 3] {
        match &self.spawn.stdio {
            Stdio::Null | Stdio::Terminal => [None, None, None],
            Stdio::Fds { stdin, stdout, stderr } => [stdin.as_ref().map(AsFd::as_fd), Some(stdout.as_fd()), Some(stderr.as_fd())],
        }
    }

    /// The mounts that the checkpoint expects. One of another runtime does not list them: there they are those of its configuration.
    fn outside(&self, spec: &Spec) -> Result<Outside, StepError> {
        let path = self.images().join(OUTSIDE_FILE);
        match fs::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|error| StepError::because(Kind::Invalid, "read", path.display(), error))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let bound = spec.mounts().iter().flatten().filter(|mount| mount.typ().as_deref() == Some("bind"));
                Ok(Outside { mounts: bound.map(|mount| mount.destination().display().to_string()).collect() })
            }
            Err(error) => Err(error).context("read", path.display()),
        }
    }

    fn images(&self) -> PathBuf {
        self.spawn.bundle.join(IMAGES)
    }

    fn restore(&self, staged: &Staged, outside: &Outside, allowed: Allowed) -> Result<(), StepError> {
        let (images, work) = (rootfs::open_path(&self.images())?, rootfs::open_path(self.spawn.bundle)?);
        let own = std::process::id();
        let pod = &self.spawn.namespaces;
        let join = |ns: &str, fd: Option<BorrowedFd<'_>>| {
            let file = |fd: BorrowedFd<'_>| format!("/proc/{own}/fd/{}", fd.as_raw_fd());
            fd.map(|fd| JoinNamespace { ns: ns.into(), ns_file: file(fd) })
        };
        let mut inherited = self.inherited_streams()?;
        inherited.extend(pod.net.map(|fd| (NETWORK_KEY.to_owned(), fd)));
        let external = outside.mounts.iter().map(|mount| format!("mnt[{mount}]:{}", staged.at(mount).display()));
        let options = Options {
            images_dir_fd: images.as_raw_fd(),
            work_dir_fd: Some(work.as_raw_fd()),
            root: Some(staged.root.display().to_string()),
            file_locks: Some(true),
            log_level: Some(LOG_LEVEL),
            log_file: Some(LOG.into()),
            notify_scripts: Some(true),
            rst_sibling: Some(true),
            inherit_fd: inherited.iter().map(|(key, fd)| InheritFd { key: key.clone(), fd: fd.as_raw_fd() }).collect(),
            manage_cgroups_mode: Some(CgroupMode::Ignore.into()),
            external: external.collect(),
            join_ns: [join("ipc", pod.ipc), join("uts", pod.uts)].into_iter().flatten().collect(),
            orphan_pts_master: Some(true),
            tcp_close: Some(true),
            network_lock: Some(NetworkLock::Skip.into()),
            ..Options::default()
        };
        let request = Request { r#type: Type::Restore.into(), opts: Some(options), notify_success: None };
        let fds: Vec<BorrowedFd<'_>> = inherited.iter().map(|(_, fd)| *fd).collect();
        Criu::start(self.criu, &fds)?
            .ask(&request, None, |notify, fd| self.notified(notify, fd, allowed))
            .map_err(|answer| answer.explain("restore", self.spawn.id, &self.spawn.bundle.join(LOG)))
    }

    /// Which pipe of the checkpoint becomes which stream of now. One that is a descriptor for two needs two of them.
    fn inherited_streams(&self) -> Result<Vec<(String, BorrowedFd<'_>)>, StepError> {
        let path = self.images().join(STREAMS_FILE);
        let bytes = fs::read(&path).context("read", path.display())?;
        let names: Vec<String> =
            serde_json::from_slice(&bytes).map_err(|error| StepError::because(Kind::Invalid, "read", path.display(), error))?;
        let pipes = |(name, fd): (&String, Option<BorrowedFd<'_>>)| name.starts_with("pipe:").then_some(fd).flatten().is_some();
        let streams = names.iter().zip(self.streams()).filter(|(name, fd)| pipes((name, *fd)));
        Ok(streams.filter_map(|(name, fd)| Some((name.clone(), fd?))).collect())
    }

    fn notified(&self, notify: &Notify, fd: Option<OwnedFd>, allowed: Allowed) -> Result<(), StepError> {
        match (notify.script(), fd) {
            ("orphan-pts-master", Some(master)) => {
                self.report.ready(Some(master.as_fd()), Vec::new(), false).context("report", "")
            }
            // They do not run yet: whoever waits for their end knows the first of them from its first moment.
            ("post-restore", _) => {
                let missing = || StepError::because(Kind::Internal, "restore", self.spawn.id, "criu named no process");
                let pid = Pid::from_raw(notify.pid()).ok_or_else(missing)?;
                let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("open pidfd", pid.as_raw_nonzero())?;
                self.report.moved(pid.as_raw_nonzero().get(), pidfd.as_fd()).context("report", "")
            }
            ("pre-resume", _) => allowed.check(self.spawn.cgroup_path),
            _ => Ok(()),
        }
    }
}

/// The container of now has exactly the mounts that the checkpointed one had.
fn check_mounts(staged: &Staged, spec: &Spec, outside: &Outside) -> Result<(), StepError> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("read", "mountinfo")?;
    let there: BTreeSet<PathBuf> = mounts(&text).into_iter().map(|(point, _)| PathBuf::from(point)).collect();
    let differ = |path: &str, why: &str| Err(StepError::because(Kind::Invalid, "restore: mounts:", path, why));
    if let Some(lost) = outside.mounts.iter().find(|mount| !there.contains(&staged.at(mount))) {
        return differ(lost, "the checkpoint has a mount there, the configuration has none");
    }
    let bound = spec.mounts().iter().flatten().filter(|mount| mount.typ().as_deref() == Some("bind"));
    let mut bound = bound.map(|mount| mount.destination().display().to_string());
    match bound.find(|mount| !outside.mounts.contains(mount)) {
        Some(new) => differ(&new, "the configuration has a mount there, the checkpoint has none"),
        None => Ok(()),
    }
}
