//! Execs: processes added to a running container, each in a sub-cgroup of it. Their streams go to the daemon and are not read here. One whose
//! daemon goes away before its end is killed: its client and its time limit went with it.

use super::container::{Phase, check_id, pipe, send_signal};
use super::note::note;
use super::poll::Source;
use super::server::{Monitor, Reply};
use crate::cgroup::Cgroup;
use crate::process::{self, Child, Context, Enter, Kind, Message, Report, Stdio, StepError};
use rustix::fs::{Mode, OFlags};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;
use windlass_proto::monitor::{ExecReply, ExecRequest, Exit, frame::Body};

/// Most execs of a pod at a time, those included whose processes have left others behind.
const EXECS_MAX: usize = 1024;

pub(super) struct Exec {
    pub(super) id: String,
    pub(super) container: u64,
    /// The connection that asked for it.
    pub(super) connection: u64,
    pub(super) cgroup: Cgroup,
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    pub(super) report: Option<Report>,
    /// Who waits for it to run, and the descriptors it gets then.
    pub(super) waiting: Option<(Reply, Vec<OwnedFd>)>,
    /// Its program was never run.
    pub(super) failed: Option<StepError>,
    /// Once reaped. It stays listed while others live in its cgroup.
    pub(super) exit: Option<Exit>,
    /// When its cgroup is looked at again, and how long after that.
    pub(super) look: Option<(Instant, std::time::Duration)>,
}

/// The daemon's ends in the order of the reply, and the child's.
fn streams(request: &ExecRequest) -> Result<(Vec<OwnedFd>, Stdio), StepError> {
    if request.terminal {
        return Ok((Vec::new(), Stdio::Terminal));
    }
    let null = || rustix::fs::open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).context("open", "/dev/null");
    let mut ours = Vec::new();
    let mut stdin = None;
    if request.stdin {
        let (read, write) = pipe()?;
        ours.push(write);
        stdin = Some(read);
    }
    let mut output = |wanted: bool| {
        if !wanted {
            return null();
        }
        let (read, write) = pipe()?;
        ours.push(read);
        Ok(write)
    };
    let stdout = output(request.stdout)?;
    let stderr = output(request.stderr)?;
    Ok((ours, Stdio::Fds { stdin, stdout, stderr }))
}

impl Monitor {
    pub(super) fn exec(&mut self, to: Reply, request: &ExecRequest) -> Result<(), StepError> {
        check_id(&request.exec_id)?;
        if self.execs.values().any(|exec| exec.id == request.exec_id) {
            return Err(StepError::because(Kind::WrongState, "exec", &request.exec_id, "the id is in use"));
        }
        if self.execs.len() >= EXECS_MAX {
            return Err(StepError::because(Kind::Internal, "exec", &request.exec_id, "too many execs"));
        }
        let (container_key, container) = self.living("exec", &request.container_id)?;
        if !matches!(container.phase, Phase::Running { .. }) || container.deleting.is_some() {
            return Err(StepError::because(Kind::WrongState, "exec", &request.container_id, "the container is not running"));
        }
        let (ours, stdio) = streams(request)?;
        let cgroup = container.cgroup.create_child(&format!("exec-{}", request.exec_id))?;
        let entered = process::enter(Enter {
            target: container.pidfd.as_fd(),
            cgroup: cgroup.as_fd(),
            process_json: &request.process,
            stdio,
            bundle: &container.bundle,
        });
        let Child { pid, pidfd, report } = entered.inspect_err(|_| {
            let _ = cgroup.remove();
        })?;
        let key = self.new_key();
        let watched = self.poll.add(&report, Source::ExecReport(key)).context("watch exec", &request.exec_id);
        let exec = Exec {
            id: request.exec_id.clone(),
            container: container_key,
            connection: to.connection,
            cgroup,
            pid,
            pidfd,
            report: Some(report),
            waiting: Some((to, ours)),
            failed: None,
            exit: None,
            look: None,
        };
        self.execs.insert(key, exec);
        if let Err(error) = watched {
            self.on_exec_outcome(key, Some(error));
        }
        Ok(())
    }

    /// Takes every message of an exec's child; called once more when it was reaped.
    pub(super) fn on_exec_report(&mut self, key: u64) {
        loop {
            let Some(exec) = self.execs.get_mut(&key) else { return };
            let Some(report) = exec.report.as_mut() else { return };
            let message = report.receive();
            let failed = match message {
                Ok(Message::WouldBlock) => return,
                Ok(Message::Ready { console, .. }) => {
                    if let Some((_, fds)) = &mut exec.waiting {
                        fds.extend(console);
                    }
                    continue;
                }
                Ok(Message::Executed | Message::Hooks { .. } | Message::Moved { .. }) => None,
                Ok(Message::Failed(error)) => Some(error),
                Err(error) => Some(StepError::because(Kind::Internal, "read report", &exec.id, error)),
            };
            return self.on_exec_outcome(key, failed);
        }
    }

    /// Its program runs, or never will.
    fn on_exec_outcome(&mut self, key: u64, failed: Option<StepError>) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        if let Some(report) = exec.report.take() {
            self.poll.remove(&report);
        }
        match failed {
            // Answered when it was reaped and its cgroup removed.
            Some(error) => {
                let _ = exec.cgroup.kill();
                exec.failed = Some(error);
            }
            None => {
                let pid = exec.pid;
                if let Some((to, fds)) = exec.waiting.take() {
                    self.reply(to, Body::ExecReply(ExecReply { pid }), fds);
                }
            }
        }
    }

    /// Kills what ran for a connection that is gone. What an exec that has ended put into the background lives on.
    pub(super) fn kill_execs_of(&mut self, connection: u64) {
        for exec in self.execs.values().filter(|exec| exec.connection == connection && exec.exit.is_none()) {
            if let Err(error) = exec.cgroup.kill() {
                note(format_args!("exec {} of a daemon that is gone: {error}", exec.id));
            }
        }
    }

    pub(super) fn kill_exec(&mut self, to: Reply, id: &str, signal: i32) -> Result<(), StepError> {
        let found = self.execs.values().find(|exec| exec.id == id);
        let exec = found.ok_or_else(|| StepError::because(Kind::NotFound, "kill exec", id, "no such exec"))?;
        if signal == 0 {
            exec.cgroup.kill()?;
        } else if exec.exit.is_none() {
            send_signal(exec.pidfd.as_fd(), signal, id)?;
        } else {
            return Err(StepError::because(Kind::WrongState, "signal exec", id, "it has ended"));
        }
        self.done(to);
        // What it left behind may be gone with this.
        if let Some(exec) = self.execs.values_mut().find(|exec| exec.id == id)
            && exec.exit.is_some()
        {
            exec.look = Some((Instant::now(), super::reap::FIRST_LOOK));
        }
        Ok(())
    }
}
