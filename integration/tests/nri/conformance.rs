//! The specs of NRI in the CRI's own validation suite.

use anyhow::Result;
use std::{path::Path, time::Duration};
use windlass_integration::{critest::Run, ginkgo, go, node, setup, standin::Images, standin_registry::StandinRegistry};

/// Longest run of the specs.
const LIMIT: Duration = Duration::from_secs(5 * 60);

#[test]
fn the_suites_specs_of_nri_pass() {
    let outcomes = outcomes().expect("a run of critest");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/must-pass-of-nri.txt");
    let listed = std::fs::read_to_string(&path).expect("the list");
    let verdict = ginkgo::compare(&outcomes, &listed, "");
    let ours: Vec<&String> = verdict.unlisted.iter().filter(|name| name.contains("NRI")).collect();
    assert!(ours.is_empty(), "not listed: {ours:?}");
    assert!(verdict.broken.is_empty(), "{} listed specs did not pass:\n{}", verdict.broken.len(), verdict.broken.join("\n"));
}

fn outcomes() -> Result<ginkgo::Outcomes> {
    let (suite, images) = (go::critest_with_nri()?, Images::build()?);
    let output = setup::reports("critest-nri")?;
    node::run(move || {
        let scratch = tempfile::tempdir()?;
        let registry = StandinRegistry::start(images)?;
        let daemon = registry.daemon(&scratch.path().join("certs.d"))?;
        let (socket, nri) = (daemon.socket(), daemon.state().join("nri.sock"));
        let flags = ["-nri-socket", &nri.to_string_lossy()];
        let run =
            Run { suite: &suite, socket: &socket, output: &output, limit: LIMIT, focus: "NRI", flags: &flags, beside: None };
        let outcomes = run.outcomes();
        std::fs::write(output.join("daemon.log"), daemon.log())?;
        outcomes
    })
}
