//! `windlass-oci`: the low-level runtime as a program with the commands of the OCI runtime command line. It keeps one directory
//! for each container below --root; between commands nothing of it runs. A created container waits in accept() on a socket there.

use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;
use windlass_runtime::bundle::read_config;
use windlass_runtime::cgroup::{self, Cgroup};
use windlass_runtime::namespace::open_namespace;
use windlass_runtime::process::{
    self as process, Child, Enter, Kind, Message, PidNamespace, PodNamespaces, Report, Spawn, Stdio, StepError,
};

const USAGE: &str = "windlass-oci [--root DIR] COMMAND
  create [--bundle DIR] [--pid-file FILE] ID    builds the container up to its gate
  start ID                                      runs its program
  run [--bundle DIR] [--pid-file FILE] ID       create, start, wait, delete; ends with its exit code
  exec [--process FILE] ID [ARG...]             one more process in a running container; ends with its exit code
  state ID                                      prints its state as JSON
  kill [--all] ID [SIGNAL]                      TERM without SIGNAL; --all: everything in it, with KILL
  delete [--force] ID                           removes a stopped container; --force kills it first";

const DEFAULT_ROOT: &str = "/run/windlass-oci";
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Exit code of this program when it could not do what it was asked.
const FAILED: i32 = 255;

type Outcome<T> = Result<T, StepError>;

/// `state.json` of a container. The start time tells a reused pid from ours.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    id: String,
    bundle: PathBuf,
    cgroup: PathBuf,
    pid: i32,
    start_time: u64,
}

#[derive(Debug, Default)]
struct Arguments {
    root: Option<PathBuf>,
    bundle: Option<PathBuf>,
    pid_file: Option<PathBuf>,
    process: Option<PathBuf>,
    force: bool,
    all: bool,
    positional: Vec<String>,
}

fn main() {
    let code = match run(std::env::args().skip(1)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("windlass-oci: {error}");
            FAILED
        }
    };
    std::process::exit(code);
}

fn run(arguments: impl Iterator<Item = String>) -> Outcome<i32> {
    let arguments = parse(arguments)?;
    let mut words = arguments.positional.iter().map(String::as_str);
    let command = words.next().ok_or_else(|| invalid("", USAGE))?;
    let id = words.next().ok_or_else(|| invalid(command, "needs a container id"))?;
    let valid = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id.starts_with('.') || !id.chars().all(valid) {
        return Err(invalid(id, "not a container id"));
    }
    let home = arguments.root.clone().unwrap_or_else(|| DEFAULT_ROOT.into()).join(id);
    let rest: Vec<&str> = words.collect();
    match command {
        "create" => create(&home, id, &arguments).map(|_| 0),
        "start" => start(&home).map(|()| 0),
        "run" => run_whole(&home, id, &arguments),
        "exec" => exec(&home, &arguments, &rest),
        "state" => state(&home).map(|()| 0),
        "kill" => kill(&home, &arguments, rest.first().copied()).map(|()| 0),
        "delete" => delete(&home, arguments.force).map(|()| 0),
        other => Err(invalid(other, USAGE)),
    }
}

fn parse(words: impl Iterator<Item = String>) -> Outcome<Arguments> {
    let mut parsed = Arguments::default();
    let mut words = words.peekable();
    while let Some(word) = words.next() {
        // What follows the id of an exec is the program's own.
        if !word.starts_with('-') || parsed.positional.len() >= 2 {
            parsed.positional.push(word);
            continue;
        }
        let (name, given) = match word.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (word, None),
        };
        let slot = match name.as_str() {
            "--force" | "-f" => {
                parsed.force = true;
                continue;
            }
            "--all" | "-a" => {
                parsed.all = true;
                continue;
            }
            "--root" => &mut parsed.root,
            "--bundle" | "-b" => &mut parsed.bundle,
            "--pid-file" => &mut parsed.pid_file,
            "--process" | "-p" => &mut parsed.process,
            "--console-socket" => return Err(unsupported(&name, "terminals are the monitor's")),
            _ => return Err(invalid(&name, USAGE)),
        };
        let value = given.or_else(|| words.next()).ok_or_else(|| invalid(&name, "needs a value"))?;
        *slot = Some(value.into());
    }
    Ok(parsed)
}

