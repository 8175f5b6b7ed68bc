//! Statistics and metrics against what a known load did, where every controller tells its figures.

use crate::{TREE, counter, in_guest, read, with_resources};
use anyhow::{Context, Result, ensure};
use std::{fs, path::Path};
use windlass_integration::{client::container, metrics::Metrics, node::output_of, wait::until};
use windlass_proto::cri::{self, LinuxContainerResources as Resources};

const MIB: u64 = 1 << 20;

/// Fails unless `found` is what was done, or up to 5 % more.
fn agrees(what: &str, found: u64, done: u64) -> Result<()> {
    println!("{what}: {found} for {done}");
    ensure!((done..=done + done / 20).contains(&found), "{what}: {found}, and {done} were done");
    Ok(())
}

fn number(value: Option<cri::UInt64Value>) -> Result<u64> {
    value.map(|value| value.value).context("a figure")
}

/// The log of a load that is done.
fn done(config: &cri::PodSandboxConfig, name: &str) -> Result<String> {
    let log = Path::new(&config.log_directory).join(format!("{name}.log"));
    let text = || fs::read_to_string(&log).unwrap_or_default();
    until("the load is done", || Ok(Some(text()).filter(|text| text.contains("done")))).with_context(text)
}

#[test]
fn the_numbers_agree_with_a_known_load() -> Result<()> {
    in_guest("the_numbers_agree_with_a_known_load", |bench| {
        let mut config = bench.pod();
        let uid = config.metadata.clone().unwrap_or_default().uid;
        let parent = format!("/numbers/pod{uid}");
        config.linux.as_mut().context("linux")?.cgroup_parent = parent.clone();
        let pod = bench.client.run(&config)?;
        let listener = std::net::TcpListener::bind("10.57.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let reader = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept()?;
            std::io::copy(&mut connection, &mut std::io::sink())
        });
        let limits = Resources {
            memory_limit_in_bytes: 400 << 20,
            cpu_quota: 100_000,
            cpu_period: 100_000,
            cpu_shares: 1024,
            ..Default::default()
        };
        let load = container(&config, "load", &["/probe", "load", "2000", "100", "50", "10", &address]);
        let id = bench.client.create(&pod, &config, &with_resources(load, limits))?;
        bench.client.start(&id)?;
        // By the kernel's clock of the process itself.
        let log = done(&config, "load")?;
        let used_us = log.split(' ').rev().nth(1).and_then(|word| word.parse::<u64>().ok()).with_context(|| log.clone())?;
        ensure!(used_us >= 2_000_000, "{log}");

        let stats = |id: &str| bench.client.container_stats(cri::ContainerStatsRequest { container_id: id.into() });
        let found = stats(&id)?.stats.context("statistics")?;
        let (cpu, memory) = (found.cpu.context("cpu")?, found.memory.context("memory")?);
        agrees("nanoseconds of processor time", number(cpu.usage_core_nano_seconds)?, used_us * 1000)?;
        agrees("bytes of memory", number(memory.rss_bytes)?, 100 * MIB)?;
        agrees("bytes of the writable layer", number(found.writable_layer.context("layer")?.used_bytes)?, 50 * MIB)?;
        ensure!(number(memory.available_bytes)? < 300 * MIB && cpu.psi.is_some() && memory.psi.is_some() && found.io.is_some());
        let reply = bench.client.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: pod.clone() })?;
        let linux = reply.stats.and_then(|stats| stats.linux).context("the pod's")?;
        let network = linux.network.and_then(|network| network.default_interface).context("an interface")?;
        agrees("bytes sent", number(network.tx_bytes)?, 10 * MIB)?;
        agrees("nanoseconds of the pod", number(linux.cpu.context("cpu of the pod")?.usage_core_nano_seconds)?, used_us * 1000)?;

        let metrics = Metrics::take(&bench.client)?;
        let own = [("name", id.as_str())];
        let leaf = Path::new(TREE).join(parent.trim_start_matches('/')).join(&id);
        for (name, file, key) in [
            ("container_memory_rss", "memory.stat", "anon "),
            ("container_memory_cache", "memory.stat", "file "),
            ("container_memory_mapped_file", "memory.stat", "file_mapped "),
            ("container_memory_kernel_usage", "memory.stat", "kernel "),
            ("container_cpu_cfs_throttled_periods_total", "cpu.stat", "nr_throttled "),
            ("container_oom_events_total", "memory.events", "oom_kill "),
        ] {
            let (told, now) = (metrics.value(name, &own)?, counter(&leaf, file, key)?);
            ensure!(told.abs_diff(now) <= now / 20, "{name} is {told}, and {file} says {now}");
        }
        for (name, file) in [
            ("container_memory_usage_bytes", "memory.current"),
            ("container_memory_max_usage_bytes", "memory.peak"),
            ("container_spec_memory_limit_bytes", "memory.max"),
            ("container_spec_memory_reservation_limit_bytes", "memory.min"),
            ("container_memory_swap", "memory.swap.current"),
            ("container_threads", "pids.current"),
        ] {
            let (told, now) = (metrics.value(name, &own)?, read(&leaf, file)?.parse::<u64>()?);
            ensure!(told.abs_diff(now) <= now / 20, "{name} is {told}, and {file} says {now}");
        }
        for (name, expected) in [
            ("container_cpu_usage_seconds_total", used_us / 1_000_000),
            ("container_spec_cpu_quota", 100_000),
            ("container_spec_cpu_period", 100_000),
            ("container_spec_cpu_shares", 1024),
            ("container_memory_failcnt", 0),
            ("container_threads_max", 0),
        ] {
            ensure!(metrics.value(name, &own)? == expected, "{name} is {:?}", metrics.values(name, &own));
        }
        agrees("bytes of the layer by metrics", metrics.value("container_fs_usage_bytes", &own)?, 50 * MIB)?;
        let faults = [own[0], ("failure_type", "pgfault"), ("scope", "container")];
        ensure!(metrics.value("container_memory_failures_total", &faults)? > 100 * MIB / 4096, "faults");
        for pressure in ["cpu", "memory", "io"] {
            for kind in ["stalled", "waiting"] {
                metrics.value(&format!("container_pressure_{pressure}_{kind}_seconds_total"), &own)?;
            }
        }
        // The pod's own cgroup tells the same for all of it.
        let whole = [("name", pod.as_str()), ("container", ""), ("id", parent.as_str())];
        ensure!(metrics.value("container_cpu_usage_seconds_total", &whole)? >= used_us / 1_000_000);
        ensure!(metrics.value("container_memory_rss", &whole)? >= 100 * MIB);
        agrees("bytes sent by metrics", metrics.value("container_network_transmit_bytes_total", &whole)?, 10 * MIB)?;
        bench.client.remove(&pod)?;
        reader.join().map_err(|_| anyhow::anyhow!("the reader"))??;
        fs::remove_dir(Path::new(TREE).join("numbers")).context("the pod's cgroup went with the pod")
    })
}

