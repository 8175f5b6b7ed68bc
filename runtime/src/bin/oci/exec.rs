//! exec: one more process in a running container.

use crate::arguments::{Call, Flag, switch, value};
use crate::console::{self, Signals, foreground};
use crate::create::own_streams;
use crate::record::{Record, Status};
use crate::{KILL_TIMEOUT, Outcome, failed, invalid};
use oci_spec::runtime::{Capabilities, Process};
use std::collections::HashSet;
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use windlass_runtime::cgroup::Cgroup;
use windlass_runtime::log::now_ns;
use windlass_runtime::process::{self, Child, Enter, Kind, Message, Stdio, StepError};

/// Its flags.
pub(crate) const FLAGS: &[Flag] = &[
    value("--process", "-p", "FILE", "the process as JSON; other flags that describe it are refused with this one"),
    value("--env", "-e", "NAME=VALUE", "one more variable"),
    value("--cwd", "", "DIR", "working directory"),
    value("--user", "-u", "UID[:GID]", "who it runs as"),
    value("--additional-gids", "-g", "GID", "one more group"),
    value("--cap", "-c", "NAME", "one more capability"),
    switch("--no-new-privs", "", "gains no rights by exec"),
    switch("--tty", "-t", "gives it a terminal"),
    value("--console-socket", "", "SOCKET", "takes the master of its terminal"),
    value("--pid-file", "", "FILE", "gets its process id"),
    switch("--detach", "-d", "returns when the program runs"),
    value("--preserve-fds", "", "COUNT", "only 0"),
];

/// `exec`.
pub(crate) fn exec(call: &Call) -> Outcome<i32> {
    let home = call.home()?;
    let record = Record::load(&home)?;
    record.require(&home, "exec in", &[Status::Running])?;
    if call.flags.number::<u32>("--preserve-fds")?.unwrap_or(0) != 0 {
        return Err(crate::unsupported("--preserve-fds", "a process begins with its standard streams alone"));
    }
    let process = describe(call, &record, &home)?;
    let detach = call.flags.has("--detach");
    let terminal = process.terminal() == Some(true);
    console::check(terminal, call.flags.path("--console-socket").as_deref(), !detach)?;
    let json = serde_json::to_string(&process).map_err(|error| invalid("process", &error.to_string()))?;
    let signals = Signals::hold()?;
    let cgroup = Cgroup::open(&record.cgroup)?.create_child(&format!("exec-{}-{}", std::process::id(), now_ns()))?;
    let result = enter(call, &record, &home, &cgroup, &json, terminal);
    let result =
        result.and_then(|(child, master)| if detach { Ok(None) } else { foreground(&child.pidfd, master, &signals).map(Some) });
    if let Ok(None) = result {
        // Its cgroup goes with the container's.
        return Ok(0);
    }
    cgroup.kill()?;
    cgroup.wait_empty(KILL_TIMEOUT)?;
    cgroup.remove()?;
    result.map(|code| code.unwrap_or_default())
}

type Entered = (Child, Option<std::os::fd::OwnedFd>);

/// Starts the process and follows it until its program runs.
fn enter(call: &Call, record: &Record, home: &Path, cgroup: &Cgroup, json: &str, terminal: bool) -> Outcome<Entered> {
    let target = record.open_process()?;
    let stdio = if terminal { Stdio::Terminal } else { own_streams()? };
    let enter = Enter { target: target.as_fd(), cgroup: cgroup.as_fd(), process_json: json, stdio, bundle: home };
    let mut child = process::enter(enter)?;
    let mut master = None;
    loop {
        match child.report.wait().map_err(|error| failed("read report", Path::new(""), &error))? {
            Message::Ready { console, .. } => master = console,
            Message::Failed(error) => {
                crate::reap(&child.pidfd)?;
                return Err(error);
            }
            Message::Executed => break,
            Message::Moved { .. } | Message::Hooks { .. } | Message::WouldBlock => {
                return Err(StepError::because(Kind::Internal, "read report", "", "unexpected report"));
            }
        }
    }
    if let (Some(socket), Some(kept)) = (call.flags.path("--console-socket"), &master) {
        console::send(&socket, kept.as_fd())?;
        master = None;
    }
    if let Some(file) = call.flags.path("--pid-file") {
        fs::write(&file, child.pid.to_string()).map_err(|error| failed("write", &file, &error))?;
    }
    Ok((child, master))
}

/// The process from its file, or the container's own with what the flags change.
fn describe(call: &Call, record: &Record, home: &Path) -> Outcome<Process> {
    let flags = &call.flags;
    if let Some(path) = flags.path("--process") {
        let others = ["--env", "--cwd", "--user", "--additional-gids", "--cap", "--no-new-privs"];
        if let Some(other) = others.into_iter().find(|other| flags.has(other)) {
            return Err(invalid(other, "the process comes from a file"));
        }
        let text = fs::read(&path).map_err(|error| failed("read", &path, &error))?;
        let parsed: Result<Process, _> = serde_json::from_slice(&text);
        let mut process = parsed.map_err(|error| invalid(&path.display().to_string(), &error.to_string()))?;
        if flags.has("--tty") {
            process.set_terminal(Some(true));
        }
        return Ok(process);
    }
    let words = call.operands.get(1..).unwrap_or_default();
    if words.is_empty() {
        return Err(invalid(&record.id, "exec needs a program or --process"));
    }
    let mut process = record.spec(home)?.process().clone().unwrap_or_default();
    process.set_args(Some(words.to_vec())).set_terminal(Some(flags.has("--tty")));
    process.env_mut().get_or_insert_default().extend(flags.all("--env").map(str::to_owned));
    if let Some(directory) = flags.path("--cwd") {
        process.set_cwd(directory);
    }
    if flags.has("--no-new-privs") {
        process.set_no_new_privileges(Some(true));
    }
    set_user(call, &mut process)?;
    add_capabilities(call, &mut process)?;
    Ok(process)
}

fn set_user(call: &Call, process: &mut Process) -> Outcome<()> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| invalid(text, "not a number of a user or group"));
    if let Some(user) = call.flags.get("--user") {
        let (uid, gid) = user.split_once(':').map_or((user, None), |(uid, gid)| (uid, Some(gid)));
        process.user_mut().set_uid(number(uid)?);
        if let Some(gid) = gid {
            process.user_mut().set_gid(number(gid)?);
        }
    }
    for group in call.flags.all("--additional-gids") {
        let group = number(group)?;
        process.user_mut().additional_gids_mut().get_or_insert_default().push(group);
    }
    Ok(())
}

/// Into every set but the inheritable, as a program of another user needs them.
fn add_capabilities(call: &Call, process: &mut Process) -> Outcome<()> {
    let parse = |name: &str| serde_json::from_value(name.into()).map_err(|_| invalid(name, "not a capability"));
    let added: HashSet<_> = call.flags.all("--cap").map(parse).collect::<Outcome<_>>()?;
    if added.is_empty() {
        return Ok(());
    }
    let mut sets = process.capabilities().clone().unwrap_or_default();
    let with = |set: &Option<Capabilities>| Some(set.iter().flatten().copied().chain(added.iter().copied()).collect());
    sets.set_bounding(with(sets.bounding()));
    sets.set_effective(with(sets.effective()));
    sets.set_permitted(with(sets.permitted()));
    process.set_capabilities(Some(sets));
    Ok(())
}
