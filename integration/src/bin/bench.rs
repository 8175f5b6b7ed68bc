//! Times every phase of a pod's life against a CRI socket, and weighs what the runtime keeps in memory for it.
//! Speaks only the CRI, so that it measures any runtime the same way.

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tonic::transport::{Channel, Endpoint};
use windlass_proto::cri::{self, runtime_service_client::RuntimeServiceClient};

/// Benchmark of one CRI runtime.
#[derive(Debug, Parser)]
struct Options {
    /// The runtime's socket.
    #[arg(long)]
    socket: PathBuf,
    /// Image that has /bin/sh, echo, sleep and true; must be on the node.
    #[arg(long, default_value = "busybox")]
    image: String,
    /// Pods measured for each kind of network.
    #[arg(long, default_value_t = 30)]
    pods: usize,
    /// Pods that are kept at once while memory is measured; 0 leaves it out.
    #[arg(long, default_value_t = 50)]
    idle_pods: usize,
    /// Process id of the daemon, for its memory.
    #[arg(long)]
    daemon_pid: Option<i32>,
    /// Text in the command line of every process that the runtime keeps for a pod, for their memory.
    #[arg(long, default_value = "windlass-monitor")]
    helper: String,
}

/// Longest wait for a container's first log line.
const LINE_LIMIT: Duration = Duration::from_secs(60);

struct Bench {
    client: RuntimeServiceClient<Channel>,
    image: String,
    logs: tempfile::TempDir,
    serial: usize,
}

/// Milliseconds of every measured call, by phase.
type Samples = BTreeMap<&'static str, Vec<f64>>;

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    let endpoint = Endpoint::from_shared(format!("unix://{}", options.socket.display()))?;
    let channel = endpoint.connect().await.with_context(|| format!("connect {}", options.socket.display()))?;
    let mut bench =
        Bench { client: RuntimeServiceClient::new(channel), image: options.image.clone(), logs: tempfile::tempdir()?, serial: 0 };
    for (title, host_network) in [("host network", true), ("pod network", false)] {
        let mut samples = Samples::new();
        bench.life(host_network, &mut Samples::new()).await?;
        for _ in 0..options.pods {
            bench.life(host_network, &mut samples).await?;
        }
        report(title, &mut samples);
    }
    if options.idle_pods > 0 {
        bench.memory(options.idle_pods, options.daemon_pid, &options.helper).await?;
    }
    Ok(())
}

fn report(title: &str, samples: &mut Samples) {
    println!("{title}: min / median / p95 in ms");
    for (phase, values) in samples {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| values.get(((values.len() - 1) as f64 * share).round() as usize).copied().unwrap_or(f64::NAN);
        println!("  {phase:<28} {:>8.2} {:>8.2} {:>8.2}", at(0.0), at(0.5), at(0.95));
    }
}

