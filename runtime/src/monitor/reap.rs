//! Ends: every child that ends is reaped here, the unknown ones too, and what has to be waited for is looked at again in time.

use super::container::{Ended, Phase};
use super::exits;
use super::note::note;
use super::server::Monitor;
use crate::log::now_ns;
use crate::process::{Kind, StepError, hooks};
use rustix::process::WaitOptions;
use std::time::{Duration, Instant};
use windlass_proto::monitor::{ContainerExited, ExecExited, Exit, frame::Body};

/// How often a killed cgroup is looked at until it is empty.
const KILLED_LOOK: Duration = Duration::from_millis(2);

/// How often at first, and at last, the cgroup of an ended exec is looked at that left processes behind.
pub(super) const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_secs(30);

/// EXITED is published this long after the first process ended, even if another hangs in the kernel.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(5);

/// Code of a container whose program could not be run.
const START_FAILED_CODE: i32 = 128;

impl Monitor {
    /// Reaps everything that has ended.
    pub(super) fn reap(&mut self) {
        let options = WaitOptions::NOHANG | WaitOptions::from_bits_retain(libc::__WALL as u32);
        while let Ok(Some((pid, status))) = rustix::process::wait(options) {
            let pid = pid.as_raw_nonzero().get();
            let (code, signal) = match (status.exit_status(), status.terminating_signal()) {
                (_, Some(signal)) => (128 + signal, signal),
                (Some(code), None) => (code, 0),
                (None, None) => continue,
            };
            self.on_reaped(pid, code, signal);
        }
    }

    fn on_reaped(&mut self, pid: i32, code: i32, signal: i32) {
        let (finished_at_ns, now) = (now_ns(), Instant::now());
        if let Some(key) = self.first_process(pid) {
            self.on_container_report(key);
            // It may have told that another goes on in its place.
            let Some(container) = self.containers.get_mut(&key).filter(|container| container.pid == pid) else { return };
            container.ended = Some(Ended { code, signal, finished_at_ns, deadline: now + EMPTY_TIMEOUT });
            return self.settle(key, now);
        }
        let exec = self.execs.iter().find(|(_, exec)| exec.pid == pid && exec.exit.is_none());
        if let Some((&key, _)) = exec {
            self.on_exec_report(key);
            let exit = Exit { code, signal, oom_killed: false, finished_at_ns };
            self.on_exec_ended(key, exit);
        }
    }

    /// The container whose first process this is. One that came in place of another is known from a report that may not be read yet.
    fn first_process(&mut self, pid: i32) -> Option<u64> {
        let known = |monitor: &Monitor| {
            let mut containers = monitor.containers.iter();
            containers.find(|(_, container)| container.pid == pid && container.ended.is_none()).map(|(key, _)| *key)
        };
        if let Some(key) = known(self) {
            return Some(key);
        }
        let creating = |phase: &Phase| matches!(phase, Phase::Creating(_) | Phase::Starting(_));
        let keys: Vec<u64> = self.containers.iter().filter(|(_, c)| creating(&c.phase)).map(|(key, _)| *key).collect();
        for key in keys {
            self.on_container_report(key);
        }
        known(self)
    }