fn create(home: &Path, id: &str, arguments: &Arguments) -> Outcome<(Record, OwnedFd)> {
    let bundle = arguments.bundle.clone().unwrap_or_else(|| ".".into());
    let bundle = fs::canonicalize(&bundle).map_err(|error| failed("open bundle", &bundle, &error))?;
    let spec = read_config(&bundle)?;
    if spec.process().as_ref().and_then(|process| process.terminal()) == Some(true) {
        return Err(unsupported("process.terminal", "terminals are the monitor's"));
    }
    let path = cgroup_path(&spec, id)?;
    let parent = home.parent().unwrap_or(home);
    fs::create_dir_all(parent).map_err(|error| failed("make directory", parent, &error))?;
    fs::create_dir(home).map_err(|error| failed("make container", home, &error))?;
    let made = build(home, id, &bundle, &spec, &path, arguments);
    if made.is_err() {
        if let Ok(cgroup) = Cgroup::open(&path) {
            let _ = cgroup.kill();
            let _ = cgroup.wait_empty(KILL_TIMEOUT);
            let _ = cgroup.remove();
        }
        let _ = fs::remove_dir_all(home);
    }
    made
}

fn build(home: &Path, id: &str, bundle: &Path, spec: &Spec, path: &Path, arguments: &Arguments) -> Outcome<(Record, OwnedFd)> {
    let cgroup = Cgroup::create(path)?;
    if cgroup.populated()? {
        return Err(StepError::because(Kind::WrongState, "use cgroup", path.display(), "processes live in it"));
    }
    let pid_namespace = pid_namespace(spec)?;
    let pid = match &pid_namespace {
        None => PidNamespace::Host,
        Some(None) if own_user(spec) => PidNamespace::NewInside,
        Some(None) => PidNamespace::New,
        Some(Some(fd)) => PidNamespace::Join(fd.as_fd()),
    };
    let gate = listen(&home.join("gate"))?;
    let stdio = own_streams()?;
    let namespaces = PodNamespaces::default();
    let spawn = Spawn { bundle, cgroup: cgroup.as_fd(), cgroup_path: path, pid, namespaces, stdio };
    let Child { mut pid, mut pidfd, mut report } = process::create_behind(spawn, gate)?;
    let mut message = wait(&mut report)?;
    if let Message::Moved { pid: first, pidfd: first_pidfd } = message {
        reap(&pidfd)?;
        (pid, pidfd) = (first, first_pidfd);
        message = wait(&mut report)?;
    }
    match message {
        Message::Ready { not_enforced, .. } if !not_enforced.is_empty() => {
            eprintln!("windlass-oci: this host does not enforce limits of: {}", not_enforced.join(", "));
        }
        Message::Failed(error) => {
            reap(&pidfd)?;
            return Err(error);
        }
        _ => {}
    }
    let start_time = start_time(pid).unwrap_or_default();
    let record = Record { version: 1, id: id.into(), bundle: bundle.into(), cgroup: path.into(), pid, start_time };
    let text = serde_json::to_string(&record).map_err(|error| invalid("state.json", &error.to_string()))?;
    let file = home.join("state.json");
    fs::write(&file, text).map_err(|error| failed("write", &file, &error))?;
    if let Some(file) = &arguments.pid_file {
        fs::write(file, pid.to_string()).map_err(|error| failed("write", file, &error))?;
    }
    Ok((record, pidfd))
}

