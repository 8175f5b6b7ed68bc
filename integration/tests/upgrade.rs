//! Pods of an older build under today's daemon. The older one comes from the repository's history.

use anyhow::Result;
use windlass_integration::{node, upgrade};

#[test]
fn pods_of_an_older_build_do_not_notice_the_new_daemon() -> Result<()> {
    let older = upgrade::earlier_programs()?;
    for line in node::run(move || upgrade::replace_the_daemon(&older))? {
        println!("{line}");
    }
    Ok(())
}