impl Bench {
    fn pod_config(&mut self, host_network: bool) -> Result<cri::PodSandboxConfig> {
        self.serial += 1;
        let name = format!("bench-{}-{}", std::process::id(), self.serial);
        let directory = self.logs.path().join(&name);
        fs::create_dir(&directory)?;
        let network = if host_network { cri::NamespaceMode::Node } else { cri::NamespaceMode::Pod };
        let options =
            cri::NamespaceOption { network: network.into(), pid: cri::NamespaceMode::Container.into(), ..Default::default() };
        Ok(cri::PodSandboxConfig {
            metadata: Some(cri::PodSandboxMetadata {
                name: name.clone(),
                uid: name.clone(),
                namespace: "bench".into(),
                attempt: 0,
            }),
            hostname: if host_network { String::new() } else { name },
            log_directory: directory.to_string_lossy().into_owned(),
            linux: Some(cri::LinuxPodSandboxConfig {
                security_context: Some(cri::LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    fn container_config(&self, pod: &cri::PodSandboxConfig) -> cri::ContainerConfig {
        let options =
            pod.linux.as_ref().and_then(|linux| linux.security_context.as_ref()).and_then(|s| s.namespace_options.clone());
        cri::ContainerConfig {
            metadata: Some(cri::ContainerMetadata { name: "main".into(), attempt: 0 }),
            image: Some(cri::ImageSpec { image: self.image.clone(), ..Default::default() }),
            command: ["/bin/sh", "-c", "echo ready; trap 'exit 0' TERM; sleep 3600 & wait"].map(str::to_owned).into(),
            log_path: "main.log".into(),
            linux: Some(cri::LinuxContainerConfig {
                security_context: Some(cri::LinuxContainerSecurityContext { namespace_options: options, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Starts a pod with one container; returns their ids once its first log line is there.
    async fn up(&mut self, host_network: bool, samples: &mut Samples) -> Result<(String, String)> {
        let mut timed = |phase: &'static str, since: Instant| {
            samples.entry(phase).or_default().push(since.elapsed().as_secs_f64() * 1e3);
        };
        let config = self.pod_config(host_network)?;
        let begin = Instant::now();
        let request = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let pod = self.client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
        timed("1 RunPodSandbox", begin);
        let step = Instant::now();
        let container = self.container_config(&config);
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: pod.clone(),
            config: Some(container),
            sandbox_config: Some(config.clone()),
        };
        let id = self.client.create_container(request).await?.into_inner().container_id;
        timed("2 CreateContainer", step);
        let step = Instant::now();
        self.client.start_container(cri::StartContainerRequest { container_id: id.clone() }).await?;
        timed("3 StartContainer", step);
        wait_for_line(&Path::new(&config.log_directory).join("main.log"))?;
        timed("4 cold start to log line", begin);
        Ok((pod, id))
    }

    async fn life(&mut self, host_network: bool, samples: &mut Samples) -> Result<()> {
        let (pod, container) = self.up(host_network, samples).await?;
        let mut timed = |phase: &'static str, since: Instant| {
            samples.entry(phase).or_default().push(since.elapsed().as_secs_f64() * 1e3);
        };
        for _ in 0..3 {
            let step = Instant::now();
            let request = cri::ExecSyncRequest { container_id: container.clone(), cmd: vec!["/bin/true".into()], timeout: 10 };
            let reply = self.client.exec_sync(request).await?.into_inner();
            timed("5 ExecSync true", step);
            if reply.exit_code != 0 {
                bail!("exec of true gave {}", reply.exit_code);
            }
        }
        let begin = Instant::now();
        self.client.stop_container(cri::StopContainerRequest { container_id: container.clone(), timeout: 10 }).await?;
        timed("6 StopContainer", begin);
        let step = Instant::now();
        self.client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.clone() }).await?;
        timed("7 StopPodSandbox", step);
        let step = Instant::now();
        self.client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id: pod }).await?;
        timed("8 RemovePodSandbox", step);
        timed("9 teardown (6 to 8)", begin);
        Ok(())
    }

    async fn memory(&mut self, count: usize, daemon: Option<i32>, helper: &str) -> Result<()> {
        let before = daemon.map(pss_kib).transpose()?;
        let mut pods = Vec::new();
        for _ in 0..count {
            pods.push(self.up(false, &mut Samples::new()).await?.0);
        }
        let after = daemon.map(pss_kib).transpose()?;
        let helpers = processes_with(helper)?;
        anyhow::ensure!(!helpers.is_empty(), "no process has {helper:?} in its command line; give --helper");
        let processes = helpers.len();
        let helpers: u64 = helpers.into_iter().filter_map(|pid| pss_kib(pid).ok()).sum();
        println!(
            "memory with {count} idle pods (PSS): {processes} helper processes, {:.0} KiB for a pod",
            helpers as f64 / count as f64
        );
        if let (Some(before), Some(after)) = (before, after) {
            let growth = after.saturating_sub(before);
            println!(
                "  daemon {before} -> {after} KiB; helpers and growth {:.0} KiB for a pod",
                (helpers + growth) as f64 / count as f64
            );
        }
        for pod_sandbox_id in pods {
            self.client.remove_pod_sandbox(cri::RemovePodSandboxRequest { pod_sandbox_id }).await?;
        }
        Ok(())
    }
}

fn wait_for_line(log: &Path) -> Result<()> {
    let deadline = Instant::now() + LINE_LIMIT;
    while !fs::metadata(log).is_ok_and(|metadata| metadata.len() > 0) {
        if Instant::now() > deadline {
            bail!("no line in {} within {LINE_LIMIT:?}", log.display());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

/// Proportional set size of a process in KiB.
fn pss_kib(pid: i32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss line")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

/// Processes that have `text` in their command line, but for this one.
fn processes_with(text: &str) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        if let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok())
            && pid != std::process::id().cast_signed()
            && fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| line.windows(text.len()).any(|window| window == text.as_bytes()))
        {
            found.push(pid);
        }
    }
    Ok(found)
}
