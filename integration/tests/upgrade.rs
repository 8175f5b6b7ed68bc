//! Pods of an older build under today's daemon. Needs the repository's history.

use anyhow::Result;
use windlass_integration::{node, upgrade};

#[test]
fn pods_of_an_older_build_do_not_notice_the_new_daemon() -> Result<()> {
    let older = upgrade::programs_of(&upgrade::earlier()?)?;
    for line in node::run(move || upgrade::replace_the_daemon(&older))? {
        println!("{line}");
    }
    Ok(())
}
