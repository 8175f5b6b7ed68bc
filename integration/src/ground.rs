//! What most tests stand on: a daemon that has had its first pod, what was there then, and a pod of the test's own.

use crate::{
    client::{Client, container, pod},
    daemon::Daemon,
    leak::Snapshot,
};
use anyhow::Result;
use std::{fs, path::Path};
use windlass_proto::cri;

/// A daemon that has had its first pod, and what is there before the test does anything.
pub fn begin() -> Result<(Daemon, Client, Snapshot)> {
    let daemon = Daemon::start(&[])?;
    let client = Client::connect(&daemon)?;
    let before = Snapshot::warm(&daemon, &client)?;
    Ok((daemon, client, before))
}

/// A pod on such a daemon.
pub struct Ground {
    pub daemon: Daemon,
    pub client: Client,
    pub config: cri::PodSandboxConfig,
    pub pod: String,
    pub before: Snapshot,
}

impl Ground {
    /// On a daemon that serves.
    pub fn on(daemon: Daemon) -> Result<Ground> {
        Ground::with_handler(daemon, "", |_| {})
    }

    /// With a pod of that runtime handler, as `change` would have it.
    pub fn with_handler(daemon: Daemon, handler: &str, change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Result<Ground> {
        let client = Client::connect(&daemon)?;
        let before = Snapshot::warm(&daemon, &client)?;
        let mut config = pod(&daemon.path("logs"));
        change(&mut config);
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.into() };
        let pod = client.run_pod_sandbox(request)?.pod_sandbox_id;
        Ok(Ground { daemon, client, config, pod, before })
    }

    /// A running container of the busybox image, as `change` would have it.
    pub fn start(&self, name: &str, command: &[&str], change: impl FnOnce(&mut cri::ContainerConfig)) -> Result<String> {
        let mut wanted = container(&self.config, name, command);
        change(&mut wanted);
        self.launch(&wanted)
    }

    /// A running container.
    pub fn launch(&self, wanted: &cri::ContainerConfig) -> Result<String> {
        let id = self.client.create(&self.pod, &self.config, wanted)?;
        self.client.start(&id)?;
        Ok(id)
    }

    /// A container's log; empty before there is one.
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(Path::new(&self.config.log_directory).join(format!("{name}.log"))).unwrap_or_default()
    }

    /// Removes the pod; fails if anything is left.
    pub fn end(self) -> Result<()> {
        self.client.remove(&self.pod)?;
        self.before.expect_again(&self.daemon)
    }
}
