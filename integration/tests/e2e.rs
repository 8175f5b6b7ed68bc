//! Quick specs of Kubernetes' own suite in a cluster over Windlass. `cargo xtask e2e` runs the others.

use anyhow::Result;
use std::{fs, path::Path};
use windlass_integration::{
    e2e::{Choice, Prepared},
    ginkgo, setup,
};

/// Specs at a time.
const PROCESSES: usize = 8;

#[test]
fn quick_specs_of_kubernetes_own_suite_pass() -> Result<()> {
    let list = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/e2e-in-ci.txt"))?;
    let output = setup::reports("e2e/quick")?;
    let focus = ginkgo::lines(&list).map(ginkgo::focus).collect();
    let choice = Choice { focus, processes: PROCESSES, ..Choice::default() };
    let outcomes = Prepared::new()?.over_windlass(&choice, &output)?;
    let broken = ginkgo::broken(&outcomes, &list);
    assert!(broken.is_empty(), "{} listed specs did not pass:\n{}", broken.len(), broken.join("\n"));
    Ok(())
}