    fn on_exec_ended(&mut self, key: u64, exit: Exit) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        exec.exit = Some(exit);
        exec.look = Some((Instant::now(), FIRST_LOOK));
        if exec.failed.is_none() {
            let exec_id = exec.id.clone();
            self.event(Body::ExecExited(ExecExited { exec_id, exit: Some(exit) }));
        }
        self.look_at_exec(key, Instant::now());
    }

    /// Forgets an ended exec whose cgroup is empty.
    fn look_at_exec(&mut self, key: u64, now: Instant) {
        let Some(exec) = self.execs.get_mut(&key) else { return };
        let Some((at, pause)) = exec.look else { return };
        if at > now {
            return;
        }
        // What cannot be read is read again.
        if exec.cgroup.populated().unwrap_or(true) {
            let pause = if exec.failed.is_some() { KILLED_LOOK } else { (pause * 2).min(LAST_LOOK) };
            exec.look = Some((now + pause, pause));
            return;
        }
        if let Err(error) = exec.cgroup.remove() {
            note(format_args!("exec {}: {error}", exec.id));
        }
        let Some(exec) = self.execs.remove(&key) else { return };
        if let (Some((to, _)), Some(error)) = (exec.waiting, exec.failed) {
            self.fail(to, error);
        }
    }

    /// When something has to be looked at again.
    pub(super) fn next_check(&self, now: Instant) -> Option<Instant> {
        let killed = self.containers.values().any(|container| {
            let settling = container.ended.is_some() && !matches!(container.phase, Phase::Exited { .. });
            !container.hooks_run() && (settling || container.deleting.is_some())
        });
        let looks = self.execs.values().filter_map(|exec| exec.look.map(|(at, _)| at));
        looks.chain(killed.then(|| now + KILLED_LOOK)).min()
    }

    /// Looks at everything that is due.
    pub(super) fn check_due(&mut self, now: Instant) {
        for key in self.execs.keys().copied().collect::<Vec<_>>() {
            self.look_at_exec(key, now);
        }
        for key in self.containers.keys().copied().collect::<Vec<_>>() {
            self.settle(key, now);
        }
    }

    /// Brings a reaped container to EXITED, and a deleted one out of the list, as far as its cgroup is empty.
    pub(super) fn settle(&mut self, key: u64, now: Instant) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if container.hooks_run() {
            return;
        }
        let exited = matches!(container.phase, Phase::Exited { .. });
        let Some(ended) = &container.ended else { return self.expire_delete(key, now) };
        if exited && container.deleting.is_none() {
            return;
        }
        if matches!(container.phase, Phase::Starting(_)) && container.report.is_some() && now < ended.deadline {
            // Another runtime has started it, and has not ended itself: whether that was a success is still to come.
            return;
        }
        if container.cgroup.populated().unwrap_or(true) {
            let _ = container.cgroup.kill();
            if exited || now < ended.deadline {
                return self.expire_delete(key, now);
            }
            note(format_args!("container {}: processes outlive a kill", container.id));
        }
        if !exited && !self.finish(key) {
            return;
        }
        self.forget_deleted(key);
    }

    /// The container has ended for good: log, record, event, answers. False if it was never more than a failed Create.
    fn finish(&mut self, key: u64) -> bool {
        self.drain(key);
        let Some(container) = self.containers.get_mut(&key) else { return false };
        let Some(ended) = &container.ended else { return false };
        let mut exit = Exit {
            code: ended.code,
            signal: ended.signal,
            oom_killed: container.is_oom_killed(ended.code),
            finished_at_ns: ended.finished_at_ns,
        };
        let started_at_ns = if let Phase::Running { started_at_ns } = container.phase { started_at_ns } else { 0 };
        let died = |what: &str| StepError::because(Kind::Internal, what, &container.id, "its process has ended");
        let failure = match &container.phase {
            Phase::CreateFailed(to, error) => {
                let (to, error) = (*to, error.clone());
                self.drop_failed(key, to, error);
                return false;
            }
            Phase::Creating(to) => {
                let (to, error) = (*to, died("create"));
                self.drop_failed(key, Some(to), error);
                return false;
            }
            Phase::StartFailed(to, error) => Some((*to, error.clone())),
            Phase::Starting(to) => Some((*to, died("start"))),
            Phase::Created | Phase::Started { .. } | Phase::Running { .. } | Phase::Exited { .. } => None,
        };
        if failure.is_some() {
            (exit.code, exit.signal) = (START_FAILED_CODE, 0);
        }
        container.phase = Phase::Exited { exit, started_at_ns };
        let container_id = container.id.clone();
        if let Some(report) = container.report.take() {
            self.poll.remove(&report);
        }
        if let Err(error) = exits::write(&self.directory, &container_id, &exit) {
            note(format_args!("write exit record of {container_id}: {error}"));
        }
        if let Some((to, error)) = failure {
            self.fail(to, error);
        }
        self.event(Body::ContainerExited(ContainerExited { container_id, exit: Some(exit) }));
        true
    }

    /// Undoes a Create that failed, then says so.
    fn drop_failed(&mut self, key: u64, to: Option<super::server::Reply>, error: StepError) {
        let Some(container) = self.containers.remove(&key) else { return };
        // A hook that failed ends a container that was there. Nobody waits for these.
        if error.step == hooks::STEP
            && let Err(error) = hooks::begin_poststop(&container.bundle, &container.id)
        {
            note(format_args!("container {}: {error}", container.id));
        }
        if let Some(report) = &container.report {
            self.poll.remove(report);
        }
        if let Err(error) = container.cgroup.remove() {
            note(format_args!("undo create: {error}"));
        }
        if let Some(to) = to {
            self.fail(to, error);
        }
        for waiting in container.deleting.into_iter().flat_map(|(replies, _)| replies) {
            self.done(waiting);
        }
    }

    /// Removes the cgroup of a container that is deleted, and forgets it.
    fn forget_deleted(&mut self, key: u64) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        let Some((replies, deadline)) = container.deleting.take() else { return };
        if let Err(error) = container.cgroup.remove() {
            if Instant::now() < deadline && error.errno == libc::EBUSY {
                container.deleting = Some((replies, deadline));
                return;
            }
            note(format_args!("delete {}: {error}", container.id));
            for to in replies {
                self.fail(to, error.clone());
            }
            return;
        }
        if std::mem::take(&mut container.later_hooks) {
            container.deleting = Some((replies, deadline));
            let begun = hooks::begin_poststop(&container.bundle, &container.id);
            return self.follow_hooks(key, begun);
        }
        self.containers.remove(&key);
        self.execs.retain(|_, exec| exec.container != key || exec.exit.is_none());
        for to in replies {
            self.done(to);
        }
    }

    /// Answers a Delete whose processes do not end. They stay listed, and a later Delete tries again.
    fn expire_delete(&mut self, key: u64, now: Instant) {
        let Some(container) = self.containers.get_mut(&key) else { return };
        if container.deleting.is_some() {
            // Again, in case it could not be killed before.
            let _ = container.cgroup.kill();
        }
        if container.deleting.as_ref().is_some_and(|(_, deadline)| now >= *deadline)
            && let Some((replies, _)) = container.deleting.take()
        {
            let error = StepError::because(Kind::Internal, "delete", &container.id, "killed processes do not end");
            for to in replies {
                self.fail(to, error.clone());
            }
        }
    }
}
