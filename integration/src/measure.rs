//! `cargo xtask bench`: the benchmark against a fresh daemon in namespaces of its own.

use crate::{build, daemon::Daemon, node, setup};
use anyhow::{Context, Result, ensure};
use std::process::Command;

/// Builds, starts a daemon with the local test image, and runs `bench` on it with `arguments` added to its own.
///
/// # Errors
/// Where the daemon does not start or a measured call fails.
pub fn run(arguments: Vec<String>) -> Result<()> {
    build::all()?;
    node::run(move || {
        let mut daemon = Daemon::start(&[])?;
        let pid = daemon.pid().context("the daemon runs")?;
        let mut bench = Command::new(setup::programs()?.join("bench"));
        bench.arg("--socket").arg(daemon.socket()).args(["--daemon-pid", &pid.to_string()]);
        // Only a monitor has the pods' run directories in its command line.
        bench.args(["--helper", &format!("{}/pods", daemon.state().display())]);
        bench.args(["--image", crate::image::BUSYBOX]).args(arguments);
        let status = bench.status().context("run bench")?;
        ensure!(status.success(), "bench: {status}\n{}", daemon.log());
        daemon.stop()
    })
}
