//! The life of a pod, phase by phase, in turns; many at once; and probes.

use super::{Peer, table::Table};
use crate::client::{self, Client};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};
use windlass_proto::cri;

/// Longest wait for a container's first log line.
const LINE_LIMIT: Duration = Duration::from_secs(20);
/// Pods that are started and ended at once.
const AT_ONCE: usize = 10;
/// Probes each second, and for how long.
const PROBES: usize = 100;
const PROBE_SECONDS: usize = 5;

/// Measures the wanted parts with runtimes that serve.
pub(super) fn measure(peers: &[Peer], pods: usize, wants: &dyn Fn(&str) -> bool) -> Result<()> {
    let logs = tempfile::tempdir()?;
    if wants("start") || wants("cni") {
        for (title, host) in [("on a pod network of its own", false), ("on the host's network", true)] {
            let mut table = Table::default();
            for round in 0..=pods {
                for peer in peers {
                    // The first round warms.
                    let mut unused = Table::default();
                    life(peer, logs.path(), host, if round > 0 { &mut table } else { &mut unused })?;
                }
            }
            println!(
                "\nA pod {title}, {pods} in turns, ms: median (p95), and the median's ratio to Windlass's\n\n{}",
                table.markdown()
            );
        }
    }
    if wants("parallel") {
        let mut table = Table::default();
        for _ in 0..5 {
            for peer in peers {
                at_once(peer, logs.path(), &mut table)?;
            }
        }
        println!("\n{AT_ONCE} pods at once on pod networks, 5 rounds, ms\n\n{}", table.markdown());
    }
    if wants("exec") {
        let mut table = Table::default();
        for peer in peers {
            probes(peer, logs.path(), &mut table)?;
        }
        println!("\n{PROBES} probes each second for {PROBE_SECONDS} s by ExecSync of /bin/true\n\n{}", table.markdown());
    }
    Ok(())
}

/// A pod with one container that has said its first line.
pub(super) struct Running {
    pub(super) pod: String,
    pub(super) container: String,
}