fn start(home: &Path) -> Outcome<()> {
    let record = load(home)?;
    let gate = home.join("gate");
    let status = status(home, &record);
    if status != "created" {
        return Err(StepError::because(Kind::WrongState, "start", &record.id, format!("the container is {status}")));
    }
    let mut report = Report::connect(&gate).map_err(|error| failed("open gate", &gate, &error))?;
    report.open_gate().map_err(|error| failed("open gate", &gate, &error))?;
    fs::remove_file(&gate).map_err(|error| failed("remove", &gate, &error))?;
    match wait(&mut report)? {
        Message::Failed(error) => Err(error),
        _ => Ok(()),
    }
}

fn run_whole(home: &Path, id: &str, arguments: &Arguments) -> Outcome<i32> {
    let (_, pidfd) = create(home, id, arguments)?;
    let started = start(home);
    let code = started.and_then(|()| reap(&pidfd));
    let deleted = delete(home, true);
    if code.is_err() {
        let _ = reap(&pidfd);
    }
    deleted.and(code)
}

fn exec(home: &Path, arguments: &Arguments, words: &[&str]) -> Outcome<i32> {
    let record = load(home)?;
    if status(home, &record) != "running" {
        return Err(StepError::because(Kind::WrongState, "exec in", &record.id, "the container is not running"));
    }
    let process: Process = match &arguments.process {
        Some(path) => {
            let text = fs::read(path).map_err(|error| failed("read", path, &error))?;
            serde_json::from_slice(&text).map_err(|error| invalid(&path.display().to_string(), &error.to_string()))?
        }
        None => {
            let mut process = read_config(&record.bundle)?.process().clone().unwrap_or_default();
            process.set_args(Some(words.iter().map(|word| (*word).to_owned()).collect()));
            process
        }
    };
    let process_json = serde_json::to_string(&process).map_err(|error| invalid("process", &error.to_string()))?;
    let target = open_process(&record)?;
    let cgroup = Cgroup::open(&record.cgroup)?.create_child(&format!("exec-{}", std::process::id()))?;
    let stdio = own_streams()?;
    let enter =
        Enter { target: target.as_fd(), cgroup: cgroup.as_fd(), process_json: &process_json, stdio, bundle: &record.bundle };
    let result = process::enter(enter).and_then(|mut child| {
        let mut message = wait(&mut child.report)?;
        if matches!(message, Message::Ready { .. }) {
            message = wait(&mut child.report)?;
        }
        let code = reap(&child.pidfd)?;
        if let Message::Failed(error) = message { Err(error) } else { Ok(code) }
    });
    cgroup.kill()?;
    cgroup.wait_empty(KILL_TIMEOUT)?;
    cgroup.remove()?;
    result
}

fn state(home: &Path) -> Outcome<()> {
    let record = load(home)?;
    let status = status(home, &record);
    let spec = read_config(&record.bundle).ok();
    let annotations = spec.and_then(|spec| spec.annotations().clone()).unwrap_or_default();
    let pid = if status == "stopped" { 0 } else { record.pid };
    let state = serde_json::json!({
        "ociVersion": "1.2.0", "id": record.id, "status": status, "pid": pid, "bundle": record.bundle, "annotations": annotations,
    });
    println!("{state:#}");
    Ok(())
}

fn kill(home: &Path, arguments: &Arguments, signal: Option<&str>) -> Outcome<()> {
    let record = load(home)?;
    if arguments.all {
        return Cgroup::open(&record.cgroup)?.kill();
    }
    let signal = parse_signal(signal.unwrap_or("TERM"))?;
    if status(home, &record) == "stopped" {
        return Err(StepError::because(Kind::WrongState, "kill", &record.id, "the container is stopped"));
    }
    let pidfd = open_process(&record)?;
    pidfd_send_signal(&pidfd, signal).map_err(|errno| failed("kill", home, &errno.into()))
}

