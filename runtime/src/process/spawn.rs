//! The parent's side: clones the child into its cgroup and pid namespace. Returns at once; the child works on alone.

use super::report::ChildReport;
use super::{Child, Enter, Kind, PidNamespace, Report, Spawn, StepError, child, exec};
use crate::namespace::PidForChildren;
use crate::process::Context;
use crate::sys::clone::{Forked, fork_into};
use rustix::io::Errno;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

/// Starts to build the container of a bundle. Returns as soon as the child exists; what it reports comes by
/// [`Child::report`]. The caller must be single-threaded.
pub fn create(spawn: Spawn<'_>) -> Result<Child, StepError> {
    create_gated(spawn, None)
}

/// As [`create`], with a gate that outlives the caller: a listening SEQPACKET socket. At the gate the child accepts one connection, which
/// takes the place of its report; [`Report::connect`] makes the other end.
pub fn create_behind(spawn: Spawn<'_>, gate: OwnedFd) -> Result<Child, StepError> {
    create_gated(spawn, Some(gate))
}

fn create_gated(spawn: Spawn<'_>, gate: Option<OwnedFd>) -> Result<Child, StepError> {
    let (report, child_report) = Report::pair(true).context("make report socket", "")?;
    let guard = match spawn.pid {
        PidNamespace::Join(target) => Some(PidForChildren::join(target)?),
        PidNamespace::New | PidNamespace::NewInside | PidNamespace::Host => None,
    };
    let new = matches!(spawn.pid, PidNamespace::New);
    let made =
        fork(spawn.cgroup, spawn.cgroup_path, new, report, child_report, |report| child::run(&spawn, gate.as_ref(), report));
    drop(guard);
    made
}

/// Adds a process to a running container. There is no gate: the program runs as soon as it can. The caller must be
/// single-threaded.
pub fn enter(enter: Enter<'_>) -> Result<Child, StepError> {
    let (report, child_report) = Report::pair(false).context("make report socket", "")?;
    let guard = PidForChildren::join(enter.target)?;
    let made = fork(enter.cgroup, enter.bundle, false, report, child_report, |report| exec::run(&enter, report));
    drop(guard);
    made
}

/// Clones; the child runs `body`, which reports its own errors, and ends.
fn fork(
    cgroup: BorrowedFd<'_>,
    object: &Path,
    new_pid: bool,
    report: Report,
    child_report: ChildReport,
    body: impl FnOnce(&ChildReport) -> Result<std::convert::Infallible, StepError>,
) -> Result<Child, StepError> {
    // SAFETY: this library's processes have a single thread (module documentation of `process`).
    match unsafe { fork_into(cgroup, new_pid) } {
        Ok(Forked::Parent { pid, pidfd }) => Ok(Child { pid, pidfd, report }),
        Ok(Forked::Child) => {
            let run = std::panic::AssertUnwindSafe(|| body(&child_report));
            // A panic must not unwind into the parent's code in the child.
            let error = match std::panic::catch_unwind(run) {
                Ok(Err(error)) => error,
                Ok(Ok(never)) => match never {},
                Err(_) => StepError::because(Kind::Internal, "build the container", "", "panicked"),
            };
            child_report.failed(error);
            crate::sys::process::exit_now(1)
        }
        Err(Errno::NOMEM) if !new_pid => Err(StepError::because(
            Kind::WrongState,
            "clone into",
            object.display(),
            "the pid namespace's first process has ended",
        )),
        Err(errno) => Err(errno).context("clone into", object.display()),
    }
}
