//! The daemon's clean end: pods go on, and no client can hold it up.

use anyhow::{Context, Result, ensure};
use windlass_integration::{
    client::{Client, container, host_network, pod},
    daemon::Daemon,
    node,
};
use windlass_proto::cri;

#[test]
fn a_silent_client_does_not_hold_up_the_end() -> Result<()> {
    node::run(|| {
        let mut daemon = Daemon::start(&[])?;
        // Connected, and from now on deaf to what the server says.
        let silent = Client::connect(&daemon)?;
        silent.version(cri::VersionRequest::default())?;
        daemon.stop()?;
        drop(silent);
        Ok(())
    })
}

#[test]
fn pods_outlive_a_clean_end() -> Result<()> {
    node::run(|| {
        let mut daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let config = host_network(pod(&daemon.path("logs")));
        let id = client.run(&config)?;
        let created = client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&created)?;
        let monitors = daemon.monitors();
        drop(client);
        daemon.stop()?;
        ensure!(daemon.monitors() == monitors && monitors.len() == 1, "{monitors:?} became {:?}", daemon.monitors());
        ensure!(!daemon.socket().exists(), "a socket that nobody serves");
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        ensure!(client.container(&created)?.state() == cri::ContainerState::ContainerRunning);
        ensure!(client.exec(&created, &["true"]).context("exec after the restart")?.exit_code == 0);
        client.remove(&id)?;
        ensure!(daemon.monitors().is_empty());
        drop(client);
        daemon.stop()?;
        ensure!(!daemon.cgroup_directory().exists(), "the pods' cgroup is left");
        Ok(())
    })
}