/// Starts a pod with one container; tells `took` the phases.
pub(super) fn up(
    client: &Client,
    image: &str,
    logs: &Path,
    host: bool,
    took: &mut dyn FnMut(&'static str, Duration),
) -> Result<Running> {
    let mut config = client::pod(logs);
    if host {
        config = client::host_network(config);
    }
    fs::create_dir_all(&config.log_directory)?;
    let script = ["/bin/sh", "-c", "echo ready; trap 'exit 0' TERM; sleep 3600 & wait"];
    let mut container = client::container(&config, "main", &script);
    container.image = Some(cri::ImageSpec { image: image.into(), user_specified_image: image.into(), ..Default::default() });
    let begin = Instant::now();
    let pod = client.run(&config).context("RunPodSandbox")?;
    took("RunPodSandbox", begin.elapsed());
    let step = Instant::now();
    let id = client.create(&pod, &config, &container).context("CreateContainer")?;
    took("CreateContainer", step.elapsed());
    let step = Instant::now();
    client.start(&id).context("StartContainer")?;
    took("StartContainer", step.elapsed());
    wait_for_line(&Path::new(&config.log_directory).join("main.log"))?;
    took("cold start to the first log line", begin.elapsed());
    Ok(Running { pod, container: id })
}

pub(super) fn wait_for_line(log: &Path) -> Result<()> {
    let deadline = Instant::now() + LINE_LIMIT;
    while !fs::metadata(log).is_ok_and(|metadata| metadata.len() > 0) {
        if Instant::now() > deadline {
            bail!("no line in {} within {LINE_LIMIT:?}", log.display());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// Ends and removes it; tells `took` the phases.
pub(super) fn down(client: &Client, running: &Running, took: &mut dyn FnMut(&'static str, Duration)) -> Result<()> {
    let begin = Instant::now();
    client.stop(&running.container, 10).context("StopContainer")?;
    took("StopContainer", begin.elapsed());
    let step = Instant::now();
    client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: running.pod.clone() }).context("StopPodSandbox")?;
    took("StopPodSandbox", step.elapsed());
    let step = Instant::now();
    client
        .remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: running.pod.clone() })
        .context("RemovePodSandbox")?;
    took("RemovePodSandbox", step.elapsed());
    took("these three together", begin.elapsed());
    Ok(())
}

fn life(peer: &Peer, logs: &Path, host: bool, table: &mut Table) -> Result<()> {
    let label = peer.rival.label();
    let mut samples = Vec::new();
    let mut took = |phase: &'static str, time: Duration| samples.push((phase, time));
    let cpu = peer.rival.cpu_seconds();
    let failed = || format!("{label}:\n{}", peer.rival.log());
    let running = up(&peer.client, &peer.image, logs, host, &mut took).with_context(failed)?;
    for _ in 0..3 {
        let step = Instant::now();
        let reply = peer.client.exec(&running.container, &["/bin/true"]).with_context(failed)?;
        ensure!(reply.exit_code == 0, "{label}: exec of true gave {}", reply.exit_code);
        took("ExecSync of true", step.elapsed());
    }
    down(&peer.client, &running, &mut took).with_context(failed)?;
    for (phase, time) in samples {
        table.add(phase, &label, time.as_secs_f64() * 1e3);
    }
    table.add("CPU of it all, 3 execs included", &label, (peer.rival.cpu_seconds() - cpu) * 1e3);
    Ok(())
}

fn at_once(peer: &Peer, logs: &Path, table: &mut Table) -> Result<()> {
    let each = |work: &(dyn Fn(&Client) -> Result<Running> + Sync)| -> Result<Vec<Running>> {
        std::thread::scope(|scope| {
            let spawn = |_| scope.spawn(|| work(&Client::connect_to(&peer.rival.socket)?));
            let threads: Vec<_> = (0..AT_ONCE).map(spawn).collect();
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        })
    };
    let begin = Instant::now();
    let running = each(&|client| up(client, &peer.image, logs, false, &mut |_, _| ()))?;
    table.add("all are ready", &peer.rival.label(), begin.elapsed().as_secs_f64() * 1e3);
    let left = std::sync::Mutex::new(running);
    let begin = Instant::now();
    each(&|client| {
        let one = left.lock().ok().and_then(|mut left| left.pop()).context("a pod is left")?;
        down(client, &one, &mut |_, _| ()).map(|()| one)
    })?;
    table.add("all are gone", &peer.rival.label(), begin.elapsed().as_secs_f64() * 1e3);
    Ok(())
}

/// Sends probes at their times, each when it is due or as soon as the one before is back, on four connections.
fn probes(peer: &Peer, logs: &Path, table: &mut Table) -> Result<()> {
    let label = peer.rival.label();
    let running = up(&peer.client, &peer.image, logs, true, &mut |_, _| ())?;
    let (cpu, begin) = (peer.rival.cpu_seconds(), Instant::now());
    let connections = 4;
    let samples: Vec<f64> = std::thread::scope(|scope| -> Result<Vec<f64>> {
        let spawn = |number: usize| {
            let container = running.container.clone();
            scope.spawn(move || -> Result<Vec<f64>> {
                let client = Client::connect_to(&peer.rival.socket)?;
                let mut samples = Vec::new();
                for probe in (number..PROBES * PROBE_SECONDS).step_by(connections) {
                    let due = begin + Duration::from_secs_f64(probe as f64 / PROBES as f64);
                    std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    let reply = client.exec(&container, &["/bin/true"])?;
                    ensure!(reply.exit_code == 0, "exec of true gave {}", reply.exit_code);
                    // From when it was due: what waits for others counts.
                    samples.push(due.elapsed().as_secs_f64() * 1e3);
                }
                Ok(samples)
            })
        };
        let threads: Vec<_> = (0..connections).map(spawn).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(all)
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    let cpu = peer.rival.cpu_seconds() - cpu;
    for sample in samples {
        table.add("ms from when it was due to its reply", &label, sample);
    }
    table.add("CPU ms for a probe", &label, cpu * 1e3 / (PROBES * PROBE_SECONDS) as f64);
    table.add("CPU percent of one core", &label, cpu * 100.0 / seconds);
    down(&peer.client, &running, &mut |_, _| ())
}
