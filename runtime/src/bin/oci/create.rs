//! create: a container from a bundle, up to its gate.

use crate::arguments::{Call, Flag, switch, value};
use crate::record::{Record, Status, VERSION, start_time};
use crate::{KILL_TIMEOUT, Outcome, console, failed, reap, unsupported};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use windlass_runtime::bundle::read_config;
use windlass_runtime::cgroup::{self, Cgroup};
use windlass_runtime::log::{now_ns, rfc3339_nano};
use windlass_runtime::namespace::open_namespace;
use windlass_runtime::process::hooks::{self, Stage};
use windlass_runtime::process::{self, Child, Kind, Message, PidNamespace, PodNamespaces, Spawn, Stdio, StepError};

/// Flags of `create` and `run`.
pub(crate) const FLAGS: &[Flag] = &[
    value("--bundle", "-b", "DIR", "the bundle; . without it"),
    value("--console-socket", "", "SOCKET", "takes the master of the container's terminal"),
    value("--pid-file", "", "FILE", "gets the process id"),
    value("--preserve-fds", "", "COUNT", "only 0"),
    switch("--no-pivot", "", "refused"),
    switch("--no-new-keyring", "", "refused"),
];

/// Where containers are that name no cgroup.
pub(crate) const CGROUP_PARENT: &str = "windlass-oci";

/// Step of the error about a cgroup that others live in.
const IN_USE: &str = "use cgroup";

/// A container that waits at its gate.
pub(crate) struct Made {
    pub(crate) pidfd: OwnedFd,
    /// Its terminal, if no console socket took it.
    pub(crate) master: Option<OwnedFd>,
}

/// What building needs beside the flags.
struct Plan<'a> {
    home: &'a Path,
    bundle: &'a Path,
    spec: &'a Spec,
    cgroup: &'a Path,
}

/// `create`.
pub(crate) fn create(call: &Call) -> Outcome<i32> {
    make(call, false).map(|_| 0)
}

/// Builds the container. With `keep_terminal` its terminal needs no console socket.
pub(crate) fn make(call: &Call, keep_terminal: bool) -> Outcome<Made> {
    for flag in ["--no-pivot", "--no-new-keyring"] {
        if call.flags.has(flag) {
            return Err(unsupported(flag, "a container always has a root and a keyring of its own"));
        }
    }
    if call.flags.number::<u32>("--preserve-fds")?.unwrap_or(0) != 0 {
        return Err(unsupported("--preserve-fds", "a container begins with its standard streams alone"));
    }
    let home = call.home()?;
    let bundle = call.flags.path("--bundle").unwrap_or_else(|| ".".into());
    let bundle = fs::canonicalize(&bundle).map_err(|error| failed("open bundle", &bundle, &error))?;
    let spec = read_config(&bundle)?;
    console::check(wants_terminal(&spec), call.flags.path("--console-socket").as_deref(), keep_terminal)?;
    let cgroup = cgroup_path(&spec, call.id()?)?;
    if let Some(parent) = home.parent() {
        fs::create_dir_all(parent).map_err(|error| failed("make directory", parent, &error))?;
    }
    fs::create_dir(&home).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            StepError::because(Kind::WrongState, "make container", home.display(), "a container of this id exists")
        }
        _ => failed("make container", &home, &error),
    })?;
    let plan = Plan { home: &home, bundle: &bundle, spec: &spec, cgroup: &cgroup };
    build(&plan, call).inspect_err(|error| undo(&plan, call, error))
}

pub(crate) fn wants_terminal(spec: &Spec) -> bool {
    spec.process().as_ref().and_then(|process| process.terminal()) == Some(true)
}

fn undo(plan: &Plan<'_>, call: &Call, error: &StepError) {
    // A cgroup that others live in is not ours.
    if error.step != IN_USE
        && let Ok(cgroup) = Cgroup::open(plan.cgroup)
    {
        let _ = cgroup.kill();
        let _ = cgroup.wait_empty(KILL_TIMEOUT);
        let _ = cgroup.remove();
    }
    let _ = fs::remove_dir_all(plan.home);
    // A hook that failed ends a container that was there.
    if error.step == hooks::STEP
        && let Ok(id) = call.id()
    {
        let state = hooks::State { id, status: Status::Stopped.name(), pid: 0, bundle: plan.bundle };
        hooks::run_all(plan.spec, Stage::Poststop, &state, plan.bundle, |error| call.log.warning(&error.to_string()));
    }
}

