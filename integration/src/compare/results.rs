//! A table of README.md: how the specs of a suite ended, a line for each runtime, and the reasons of those that did not pass.

use crate::{
    ginkgo::{Outcome, Outcomes},
    setup,
};
use anyhow::{Context, Result, ensure};
use std::{collections::BTreeMap, fmt::Write, fs};

/// What ends a table in README.md; a command's own name begins it.
const END: &str = "<!-- end -->";

/// A line of the table.
pub(super) struct Line {
    pub(super) title: String,
    pub(super) outcomes: Outcomes,
}

/// Tells how a run went, and gives it back.
pub(super) fn noted(what: &str, outcomes: Outcomes) -> Outcomes {
    println!("==> {what}: {} of {} specs passed", count(&outcomes, "passed"), outcomes.len());
    for (name, outcome) in outcomes.iter().filter(|(_, outcome)| !["passed", "skipped"].contains(&outcome.state.as_str())) {
        println!("    {}: {name}: {}", outcome.state, outcome.message.lines().next().unwrap_or_default());
    }
    outcomes
}

fn count(outcomes: &Outcomes, state: &str) -> usize {
    outcomes.values().filter(|outcome| outcome.state == state).count()
}

/// A line for each runtime, then one with the reasons why specs did not pass.
pub(super) fn table(suite: &str, lines: &[Line]) -> Result<String> {
    let mut text = format!("| {suite} | specs | passed | failed | skipped |\n|---|---|---|---|---|\n");
    for Line { title, outcomes } in lines {
        let (passed, skipped) = (count(outcomes, "passed"), count(outcomes, "skipped"));
        let failed = outcomes.len() - passed - skipped;
        writeln!(text, "| {title} | {} | {passed} | {failed} | {skipped} |", outcomes.len())?;
    }
    text.push('\n');
    for Line { title, outcomes } in lines {
        let mut reasons: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        for (name, outcome) in outcomes.iter().filter(|(_, outcome)| outcome.state != "passed") {
            reasons.entry(reason(name, outcome)).or_default().push(name);
        }
        let told: Vec<String> = reasons.iter().map(|(reason, names)| format!("{} {reason}", names.len())).collect();
        writeln!(text, "- {title}: {}.", if told.is_empty() { "all pass".into() } else { told.join("; ") })?;
    }
    Ok(text)
}

/// Why a spec did not pass: what the suite says when it skips one, and the spec's own name when it failed.
fn reason(name: &str, outcome: &Outcome) -> String {
    let spec = name.rsplit(" / ").next().unwrap_or(name);
    let said = outcome.message.lines().next().unwrap_or_default().trim();
    match outcome.state.as_str() {
        "skipped" if name.contains("benchmark") => "benchmarks, which run only when asked for".into(),
        "skipped" if said.is_empty() => format!("skipped: {spec}"),
        "skipped" => format!("skipped: {said}"),
        state => format!("{state}: {spec}"),
    }
}

/// Puts the table of a command into README.md.
pub(super) fn write(command: &str, table: &str) -> Result<()> {
    let path = setup::workspace().join("README.md");
    let text = fs::read_to_string(&path)?;
    let begin = format!("<!-- {command} -->");
    let parts = text.split_once(&begin).and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = parts.with_context(|| format!("README.md has no {begin} and {END}"))?;
    ensure!(!table.contains(END), "the table would end itself");
    Ok(fs::write(path, format!("{before}{begin}\n{}\n{END}{after}", table.trim_end()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_counts_and_gives_reasons() {
        let outcome = |state: &str, message: &str| Outcome { state: state.into(), message: message.into() };
        let outcomes = Outcomes::from([
            ("A / one".into(), outcome("passed", "")),
            ("A / two".into(), outcome("skipped", "no AppArmor\nmore")),
            ("A / three".into(), outcome("skipped", "no AppArmor")),
            ("A / benchmark of four".into(), outcome("skipped", "")),
            ("A / five".into(), outcome("failed", "EPERM")),
        ]);
        let text = table("S 1", &[Line { title: "X".into(), outcomes }]).expect("a table");
        assert!(text.contains("\n| X | 5 | 1 | 1 | 3 |\n"), "{text}");
        assert!(
            text.contains("- X: 1 benchmarks, which run only when asked for; 1 failed: five; 2 skipped: no AppArmor.\n"),
            "{text}"
        );
    }
}
