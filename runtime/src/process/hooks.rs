//! Hooks of a bundle: programs that run at points of a container's life (config.md of the OCI runtime specification). Each gets the
//! container's state on its standard input, has its own environment alone, and a bounded time. What it prints is told when it fails.
//!
//! | hooks | where | who runs them |
//! |---|---|---|
//! | prestart, createRuntime | the caller's namespaces | a copy of the caller ([`serve`]), which the child asks for; the root is built |
//! | createContainer | the container's, host's tree in view | the child, before it changes its root |
//! | startContainer | inside, as the program's user | the child, when the gate has opened |
//! | poststart, poststop | the caller's | the caller ([`run`], [`run_all`]) or a copy of it ([`begin_poststart`], [`begin_poststop`]) |
//!
//! A hook that fails fails the operation, but poststop: there the others run all the same.

use super::report::{ChildReport, Message, Report};
use super::{Context, Kind, StepError};
use crate::bundle::read_config;
use crate::sys;
use crate::sys::clone::{Forked, fork};
use oci_spec::runtime::{Hook, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Time of a hook that names none: nothing here waits for ever.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(600);

/// The last output of a hook, as much as an error tells.
const OUTPUT_LIMIT_BYTES: usize = 2048;

/// Step of every error of a hook.
pub const STEP: &str = "run hook";

/// When a hook runs, in the order of a container's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Deprecated: as `CreateRuntime`, and before it.
    Prestart,
    /// The root is built.
    CreateRuntime,
    /// After `CreateRuntime`.
    CreateContainer,
    /// Before the program.
    StartContainer,
    /// The program runs.
    Poststart,
    /// The container is deleted.
    Poststop,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Stage; 6] =
        [Stage::Prestart, Stage::CreateRuntime, Stage::CreateContainer, Stage::StartContainer, Stage::Poststart, Stage::Poststop];

    /// Its name in `config.json`.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Prestart => "prestart",
            Stage::CreateRuntime => "createRuntime",
            Stage::CreateContainer => "createContainer",
            Stage::StartContainer => "startContainer",
            Stage::Poststart => "poststart",
            Stage::Poststop => "poststop",
        }
    }

    fn hooks(self, spec: &Spec) -> &[Hook] {
        let Some(hooks) = spec.hooks() else { return &[] };
        let listed = match self {
            Stage::Prestart => hooks.prestart(),
            Stage::CreateRuntime => hooks.create_runtime(),
            Stage::CreateContainer => hooks.create_container(),
            Stage::StartContainer => hooks.start_container(),
            Stage::Poststart => hooks.poststart(),
            Stage::Poststop => hooks.poststop(),
        };
        listed.as_deref().unwrap_or_default()
    }
}

/// What a hook is told of its container.
#[derive(Debug, Clone, Copy)]
pub struct State<'a> {
    /// Its id.
    pub id: &'a str,
    /// created, running or stopped.
    pub status: &'a str,
    /// Its first process as the hook's pid namespace numbers it, 0 when it has ended.
    pub pid: u32,
    /// Absolute directory of its bundle.
    pub bundle: &'a Path,
}

impl State<'_> {
    /// The state as the specification's JSON. Version and annotations are those of `spec`.
    pub fn json(&self, spec: &Spec) -> serde_json::Value {
        serde_json::json!({
            "ociVersion": spec.version(),
            "id": self.id,
            "status": self.status,
            "pid": self.pid,
            "bundle": self.bundle,
            "annotations": spec.annotations().clone().unwrap_or_default(),
        })
    }
}

/// Whether `spec` has hooks of this stage.
pub fn listed(spec: &Spec, stage: Stage) -> bool {
    !stage.hooks(spec).is_empty()
}

/// Runs the hooks of a stage in their order, in the namespaces of the calling process, and stops at the first that fails. They begin in
/// `directory`.
pub fn run(spec: &Spec, stage: Stage, state: &State<'_>, directory: &Path) -> Result<(), StepError> {
    stage.hooks(spec).iter().try_for_each(|hook| run_one(spec, stage, hook, state, directory))
}

