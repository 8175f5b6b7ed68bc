//! Statistics against what a known load did, on this host as it is: CPU time is counted by every cgroup v2 tree.

use anyhow::{Context, Result, ensure};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    ground::begin,
    metrics::Metrics,
    node,
    wait::until,
};
use windlass_proto::cri;

fn number(value: Option<cri::UInt64Value>) -> u64 {
    value.map(|value| value.value).unwrap_or_default()
}

fn stats(client: &Client, id: &str) -> Result<cri::ContainerStats> {
    let reply = client.container_stats(cri::ContainerStatsRequest { container_id: id.into() })?;
    reply.stats.context("statistics")
}

#[test]
fn statistics_agree_with_what_was_done() {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        // Burns half a second of CPU time, writes 5 MB to its layer, keeps a second process, and then is idle.
        let script = "dd if=/dev/zero of=/file bs=1M count=5 2>/dev/null; \
                      while read -r _ _ _ _ _ _ _ _ _ _ _ _ _ user system rest < /proc/self/stat && [ $((user + system)) -lt 50 ]; do :; done; \
                      touch /done; sleep 1000 & sleep 1000";
        let created = client.create(&id, &config, &container(&config, "load", &["sh", "-c", script]))?;
        client.start(&created)?;
        until("the load is done", || {
            Ok(client.exec(&created, &["test", "-e", "/done"]).is_ok_and(|reply| reply.exit_code == 0).then_some(()))
        })?;
        let found = until("every figure is there", || {
            let found = stats(&client, &created)?;
            let layer = found.writable_layer.as_ref().map_or(0, |layer| number(layer.used_bytes));
            Ok((layer > 0).then_some(found))
        })?;
        let cpu = found.cpu.context("cpu")?;
        let used_ms = number(cpu.usage_core_nano_seconds) / 1_000_000;
        ensure!((480..20_000).contains(&used_ms), "{used_ms} ms of CPU time");
        ensure!(cpu.psi.is_some(), "no pressure");
        let layer = found.writable_layer.clone().context("layer")?;
        let (bytes, inodes) = (number(layer.used_bytes), number(layer.inodes_used));
        ensure!((5 << 20..(5 << 20) + (256 << 10)).contains(&bytes) && (3..12).contains(&inodes), "layer: {bytes} bytes, {inodes} inodes");
        let memory = found.memory.context("memory")?;
        ensure!(number(memory.working_set_bytes) > 50_000, "memory: {memory:?}");
        // Idle since then: the rate over a second is next to nothing, and the time stays.
        until("the rate of an idle container", || {
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
        before.expect_again(&daemon)
    })
    .expect("statistics");
}

/// The names that kubelet's /metrics/cadvisor has on a node with cgroup v2.
const CADVISOR: &str = include_str!("../conformance/cadvisor-metrics.txt");

