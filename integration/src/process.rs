//! Processes of a test's own.

use crate::wait::until_within;
use anyhow::Result;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    ops::{Deref, DerefMut},
    process::{Child, ExitStatus},
    time::Duration,
};

/// A child process that is killed, and waited for, when this is dropped.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Asks it to end (SIGTERM), and waits for that.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM)?;
        until_within(limit, "the end after SIGTERM", || Ok(self.0.try_wait()?))
    }
}

impl From<Child> for Process {
    fn from(child: Child) -> Process {
        Process(child)
    }
}

impl Deref for Process {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
