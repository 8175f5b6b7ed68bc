//! A container that another OCI runtime builds (runc, crun): a copy of the caller prepares what that runtime needs in a mount
//! namespace of its own, has it create the container, waits at the gate in the container's place, and has it started. It speaks as a
//! child of ours does, so that the caller sees no difference; what the runtime keeps lies in the bundle and goes with it.

use super::report::ChildReport;
use super::{Child, Context, Kind, PidNamespace, Report, Spawn, Stdio, StepError, stdio};
use crate::bundle::{self, read_config, read_rootfs_plan};
use crate::cgroup;
use crate::rootfs::{CGROUP, expose};
use crate::security;
use crate::sys;
use crate::sys::clone::{Forked, fork};
use oci_spec::runtime::Spec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};
use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Longest time for one command of the runtime.
const LIMIT: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// As [`super::create`], by `program`. Nothing is cloned into the container's cgroup but by that program. The caller must be
/// single-threaded, and the reaper of what its children leave.
pub fn create_by(program: &Path, spawn: &Spawn<'_>) -> Result<Child, StepError> {
    let (report, child_report) = Report::pair(true).context("make report socket", "")?;
    // SAFETY: this library's processes have a single thread (module documentation of `process`).
    match unsafe { fork() }.context("fork", "")? {
        Forked::Parent { pid, pidfd } => Ok(Child { pid, pidfd, report }),
        Forked::Child => {
            drop(report);
            let run = std::panic::AssertUnwindSafe(|| Driver { program, spawn, report: &child_report }.run());
            // A panic must not unwind into the parent's code in the child.
            let code = match std::panic::catch_unwind(run) {
                Ok(Ok(())) => 0,
                Ok(Err(error)) => {
                    child_report.failed(error);
                    1
                }
                Err(_) => {
                    child_report.failed(StepError::because(Kind::Internal, "build the container", "", "panicked"));
                    1
                }
            };
            sys::process::exit_now(code)
        }
    }
}

struct Driver<'a> {
    program: &'a Path,
    spawn: &'a Spawn<'a>,
    report: &'a ChildReport,
}

