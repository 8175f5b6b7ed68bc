//! The validation suite of the OCI runtime specification (runtime-tools) against a runtime's command line: runs its programs, reads
//! their TAP output, compares with the committed lists. Building them is `go`'s.

use crate::go::Validation;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Longest run of one program. They wait in whole seconds for a container's end.
const PROGRAM_LIMIT: Duration = Duration::from_secs(180);

/// How many run at a time: most of their time they sleep.
const AT_ONCE: usize = 4;

/// Programs that give a container's shell a fixed time to set its trap before they send the signal: a busy machine is later.
const TIMED: [&str; 1] = ["killsig"];

/// How often one of them may be run.
const TRIES: usize = 3;

/// How one program ended.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Points that passed or were skipped.
    pub passed: usize,
    /// What failed, each once: the text of a point, or the program's last words when it has none.
    pub failed: BTreeSet<String>,
}

/// Outcomes by program.
pub type Outcomes = BTreeMap<String, Outcome>;

/// The names in a list of the suite: lines without comments and empty ones.
pub fn lines(list: &str) -> impl Iterator<Item = &str> {
    list.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// The names of all programs.
pub fn programs(suite: &Validation) -> Result<BTreeSet<String>> {
    let entries = fs::read_dir(&suite.programs).with_context(|| format!("list {}", suite.programs.display()))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|name| name != "runtimetest").collect())
}

/// Runs `names` with `runtime`, a program with the commands of the OCI command line. Their bundles are made below `scratch`.
pub fn run(suite: &Validation, names: &[&str], runtime: &Path, scratch: &Path) -> Result<Outcomes> {
    let bundles = scratch.join("bundles");
    fs::create_dir_all(&bundles)?;
    // The programs look for both in their working directory.
    fs::copy(suite.programs.join("runtimetest"), scratch.join("runtimetest")).context("copy runtimetest")?;
    fs::copy(&suite.rootfs, scratch.join("rootfs-amd64.tar.gz")).context("copy the suite's root")?;
    let (waiting, outcomes) = (Mutex::new(names.to_vec()), Mutex::new(Outcomes::new()));
    let next = || waiting.lock().ok().and_then(|mut waiting| waiting.pop());
    let work = || -> Result<()> {
        while let Some(name) = next() {
            let mut tries = if TIMED.contains(&name) { TRIES } else { 1 };
            let outcome = loop {
                let outcome = run_one(&suite.programs.join(name), runtime, scratch).with_context(|| format!("run {name}"))?;
                tries -= 1;
                if outcome.failed.is_empty() || tries == 0 {
                    break outcome;
                }
            };
            outcomes.lock().map_err(|_| anyhow::anyhow!("another program's run panicked"))?.insert(name.to_owned(), outcome);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a run panicked"))?)
    })?;
    outcomes.into_inner().map_err(|_| anyhow::anyhow!("a run panicked"))
}

fn run_one(program: &Path, runtime: &Path, scratch: &Path) -> Result<Outcome> {
    let name = program.file_name().context("a program has a name")?.to_string_lossy();
    let (printed, said) = (scratch.join(format!("{name}.tap")), scratch.join(format!("{name}.err")));
    let mut child = Command::new(program)
        .current_dir(scratch)
        .env("RUNTIME", runtime)
        .env("TMPDIR", scratch.join("bundles"))
        .stdin(Stdio::null())
        .stdout(File::create(&printed)?)
        .stderr(File::create(&said)?)
        .spawn()?;
    let deadline = Instant::now() + PROGRAM_LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut outcome = read_tap(&fs::read_to_string(&printed).context("read the program's points")?);
    match status {
        Some(status) if status.success() => {}
        other => {
            let said = fs::read_to_string(&said).unwrap_or_default();
            let how = other.map_or_else(|| format!("no end within {PROGRAM_LIMIT:?}"), |status| status.to_string());
            outcome.failed.insert(format!("{how}: {}", said.trim()));
        }
    }
    Ok(outcome)
}