fn build(plan: &Plan<'_>, call: &Call) -> Outcome<Made> {
    let Plan { home, bundle, spec, cgroup: path } = *plan;
    keep_config(bundle, home)?;
    let cgroup = Cgroup::create(path)?;
    if cgroup.populated()? {
        return Err(StepError::because(Kind::WrongState, IN_USE, path.display(), "processes live in it"));
    }
    let pid_namespace = pid_namespace(spec)?;
    let pid = match &pid_namespace {
        None => PidNamespace::Host,
        Some(None) if own_user(spec) => PidNamespace::NewInside,
        Some(None) => PidNamespace::New,
        Some(Some(fd)) => PidNamespace::Join(fd.as_fd()),
    };
    let gate = listen(&home.join("gate"))?;
    let stdio = if wants_terminal(spec) { Stdio::Terminal } else { own_streams()? };
    let namespaces = PodNamespaces::default();
    let id = call.id()?;
    let spawn = Spawn { bundle, cgroup: cgroup.as_fd(), cgroup_path: path, pid, namespaces, stdio, id };
    let (pid, mut made) = hear(process::create_behind(spawn, gate)?, bundle, call)?;
    let created = String::from_utf8_lossy(&rfc3339_nano(now_ns())).into_owned();
    let start_time = start_time(pid).unwrap_or_default();
    let record = Record { version: VERSION, id: id.into(), bundle: bundle.into(), cgroup: path.into(), pid, start_time, created };
    record.store(home)?;
    if let (Some(socket), Some(master)) = (call.flags.path("--console-socket"), &made.master) {
        console::send(&socket, master.as_fd())?;
        made.master = None;
    }
    if let Some(file) = call.flags.path("--pid-file") {
        fs::write(&file, pid.to_string()).map_err(|error| failed("write", &file, &error))?;
    }
    Ok(made)
}

/// Follows the child up to its gate.
fn hear(child: Child, bundle: &Path, call: &Call) -> Outcome<(i32, Made)> {
    let Child { mut pid, mut pidfd, mut report } = child;
    loop {
        match report.wait().map_err(|error| failed("read report", Path::new(""), &error))? {
            Message::Moved { pid: first, pidfd: first_pidfd } => {
                reap(&pidfd)?;
                (pid, pidfd) = (first, first_pidfd);
            }
            Message::Hooks { outcome } => hooks::serve(outcome, bundle, call.id()?, pid)?,
            Message::Ready { console, not_enforced, .. } => {
                if !not_enforced.is_empty() {
                    let names = not_enforced.join(", ");
                    call.log.warning(&format!("this host does not enforce limits of: {names}"));
                }
                return Ok((pid, Made { pidfd, master: console }));
            }
            Message::Failed(error) => {
                reap(&pidfd)?;
                return Err(error);
            }
            Message::Executed | Message::WouldBlock => {
                return Err(StepError::because(Kind::Internal, "read report", "", "the gate did not hold"));
            }
        }
    }
}

/// Later changes of the bundle's `config.json` must not matter.
fn keep_config(bundle: &Path, home: &Path) -> Outcome<()> {
    let from = bundle.join("config.json");
    fs::copy(&from, home.join("config.json")).map_err(|error| failed("copy", &from, &error)).map(drop)
}

fn cgroup_path(spec: &Spec, id: &str) -> Outcome<PathBuf> {
    let given = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    let path = given.unwrap_or_else(|| Path::new(CGROUP_PARENT).join(id));
    if path.to_string_lossy().contains(':') {
        return Err(unsupported(&path.display().to_string(), "systemd's cgroups are the daemon's"));
    }
    Ok(cgroup::mount_point()?.join(path.strip_prefix("/").unwrap_or(&path)))
}

/// Whether the container lives in a user namespace.
fn own_user(spec: &Spec) -> bool {
    let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    listed.into_iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User)
}

/// `None`: the host's; `Some(None)`: a new one; else the one to join.
fn pid_namespace(spec: &Spec) -> Outcome<Option<Option<OwnedFd>>> {
    let list = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let entry = list.into_iter().flatten().find(|entry| entry.typ() == LinuxNamespaceType::Pid);
    match entry.map(|entry| entry.path()) {
        None => Ok(None),
        Some(None) => Ok(Some(None)),
        Some(Some(path)) => open_namespace(path).map(|fd| Some(Some(fd))),
    }
}

fn listen(path: &Path) -> Outcome<OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
    let make = || {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, 1)?;
        Ok(socket)
    };
    make().map_err(|errno: rustix::io::Errno| failed("make gate", path, &errno.into()))
}

/// The caller's own standard streams.
pub(crate) fn own_streams() -> Outcome<Stdio> {
    let copy =
        |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|error| failed("copy", Path::new("streams"), &error));
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    Ok(Stdio::Fds { stdin: Some(copy(stdin.as_fd())?), stdout: copy(stdout.as_fd())?, stderr: copy(stderr.as_fd())? })
}
