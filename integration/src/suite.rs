//! `cargo xtask test`: set-up, build, style, unit tests, integration tests; then one line that says how it went.

use crate::build::{self, cargo};
use anyhow::{Context, Result, bail};
use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
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
    build::step("formatting", cargo().args(["fmt", "--all", "--check"]))?;
    build::step("clippy", cargo().args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    let mut tally = Tally::default();
    let mut good = true;
    good &= tests(&mut tally, "unit tests", &["--workspace", "--exclude", "windlass-integration"], None)?;
    good &= tests(&mut tally, "integration tests", &["-p", "windlass-integration"], Some("1"))?;
    let list = crate::setup::workspace().join("integration").join(MUST_RUN);
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

/// Runs `cargo test` with its output shown, and takes the name and the outcome of every test from it.
fn tests(tally: &mut Tally, title: &str, arguments: &[&str], threads: Option<&str>) -> Result<bool> {
    println!("==> {title}");
    let mut command = cargo();
    command.args(["test", "--no-fail-fast"]).args(arguments).arg("--");
    if let Some(threads) = threads {
        command.args(["--test-threads", threads]);
    }
    let mut child = command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("run cargo test")?;
    let output = child.stdout.take().context("output of cargo test")?;
    let mut pending: Option<String> = None;
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        if let Some(rest) = line.strip_prefix("test ")
            && let Some((name, outcome)) = rest.split_once(" ... ")
        {
            pending = Some(name.trim_end_matches(" - should panic").to_owned());
            note(tally, &mut pending, outcome);
        } else {
            note(tally, &mut pending, line.trim());
        }
    }
    Ok(child.wait()?.success())
}

/// With one thread a test's own output may stand between its name and its outcome.
fn note(tally: &mut Tally, pending: &mut Option<String>, outcome: &str) {
    let set = match outcome {
        "ok" => &mut tally.passed,
        "FAILED" => &mut tally.failed,
        _ if outcome.ends_with("ok") && pending.is_some() && outcome.len() < 4 => &mut tally.passed,
        _ => return,
    };
    if let Some(name) = pending.take() {
        set.insert(name);
    }
}

/// Fails unless the command can be run; for programs that a suite needs.
pub fn require(program: &str) -> Result<()> {
    match Command::new(program).arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(_) => Ok(()),
        Err(error) => bail!("{program} is needed: {error}"),
    }
}
