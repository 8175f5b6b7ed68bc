//! Suites of ginkgo: their reports, and the committed lists of specs that these are compared with.

use anyhow::{Context, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

/// How one spec ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// `passed`, `skipped`, `failed`, `panicked`, `timedout`, ...: ginkgo's words.
    pub state: String,
    /// Why it did not pass; empty when it did.
    pub message: String,
}

/// Outcomes by the spec's full name: its containers' texts and its own, joined by ` / `.
pub type Outcomes = BTreeMap<String, Outcome>;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    spec_reports: Option<Vec<Spec>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    failure: Option<Failure>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    message: Option<String>,
}

/// Reads ginkgo's JSON report. Set-up and clean-up nodes are no specs.
pub fn outcomes(report: &[u8]) -> Result<Outcomes> {
    let suites: Vec<Suite> = serde_json::from_slice(report).context("read the suite's report")?;
    let specs = suites.into_iter().flat_map(|suite| suite.spec_reports.unwrap_or_default());
    let mut found = Outcomes::new();
    for spec in specs.filter(|spec| spec.leaf_node_type == "It") {
        let mut name = spec.container_hierarchy_texts.unwrap_or_default();
        name.push(spec.leaf_node_text);
        let message = spec.failure.and_then(|failure| failure.message).unwrap_or_default();
        found.insert(name.join(" / "), Outcome { state: spec.state, message });
    }
    Ok(found)
}

/// A run compared with the committed lists.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Specs of must-pass.txt that did not pass, each with what happened. Any of them fails the test.
    pub broken: Vec<String>,
    /// Specs in neither list, or in both: the lists must name each registered spec once.
    pub unlisted: Vec<String>,
    /// Specs of not-yet.txt that pass now and belong to must-pass.txt.
    pub gained: Vec<String>,
}

/// What of a list did not pass in a run of chosen specs, each with what happened.
pub fn broken(outcomes: &Outcomes, must_pass: &str) -> Vec<String> {
    compare(outcomes, must_pass, "").broken
}

/// Compares outcomes with the text of must-pass.txt (a name a line) and not-yet.txt (`name | reason`).
pub fn compare(outcomes: &Outcomes, must_pass: &str, not_yet: &str) -> Verdict {
    let must: BTreeSet<&str> = lines(must_pass).collect();
    let later: BTreeSet<&str> = lines(not_yet).map(|line| line.split_once(" | ").map_or(line, |(name, _)| name)).collect();
    let mut verdict = Verdict::default();
    for name in &must {
        match outcomes.get(*name) {
            Some(outcome) if outcome.state == "passed" => {}
            Some(outcome) => verdict.broken.push(format!("{name}: {}: {}", outcome.state, outcome.message)),
            None => verdict.broken.push(format!("{name}: did not run")),
        }
    }
    for (name, outcome) in outcomes {
        if must.contains(name.as_str()) == later.contains(name.as_str()) {
            verdict.unlisted.push(name.clone());
        } else if later.contains(name.as_str()) && outcome.state == "passed" {
            verdict.gained.push(name.clone());
        }
    }
    verdict
}

/// A regular expression that finds this spec and no other.
pub fn focus(name: &str) -> String {
    let words = name.replace(" / ", " ");
    let quoted = words.chars().flat_map(|c| (!c.is_alphanumeric() && c != ' ').then_some('\\').into_iter().chain([c]));
    quoted.chain(['$']).collect()
}

/// The lines of a list.
pub fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"[{"SpecReports":[
        {"ContainerHierarchyTexts":null,"LeafNodeType":"BeforeSuite","LeafNodeText":"","State":"passed"},
        {"ContainerHierarchyTexts":["[k8s.io] Pod","basic"],"LeafNodeType":"It","LeafNodeText":"runs","State":"passed"},
        {"ContainerHierarchyTexts":["[k8s.io] Pod"],"LeafNodeType":"It","LeafNodeText":"stops","State":"failed","Failure":{"Message":"no"}}
    ]}]"#;

    #[test]
    fn a_report_is_read_by_full_names_without_set_up() {
        let found = outcomes(REPORT.as_bytes()).expect("a report");
        assert_eq!(found.keys().collect::<Vec<_>>(), ["[k8s.io] Pod / basic / runs", "[k8s.io] Pod / stops"]);
        assert_eq!(found["[k8s.io] Pod / stops"], Outcome { state: "failed".into(), message: "no".into() });
    }

    #[test]
    fn a_name_is_found_as_it_stands() {
        assert_eq!(focus("[a] B / c (d) 2"), "\\[a\\] B c \\(d\\) 2$");
    }

    #[test]
    fn a_listed_spec_that_fails_or_is_gone_breaks_the_run() {
        let found = outcomes(REPORT.as_bytes()).expect("a report");
        let verdict = compare(&found, "# names\n[k8s.io] Pod / stops\ngone\n", "[k8s.io] Pod / basic / runs | later\n");
        assert_eq!(verdict.broken, ["[k8s.io] Pod / stops: failed: no", "gone: did not run"]);
        assert_eq!(verdict.gained, ["[k8s.io] Pod / basic / runs"]);
        assert!(verdict.unlisted.is_empty());
        assert_eq!(compare(&found, "", "").unlisted.len(), 2);
    }
}
