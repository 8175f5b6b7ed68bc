//! NRI with real plugins: programs with the interface's own library. What they are told, what they change, and what becomes of those that
//! fail. Needs `go` and its module cache or proxy.

mod adjust;
mod conformance;
mod failures;
mod life;
mod updates;

use anyhow::Result;
use serde_json::{Value, json};
use windlass_integration::{client::Client, daemon::Daemon, go, ground::Ground, node, nri::Plugin};

/// A test in namespaces of its own. The plugin is built before: in there is no way to the modules.
fn run(test: impl FnOnce() -> Result<()> + Send + 'static) {
    go::nri_plugin().and_then(|_| go::earlier_nri_plugin()).expect("the plugins");
    node::run(test).expect("a test");
}

/// A pod on a daemon that has one plugin, and the plugin.
fn ground(behaviour: &Value) -> Result<(Ground, Plugin)> {
    let daemon = Daemon::start(&[])?;
    let plugin = Plugin::connect(&daemon, "10-test", behaviour)?;
    Ok((Ground::on(daemon)?, plugin))
}

/// A behaviour that adjusts one container.
fn adjusting(name: &str, adjustment: Value) -> Value {
    json!({ "Events": "CreateContainer", "Adjust": { name: adjustment } })
}

/// What a shell prints there.
fn shell(client: &Client, id: &str, script: &str) -> Result<String> {
    client.shell(id, script)
}

/// Removes the pod; fails if anything is left. The plugins' files are there as long as the daemon is.
fn remove(ground: Ground) -> Result<Daemon> {
    let Ground { client, daemon, pod, before, .. } = ground;
    client.remove(&pod)?;
    before.expect_again(&daemon)?;
    Ok(daemon)
}