/// Reads the points. A program without any tells of a failure in a diagnostic alone.
fn read_tap(text: &str) -> Outcome {
    let mut outcome = Outcome::default();
    for line in text.lines() {
        let (point, failed) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(point), _) => (point, false),
            (_, Some(point)) => (point, true),
            _ => continue,
        };
        // A number, and perhaps a text behind it; points to do are no failures.
        let text = point.split_once(" - ").map_or(point, |(_, text)| text).trim();
        if failed && !text.to_ascii_uppercase().contains("# TODO") {
            outcome.failed.insert(text.to_owned());
        } else {
            outcome.passed += 1;
        }
    }
    if outcome.passed == 0 && outcome.failed.is_empty() {
        let said = text.lines().find_map(|line| line.trim().strip_prefix("\"error\": "));
        outcome.failed.extend(said.map(|said| said.trim_matches(['"', ',']).to_owned()));
    }
    outcome
}

/// What `not_yet` says: whole programs, and points of programs, each with a reason.
#[derive(Debug, Default)]
pub struct NotYet {
    /// Not run.
    pub programs: BTreeSet<String>,
    /// Failures that are known, by program.
    pub points: BTreeMap<String, BTreeSet<String>>,
}

impl NotYet {
    /// Reads `program | reason` and `program: point | reason`.
    pub fn read(list: &str) -> Result<NotYet> {
        let mut not_yet = NotYet::default();
        for line in lines(list) {
            let (what, reason) = line.rsplit_once(" | ").with_context(|| format!("no reason in {line:?}"))?;
            ensure!(!reason.trim().is_empty(), "no reason in {line:?}");
            match what.split_once(": ") {
                None => drop(not_yet.programs.insert(what.to_owned())),
                Some((program, point)) => {
                    not_yet.points.entry(program.to_owned()).or_default().insert(point.to_owned());
                }
            }
        }
        Ok(not_yet)
    }

    /// The failures of `outcomes` that are not known, as `program: point`. A point of the list ends in `*` where only its beginning
    /// counts.
    pub fn unknown(&self, outcomes: &Outcomes) -> Vec<String> {
        let known = |program: &str, point: &str| {
            let listed = self.points.get(program).into_iter().flatten();
            listed.into_iter().any(|known| known.strip_suffix('*').map_or(point == known, |begin| point.starts_with(begin)))
        };
        let failed = outcomes.iter().flat_map(|(program, outcome)| outcome.failed.iter().map(move |point| (program, point)));
        failed.filter(|(program, point)| !known(program, point)).map(|(program, point)| format!("{program}: {point}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_and_diagnostics_are_read() {
        let outcome = read_tap(
            "TAP version 13\nok 1 - good\n  ---\n  {\n    \"error\": \"\"\n  }\nnot ok 2 - bad\nnot ok 3 # TODO later\n",
        );
        assert_eq!(outcome, Outcome { passed: 2, failed: ["bad".to_owned()].into() });
        let silent = read_tap("TAP version 13\n  ---\n  {\n    \"error\": \"out of order\"\n  }\n1..0\n");
        assert_eq!(silent.failed, ["out of order".to_owned()].into());
        assert_eq!(read_tap("TAP version 13\n1..0\n"), Outcome::default());
    }

    #[test]
    fn known_failures_are_told_from_others() {
        let not_yet = NotYet::read("# why\nwhole | reason\npart: this point | reason\npart: that * | reason\n").expect("a list");
        assert!(not_yet.programs.contains("whole"));
        let failed = ["this point", "that one", "another"].map(str::to_owned).into();
        let outcomes = Outcomes::from([("part".to_owned(), Outcome { passed: 1, failed })]);
        assert_eq!(not_yet.unknown(&outcomes), ["part: another"]);
        assert!(NotYet::read("without reason").is_err());
    }
}
