//! The CRI's validation suite against a running daemon: the one digest it hard-wires, its command line, its report, and the
//! committed lists of specs. The daemon, its namespaces and the registry with the stand-in images are the caller's.

use crate::{go, standin::Images};
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The digest of the suite's `test-image-digest` as its publisher pushed it, in lowercase hex.
pub const PUBLISHED_DIGEST: &str = "9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf";

/// Copies critest with [`PUBLISHED_DIGEST`] replaced by `digest` (64 hex digits), wherever it stands.
pub fn with_digest(critest: &Path, digest: &str, output: &Path) -> Result<()> {
    ensure!(digest.len() == PUBLISHED_DIGEST.len(), "digest {digest} is not 64 hex digits");
    let mut program = std::fs::read(critest).with_context(|| format!("read {}", critest.display()))?;
    let places = replace(&mut program, PUBLISHED_DIGEST.as_bytes(), digest.as_bytes());
    ensure!(places > 0, "{} does not hold the published digest: another version?", critest.display());
    std::fs::write(output, program).with_context(|| format!("write {}", output.display()))?;
    let mode = std::fs::metadata(critest).context("look at critest")?.permissions();
    std::fs::set_permissions(output, mode).with_context(|| format!("make {} executable", output.display()))
}

/// Overwrites every `from` with the equally long `to`; returns how many there were.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) -> usize {
    let mut places = 0;
    let mut start = 0;
    while let Some(found) = bytes[start..].windows(from.len()).position(|window| window == from) {
        bytes[start + found..][..to.len()].copy_from_slice(to);
        start += found + to.len();
        places += 1;
    }
    places
}

/// The suite ready to run, and the images that it pulls. Made where the network is, used where it need not be.
pub struct Prepared {
    folder: tempfile::TempDir,
    pub images: Images,
}

impl Prepared {
    /// Builds what is missing, and lays the suite and its runner side by side.
    pub fn new() -> Result<Prepared> {
        let tools = go::tools()?;
        let images = Images::build()?;
        let folder = tempfile::tempdir().context("make a folder for the suite")?;
        let prepared = Prepared { folder, images };
        with_digest(&tools.critest, &prepared.images.pinned_digest()?, &prepared.program())?;
        std::os::unix::fs::symlink(tools.ginkgo.canonicalize()?, prepared.folder.path().join("ginkgo")).context("link ginkgo")?;
        Ok(prepared)
    }

    /// The suite, with the digest of these images.
    pub fn program(&self) -> PathBuf {
        self.folder.path().join("critest")
    }
}

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

/// A run of the suite.
#[derive(Debug, Clone)]
pub struct Run<'a> {
    /// With `-parallel N` it calls `ginkgo`, which has to lie beside it.
    pub suite: &'a Path,
    pub socket: &'a Path,
    /// Where log and report are left.
    pub output: &'a Path,
    /// Bounds the whole suite.
    pub limit: Duration,
    /// A regular expression of the specs to run; empty for all.
    pub focus: &'a str,
    /// Further flags of the suite.
    pub flags: &'a [&'a str],
    /// A process whose mount namespace it runs in; none where that is the caller's, which is the daemon's too.
    pub beside: Option<i32>,
}

impl Run<'_> {
    /// Runs it to its end, in the daemon's network namespace, which is the caller's. A failed spec is no error here.
    pub fn outcomes(&self) -> Result<Outcomes> {
        let report = self.output.join("critest.json");
        let log = std::fs::File::create(self.output.join("critest.log")).context("create critest's log")?;
        let endpoint = format!("unix://{}", self.socket.display());
        let mut command = match self.beside {
            Some(pid) => {
                let mut enter = Command::new("nsenter");
                enter.args(["--mount", "--target", &pid.to_string(), "--"]).arg(self.suite);
                enter
            }
            None => Command::new(self.suite),
        };
        let status = command
            .args(["-config", "/nonexistent", "-runtime-endpoint", &endpoint, "-image-endpoint", &endpoint])
            .args(["-ginkgo.v", "-ginkgo.no-color", "-test.timeout", &format!("{}s", self.limit.as_secs())])
            .arg("-ginkgo.json-report")
            .arg(&report)
            .args(["-ginkgo.focus", self.focus])
            .args(self.flags)
            .env("PATH", path_with(self.suite.parent().context("the suite's folder")?)?)
            .current_dir(self.output)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share critest's log")?)
            .stderr(log)
            .status()
            .with_context(|| format!("run {}", self.suite.display()))?;
        let text = std::fs::read(&report).with_context(|| {
            format!("critest ended with {status} and left no report; its log is in {}", self.output.display())
        })?;
        outcomes(&text)
    }
}

/// The program search path with one more folder.
fn path_with(folder: &Path) -> Result<std::ffi::OsString> {
    let usual = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(std::iter::once(folder.to_owned()).chain(std::env::split_paths(&usual))).context("a search path")
}

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
    let suites: Vec<Suite> = serde_json::from_slice(report).context("read the report of critest")?;
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

fn lines(text: &str) -> impl Iterator<Item = &str> {
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
    fn a_listed_spec_that_fails_or_is_gone_breaks_the_run() {
        let found = outcomes(REPORT.as_bytes()).expect("a report");
        let verdict = compare(&found, "# names\n[k8s.io] Pod / stops\ngone\n", "[k8s.io] Pod / basic / runs | later\n");
        assert_eq!(verdict.broken, ["[k8s.io] Pod / stops: failed: no", "gone: did not run"]);
        assert_eq!(verdict.gained, ["[k8s.io] Pod / basic / runs"]);
        assert!(verdict.unlisted.is_empty());
        assert_eq!(compare(&found, "", "").unlisted.len(), 2);
    }

    #[test]
    fn every_place_of_the_digest_is_replaced() {
        let mut bytes = b"..aab.aab".to_vec();
        assert_eq!(replace(&mut bytes, b"aab", b"xyz"), 2);
        assert_eq!(bytes, b"..xyz.xyz");
    }
}
