//! What runs in the guest: Docker, and kind as a user calls it.

use super::IMAGE as NODE_IMAGE;
use crate::{image, kubelet::CLOCK, node::run_command, process::Process, setup, wait::until_within};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Files of the directory that host and guest share: the node image, another image, and where the programs are.
pub(super) const NODE: &str = "node.tar";
pub(super) const IMAGE: &str = "image.tar";
const SETTING: &str = "setting.json";

/// The cluster's name, and its one node's.
const CLUSTER: &str = "windlass";
const CONTROL_PLANE: &str = "windlass-control-plane";

/// Longest wait for Docker, for the node, and for pods.
const DOCKER_LIMIT: Duration = Duration::from_secs(120);
const READY: &str = "10m";
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// What the node sees as /proc/cpuinfo.
const CPU_INFO: &str = "/tmp/cpuinfo";

/// What a user's configuration has no need of: the clock, a mode of kube-proxy that needs fewer programs in its image, and patience with a
/// machine of one processor that is an ordinary process.
const NODE_FIELDS: &str = "- role: control-plane
  extraMounts:
  - hostPath: /tmp/cpuinfo
    containerPath: /proc/cpuinfo
    readOnly: true
";
const MORE: &str = r#"- |
  kind: InitConfiguration
  timeouts:
    controlPlaneComponentHealthCheck: 10m
    kubeletHealthCheck: 10m
    kubernetesAPICall: 5m
- |
  kind: ClusterConfiguration
  etcd:
    local:
      extraArgs:
      - { name: unsafe-no-fsync, value: "true" }
  controllerManager:
    extraArgs:
    - { name: leader-elect, value: "false" }
  scheduler:
    extraArgs:
    - { name: leader-elect, value: "false" }
networking:
  kubeProxyMode: nftables
"#;

/// Where the programs are.
#[derive(Serialize, Deserialize)]
pub(super) struct Setting {
    /// The folder that Debian's packages of Docker were unpacked into.
    pub(super) docker: PathBuf,
    pub(super) kind: PathBuf,
    pub(super) kubectl: PathBuf,
}

impl Setting {
    pub(super) fn write(&self, directory: &Path) -> Result<()> {
        fs::write(directory.join(SETTING), serde_json::to_vec(self)?).context("write the guest's setting")
    }
}

/// Commands of a user, each with the time that it took.
struct User {
    setting: Setting,
    path: String,
}

impl User {
    fn command(&self, program: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(words).env("PATH", &self.path).env("KUBECONFIG", "/tmp/kubeconfig").stdin(Stdio::null());
        command
    }

    /// What a command that must succeed prints.
    fn output(&self, program: &Path, words: &[&str]) -> Result<String> {
        let output = self.command(program, words).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "{} {}: {}", program.display(), words.join(" "), output.status);
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a command that must succeed, with its output shown.
    fn step(&self, program: &Path, words: &[&str]) -> Result<()> {
        let (name, begun) = (program.file_name().unwrap_or_default().to_string_lossy(), Instant::now());
        println!("==> {name} {}", words.join(" "));
        let status = self.command(program, words).status().with_context(|| format!("run {name}"))?;
        ensure!(status.success(), "{name} {}: {status}", words.join(" "));
        println!("    {:.1} s", begun.elapsed().as_secs_f64());
        Ok(())
    }

    fn docker(&self) -> PathBuf {
        self.setting.docker.join("usr/bin/docker")
    }

    fn kubectl(&self, words: &[&str]) -> Result<String> {
        self.output(&self.setting.kubectl, words)
    }

    /// Waits until what it names holds.
    fn wait(&self, words: &[&str]) -> Result<()> {
        self.step(&self.setting.kubectl, &[&["wait", "--timeout", READY], words].concat())
    }
}

/// Everything, in the guest. `directory` is the one that the host shares.
///
/// # Errors
/// Where a step fails; the logs of Docker and, where there is a node, of kind's cluster are in the directory.
pub fn run(directory: &Path) -> Result<()> {
    let setting: Setting = serde_json::from_slice(&fs::read(directory.join(SETTING))?)?;
    let usual = env::var("PATH").unwrap_or_default();
    let folders = ["usr/bin", "usr/sbin"].map(|folder| setting.docker.join(folder).to_string_lossy().into_owned());
    let user = User { path: format!("{}:{usual}", folders.join(":")), setting };
    let _docker = start_docker(&user, directory)?;
    let used = use_kind(&user, directory);
    if used.is_err() {
        let _ = user.step(&user.docker(), &["logs", "--tail", "20", CONTROL_PLANE]);
        let _ = user.step(&user.setting.kubectl, &["get", "nodes,pods", "--all-namespaces", "--output", "wide"]);
        let _ = user.step(&user.docker(), &["exec", CONTROL_PLANE, "journalctl", "--no-pager", "--lines", "40"]);
    }
    used
}

