//! A program of the control plane in the background, with its output in a file.

use crate::process::Process;
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Lines of a log that an error carries.
const LOG_LINES: usize = 40;

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Service {
    name: &'static str,
    process: Process,
    log: PathBuf,
}

impl Service {
    /// Starts a program; its output goes to `<directory>/<name>.log`.
    pub(super) fn start(name: &'static str, program: &Path, arguments: &[String], directory: &Path) -> Result<Service> {
        let log = directory.join(format!("{name}.log"));
        let output = fs::File::options().create(true).append(true).open(&log)?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let process = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Service { name, process: process.into(), log })
    }

    /// Fails, with the end of its log, if it has ended.
    pub(super) fn expect_running(&mut self) -> Result<()> {
        if let Some(status) = self.process.try_wait()? {
            bail!("{} ended with {status}:\n{}", self.name, self.log());
        }
        Ok(())
    }

    /// The end of what it wrote.
    pub(super) fn log(&self) -> String {
        last_lines(&self.log, LOG_LINES)
    }
}

fn last_lines(path: &Path, count: usize) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
