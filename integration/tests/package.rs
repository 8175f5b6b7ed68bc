//! The Debian package in a clean Debian system: it installs, its programs run pods from there, an upgrade and a removal disturb none, and
//! after a purge nothing is left. Needs the packages' registry the first time.

use anyhow::{Context, Result, ensure};
use std::{fs, path::Path};
use windlass_integration::{
    client::{Client, container, pod},
    debian::{Debian, DebianNode},
    image, node, package,
};
use windlass_proto::cri;

const CONFIG: &str = "/etc/windlass/config.toml";
const MONITOR: &str = "/usr/libexec/windlass/windlass-monitor";

/// What the package brings, with its mode.
const FILES: [(&str, &str); 14] = [
    ("/usr/bin/windlass", "755"),
    ("/usr/bin/windlass-oci", "755"),
    (MONITOR, "755"),
    (CONFIG, "644"),
    ("/usr/lib/systemd/system/windlass.service", "644"),
    ("/usr/lib/systemd/system/windlass-cri.socket", "644"),
    ("/usr/lib/sysctl.d/50-windlass.conf", "644"),
    ("/usr/share/doc/windlass/examples/kubelet.yaml", "644"),
    ("/usr/share/doc/windlass/OPERATING.md", "644"),
    ("/usr/share/bash-completion/completions/windlass", "644"),
    ("/usr/share/zsh/vendor-completions/_windlass", "644"),
    ("/usr/share/fish/vendor_completions.d/windlass.fish", "644"),
    ("/usr/share/man/man1/windlass.1.gz", "644"),
    ("/usr/share/man/man1/windlass-image-pull.1.gz", "644"),
];

/// Where a container's process and its pod's monitor are: their ids, and the monitor's program.
fn processes(client: &Client, container: &str) -> Result<(String, u32)> {
    let request = cri::ContainerStatusRequest { container_id: container.into(), verbose: true };
    let reply = client.container_status(request)?;
    ensure!(reply.status.context("a status")?.state() == cri::ContainerState::ContainerRunning, "it does not run");
    let info: serde_json::Value = serde_json::from_str(reply.info.get("info").context("verbose information")?)?;
    let pid = info["pid"].as_u64().context("its process id")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).context("its parent")?.trim().parse()?;
    let program = fs::read_link(format!("/proc/{parent}/exe"))?.to_string_lossy().into_owned();
    Ok((program, parent))
}

fn install(node: &DebianNode, package: &Path, name: &str) -> Result<String> {
    let file = format!("/tmp/{name}.deb");
    fs::copy(package, node.system.path(&file)).context("copy the package")?;
    node.system.run(&["dpkg", "--install", &file])
}

#[test]
fn the_package_installs_runs_pods_is_upgraded_under_them_and_leaves_nothing() -> Result<()> {
    Debian::prepare()?;
    let directory = tempfile::tempdir()?;
    let first = package::make(directory.path())?;
    let second = package::later(&first)?;
    node::run(move || life_of_the_package(&first, &second))
}