impl Driver<'_> {
    fn run(&self) -> Result<(), StepError> {
        stdio::install(&self.spawn.stdio)?;
        self.close_others()?;
        rustix::process::setsid().context("make session", "")?;
        sys::signal::reset_all();
        let spec = read_config(self.spawn.bundle)?;
        bundle::check(&spec)?;
        let missing = || StepError::because(Kind::Invalid, "read", self.spawn.bundle.display(), "no rootfs.json");
        let plan = read_rootfs_plan(self.spawn.bundle)?.ok_or_else(missing)?;
        // While the cgroup tree is where the caller knows it.
        let (config, not_enforced) = self.configuration(&spec)?;
        expose(self.spawn.bundle, &spec, &plan, &self.spawn.namespaces)?;
        let own = self.own();
        fs::create_dir_all(&own).context("create", own.display())?;
        fs::write(own.join("config.json"), config.to_string()).context("write", own.join("config.json").display())?;
        let console = matches!(self.spawn.stdio, Stdio::Terminal).then(|| Console::listen(&own)).transpose()?;
        let bundle = own.to_string_lossy();
        let mut words = vec!["create", "--bundle", &bundle, "--pid-file", "pid"];
        if let Some(console) = &console {
            words.extend(["--console-socket", &console.path]);
        }
        let created = self.command(&words);
        let master = match (&created, &console) {
            (Ok(()), Some(console)) => Some(console.master()?),
            _ => None,
        };
        match &created {
            Ok(()) => {
                self.restrict(&spec, &config)?;
                let pid = self.created_pid()?;
                let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("open pidfd", pid.as_raw_nonzero())?;
                self.report.moved(pid.as_raw_nonzero().get(), pidfd.as_fd()).context("report", "")?;
            }
            // A program that cannot be run is told at the start, as everywhere.
            Err(error) if error.kind == Kind::Entrypoint => {}
            Err(error) => return Err(error.clone()),
        }
        self.report.ready(master.as_ref().map(AsFd::as_fd), not_enforced, false).context("report", "")?;
        drop(master);
        if !self.report.wait_at_gate().context("wait at the gate", "")? {
            return Ok(());
        }
        created?;
        self.command(&["start"]).map_err(|error| error.kind(Kind::Entrypoint))
    }

    /// Device rules are enforced here for all: the runtime was told to allow everything, because some need CAP_SYS_RESOURCE for their
    /// filter. Filters of one cgroup add up, and the container's program does not run yet.
    fn restrict(&self, spec: &Spec, config: &Value) -> Result<(), StepError> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
        let path = config["linux"]["cgroupsPath"].as_str().unwrap_or_default();
        cgroup::restrict(&Path::new(CGROUP).join(path.trim_start_matches('/')), rules)
    }

    /// What the other runtime reads and writes.
    fn own(&self) -> PathBuf {
        self.spawn.bundle.join("oci")
    }

    fn held(&self) -> [Option<BorrowedFd<'_>>; 6] {
        let pod = &self.spawn.namespaces;
        let pid = if let PidNamespace::Join(target) = self.spawn.pid { Some(target) } else { None };
        [pod.net, pod.ipc, pod.uts, pod.shm, pod.layers, pid]
    }

    fn close_others(&self) -> Result<(), StepError> {
        let mut keep = vec![0, 1, 2, self.report.as_fd().as_raw_fd()];
        keep.extend(self.held().into_iter().flatten().map(|fd| fd.as_raw_fd()));
        // SAFETY: the child runs nothing of the parent's code any more; of the parent's descriptors it uses those kept here.
        unsafe { sys::descriptors::close_all_but(&keep) }.context("close descriptors", "")
    }

    /// `config.json` as any OCI runtime takes it, and the limits that this host cannot enforce, which are left out.
    fn configuration(&self, spec: &Spec) -> Result<(Value, Vec<String>), StepError> {
        let refuse = |what: &str, why: &str| Err(StepError::because(Kind::Unsupported, "run with another runtime", what, why));
        let mut config = serde_json::to_value(spec).map_err(std::io::Error::other).context("encode", "config.json")?;
        for later in ["poststart", "poststop"] {
            if config["hooks"][later].as_array().is_some_and(|hooks| !hooks.is_empty()) {
                return refuse(&format!("hooks.{later}"), "only the native runtime runs such hooks");
            }
        }
        // Every version since has the same meaning for what is used here, and older runtimes refuse a newer one.
        config["ociVersion"] = json!("1.0.2");
        config["root"]["path"] = json!(self.spawn.bundle.join("rootfs"));
        config["process"]["terminal"] = json!(matches!(self.spawn.stdio, Stdio::Terminal));
        self.namespaces(&mut config)?;
        for mount in config["mounts"].as_array_mut().into_iter().flatten() {
            if mount["type"] == "cgroup2" {
                mount["type"] = json!("cgroup");
            }
            if mount["destination"] == "/dev/shm" && mount["type"] == "tmpfs" && self.spawn.namespaces.shm.is_some() {
                let source = self.spawn.bundle.join("shm");
                *mount = json!({ "destination": "/dev/shm", "type": "bind", "source": source, "options": ["rbind", "rprivate"] });
            }
        }
        let not_enforced = self.limits(spec, &mut config)?;
        let tree = cgroup::mount_point()?;
        let path = self.spawn.cgroup_path.strip_prefix(&tree).unwrap_or(self.spawn.cgroup_path);
        config["linux"]["resources"]["devices"] = json!([{ "allow": true, "type": "a", "access": "rwm" }]);
        config["linux"]["cgroupsPath"] = json!(Path::new("/").join(path));
        let limits = spec.process().as_ref().and_then(|process| process.rlimits().as_deref()).unwrap_or_default();
        for (index, limit) in limits.iter().enumerate() {
            let (soft, hard) = security::reachable_rlimit(limit);
            config["process"]["rlimits"][index]["soft"] = json!(soft);
            config["process"]["rlimits"][index]["hard"] = json!(hard);
        }
        if let Some(score) = config["process"]["oomScoreAdj"].as_i64()
            && fs::write("/proc/self/oom_score_adj", score.to_string()).is_err()
        {
            // Lower than the caller's own needs CAP_SYS_RESOURCE; the container then keeps the caller's, as with the native runtime.
            if let Some(process) = config["process"].as_object_mut() {
                process.remove("oomScoreAdj");
            }
        }
        Ok((config, not_enforced))
    }

    /// The pod's namespaces by the descriptors of this process, which outlives the creation.
    fn namespaces(&self, config: &mut Value) -> Result<(), StepError> {
        let pod = &self.spawn.namespaces;
        let own = std::process::id();
        let path = |fd: BorrowedFd<'_>| match target_of(fd) {
            Some(pid) => json!(format!("/proc/{pid}/ns/pid")),
            None => json!(format!("/proc/{own}/fd/{}", fd.as_raw_fd())),
        };
        let mut kept = Vec::new();
        for mut namespace in config["linux"]["namespaces"].as_array().cloned().unwrap_or_default() {
            let held = match (namespace["type"].as_str().unwrap_or_default(), self.spawn.pid) {
                ("user", _) => {
                    let why = "a user namespace is served by the native runtime alone";
                    return Err(StepError::because(Kind::Unsupported, "run with another runtime", "userns_options", why));
                }
                ("pid", PidNamespace::Host) => continue,
                ("pid", PidNamespace::Join(target)) => Some(target),
                ("network", _) => pod.net,
                ("ipc", _) => pod.ipc,
                ("uts", _) => pod.uts,
                _ => None,
            };
            if let Some(fd) = held {
                namespace["path"] = path(fd);
            }
            kept.push(namespace);
        }
        config["linux"]["namespaces"] = json!(kept);
        Ok(())
    }

    /// Takes out what the cgroup's controllers cannot do: other runtimes fail there.
    fn limits(&self, spec: &Spec, config: &mut Value) -> Result<Vec<String>, StepError> {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let Some(resources) = resources else { return Ok(Vec::new()) };
        let missing = cgroup::unavailable(self.spawn.cgroup_path, resources)?;
        let Some(kept) = config["linux"]["resources"].as_object_mut() else { return Ok(missing) };
        for controller in &missing {
            match controller.as_str() {
                "cpu" => {
                    for name in ["shares", "quota", "period", "burst", "idle"] {
                        kept.get_mut("cpu").and_then(Value::as_object_mut).map(|cpu| cpu.remove(name));
                    }
                }
                "cpuset" => {
                    for name in ["cpus", "mems"] {
                        kept.get_mut("cpu").and_then(Value::as_object_mut).map(|cpu| cpu.remove(name));
                    }
                }
                "swap" => drop(kept.get_mut("memory").and_then(Value::as_object_mut).map(|memory| memory.remove("swap"))),
                "hugetlb" => drop(kept.remove("hugepageLimits")),
                "io" => drop(kept.remove("blockIO")),
                other => drop(kept.remove(other)),
            }
        }
        Ok(missing)
    }

    /// Runs `program` with these words and the container's id. What it says goes to its log, whose last line is the error.
    fn command(&self, words: &[&str]) -> Result<(), StepError> {
        let own = self.own();
        let step = format!("{} {}", self.program.display(), words.first().unwrap_or(&""));
        let log = own.join("log");
        let _ = fs::remove_file(&log);
        let mut command = Command::new(self.program);
        command.current_dir(&own).arg("--root").arg(own.join("state")).arg("--log").arg(&log).args(["--log-format", "json"]);
        let mut child = command.args(words).arg(self.spawn.id).spawn().context(&step, "")?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context(&step, "")?;
        let in_time = matches!(poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&LIMIT)), Ok(1));
        if !in_time {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        }
        let status = child.wait().context(&step, "")?;
        if status.success() && in_time {
            return Ok(());
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        let message = said.lines().rev().find_map(|line| {
            let line: Value = serde_json::from_str(line).ok()?;
            line["msg"].as_str().map(str::to_owned)
        });
        let message =
            message.unwrap_or_else(|| if in_time { format!("it ended with {status}") } else { "no end within 60 s".into() });
        let program = ["executable file", "exec:", "exec format", "chdir", "is a directory", "permission denied"];
        let kind =
            if program.iter().any(|part| message.to_lowercase().contains(part)) { Kind::Entrypoint } else { Kind::Internal };
        Err(StepError::because(kind, &step, self.spawn.id, message))
    }

    fn created_pid(&self) -> Result<Pid, StepError> {
        let path = self.own().join("pid");
        let text = fs::read_to_string(&path).context("read", path.display())?;
        let pid = text.trim().parse::<i32>().ok().and_then(Pid::from_raw);
        pid.ok_or_else(|| StepError::because(Kind::Internal, "read", path.display(), "no process id"))
    }
}

