//! Statistics against what a known load did, on this host as it is: CPU time is counted by every cgroup v2 tree.

use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    leak::Snapshot,
    node,
};
use windlass_proto::cri;

fn number(value: Option<cri::UInt64Value>) -> u64 {
    value.map(|value| value.value).unwrap_or_default()
}

fn wait_for<T>(what: &str, mut check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = check()? {
            return Ok(found);
        }
        ensure!(Instant::now() < deadline, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn stats(client: &Client, id: &str) -> Result<cri::ContainerStats> {
    let reply = client.container_stats(cri::ContainerStatsRequest { container_id: id.into() })?;
    reply.stats.context("statistics")
}

#[test]
fn statistics_agree_with_what_was_done() {
    node::run(|| {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let warm = client.run(&pod(&daemon.path("logs")))?;
        client.remove(&warm)?;
        let before = Snapshot::take(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        // Burns half a second of CPU time, writes 5 MB to its layer, keeps a second process, and then is idle.
        let script = "dd if=/dev/zero of=/file bs=1M count=5 2>/dev/null; \
                      while read -r _ _ _ _ _ _ _ _ _ _ _ _ _ user system rest < /proc/self/stat && [ $((user + system)) -lt 50 ]; do :; done; \
                      touch /done; sleep 1000 & sleep 1000";
        let created = client.create(&id, &config, &container(&config, "load", &["sh", "-c", script]))?;
        client.start(&created)?;
        wait_for("the load is done", || {
            Ok(client.exec(&created, &["test", "-e", "/done"]).is_ok_and(|reply| reply.exit_code == 0).then_some(()))
        })?;
        let found = wait_for("every figure is there", || {
            let found = stats(&client, &created)?;
            let layer = found.writable_layer.as_ref().map_or(0, |layer| number(layer.used_bytes));
            Ok((layer > 0).then_some(found))
        })?;
        let cpu = found.cpu.context("cpu")?;
        let used_ms = number(cpu.usage_core_nano_seconds) / 1_000_000;
        ensure!((480..3000).contains(&used_ms), "{used_ms} ms of CPU time");
        ensure!(cpu.psi.is_some(), "no pressure");
        let layer = found.writable_layer.clone().context("layer")?;
        let (bytes, inodes) = (number(layer.used_bytes), number(layer.inodes_used));
        ensure!((5 << 20..(5 << 20) + (256 << 10)).contains(&bytes) && (3..12).contains(&inodes), "layer: {bytes} bytes, {inodes} inodes");
        let memory = found.memory.context("memory")?;
        ensure!(number(memory.working_set_bytes) > 50_000, "memory: {memory:?}");
        // Idle since then: the rate over a second is next to nothing, and the time stays.
        wait_for("the rate of an idle container", || {
            let rate = stats(&client, &created)?.cpu.and_then(|cpu| cpu.usage_nano_cores).map(|rate| rate.value);
            Ok(rate.filter(|rate| *rate < 20_000_000))
        })?;
        let reply = client.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: id.clone() })?;
        let linux = reply.stats.and_then(|stats| stats.linux).context("the pod's")?;
        ensure!(linux.containers.len() == 1, "{} containers", linux.containers.len());
        let processes = linux.process.map_or(0, |process| number(process.process_count));
        ensure!((2..5).contains(&processes), "{processes} processes, of which two sleep");
        let interface = linux.network.and_then(|network| network.default_interface).context("an interface")?;
        ensure!(interface.name == "eth0", "interface {}", interface.name);
        let list = client.list_pod_sandbox_stats(Default::default())?.stats;
        ensure!(list.len() == 1, "{} pods", list.len());
        let none = cri::ContainerStatsFilter { id: "ffff".into(), ..Default::default() };
        let list = client.list_container_stats(cri::ListContainerStatsRequest { filter: Some(none) })?.stats;
        ensure!(list.is_empty(), "{} containers of another id", list.len());
        client.stop(&created, 0)?;
        let list = client.list_container_stats(Default::default())?.stats;
        ensure!(list.is_empty(), "{} containers though it has ended", list.len());
        let empty = client.pod_sandbox_stats(cri::PodSandboxStatsRequest::default()).expect_err("no id");
        ensure!(empty.code() == tonic::Code::NotFound, "kubelet's question: {empty}");
        client.remove(&id)?;
        before.expect_same(&Snapshot::take(&daemon)?)
    })
    .expect("statistics");
}