/// Docker with the guest's disk. Ends with the value.
fn start_docker(user: &User, directory: &Path) -> Result<Process> {
    fs::write(CPU_INFO, fs::read_to_string("/proc/cpuinfo")? + CLOCK)?;
    fs::create_dir_all("/var/lib/docker")?;
    // What was written need not outlive the guest.
    run_command("mount", &["-o", "noatime,nobarrier", "/dev/ubda", "/var/lib/docker"])?;
    let begun = Instant::now();
    println!("==> dockerd");
    let log = File::create(directory.join("docker.log"))?;
    let mut command = user.command(&user.setting.docker.join("usr/sbin/dockerd"), &["--storage-driver", "overlay2"]);
    let libraries = ["usr/lib", "lib"].map(|folder| user.setting.docker.join(folder).join(LIBRARIES));
    command.env("LD_LIBRARY_PATH", env::join_paths(libraries)?).stdout(log.try_clone()?).stderr(log);
    let mut docker = Process::from(command.spawn().context("start dockerd")?);
    until_within(DOCKER_LIMIT, "Docker answers", || {
        if let Some(status) = docker.try_wait()? {
            anyhow::bail!("dockerd ended with {status}:\n{}", fs::read_to_string(directory.join("docker.log"))?);
        }
        let asked = user.command(&user.docker(), &["version"]).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        Ok(asked.success().then_some(()))
    })?;
    println!("    {:.1} s", begun.elapsed().as_secs_f64());
    Ok(docker)
}

/// Debian's folder of libraries.
const LIBRARIES: &str = if cfg!(target_arch = "aarch64") { "aarch64-linux-gnu" } else { "x86_64-linux-gnu" };

fn use_kind(user: &User, directory: &Path) -> Result<()> {
    let (docker, kind) = (user.docker(), user.setting.kind.clone());
    let file = |name: &str| directory.join(name).to_string_lossy().into_owned();
    user.step(&docker, &["load", "--quiet", "--input", &file(NODE)])?;
    let config = file("cluster.yaml");
    fs::write(&config, configuration()?)?;
    user.step(
        &kind,
        &["create", "cluster", "--name", CLUSTER, "--image", NODE_IMAGE, "--config", &config, "--wait", READY, "--retain"],
    )?;
    let runtime =
        user.kubectl(&["get", "node", CONTROL_PLANE, "--output", "jsonpath={.status.nodeInfo.containerRuntimeVersion}"])?;
    ensure!(runtime.starts_with("windlass://"), "the node's runtime is {runtime}");
    user.wait(&["node", CONTROL_PLANE, "--for", "condition=Ready"])?;
    user.wait(&["pods", "--namespace", "kube-system", "--all", "--for", "condition=Ready"])?;

    user.step(&docker, &["load", "--quiet", "--input", &file(IMAGE)])?;
    user.step(&kind, &["load", "docker-image", "--name", CLUSTER, image::BUSYBOX])?;
    let script = "echo loaded; exec sleep 2147483647";
    let pod = ["--image", image::BUSYBOX, "--image-pull-policy", "Never", "--", "sh", "-c", script];
    user.wait(&["serviceaccount/default", "--for", "create"])?;
    user.step(&user.setting.kubectl, &[&["run", "first"], &pod[..]].concat())?;
    user.wait(&["pod/first", "--for", "condition=Ready"])?;
    until_within(ANSWER_LIMIT, "the pod's log", || Ok((user.kubectl(&["logs", "first"])? == "loaded\n").then_some(())))?;
    let said = user.kubectl(&["exec", "first", "--", "hostname"])?;
    ensure!(said == "first\n", "the pod says {said:?}");
    // By the name of a service, which CoreDNS knows, and its address, which kube-proxy's rules lead to the apiserver.
    let script = "nc -w 60 kubernetes.default.svc.cluster.local 443 </dev/null && echo reached";
    until_within(ANSWER_LIMIT, "the apiserver answers at its service's name", || {
        Ok(user.kubectl(&["exec", "first", "--", "sh", "-c", script]).ok().filter(|said| said == "reached\n"))
    })?;
    user.step(&user.setting.kubectl, &["get", "nodes,pods", "--all-namespaces", "--output", "wide"])?;

    let logs = file("logs");
    user.step(&kind, &["export", "logs", "--name", CLUSTER, &logs])?;
    let node = Path::new(&logs).join(CONTROL_PLANE);
    let runtime = fs::read_to_string(node.join("containerd.log"))?;
    ensure!(runtime.contains("windlass") && runtime.contains("container started"), "not the runtime's log:\n{runtime}");
    let pods: Vec<_> = fs::read_dir(node.join("pods"))?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(pods.iter().any(|name| name.to_string_lossy().starts_with("default_first_")), "logs of {pods:?}");

    user.step(&kind, &["delete", "cluster", "--name", CLUSTER])?;
    let left = user.output(&docker, &["ps", "--all", "--quiet"])?;
    ensure!(left.is_empty(), "left of the cluster: {left}");
    Ok(())
}

/// The configuration of `manifests/kind`, with what this guest needs.
fn configuration() -> Result<String> {
    let text = fs::read_to_string(setup::workspace().join("manifests/kind/cluster.yaml")).context("read kind's configuration")?;
    let role = "- role: control-plane\n";
    ensure!(
        text.contains(role) && text.contains("\nkubeadmConfigPatches:\n"),
        "not the configuration that was expected:\n{text}"
    );
    Ok(text.replacen(role, NODE_FIELDS, 1) + MORE)
}
