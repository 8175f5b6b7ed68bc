//! Requests that kubelet sends again: the same metadata at the same time is one pod and one container, whoever asked first.

use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    ground::begin,
    node,
};
use windlass_proto::cri;

/// Callers at once.
const CALLERS: usize = 8;

/// Asks from several connections at once; returns the different answers.
fn at_once(daemon: &Daemon, ask: impl Fn(&Client) -> Result<String, tonic::Status> + Sync) -> Result<BTreeSet<String>> {
    let clients = (0..CALLERS).map(|_| Client::connect(daemon)).collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let asked: Vec<_> = clients
            .into_iter()
            .map(|client| {
                scope.spawn(|| {
                    let client = client;
                    ask(&client)
                })
            })
            .collect();
        asked.into_iter().map(|thread| Ok(thread.join().ok().context("a caller panicked")??)).collect()
    })
}

#[test]
fn one_pod_and_one_container_for_many_callers() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;

        let config = pod(&daemon.path("logs"));
        let pods = at_once(&daemon, |client| client.run(&config))?;
        ensure!(pods.len() == 1, "{pods:?}");
        let id = pods.first().context("a pod")?.clone();
        ensure!(daemon.monitors().len() == 1);
        ensure!(client.list_pod_sandbox(cri::ListPodSandboxRequest::default())?.items.len() == 1);

        let wanted = container(&config, "main", &["sleep", "1000"]);
        let containers = at_once(&daemon, |client| client.create(&id, &config, &wanted))?;
        ensure!(containers.len() == 1, "{containers:?}");
        ensure!(client.list_containers(cri::ListContainersRequest::default())?.containers.len() == 1);

        let removed = at_once(&daemon, |client| client.remove(&id).map(|()| String::new()))?;
        ensure!(removed.len() == 1, "{removed:?}");
        before.expect_again(&daemon)
    })
}

#[test]
fn many_pods_at_once_are_each_their_own() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let ids = at_once(&daemon, |client| client.run(&pod(&daemon.path("logs"))))?;
        ensure!(ids.len() == CALLERS, "{ids:?}");
        let addresses =
            ids.iter().map(|id| Ok(client.pod(id)?.network.context("network")?.ip)).collect::<Result<BTreeSet<_>>>()?;
        ensure!(addresses.len() == CALLERS, "addresses are shared: {addresses:?}");
        for id in &ids {
            client.remove(id)?;
        }
        before.expect_again(&daemon)
    })
}
