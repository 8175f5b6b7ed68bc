//! The validation suite of the OCI runtime specification against `windlass-oci`, as far as conformance/oci-must-pass.txt names its
//! programs. Needs `go` and its module cache or proxy.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use windlass_integration::{go, setup, validation};

fn list(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

#[test]
fn the_validation_suite_passes_as_listed() {
    let suite = go::validation().expect("the validation programs");
    let (must_pass, not_yet) = (list("oci-must-pass.txt"), list("oci-not-yet.txt"));
    let not_yet = validation::NotYet::read(&not_yet).expect("oci-not-yet.txt");
    let must_pass: BTreeSet<String> = validation::lines(&must_pass).map(str::to_owned).collect();
    let all = validation::programs(&suite).expect("the suite's programs");
    let listed: BTreeSet<String> = must_pass.union(&not_yet.programs).cloned().collect();
    assert_eq!(listed, all, "every program is in one of the lists");
    assert!(must_pass.is_disjoint(&not_yet.programs), "a program is in both lists");

    let scratch = tempfile::tempdir().expect("a directory");
    let root = scratch.path().join("containers");
    let runtime = scratch.path().join("runtime");
    let program = setup::programs().expect("programs").join("windlass-oci");
    let script = format!("#!/bin/sh\nexec {} --root {} \"$@\"\n", program.display(), root.display());
    fs::write(&runtime, script).expect("the runtime's script");
    fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).expect("mode");
    let names: Vec<&str> = must_pass.iter().map(String::as_str).collect();
    let outcomes = validation::run(&suite, &names, &runtime, scratch.path()).expect("a run of the suite");
    let points: usize = outcomes.values().map(|outcome| outcome.passed).sum();
    println!("{} programs, {points} points passed", outcomes.len());
    let unknown = not_yet.unknown(&outcomes);
    assert!(unknown.is_empty(), "failed:\n{}", unknown.join("\n"));
    let left: Vec<_> =
        fs::read_dir(&root).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default();
    assert!(left.is_empty(), "containers are left: {left:?}");
}
