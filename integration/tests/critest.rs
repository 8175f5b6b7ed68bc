//! The real `crictl` and `critest`. Needs `go` and its module cache or proxy.

use std::process::Command;
use windlass_integration::{critest, go};

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
