//! What streams carry, and what they cost: exec and port-forward by client-go over SPDY, which all of the runtimes serve.

use super::{Peer, table::Table};
use crate::{client, streams};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};
use windlass_proto::cri;

/// The image whose containers serve a port, without the registry.
pub(super) const IMAGE: &str = "compare/streams:1";

const ROUNDS: usize = 3;
const EXEC_MIB: u64 = 512;
const FORWARD_MIB: u64 = 128;
/// Single connections in a round.
const CONNECTIONS: usize = 10;
const AT_ONCE: usize = 200;
/// Longest wait for the container to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(20);

/// A pod whose container serves a port.
struct Served<'a> {
    peer: &'a Peer,
    label: String,
    pod: String,
    container: String,
}

/// Measures the runtimes in turns; prints the table.
pub(super) fn measure(peers: &[Peer], image: &str) -> Result<()> {
    let logs = tempfile::tempdir()?;
    let mut table = Table::default();
    let served: Vec<Served<'_>> = peers.iter().map(|peer| up(peer, image, logs.path())).collect::<Result<_>>()?;
    for _ in 0..ROUNDS {
        for one in &served {
            let measured = exec(one, &mut table).and_then(|()| forward(one, &mut table));
            measured.with_context(|| format!("{}:\n{}", one.label, one.peer.rival.log()))?;
        }
    }
    for one in &served {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: one.pod.clone() };
        one.peer.client.stop_pod_sandbox(request).context("StopPodSandbox")?;
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: one.pod.clone() };
        one.peer.client.remove_pod_sandbox(request).context("RemovePodSandbox")?;
    }
    println!("\nStreams by client-go over SPDY, {ROUNDS} rounds in turns\n\n{}", table.markdown());
    Ok(())
}

fn up<'a>(peer: &'a Peer, image: &str, logs: &Path) -> Result<Served<'a>> {
    peer.pull(image)?;
    let config = client::pod(logs);
    fs::create_dir_all(&config.log_directory)?;
    let mut container = client::container(&config, "main", &["/probe", "echo", "80"]);
    container.image = Some(cri::ImageSpec { image: image.into(), user_specified_image: image.into(), ..Default::default() });
    let pod = peer.client.run(&config).context("RunPodSandbox")?;
    let id = peer.client.create(&pod, &config, &container).context("CreateContainer")?;
    peer.client.start(&id).context("StartContainer")?;
    let log = Path::new(&config.log_directory).join("main.log");
    let deadline = Instant::now() + LISTEN_LIMIT;
    while !fs::read_to_string(&log).unwrap_or_default().contains("listening") {
        ensure!(Instant::now() < deadline, "{}: the container does not listen", peer.rival.label());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Served { peer, label: peer.rival.label(), pod, container: id })
}

impl Served<'_> {
    fn client(&self, flags: &[&str], arguments: &[&str]) -> Result<serde_json::Value> {
        streams::client_in(Some(self.peer.rival.pid), &[streams::SPDY, flags].concat(), arguments, "")
    }

    fn exec_url(&self, script: &str, stdin: bool) -> Result<String> {
        let cmd = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        let container_id = self.container.clone();
        let request = cri::ExecRequest { container_id, cmd, stdin, stdout: true, ..Default::default() };
        self.peer.client.exec_url(request).context("Exec")
    }

    fn forward_url(&self) -> Result<String> {
        let request = cri::PortForwardRequest { pod_sandbox_id: self.pod.clone(), port: vec![80] };
        Ok(self.peer.client.port_forward(request).context("PortForward")?.url)
    }
}

fn seconds(answer: &serde_json::Value) -> Result<f64> {
    answer["seconds"].as_f64().with_context(|| format!("no time in {answer}"))
}

fn exec(served: &Served<'_>, table: &mut Table) -> Result<()> {
    let bytes = (EXEC_MIB << 20).to_string();
    // Large blocks, and an output that stays open: containerd ends the input with the output.
    let out = format!("dd if=/dev/zero bs=64k count={} 2>/dev/null", EXEC_MIB * 16);
    for (title, script, stdin) in [("in", "wc -c", true), ("out", out.as_str(), false), ("through cat", "cat", true)] {
        let url = served.exec_url(script, stdin)?;
        let flags: &[&str] = if stdin { &["-stdin", "-bytes", &bytes] } else { &[] };
        let cpu = served.peer.rival.cpu_seconds();
        let answer = served.client(flags, &["exec", &url])?;
        let cpu = served.peer.rival.cpu_seconds() - cpu;
        let arrived = if title == "in" {
            answer["stdout"]["head"] == format!("{bytes}\n")
        } else {
            answer["stdout"]["bytes"] == EXEC_MIB << 20
        };
        ensure!(answer["code"] == 0 && arrived, "exec {title}: {answer}");
        table.add(&format!("exec, {title}: MiB/s"), &served.label, EXEC_MIB as f64 / seconds(&answer)?);
        table.add(
            &format!("exec, {title}: CPU ms for a MiB, the command's included"),
            &served.label,
            cpu * 1e3 / EXEC_MIB as f64,
        );
    }
    Ok(())
}

fn forward(served: &Served<'_>, table: &mut Table) -> Result<()> {
    let bytes = (FORWARD_MIB << 20).to_string();
    let cpu = served.peer.rival.cpu_seconds();
    let answer = served.client(&["-bytes", &bytes], &["forward", &served.forward_url()?])?;
    let cpu = served.peer.rival.cpu_seconds() - cpu;
    ensure!(answer["same"] == 1, "port-forward: {answer}");
    table.add("port-forward, there and back: MiB/s", &served.label, FORWARD_MIB as f64 / seconds(&answer)?);
    let title = "port-forward, there and back: CPU ms for a MiB, the server's included";
    table.add(title, &served.label, cpu * 1e3 / FORWARD_MIB as f64);
    for _ in 0..CONNECTIONS {
        let answer = served.client(&["-bytes", "1"], &["forward", &served.forward_url()?])?;
        ensure!(answer["same"] == 1, "port-forward: {answer}");
        table.add("a forwarded connection with a byte there and back, ms", &served.label, seconds(&answer)? * 1e3);
    }
    let count = AT_ONCE.to_string();
    let answer = served.client(&["-connections", &count, "-bytes", "10000"], &["forward", &served.forward_url()?])?;
    let title = format!("{AT_ONCE} forwarded connections at once, 10 kB each, ms");
    if answer["same"].as_u64() == Some(AT_ONCE as u64) {
        table.add(&title, &served.label, seconds(&answer)? * 1e3);
    } else {
        println!("{}: {title}: {} went well", served.label, answer["same"]);
    }
    Ok(())
}