/// As [`run`], but a hook that fails is only told to `warn`: the rule of poststop.
pub fn run_all(spec: &Spec, stage: Stage, state: &State<'_>, directory: &Path, mut warn: impl FnMut(&StepError)) {
    for hook in stage.hooks(spec) {
        if let Err(error) = run_one(spec, stage, hook, state, directory) {
            warn(&error);
        }
    }
}

/// In the child: has the hooks of the caller's namespaces run, and waits for their outcome.
pub(super) fn ask(report: &ChildReport) -> Result<(), StepError> {
    let (mut outcome, other) = Report::pair(true).context("make report socket", "")?;
    report.hooks_due(&other).context("report", "")?;
    drop(other);
    match outcome.wait().context("read report", "")? {
        Message::Ready { .. } => Ok(()),
        Message::Failed(error) => Err(error),
        _ => Err(StepError::because(Kind::Internal, STEP, "", "unexpected answer")),
    }
}

/// Answers [`Message::Hooks`]: runs the prestart and createRuntime hooks of the bundle in a copy of the caller, which reports to
/// `outcome` and ends. Returns at once; the caller must be single-threaded and reap what it does not know.
pub fn serve(outcome: OwnedFd, bundle: &Path, id: &str, pid: i32) -> Result<(), StepError> {
    in_copy(ChildReport::of(outcome), || {
        let spec = read_config(bundle)?;
        let state = State { id, status: "created", pid: pid.unsigned_abs(), bundle };
        run(&spec, Stage::Prestart, &state, bundle)?;
        run(&spec, Stage::CreateRuntime, &state, bundle)
    })
}

/// Runs the poststart hooks of the bundle in a copy of the caller, as [`serve`] does; Ready or Failed comes through the report.
pub fn begin_poststart(bundle: &Path, id: &str, pid: i32) -> Result<Report, StepError> {
    begin(|| {
        let state = State { id, status: "running", pid: pid.unsigned_abs(), bundle };
        run(&read_config(bundle)?, Stage::Poststart, &state, bundle)
    })
}

/// As [`begin_poststart`], the poststop hooks. All of them run; Failed tells of the last that failed.
pub fn begin_poststop(bundle: &Path, id: &str) -> Result<Report, StepError> {
    begin(|| {
        let state = State { id, status: "stopped", pid: 0, bundle };
        let mut outcome = Ok(());
        run_all(&read_config(bundle)?, Stage::Poststop, &state, bundle, |error| outcome = Err(error.clone()));
        outcome
    })
}

fn begin(work: impl FnOnce() -> Result<(), StepError>) -> Result<Report, StepError> {
    let (report, outcome) = Report::pair(true).context("make report socket", "")?;
    in_copy(outcome, work).map(|()| report)
}

fn in_copy(outcome: ChildReport, work: impl FnOnce() -> Result<(), StepError>) -> Result<(), StepError> {
    // SAFETY: this library's processes have a single thread (module documentation of `process`).
    let Forked::Child = unsafe { fork() }.context("fork", "")? else { return Ok(()) };
    let keep = [0, 1, 2, outcome.as_fd().as_raw_fd()];
    // SAFETY: this copy of the caller uses no descriptor but those kept, and ends below.
    let closed = unsafe { sys::descriptors::close_all_but(&keep) }.context("close descriptors", "");
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| closed.and_then(|()| work()))) {
        Ok(Ok(())) => {
            // Whoever waits sees the end of this process by itself.
            let _ = outcome.ready(None, Vec::new(), false);
        }
        Ok(Err(error)) => outcome.failed(error),
        Err(_) => outcome.failed(StepError::because(Kind::Internal, STEP, "", "panicked")),
    }
    sys::process::exit_now(0)
}