/// The process of a pidfd, as /proc names it; `None` for another descriptor.
fn target_of(fd: BorrowedFd<'_>) -> Option<i32> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    line.trim().parse::<i32>().ok().filter(|pid| *pid > 0)
}

/// The socket on which the runtime hands over a terminal's master.
struct Console {
    listener: UnixListener,
    /// Short, whatever the bundle's path is: a socket's name has 108 bytes.
    path: String,
    _directory: OwnedFd,
}

impl Console {
    fn listen(own: &Path) -> Result<Console, StepError> {
        let directory = crate::rootfs::open_path(own)?;
        let path = format!("/proc/{}/fd/{}/console", std::process::id(), directory.as_raw_fd());
        let listener = UnixListener::bind(&path).context("listen on", "console")?;
        // What was handed over waits there when the runtime has ended.
        listener.set_nonblocking(true).context("listen on", "console")?;
        Ok(Console { listener, path, _directory: directory })
    }

    fn master(&self) -> Result<OwnedFd, StepError> {
        let (stream, _) = self.listener.accept().context("take terminal", "")?;
        let mut bytes = [0u8; 256];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        recvmsg(&stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)
            .context("take terminal", "")?;
        let received = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        received.ok_or_else(|| StepError::because(Kind::Internal, "take terminal", "", "the runtime sent none"))
    }
}
