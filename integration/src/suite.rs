//! `cargo xtask test`: set-up, build, style, unit tests, integration tests; then one line that says how it went.

use crate::{
    ahead::{self, Ahead},
    build::{self, cargo},
    setup::workspace,
};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Stdio},
    time::Instant,
};

/// Tests that have to have run: a test that is lost or skipped fails the whole.
const MUST_RUN: &str = "must-run.txt";

#[derive(Debug, Default)]
struct Tally {
    passed: BTreeSet<String>,
    failed: BTreeSet<String>,
}

/// Runs everything; true if all of it passed.
pub fn run() -> Result<bool> {
    let start = Instant::now();
    build::all()?;
    let _ahead = Ahead::start()?;
    build::step("formatting", cargo().args(["fmt", "--all", "--check"]))?;
    build::step("clippy", cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    let mut tally = Tally::default();
    let mut good = true;
    println!("==> unit tests");
    good &= tally.tests(cargo().args(["test", "--no-fail-fast", "--workspace", "--exclude", "windlass-integration"]))?;
    let mut programs = integration_tests()?;
    programs.sort_by_key(|test| (ahead::turn(&test.name), test.name.clone()));
    for test in &programs {
        println!("==> {}", test.name);
        let begin = Instant::now();
        good &= tally
            .tests(Command::new(&test.program).args(["--test-threads", "1"]).current_dir(workspace().join("integration")))?;
        println!("    {:.1} s", begin.elapsed().as_secs_f64());
    }
    let list = workspace().join("integration").join(MUST_RUN);
    let list = fs::read_to_string(&list).with_context(|| format!("read {}", list.display()))?;
    let missing: Vec<&str> =
        list.lines().filter(|name| !name.is_empty() && !tally.passed.contains(*name) && !tally.failed.contains(*name)).collect();
    for name in &missing {
        println!("did not run: {name}");
    }
    for name in &tally.failed {
        println!("failed: {name}");
    }
    good &= missing.is_empty() && tally.failed.is_empty();
    println!("{} in {:.0} s", if good { "everything passed" } else { "NOT everything passed" }, start.elapsed().as_secs_f64());
    println!("{} passed, {} failed", tally.passed.len(), tally.failed.len() + missing.len());
    Ok(good)
}

/// A built program of integration tests.
struct TestProgram {
    name: String,
    program: PathBuf,
}

/// What `cargo` says with `--message-format json`, as far as it is needed.
#[derive(Deserialize)]
struct Message {
    target: Option<Target>,
    executable: Option<PathBuf>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    /// Of what is built for tests, the programs that are tests.
    test: bool,
}

/// Builds the tests of the harness, its own and those of nodes, and tells where they are.
fn integration_tests() -> Result<Vec<TestProgram>> {
    println!("==> build the integration tests");
    let mut command = cargo();
    command.args(["test", "--no-run", "--quiet", "-p", "windlass-integration", "--message-format", "json-render-diagnostics"]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("run cargo test")?;
    ensure!(output.status.success(), "build the integration tests: {}", output.status);
    let messages = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let programs = messages.filter_map(|line| match serde_json::from_slice(line) {
        Ok(Message { target: Some(target), executable: Some(program), profile: Some(Profile { test: true }) }) => {
            Some(Ok(TestProgram { name: target.name, program }))
        }
        Ok(_) => None,
        Err(error) => Some(Err(error).context("read what cargo says of a program")),
    });
    programs.collect()
}

impl Tally {
    /// Runs tests with their output shown, and takes the name and the outcome of every one from it.
    fn tests(&mut self, command: &mut Command) -> Result<bool> {
        command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("run {command:?}"))?;
        let output = child.stdout.take().context("output of the tests")?;
        let mut pending: Option<String> = None;
        for line in BufReader::new(output).lines() {
            let line = line?;
            println!("{line}");
            if let Some(rest) = line.strip_prefix("test ")
                && let Some((name, outcome)) = rest.split_once(" ... ")
            {
                pending = Some(name.trim_end_matches(" - should panic").to_owned());
                self.note(&mut pending, outcome);
            } else {
                self.note(&mut pending, line.trim());
            }
        }
        Ok(child.wait()?.success())
    }

    /// With one thread a test's own output may stand between its name and its outcome.
    fn note(&mut self, pending: &mut Option<String>, outcome: &str) {
        let set = match outcome {
            "ok" => &mut self.passed,
            "FAILED" => &mut self.failed,
            _ if outcome.ends_with("ok") && pending.is_some() && outcome.len() < 4 => &mut self.passed,
            _ => return,
        };
        if let Some(name) = pending.take() {
            set.insert(name);
        }
    }
}
