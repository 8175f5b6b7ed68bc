//! The real `crictl` and `critest`. Needs `go` and its module cache or proxy.

use anyhow::Result;
use std::{path::Path, process::Command, time::Duration};
use windlass_integration::{
    critest::{self, Prepared, Run},
    ginkgo, go, node, setup,
    standin_registry::StandinRegistry,
};

#[test]
fn the_tools_are_built_and_the_digest_can_be_replaced() {
    let tools = go::tools().expect("crictl and critest");
    let version = Command::new(&tools.crictl).arg("--version").output().expect("run crictl");
    assert!(version.status.success(), "crictl --version ended with {}", version.status);

    let scratch = tempfile::tempdir().expect("a folder");
    let patched = scratch.path().join("critest");
    critest::with_digest(&tools.critest, &"ab".repeat(32), &patched).expect("replace the digest");
    let help = Command::new(&patched).arg("-version").output().expect("run the changed critest");
    assert!(help.status.success(), "the changed critest ended with {}", help.status);
    assert!(
        critest::with_digest(&patched, &"cd".repeat(32), &scratch.path().join("again")).is_err(),
        "no published digest is left"
    );
}

/// Longest run of the whole suite.
const SUITE_LIMIT: Duration = Duration::from_secs(15 * 60);

fn list(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

/// Streams over WebSocket, version 5 and the tunnel, where the suite has SPDY by default.
const WEBSOCKET: [&str; 3] = ["-websocket-exec", "-websocket-attach", "-websocket-portforward"];

/// The suite against a daemon whose registries are the stand-ins'. Its log and report stay in this directory of `<target>`.
fn run_suite(directory: &str, focus: &'static str, flags: &'static [&str]) -> Result<ginkgo::Outcomes> {
    let suite = Prepared::new()?;
    let output = setup::reports(directory)?;
    node::run(move || {
        let program = suite.program();
        let scratch = tempfile::tempdir()?;
        let registry = StandinRegistry::start(suite.images)?;
        let daemon = registry.daemon(&scratch.path().join("certs.d"))?;
        let socket = daemon.socket();
        let (suite, output, limit) = (&*program, &*output, SUITE_LIMIT);
        let outcomes = Run { suite, socket: &socket, output, limit, focus, flags, beside: None }.outcomes();
        std::fs::write(output.join("daemon.log"), daemon.log())?;
        outcomes
    })
}

#[test]
fn the_listed_specs_pass() {
    let outcomes = run_suite("critest", "", &[]).expect("a run of critest");
    let passed = outcomes.values().filter(|outcome| outcome.state == "passed").count();
    let verdict = ginkgo::compare(&outcomes, &list("must-pass.txt"), &list("not-yet.txt"));
    println!("critest: {passed} of {} specs passed", outcomes.len());
    for name in &verdict.gained {
        println!("passes now, belongs to must-pass.txt: {name}");
    }
    assert!(verdict.unlisted.is_empty(), "in neither list or in both:\n{}", verdict.unlisted.join("\n"));
    assert!(verdict.broken.is_empty(), "{} listed specs did not pass:\n{}", verdict.broken.len(), verdict.broken.join("\n"));
}

/// All of the suite, four specs at a time.
#[test]
fn the_listed_specs_pass_in_parallel() {
    let outcomes = run_suite("critest-parallel", "", &["-parallel", "4"]).expect("a parallel run of critest");
    let broken = ginkgo::broken(&outcomes, &list("must-pass.txt"));
    assert!(broken.is_empty(), "{} listed specs did not pass:\n{}", broken.len(), broken.join("\n"));
}

#[test]
fn the_streaming_specs_pass_over_websocket() {
    let outcomes = run_suite("critest-websocket", "Streaming", &WEBSOCKET).expect("a run of critest");
    let broken = ginkgo::broken(&outcomes, &list("must-pass-over-websocket.txt"));
    assert!(broken.is_empty(), "{} listed specs did not pass:\n{}", broken.len(), broken.join("\n"));
}
