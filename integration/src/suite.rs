//! `cargo xtask test`: set-up, build, style, all tests side by side; then one line that says how it went.

use crate::{
    ahead::{self, Ahead},
    build::{self, cargo},
    setup::workspace,
    side_by_side::{self, Ended, Job},
};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Tests that have to have run: a test that is lost or skipped fails the whole.
const MUST_RUN: &str = "must-run.txt";

/// Longest that a program of tests may take, with what it waits for to be built: the longest takes a third of it on a slow machine.
const LIMIT: Duration = Duration::from_secs(60 * 60);

#[derive(Debug, Default)]
struct Tally {
    passed: BTreeSet<String>,
    failed: BTreeSet<String>,
}

/// Programs that no other may run beside, and why.
const ALONE: [(&str, &str); 1] = [("layers", "counts the EROFS file systems of the whole kernel")];

/// Long programs that run in parts, each beside the others: the tests with such a word in their names, and all that have none of them.
const PARTS: [(&str, &[&str]); 5] = [
    ("critest", &["in_parallel", "over_websocket"]),
    ("guest", &["systemd::"]),
    ("guest_critest", &["under_systemd"]),
    ("kubelet", &["::guest", "::systemd"]),
    ("power_cut", &["imports"]),
];

/// Runs everything; true if all of it passed.
pub fn run() -> Result<bool> {
    let start = Instant::now();
    build::install_missing()?;
    let _ahead = Ahead::start()?;
    build::for_a_node()?;
    let programs = test_programs()?;
    let (alone, together): (Vec<_>, Vec<_>) = programs.iter().partition(|one| ALONE.iter().any(|(name, _)| *name == one.name));
    let mut together: Vec<(usize, Job)> = together.into_iter().flat_map(TestProgram::jobs).chain(style()).collect();
    together.sort_by_key(|(turn, job)| (*turn, job.name.clone()));
    // Most tests wait longer than they compute.
    let width = std::thread::available_parallelism()?.get() + 1;
    let mut tally = Tally::default();
    let mut good = true;
    for (jobs, width) in [(alone.into_iter().flat_map(TestProgram::jobs).collect(), 1), (together, width)] {
        side_by_side::run(jobs.into_iter().map(|(_, job)| job).collect(), width, LIMIT, |ended| good &= tally.take(&ended))?;
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

/// What looks at the source alone, and when it has its turn: the first takes a processor for minutes, the last waits for what it locks.
fn style() -> impl Iterator<Item = (usize, Job)> {
    const CLIPPY: [&str; 7] = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    let jobs: [(usize, &str, &[&str]); 3] = [
        (0, "clippy", &CLIPPY),
        (0, "formatting", &["fmt", "--all", "--check"]),
        (6, "tests in the documentation", &["test", "--doc", "--workspace", "--quiet"]),
    ];
    jobs.into_iter().map(|(turn, name, words)| {
        let mut command = cargo();
        command.args(words);
        (turn, Job { name: name.to_owned(), command })
    })
}

/// A built program of tests.
struct TestProgram {
    name: String,
    program: PathBuf,
    /// Of its package, in which it runs as cargo would have it.
    directory: PathBuf,
}

impl TestProgram {
    /// Its parts, and when they have their turn.
    fn jobs(&self) -> impl Iterator<Item = (usize, Job)> {
        let words = PARTS.iter().find(|(name, _)| *name == self.name).map_or(&[][..], |(_, words)| *words);
        let rest = words.iter().flat_map(|word| ["--skip", word]).collect();
        let parts = words.iter().map(|word| (format!("{} {word}", self.name), vec![*word]));
        parts.chain([(self.name.clone(), rest)]).map(|(name, words)| {
            let mut command = Command::new(&self.program);
            command.args(words).current_dir(&self.directory).env("NO_COLOR", "1");
            // What stands on a node of its own measures or fills the machine: one test at a time.
            if self.directory.ends_with("integration") {
                command.args(["--test-threads", "1"]);
            }
            (ahead::turn(&self.name), Job { name, command })
        })
    }
}

/// What `cargo` says with `--message-format json`, as far as it is needed.
#[derive(Deserialize)]
struct Message {
    manifest_path: Option<PathBuf>,
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

/// Builds all tests, those beside the code and those of nodes, and tells where they are.
fn test_programs() -> Result<Vec<TestProgram>> {
    println!("==> build the tests");
    let begun = Instant::now();
    let mut command = cargo();
    command.args(["test", "--no-run", "--quiet", "--workspace", "--message-format", "json-render-diagnostics"]);
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("run cargo test")?;
    ensure!(output.status.success(), "build the tests: {}", output.status);
    println!("    {:.1} s", begun.elapsed().as_secs_f64());
    let messages = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let programs = messages.filter_map(|line| match serde_json::from_slice(line) {
        Ok(Message {
            manifest_path: Some(manifest),
            target: Some(target),
            executable: Some(program),
            profile: Some(Profile { test: true }),
        }) => Some(Ok(TestProgram { name: target.name, program, directory: manifest.with_file_name("") })),
        Ok(_) => None,
        Err(error) => Some(Err(error).context("read what cargo says of a program")),
    });
    programs.collect()
}

impl Tally {
    /// Shows what a program of tests printed, and takes the name and the outcome of every test from it. True if all is well.
    fn take(&mut self, ended: &Ended) -> bool {
        println!("==> {}\n{}", ended.name, ended.output.trim_end());
        let (took, processor) = (ended.took.as_secs_f64(), ended.processor.as_secs_f64());
        println!("    {took:.1} s, {processor:.1} s of a processor");
        let (mut pending, failed_before): (Option<String>, usize) = (None, self.failed.len());
        for line in ended.output.lines() {
            if let Some(rest) = line.strip_prefix("test ")
                && let Some((name, outcome)) = rest.split_once(" ... ")
            {
                pending = Some(name.trim_end_matches(" - should panic").to_owned());
                self.note(&mut pending, outcome);
            } else {
                self.note(&mut pending, line.trim());
            }
        }
        if !ended.status.success() && self.failed.len() == failed_before {
            self.failed.insert(format!("{}: {}", ended.name, ended.status));
        }
        ended.status.success()
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
