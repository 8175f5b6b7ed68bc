//! `cargo xtask demo`: a pod from nothing, seen from both sides, and gone without a trace.

use crate::{
    build,
    client::{self, Client},
    daemon::Daemon,
    leak::Snapshot,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};
use windlass_proto::cri;

/// Proportional set size of a process in KiB.
fn pss_kib(pid: i32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss line")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

struct Steps(Vec<(&'static str, Duration)>);

impl Steps {
    fn time<T>(&mut self, name: &'static str, step: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = step()?;
        self.0.push((name, start.elapsed()));
        Ok(result)
    }
}

/// Builds, runs one pod on this machine under a temporary root, shows it, removes it, and checks that nothing is left.
pub fn run() -> Result<()> {
    build::all()?;
    let mut daemon = Daemon::prepare(&[])?;
    let before = Snapshot::take(&daemon)?;
    let mut steps = Steps(Vec::new());
    let archive = daemon.path("images.tar");
    crate::image::write_archive(&archive)?;
    let imported = steps.time("import the image", || daemon.windlass(&["image", "import", &archive.to_string_lossy()]))?;
    fs::remove_file(archive)?;
    println!("\n==> image made from this machine's busybox\n    {}", imported.trim());
    steps.time("start the daemon", || daemon.serve())?;
    let client = Client::connect(&daemon)?;
    show(&daemon, &client, &mut steps)?;
    daemon.stop()?;
    println!("\n==> how long each step took");
    for (name, elapsed) in &steps.0 {
        println!("    {name:<28} {:>8.2} ms", elapsed.as_secs_f64() * 1e3);
    }
    before.expect_again(&daemon).context("the pod left something behind")?;
    println!("\n==> mounts, links, rules, namespaces, cgroups, processes and records are as before: nothing is left");
    println!("demo passed");
    Ok(())
}

fn show(daemon: &Daemon, client: &Client, steps: &mut Steps) -> Result<()> {
    let config = client::pod(&daemon.path("logs"));
    let id = steps.time("RunPodSandbox", || Ok(client.run(&config)?))?;
    let address = client.pod(&id)?.network.context("the pod has no network")?.ip;
    println!("\n==> pod {} is ready at {address}", &id[..13]);
    let mut wanted = client::container(
        &config,
        "main",
        &["sh", "-c", "trap 'exit 0' TERM; echo \"hello from pid $$ on $(hostname)\"; sleep 3600 & wait"],
    );
    let resources = cri::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        ..Default::default()
    };
    wanted.linux.get_or_insert_default().resources = Some(resources);
    let container = steps.time("CreateContainer", || Ok(client.create(&id, &config, &wanted)?))?;
    steps.time("StartContainer", || Ok(client.start(&container)?))?;
    let log = Path::new(&config.log_directory).join("main.log");
    let line = steps.time("first log line after that", || first_line(&log))?;
    println!("    log   {line}");
    let exec = steps.time("ExecSync", || Ok(client.exec(&container, &["ps", "-o", "pid,args"])?))?;
    println!("    exec `ps`\n{}", indent(&String::from_utf8_lossy(&exec.stdout)));
    both_sides(daemon, client, &container)?;
    steps.time("StopContainer", || Ok(client.stop(&container, 5)?))?;
    let stop = cri::StopPodSandboxRequest { pod_sandbox_id: id.clone() };
    steps.time("StopPodSandbox", || Ok(client.stop_pod_sandbox(stop)?))?;
    let remove = cri::RemovePodSandboxRequest { pod_sandbox_id: id };
    steps.time("RemovePodSandbox", || Ok(client.remove_pod_sandbox(remove)?))?;
    Ok(())
}

fn first_line(log: &Path) -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(line) = fs::read_to_string(log).unwrap_or_default().lines().next() {
            return Ok(line.to_owned());
        }
        ensure!(Instant::now() < deadline, "no log line within 10 s");
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("          {line}")).collect::<Vec<_>>().join("\n")
}

/// The container as the host sees it: a process like any other, with another view.
fn both_sides(daemon: &Daemon, client: &Client, container: &str) -> Result<()> {
    let request = cri::ContainerStatusRequest { container_id: container.into(), verbose: true };
    let info = client.container_status(request)?.info;
    let info: serde_json::Value = serde_json::from_str(info.get("info").context("verbose information")?)?;
    let pid = i32::try_from(info["pid"].as_i64().unwrap_or(0)).context("pid")?;
    println!("==> one process, two views: pid 1 inside, pid {pid} on the host");
    for name in ["mnt", "pid", "net", "ipc", "uts", "cgroup", "user", "time"] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{name}")).unwrap_or_default();
        let (theirs, ours) = (of(&pid.to_string()), of("self"));
        println!("    {name:<7} {:<22} {}", theirs.display(), if theirs == ours { "the host's" } else { "its own" });
    }
    println!("    cgroup  {}", info["cgroup"].as_str().unwrap_or_default());
    for file in ["memory.max", "cpu.max", "pids.max"] {
        let path = Path::new(info["cgroup"].as_str().unwrap_or_default()).join(file);
        if let Ok(text) = fs::read_to_string(&path) {
            println!("            {file} = {}", text.trim());
        }
    }
    if let Some(missing) = info["notEnforced"].as_array().filter(|list| !list.is_empty()) {
        println!("            not enforced, this host's cgroup v2 tree lacks the controllers: {}", serde_json::json!(missing));
    }
    for layer in info["chainIDs"].as_array().into_iter().flatten() {
        println!("    layer   {}", layer.as_str().unwrap_or_default());
    }
    let monitors = daemon.monitors();
    let monitor = monitors.first().copied().context("the pod's monitor")?;
    println!("    memory  {:>6} KiB the container's own processes (PSS)", pss_kib(pid)?);
    println!("            {:>6} KiB the pod's monitor, all that the runtime adds for a pod", pss_kib(monitor)?);
    if let Some(daemon) = daemon.pid() {
        println!("            {:>6} KiB the daemon, once for the node", pss_kib(daemon.cast_signed())?);
    }
    println!("            a virtual machine's guest system would take 100,000 to 200,000 KiB");
    Ok(())
}
