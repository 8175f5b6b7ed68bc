//! `windlass-oci`: the low-level runtime as a program with the commands of the OCI runtime command line. It keeps one directory
//! for each container below --root; between commands nothing of it runs. A created container waits in accept() on a socket there.

mod arguments;
mod console;
mod create;
mod exec;
mod features;
mod inspect;
mod life;
mod log;
mod record;
mod update;

use arguments::{Call, Command, Flag, switch, value};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;
use windlass_runtime::process::{Kind, StepError};

const DEFAULT_ROOT: &str = "/run/windlass-oci";
/// How long killed and frozen processes may take to follow.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Exit code of this program when it could not do what it was asked.
const FAILED: i32 = 255;
/// Oldest and newest version of the OCI runtime specification that is understood.
const SPECIFICATION: (&str, &str) = ("1.0.0", "1.2.1");

type Outcome<T> = Result<T, StepError>;

const HELP: &[Flag] = &[switch("--help", "-h", "lists what may be said")];
const GLOBAL: &[Flag] = &[
    value("--root", "", "DIR", "where containers are kept, /run/windlass-oci without it"),
    value("--log", "", "FILE", "gets errors and warnings, a line each"),
    value("--log-format", "", "FORMAT", "text or json"),
    switch("--systemd-cgroup", "", "refused: systemd's cgroups are the daemon's"),
    switch("--debug", "", "there is nothing more to tell"),
    value("--rootless", "", "BOOL", "false or auto"),
    switch("--version", "-v", "prints versions"),
];
const ONE: (usize, usize) = (1, 1);
const COMMANDS: &[Command] = &[
    Command {
        name: "create",
        operands: "ID",
        count: ONE,
        about: "builds the container up to its gate",
        flags: &[HELP, create::FLAGS],
        run: create::create,
    },
    Command { name: "start", operands: "ID", count: ONE, about: "runs its program", flags: &[HELP], run: life::start },
    Command {
        name: "run",
        operands: "ID",
        count: ONE,
        about: "create, start, wait, delete; ends with its exit code",
        flags: &[HELP, create::FLAGS, life::RUN_FLAGS],
        run: life::run,
    },
    Command {
        name: "exec",
        operands: "ID [PROGRAM [ARGUMENT...]]",
        count: (1, usize::MAX),
        about: "one more process in a running container; ends with its exit code",
        flags: &[HELP, exec::FLAGS],
        run: exec::exec,
    },
    Command { name: "state", operands: "ID", count: ONE, about: "its state as JSON", flags: &[HELP], run: inspect::state },
    Command {
        name: "list",
        operands: "",
        count: (0, 0),
        about: "every container",
        flags: &[HELP, inspect::LIST_FLAGS],
        run: inspect::list,
    },
    Command {
        name: "ps",
        operands: "ID",
        count: ONE,
        about: "its processes",
        flags: &[HELP, inspect::PS_FLAGS],
        run: inspect::ps,
    },
    Command {
        name: "kill",
        operands: "ID [SIGNAL]",
        count: (1, 2),
        about: "TERM without SIGNAL",
        flags: &[HELP, life::KILL_FLAGS],
        run: life::kill,
    },
    Command { name: "pause", operands: "ID", count: ONE, about: "holds its processes still", flags: &[HELP], run: life::pause },
    Command { name: "resume", operands: "ID", count: ONE, about: "lets them go on", flags: &[HELP], run: life::resume },
    Command {
        name: "update",
        operands: "ID",
        count: ONE,
        about: "changes its limits",
        flags: &[HELP, update::FLAGS],
        run: update::update,
    },
    Command {
        name: "delete",
        operands: "ID",
        count: ONE,
        about: "removes a stopped container",
        flags: &[HELP, life::DELETE_FLAGS],
        run: life::delete,
    },
    Command {
        name: "features",
        operands: "",
        count: (0, 0),
        about: "what this program can do, as JSON",
        flags: &[HELP],
        run: features::features,
    },
];

fn main() {
    let mut log = log::Log::default();
    let code = match run(std::env::args().skip(1), &mut log) {
        Ok(code) => code,
        Err(error) => {
            log.error(&error.to_string());
            FAILED
        }
    };
    std::process::exit(code);
}

fn run(mut words: impl Iterator<Item = String>, log: &mut log::Log) -> Outcome<i32> {
    let (global, name) = arguments::flags(&mut words, &[HELP, GLOBAL])?;
    *log = log::Log::open(global.path("--log"), global.get("--log-format"))?;
    if global.has("--version") {
        println!("windlass-oci version {}\nspec: {}", env!("CARGO_PKG_VERSION"), SPECIFICATION.1);
        return Ok(0);
    }
    let usage = || arguments::usage(GLOBAL, COMMANDS);
    let Some(name) = name.filter(|name| name != "help" && !global.has("--help")) else {
        println!("{}", usage());
        return Ok(if global.has("--help") { 0 } else { FAILED });
    };
    if global.has("--systemd-cgroup") {
        return Err(unsupported("--systemd-cgroup", "systemd's cgroups are the daemon's; name a plain cgroupsPath"));
    }
    if let Some(other) = global.get("--rootless").filter(|given| !["false", "auto"].contains(given)) {
        return Err(unsupported(&format!("--rootless {other}"), "containers are made by root"));
    }
    let command = COMMANDS.iter().find(|command| command.name == name);
    let command = command.ok_or_else(|| invalid(&name, &format!("no such command\n{}", usage())))?;
    let (flags, operands) = arguments::command_line(command, &mut words)?;
    if flags.has("--help") {
        println!("{}", arguments::help(command));
        return Ok(0);
    }
    let root = global.path("--root").unwrap_or_else(|| DEFAULT_ROOT.into());
    (command.run)(&Call { root, log: log.clone(), flags, operands })
}

/// Exit code, or 128 and the signal.
fn reap(pidfd: &OwnedFd) -> Outcome<i32> {
    let waited = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
    let ended = waited.map_err(|errno| failed("wait for", Path::new("process"), &errno.into()))?;
    let code = ended.and_then(|ended| ended.exit_status().or(ended.terminating_signal().map(|signal| 128 + signal)));
    Ok(code.unwrap_or(FAILED))
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