fn delete(home: &Path, force: bool) -> Outcome<()> {
    let record = match load(home) {
        Err(error) if force && error.kind == Kind::NotFound => return Ok(()),
        other => other?,
    };
    let status = status(home, &record);
    if status != "stopped" && !force {
        return Err(StepError::because(Kind::WrongState, "delete", &record.id, format!("the container is {status}")));
    }
    match Cgroup::open(&record.cgroup) {
        Err(error) if error.errno == libc::ENOENT => {}
        Err(error) => return Err(error),
        Ok(cgroup) => {
            cgroup.kill()?;
            if !cgroup.wait_empty(KILL_TIMEOUT)? {
                return Err(StepError::because(Kind::Internal, "delete", &record.id, "processes of it do not die"));
            }
            cgroup.remove()?;
        }
    }
    fs::remove_dir_all(home).map_err(|error| failed("remove", home, &error))
}

/// created, running or stopped. The gate's socket is there until the container was started.
fn status(home: &Path, record: &Record) -> &'static str {
    if start_time(record.pid) != Some(record.start_time) {
        "stopped"
    } else if home.join("gate").exists() {
        "created"
    } else {
        "running"
    }
}

/// Field 22 of /proc/PID/stat, `None` for a process that is gone or a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.get(text.rfind(')')? + 2..)?.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn open_process(record: &Record) -> Outcome<OwnedFd> {
    let gone = || StepError::because(Kind::WrongState, "open process of", &record.id, "the container is stopped");
    let pid = Pid::from_raw(record.pid).ok_or_else(gone)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| gone())?;
    // Only now is the pid pinned: it must still be the one that was recorded.
    if start_time(record.pid) == Some(record.start_time) { Ok(pidfd) } else { Err(gone()) }
}

fn load(home: &Path) -> Outcome<Record> {
    let path = home.join("state.json");
    let text = fs::read(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => StepError::because(Kind::NotFound, "open container", home.display(), "does not exist"),
        _ => failed("read", &path, &error),
    })?;
    serde_json::from_slice(&text).map_err(|error| invalid(&path.display().to_string(), &error.to_string()))
}

fn cgroup_path(spec: &Spec, id: &str) -> Outcome<PathBuf> {
    let given = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    let path = given.unwrap_or_else(|| Path::new("windlass-oci").join(id));
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

fn own_streams() -> Outcome<Stdio> {
    let copy =
        |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|error| failed("copy", Path::new("streams"), &error));
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    Ok(Stdio::Fds { stdin: Some(copy(stdin.as_fd())?), stdout: copy(stdout.as_fd())?, stderr: copy(stderr.as_fd())? })
}

/// Waits for the next message of a child.
fn wait(report: &mut Report) -> Outcome<Message> {
    loop {
        match report.receive().map_err(|error| failed("read report", Path::new(""), &error))? {
            Message::WouldBlock => {
                // An interrupted wait is only an early look.
                let _ = poll(&mut [PollFd::new(&*report, PollFlags::IN)], None);
            }
            message => return Ok(message),
        }
    }
}

/// Exit code, or 128 and the signal.
fn reap(pidfd: &OwnedFd) -> Outcome<i32> {
    let waited = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
    let ended = waited.map_err(|errno| failed("wait for", Path::new("process"), &errno.into()))?;
    let code = ended.and_then(|ended| ended.exit_status().or(ended.terminating_signal().map(|signal| 128 + signal)));
    Ok(code.unwrap_or(FAILED))
}

fn parse_signal(text: &str) -> Outcome<Signal> {
    let number = text.parse::<i32>().ok().or_else(|| {
        let upper = text.to_ascii_uppercase();
        let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
        name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
    });
    number.and_then(Signal::from_named_raw).ok_or_else(|| invalid(text, "not a signal"))
}

fn failed(step: &str, object: &Path, error: &std::io::Error) -> StepError {
    match error.raw_os_error() {
        Some(errno) => StepError::errno(step, object.display(), errno),
        None => StepError::because(Kind::Internal, step, object.display(), error),
    }
}

fn invalid(object: &str, why: &str) -> StepError {
    StepError::because(Kind::Invalid, "use", object, why)
}

fn unsupported(object: &str, why: &str) -> StepError {
    StepError::because(Kind::Unsupported, "use", object, why)
}