fn run_one(spec: &Spec, stage: Stage, hook: &Hook, state: &State<'_>, directory: &Path) -> Result<(), StepError> {
    let object = format!("{} {}", stage.name(), hook.path().display());
    let invalid = |why: &str| Err(StepError::because(Kind::Invalid, STEP, &object, why));
    let timeout = match hook.timeout() {
        None => DEFAULT_TIMEOUT,
        Some(seconds) if seconds > 0 => Duration::from_secs(seconds.unsigned_abs()),
        Some(_) => return invalid("its timeout must be greater than zero"),
    };
    if !hook.path().is_absolute() {
        return invalid("its path must be absolute");
    }
    let deadline = Instant::now() + timeout;
    let (output, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context(STEP, &object)?;
    rustix::io::ioctl_fionbio(&output, true).context(STEP, &object)?;
    let mut child = command(hook, directory, input(&state.json(spec)).context(STEP, &object)?, write)
        .and_then(|mut command| command.spawn())
        .context(STEP, &object)?;
    let mut told = Vec::new();
    let in_time = wait(&child, &output, &mut told, deadline).context(STEP, &object);
    if !matches!(in_time, Ok(true))
        && let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw)
    {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let status = child.wait().context(STEP, &object)?;
    let why = match (in_time?, status.code(), status.signal()) {
        (false, ..) => format!("did not end in {} s", timeout.as_secs()),
        (true, Some(0), _) => return Ok(()),
        (true, Some(code), _) => format!("exit code {code}"),
        (true, None, signal) => format!("ended by signal {}", signal.unwrap_or_default()),
    };
    let told = String::from_utf8_lossy(&told);
    let told = told.trim();
    let message = if told.is_empty() { why } else { format!("{why}: {told}") };
    Err(StepError::because(Kind::Internal, STEP, &object, message))
}

/// A file in memory: a hook that does not read its input cannot hold anybody up.
fn input(state: &serde_json::Value) -> std::io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC)?);
    file.write_all(state.to_string().as_bytes())?;
    file.rewind()?;
    Ok(file)
}

fn command(hook: &Hook, directory: &Path, input: File, output: OwnedFd) -> std::io::Result<Command> {
    let mut command = Command::new(hook.path());
    let mut arguments = hook.args().iter().flatten();
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    command.args(arguments).env_clear().current_dir(directory).process_group(0);
    let environment = hook.env().iter().flatten();
    command.envs(environment.map(|entry| entry.split_once('=').unwrap_or((entry, ""))));
    command.stdin(input).stdout(output.try_clone()?).stderr(output);
    Ok(command)
}

/// Reads what the hook prints until it has ended, or returns false at the deadline. What it leaves running may hold its output open.
fn wait(child: &Child, output: &OwnedFd, told: &mut Vec<u8>, deadline: Instant) -> Result<bool, Errno> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    let ended = pidfd_open(pid, PidfdFlags::empty())?;
    let mut open = true;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        let mut polled = [PollFd::new(&ended, PollFlags::IN), PollFd::new(output, PollFlags::IN)];
        let polled = if open { polled.as_mut_slice() } else { polled.split_at_mut(1).0 };
        match poll(polled, Some(&left)) {
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
            Ok(0) => return Ok(false),
            Ok(_) => {}
        }
        let over = polled.first().is_some_and(|ended| !ended.revents().is_empty());
        open = read(output.as_fd(), told);
        if over {
            return Ok(true);
        }
    }
}

/// Takes what is there, at most a pipe full, and keeps the last of it. False at the end.
fn read(output: BorrowedFd<'_>, told: &mut Vec<u8>) -> bool {
    let mut buffer = [0u8; 64 * 1024];
    match rustix::io::read(output, &mut buffer) {
        Ok(0) => false,
        Ok(count) => {
            told.extend_from_slice(buffer.get(..count).unwrap_or_default());
            told.drain(..told.len().saturating_sub(OUTPUT_LIMIT_BYTES));
            true
        }
        Err(Errno::AGAIN | Errno::INTR) => true,
        Err(_) => false,
    }
}
