//! start, run, kill, pause, resume, delete.

use crate::arguments::{Call, Flag, switch};
use crate::console::foreground;
use crate::record::{Record, Status};
use crate::{KILL_TIMEOUT, Outcome, create, failed, invalid};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use windlass_runtime::cgroup::Cgroup;
use windlass_runtime::process::hooks::{self, Stage};
use windlass_runtime::process::{Kind, Message, Report, StepError};
use windlass_runtime::sys::signal::send;

/// Flags of `run` beside those of `create`.
pub(crate) const RUN_FLAGS: &[Flag] = &[
    switch("--detach", "-d", "returns when the program runs; the container stays until it is deleted"),
    switch("--keep", "", "does not delete the container at its end"),
];
pub(crate) const KILL_FLAGS: &[Flag] = &[switch("--all", "-a", "every process of the container")];
pub(crate) const DELETE_FLAGS: &[Flag] = &[switch("--force", "-f", "kills it first; no error if there is none")];

/// `start`.
pub(crate) fn start(call: &Call) -> Outcome<i32> {
    begin(&call.home()?).map(|()| 0)
}

fn begin(home: &Path) -> Outcome<()> {
    let record = Record::load(home)?;
    let gate = home.join("gate");
    record.require(home, "start", &[Status::Created])?;
    let spec = record.spec(home)?;
    let mut report = Report::connect(&gate).map_err(|error| failed("open gate", &gate, &error))?;
    report.open_gate().map_err(|error| failed("open gate", &gate, &error))?;
    fs::remove_file(&gate).map_err(|error| failed("remove", &gate, &error))?;
    let message = report.wait().map_err(|error| failed("read report", Path::new(""), &error))?;
    if let Message::Failed(error) = message {
        return Err(error);
    }
    hooks::run(&spec, Stage::Poststart, &record.state(Status::Running), &record.bundle).inspect_err(|_| {
        let _ = Cgroup::open(&record.cgroup).and_then(|cgroup| cgroup.kill());
    })
}

/// `run`.
pub(crate) fn run(call: &Call) -> Outcome<i32> {
    let home = call.home()?;
    let detach = call.flags.has("--detach");
    let signals = if detach { None } else { Some(crate::console::Signals::hold()?) };
    let made = create::make(call, !detach)?;
    let started = begin(&home);
    let Some(signals) = signals else {
        return started.map(|()| 0).inspect_err(|_| {
            let _ = remove(call, &home, true);
        });
    };
    let code = started.and_then(|()| foreground(&made.pidfd, made.master, &signals));
    if call.flags.has("--keep") && code.is_ok() {
        return code;
    }
    remove(call, &home, true).and(code)
}

/// `kill`.
pub(crate) fn kill(call: &Call) -> Outcome<i32> {
    let home = call.home()?;
    let record = Record::load(&home)?;
    let signal = parse_signal(call.operands.get(1).map_or("TERM", String::as_str))?;
    if call.flags.has("--all") {
        let cgroup = Cgroup::open(&record.cgroup)?;
        if signal == libc::SIGKILL {
            return cgroup.kill().map(|()| 0);
        }
        for pid in cgroup.processes()? {
            let opened = Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
            // One that has ended meanwhile needs no signal.
            let _ = opened.map(|pidfd| send(pidfd.as_fd(), signal));
        }
        return Ok(0);
    }
    if record.status(&home) == Status::Stopped {
        return Err(StepError::because(Kind::WrongState, "kill", &record.id, "the container is stopped"));
    }
    let pidfd = record.open_process()?;
    send(pidfd.as_fd(), signal).map_err(|errno| failed("kill", &home, &errno.into()))?;
    Ok(0)
}

/// `pause`.
pub(crate) fn pause(call: &Call) -> Outcome<i32> {
    freeze(call, "pause", Status::Running, true)
}

/// `resume`.
pub(crate) fn resume(call: &Call) -> Outcome<i32> {
    freeze(call, "resume", Status::Paused, false)
}

fn freeze(call: &Call, step: &str, from: Status, frozen: bool) -> Outcome<i32> {
    let home = call.home()?;
    let record = Record::load(&home)?;
    record.require(&home, step, &[from])?;
    if !Cgroup::open(&record.cgroup)?.freeze(frozen, KILL_TIMEOUT)? {
        return Err(StepError::because(Kind::Internal, step, &record.id, "its processes do not follow"));
    }
    Ok(0)
}

/// `delete`.
pub(crate) fn delete(call: &Call) -> Outcome<i32> {
    remove(call, &call.home()?, call.flags.has("--force")).map(|()| 0)
}

/// Ends what is left of a container and forgets it; then its poststop hooks.
fn remove(call: &Call, home: &Path, force: bool) -> Outcome<()> {
    let record = match Record::load(home) {
        Err(error) if force && error.kind == Kind::NotFound => return Ok(()),
        other => other?,
    };
    if !force {
        record.require(home, "delete", &[Status::Stopped])?;
    }
    let spec = record.spec(home);
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
    // The parent of containers that name no cgroup goes with the last of them.
    if let Some(parent) = record.cgroup.parent().filter(|parent| parent.ends_with(create::CGROUP_PARENT)) {
        let _ = fs::remove_dir(parent);
    }
    fs::remove_dir_all(home).map_err(|error| failed("remove", home, &error))?;
    match spec {
        Ok(spec) => {
            let state = record.state(Status::Stopped);
            let warn = |error: &StepError| call.log.warning(&error.to_string());
            hooks::run_all(&spec, Stage::Poststop, &state, &record.bundle, warn);
        }
        Err(error) => call.log.warning(&format!("its poststop hooks are unknown: {error}")),
    }
    Ok(())
}

fn parse_signal(text: &str) -> Outcome<i32> {
    let number = text.parse::<i32>().ok().or_else(|| {
        let upper = text.to_ascii_uppercase();
        let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
        let real_time =
            name.strip_prefix("SIGRTMIN+").and_then(|offset| offset.parse::<i32>().ok()).map(|offset| libc::SIGRTMIN() + offset);
        real_time.or_else(|| name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32))
    });
    number.filter(|number| (1..=64).contains(number)).ok_or_else(|| invalid(text, "not a signal"))
}
