//! A short-lived copy of the caller that does one thing in another namespace, so that the caller need not go there.

use super::report::{ChildReport, Message, Report};
use super::{Context, Kind, StepError};
use crate::sys::clone::{Forked, fork};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, WaitId, WaitIdOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// How long the copy may take.
const TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Runs `work` in a forked copy of the caller, then `look` in the caller with the copy's process id in the host's /proc and the words
/// that `work` returned. The copy lives until `look` returns. The caller must be single-threaded.
pub(crate) fn beside<T>(
    work: impl FnOnce() -> Result<Vec<String>, StepError>,
    look: impl FnOnce(i32, Vec<String>) -> Result<T, StepError>,
) -> Result<T, StepError> {
    let (mut report, child_report) = Report::pair(true).context("make report socket", "")?;
    // SAFETY: this library's processes have a single thread (module documentation of `process`).
    let forked = unsafe { fork() }.context("fork", "")?;
    let Forked::Parent { pidfd, .. } = forked else {
        // End of file here says that the caller needs the copy no more.
        drop(report);
        run(work, &child_report)
    };
    drop(child_report);
    let result = hear(&mut report).and_then(|words| look(pid_of(&pidfd)?, words));
    let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
    drop(report);
    let _ = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
    result
}

fn run(work: impl FnOnce() -> Result<Vec<String>, StepError>, report: &ChildReport) -> ! {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(Ok(words)) => match report.ready(None, words, false).context("report from", "a namespace") {
            Ok(()) => drop(report.wait_at_gate()),
            Err(error) => report.failed(error),
        },
        Ok(Err(error)) => report.failed(error),
        Err(_) => report.failed(StepError::because(Kind::Internal, "work in a namespace", "", "panicked")),
    }
    crate::sys::process::exit_now(0)
}

fn hear(report: &mut Report) -> Result<Vec<String>, StepError> {
    loop {
        match report.receive().context("read report", "")? {
            Message::Ready { not_enforced, .. } => return Ok(not_enforced),
            Message::Failed(error) => return Err(error),
            Message::WouldBlock => {
                let ready = readable(report.as_fd());
                if !ready {
                    return Err(StepError::because(Kind::Internal, "work in a namespace", "", "no answer in 10 s"));
                }
            }
            Message::Executed | Message::Hooks { .. } | Message::Moved { .. } => {
                return Err(StepError::because(Kind::Internal, "work in a namespace", "", "unexpected answer"));
            }
        }
    }
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    !matches!(poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&TIMEOUT)), Ok(0))
}

/// The process id as the /proc in view has it: the caller may live in another pid namespace than the host's.
fn pid_of(pidfd: &OwnedFd) -> Result<i32, StepError> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let text = std::fs::read_to_string(&path).context("read", &path)?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    let pid = line.and_then(|pid| pid.trim().parse::<i32>().ok()).filter(|pid| *pid > 0);
    pid.ok_or_else(|| StepError::because(Kind::Internal, "read", &path, "it names no process"))
}