#[test]
fn metrics_are_described_and_agree_with_the_kernel() {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config = pod(&daemon.path("logs"));
        let name = config.metadata.clone().unwrap_or_default().name;
        let id = client.run(&config)?;
        let listener = std::net::TcpListener::bind("10.57.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let reader = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept()?;
            std::io::copy(&mut connection, &mut std::io::sink())
        });
        let load = ["/probe", "load", "1200", "8", "3", "4", &address];
        let created = client.create(&id, &config, &container(&config, "load", &load))?;
        client.start(&created)?;
        let log = std::path::Path::new(&config.log_directory).join("load.log");
        until("the load is done", || Ok(std::fs::read_to_string(&log).unwrap_or_default().contains("done").then_some(())))?;
        // A first look counts the writable layer.
        let found = Metrics::take(&client)?;
        let own = [("name", created.as_str())];
        let mine = [
            ("container", "load"),
            ("pod", name.as_str()),
            ("namespace", "test"),
            ("image", windlass_integration::image::BUSYBOX),
        ];
        ensure!(
            found
                .labels_of("container_cpu_usage_seconds_total")
                .is_some_and(|keys| keys == ["id", "name", "image", "pod", "namespace", "container", "cpu"])
        );
        let leaf = daemon.cgroup_directory().join(&created);
        let path = format!("{}/{created}", daemon.cgroup);
        for labels in [&own[..], &mine[..], &[("id", path.as_str())]] {
            ensure!(found.value("container_cpu_usage_seconds_total", labels)? >= 1, "{labels:?}");
        }
        let stat = std::fs::read_to_string(leaf.join("cpu.stat"))?;
        for (key, name) in
            [("user_usec ", "container_cpu_user_seconds_total"), ("system_usec ", "container_cpu_system_seconds_total")]
        {
            let usec: u64 = stat.lines().find_map(|line| line.strip_prefix(key)?.parse().ok()).context(stat.clone())?;
            ensure!(found.value(name, &own)?.abs_diff(usec / 1_000_000) <= 1, "{name}: {stat}");
        }
        let pid = std::fs::read_to_string(leaf.join("cgroup.procs"))?.trim().to_owned();
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64;
        ensure!(found.value("container_file_descriptors", &own)? == descriptors, "{descriptors} descriptors");
        ensure!(found.value("container_sockets", &own)? == 1 && found.value("container_processes", &own)? == 1);
        // Its last word is out a moment before it sleeps.
        let sleeps = || Metrics::take(&client)?.value("container_tasks_state", &[own[0], ("state", "sleeping")]);
        until("its one task sleeps", || Ok((sleeps()? == 1).then_some(())))?;
        ensure!(found.value("container_ulimits_soft", &[own[0], ("ulimit", "max_open_files")])? == 1024);
        ensure!(found.value("container_memory_rss", &own)? > 8 << 20, "resident memory");
        ensure!(found.value("container_fs_usage_bytes", &own)? >= 3 << 20, "the writable layer");
        let started = client.container(&created)?.started_at as u64 / 1_000_000_000;
        ensure!(found.value("container_start_time_seconds", &own)? == started);
        let traffic = [("pod", name.as_str()), ("interface", "eth0"), ("container", "")];
        let sent = found.value("container_network_transmit_bytes_total", &traffic)?;
        ensure!((4 << 20..(4 << 20) * 105 / 100).contains(&sent), "{sent} bytes sent");
        ensure!(found.value("container_network_receive_errors_total", &traffic)? == 0);
        ensure!(found.values("container_network_transmit_bytes_total", &mine[..1]).is_empty(), "the network is the pod's");
        // What the tree has no controller for is absent, and what it tells is there.
        for (file, name) in [
            ("cpu.pressure", "container_pressure_cpu_waiting_seconds_total"),
            ("cpu.max", "container_spec_cpu_period"),
            ("memory.current", "container_memory_usage_bytes"),
            ("memory.stat", "container_memory_cache"),
            ("pids.max", "container_threads_max"),
            ("hugetlb.2MB.current", "container_hugetlb_usage_bytes"),
        ] {
            let (there, told) = (leaf.join(file).exists(), !found.values(name, &own).is_empty());
            ensure!(
                there == told,
                "{file} is {}there, {name} is {}told",
                if there { "" } else { "not " },
                if told { "" } else { "not " }
            );
        }
        for wanted in CADVISOR.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
            ensure!(found.described().any(|name| name == wanted), "{wanted} is not described");
        }
        // The same by a stream, but for what goes on.
        let listed: usize = client.list_pod_sandbox_metrics(Default::default())?.pod_metrics.iter().map(count).sum();
        let streamed: usize = client.streamed_metrics()?.iter().map(count).sum();
        ensure!(listed == streamed && listed > 30, "{listed} listed, {streamed} streamed");
        client.stop(&created, 0)?;
        reader.join().map_err(|_| anyhow::anyhow!("the reader"))??;
        let found = Metrics::take(&client)?;
        ensure!(found.names(&own).is_empty(), "of a container that has ended: {:?}", found.names(&own));
        ensure!(found.value("container_network_transmit_bytes_total", &traffic)? >= sent, "the pod's remain");
        client.remove(&id)?;
        ensure!(client.list_pod_sandbox_metrics(Default::default())?.pod_metrics.is_empty());
        before.expect_again(&daemon)
    })
    .expect("metrics");
}

fn count(pod: &cri::PodSandboxMetrics) -> usize {
    pod.metrics.len() + pod.container_metrics.iter().map(|container| container.metrics.len()).sum::<usize>()
}

/// Processor time of a pod in nanoseconds.
fn pod_cpu_ns(client: &Client, id: &str) -> Result<u64> {
    let reply = client.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: id.into() })?;
    let cpu = reply.stats.and_then(|stats| stats.linux).and_then(|linux| linux.cpu).context("processor time of the pod")?;
    ensure!(cpu.psi.is_none(), "a sum of pressures");
    Ok(number(cpu.usage_core_nano_seconds))
}

#[test]
fn a_summed_pods_time_stays_when_its_containers_go() {
    node::run(|| {
        let mut daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let nowhere = "127.0.0.1:9";
        let first =
            client.create(&id, &config, &container(&config, "first", &["/probe", "load", "300", "0", "0", "0", nowhere]))?;
        client.start(&first)?;
        let used = until("the first has burnt", || Ok(Some(pod_cpu_ns(&client, &id)?).filter(|used| *used >= 300_000_000)))?;
        client.stop(&first, 0)?;
        let ended = pod_cpu_ns(&client, &id)?;
        ensure!(ended >= used, "{used} ns before its end, {ended} after");
        client.remove_container(cri::RemoveContainerRequest { container_id: first })?;
        let removed = pod_cpu_ns(&client, &id)?;
        ensure!(removed >= ended, "{ended} ns before it was removed, {removed} after");
        let second =
            client.create(&id, &config, &container(&config, "second", &["/probe", "load", "100", "0", "0", "0", nowhere]))?;
        client.start(&second)?;
        let both =
            until("the second has burnt", || Ok(Some(pod_cpu_ns(&client, &id)?).filter(|used| *used >= removed + 100_000_000)))?;
        client.stop(&second, 0)?;
        daemon.kill9()?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        let again = pod_cpu_ns(&client, &id)?;
        ensure!(again >= both, "{both} ns before the daemon started again, {again} after");
        client.remove(&id)?;
        Ok(())
    })
    .expect("statistics");
}
