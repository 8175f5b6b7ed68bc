//! Checkpoints: containers are held still, CRIU writes what they are, and they go on when the daemon says so or is gone. Frozen containers
//! never outlive the connection that wanted them so.

use super::container::Phase;
use super::note::note;
use super::poll::Source;
use super::server::{Monitor, Reply};
use crate::process::{self, Captured, Context, Kind, Message, Report, StepError};
use rustix::fs::fstat;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;
use windlass_proto::monitor::CheckpointRequest;

/// The one checkpoint of the pod.
pub(super) struct Checkpoint {
    /// Keys of the containers.
    pub(super) containers: Vec<u64>,
    connection: u64,
    /// While CRIU writes: its report, and who waits for the outcome.
    writing: Option<(Report, Reply)>,
    /// Who waits until they go on.
    resuming: Option<Reply>,
}

impl Monitor {
    pub(super) fn checkpoint(&mut self, to: Reply, request: &CheckpointRequest) -> Result<(), StepError> {
        if self.checkpoint.is_some() {
            return Err(StepError::because(Kind::WrongState, "checkpoint", "", "another one of this pod is under way"));
        }
        let (mut keys, mut captured) = (Vec::new(), Vec::new());
        for wanted in &request.containers {
            let (key, container) = self.living("checkpoint", &wanted.container_id)?;
            if !matches!(container.phase, Phase::Running { .. }) {
                return Err(StepError::because(Kind::WrongState, "checkpoint", &wanted.container_id, "it does not run yet"));
            }
            let pipe = |fd: &Option<OwnedFd>| fd.as_ref().filter(|_| !container.terminal).and_then(|fd| fstat(fd).ok());
            let pipes = [&container.stdin, &container.stdout, &container.stderr].map(pipe);
            keys.push(key);
            captured.push(Captured {
                id: container.id.clone(),
                pid: container.pid,
                cgroup: container.cgroup.path().to_owned(),
                bundle: container.bundle.clone(),
                directory: PathBuf::from(&wanted.directory),
                pipes: pipes.map(|found| found.map(|found| found.st_ino)),
            });
        }
        self.checkpoint = Some(Checkpoint { containers: keys, connection: to.connection, writing: None, resuming: None });
        let begun = self.freeze(true).and_then(|()| {
            let child = process::capture(Path::new(&request.criu), &captured)?;
            let key = self.new_key();
            self.poll.add(&child.report, Source::CheckpointReport(key)).context("watch", "checkpoint")?;
            Ok(child.report)
        });
        match begun {
            Ok(report) => {
                if let Some(checkpoint) = &mut self.checkpoint {
                    checkpoint.writing = Some((report, to));
                }
                Ok(())
            }
            Err(error) => {
                self.end_checkpoint();
                Err(error)
            }
        }
    }

    /// Begins to hold the containers still, or lets them go on. Those that have ended meanwhile are passed over.
    fn freeze(&mut self, frozen: bool) -> Result<(), StepError> {
        let keys = self.checkpoint.as_ref().map(|checkpoint| checkpoint.containers.clone()).unwrap_or_default();
        let mut outcome = Ok(());
        for container in keys.iter().filter_map(|key| self.containers.get(key)) {
            // Whether all have followed is waited for where nothing else waits.
            let done = container.cgroup.freeze(frozen, Duration::ZERO).map(drop);
            outcome = outcome.and(done);
        }
        outcome
    }

    /// All are written, or a failure: then they go on.
    pub(super) fn on_checkpoint_report(&mut self) {
        let Some((report, to)) = self.checkpoint.as_mut().and_then(|checkpoint| checkpoint.writing.as_mut()) else { return };
        let to = *to;
        let outcome = match report.receive() {
            Ok(Message::WouldBlock) => return,
            Ok(Message::Ready { .. }) => Ok(()),
            Ok(Message::Failed(error)) => Err(error),
            Ok(Message::Executed | Message::Moved { .. } | Message::Hooks { .. }) => {
                Err(StepError::because(Kind::WrongState, "checkpoint", "", "it was given up"))
            }
            Err(error) => Err(StepError::because(Kind::Internal, "read report of", "checkpoint", error)),
        };
        self.poll.remove(&*report);
        if let Some(checkpoint) = &mut self.checkpoint {
            checkpoint.writing = None;
        }
        match outcome {
            Ok(()) if self.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.resuming.is_none()) => {
                let there = self.checkpoint.as_ref().is_some_and(|checkpoint| self.connected(checkpoint.connection));
                self.done(to);
                if !there {
                    self.end_checkpoint();
                }
            }
            Ok(()) => {
                self.done(to);
                self.end_checkpoint();
            }
            Err(error) => {
                self.end_checkpoint();
                self.fail(to, error);
            }
        }
    }

    /// The containers go on, and whoever waits for that is told.
    fn end_checkpoint(&mut self) {
        if let Err(error) = self.freeze(false) {
            note(format_args!("let containers go on: {error}"));
        }
        if let Some(to) = self.checkpoint.take().and_then(|checkpoint| checkpoint.resuming) {
            self.done(to);
        }
    }

    pub(super) fn resume(&mut self, to: Reply) -> Result<(), StepError> {
        let Some(checkpoint) = &mut self.checkpoint else {
            self.done(to);
            return Ok(());
        };
        if checkpoint.resuming.is_some() {
            return Err(StepError::because(Kind::WrongState, "resume", "", "it is under way"));
        }
        checkpoint.resuming = Some(to);
        self.give_up_checkpoint();
        Ok(())
    }

    /// Ends what is being written; they go on when that has ended.
    fn give_up_checkpoint(&mut self) {
        match self.checkpoint.as_mut().and_then(|checkpoint| checkpoint.writing.as_mut()) {
            // One that has just ended reports it.
            Some((report, _)) => drop(report.open_gate()),
            None => self.end_checkpoint(),
        }
    }

    /// Nobody is left who would let the containers go on.
    pub(super) fn end_checkpoint_of(&mut self, connection: u64) {
        if self.checkpoint.as_ref().is_some_and(|checkpoint| checkpoint.connection == connection) {
            self.give_up_checkpoint();
        }
    }

    /// Whether a container is held still for a checkpoint.
    pub(super) fn held(&self, id: &str) -> bool {
        let keys = self.checkpoint.as_ref().map(|checkpoint| checkpoint.containers.as_slice()).unwrap_or_default();
        keys.iter().filter_map(|key| self.containers.get(key)).any(|container| container.id == id)
    }
}