#[test]
fn block_devices_are_told_by_name() -> Result<()> {
    in_guest("block_devices_are_told_by_name", |bench| {
        let (image, mounted) = (bench.daemon.path("disk"), bench.daemon.path("data"));
        fs::create_dir(&mounted)?;
        fs::File::create(&image)?.set_len(100 * MIB)?;
        output_of("mkfs.ext4", &["-q", &image.to_string_lossy()])?;
        output_of("mount", &["-o", "loop", &image.to_string_lossy(), &mounted.to_string_lossy()])?;
        let config = bench.pod();
        let pod = bench.client.run(&config)?;
        let script = "dd if=/dev/zero of=/data/file bs=1M count=50 conv=fsync 2>/dev/null; echo done; exec sleep 1000";
        let mut load = container(&config, "writer", &["sh", "-c", script]);
        let mount = cri::Mount {
            container_path: "/data".into(),
            host_path: mounted.to_string_lossy().into_owned(),
            ..Default::default()
        };
        load.mounts.push(mount);
        let id = bench.client.create(&pod, &config, &load)?;
        bench.client.start(&id)?;
        let _ = done(&config, "writer")?;
        let metrics = Metrics::take(&bench.client)?;
        let device = [("name", id.as_str()), ("device", "/dev/loop0")];
        agrees("bytes written", metrics.value("container_fs_writes_bytes_total", &device)?, 50 * MIB)?;
        ensure!(metrics.value("container_fs_writes_total", &device)? > 0, "writes");
        let usage = [device[0], device[1], ("major", "7"), ("minor", "0"), ("operation", "Write")];
        agrees("bytes written by device", metrics.value("container_blkio_device_usage_total", &usage)?, 50 * MIB)?;
        bench.client.remove(&pod)?;
        output_of("umount", &[&mounted.to_string_lossy()]).map(drop)
    })
}