fn life_of_the_package(first: &Path, second: &Path) -> Result<()> {
    let mut node = DebianNode::start("package")?;
    let before = node.system.files()?;
    install(&node, first, "first")?;
    is_installed(&node.system)?;

    // The administrator's own words in the configuration.
    let config = fs::read_to_string(node.system.path(CONFIG))?;
    let own = config.replace("parent = \"/windlass\"", &format!("parent = {:?}", node.cgroup));
    ensure!(own != config, "the configuration names no parent of cgroups");
    fs::write(node.system.path(CONFIG), &own)?;
    let archive = node.system.path("/tmp/image.tar");
    image::write_archive(&archive)?;

    let client = node.serve()?;
    node.system.run(&["windlass", "image", "import", "/tmp/image.tar"])?;
    let config = pod(Path::new("/tmp/logs"));
    let id = client.run(&config)?;
    let main = client.create(&id, &config, &container(&config, "main", &["sh", "-c", "echo begun; sleep 1000"]))?;
    client.start(&main)?;
    let running = processes(&client, &main)?;
    ensure!(running.0 == MONITOR, "the monitor is {}", running.0);
    ensure!(client.pod(&id)?.network.is_some_and(|network| !network.ip.is_empty()), "the pod has no address");

    // The new package's files are there while the old daemon runs, which goes on with what it has.
    install(&node, second, "second")?;
    ensure!(fs::read_to_string(node.system.path(CONFIG))? == own, "the configuration was not kept");
    let other = client.run(&pod(Path::new("/tmp/logs")))?;
    node.stop()?;
    let client = node.serve()?;
    ensure!(processes(&client, &main)?.1 == running.1, "another monitor");
    client.remove(&other)?;

    node.stop()?;
    node.system.run(&["dpkg", "--remove", "windlass"])?;
    ensure!(!node.system.path(MONITOR).exists() && node.system.path(CONFIG).exists(), "removed, but for the configuration");
    ensure!(Path::new(&format!("/proc/{}", running.1)).exists(), "the removal ended a pod");
    let said = node.system.run(&["dpkg", "--purge", "windlass"])?;
    ensure!(said.contains("pods still run") && node.system.path("/var/lib/windlass").exists(), "{said}");

    install(&node, second, "second")?;
    fs::write(node.system.path(CONFIG), &own)?;
    let client = node.serve()?;
    ensure!(processes(&client, &main)?.1 == running.1, "another monitor");
    ensure!(client.shell(&main, "echo here")? == "here");
    let log = fs::read_to_string(node.system.path(&config.log_directory).join("main.log"))?;
    ensure!(log.contains("begun"), "{log:?}");
    client.remove(&id)?;
    node.stop()?;
    node.system.run(&["dpkg", "--purge", "windlass"])?;
    nothing_is_left(&node, &before)
}

fn is_installed(system: &Debian) -> Result<()> {
    ensure!(system.run(&["dpkg-query", "-W", "-f", "${Status}", "windlass"])? == "install ok installed");
    ensure!(system.run(&["dpkg", "--audit"])?.is_empty());
    for (path, mode) in FILES {
        let found = system.run(&["stat", "-c", "%a %U:%G", path])?;
        ensure!(found.trim() == format!("{mode} root:root"), "{path}: {found}");
    }
    let units = ["/usr/lib/systemd/system/windlass.service", "/usr/lib/systemd/system/windlass-cri.socket"];
    let said = system.run(&["systemd-analyze", "verify", "--man=no", units[0], units[1]])?;
    ensure!(said.is_empty(), "systemd-analyze verify: {said}");
    ensure!(system.run(&["systemctl", "--root=/", "is-enabled", "windlass.service"])?.trim() == "enabled");
    let socket = system.output(&["systemctl", "--root=/", "is-enabled", "windlass-cri.socket"])?;
    ensure!(String::from_utf8_lossy(&socket.stdout).trim() == "disabled", "{socket:?}");
    let sysctls = fs::read_to_string(system.path("/usr/lib/sysctl.d/50-windlass.conf"))?;
    for key in sysctls.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(" = ")) {
        ensure!(Path::new("/proc/sys").join(key.0.replace('.', "/")).exists(), "there is no sysctl {}", key.0);
    }
    ensure!(system.run(&["windlass", "--help"])?.contains("Serve the CRI"));
    ensure!(system.run(&["windlass-oci", "--version"])?.contains(env!("CARGO_PKG_VERSION")));
    Ok(())
}

fn nothing_is_left(node: &DebianNode, before: &[String]) -> Result<()> {
    let after = node.system.files()?;
    let left: Vec<&String> = after.iter().filter(|path| before.binary_search(path).is_err()).collect();
    let gone: Vec<&String> = before.iter().filter(|path| after.binary_search(path).is_err()).collect();
    ensure!(left.is_empty() && gone.is_empty(), "left behind: {left:#?}\ngone: {gone:#?}");
    let run = fs::read_dir(node.system.path("/run"))?.flatten().map(|entry| entry.file_name());
    let run: Vec<_> = run.filter(|name| name.to_string_lossy().contains("windlass")).collect();
    ensure!(run.is_empty(), "left in /run: {run:?}");
    ensure!(!node.cgroup_directory().exists(), "a cgroup is left");
    Ok(())
}
