//! A real kubelet without a control plane: it runs the pods whose manifests lie in its directory, against a daemon of a test.
//!
//! Started in the caller's mount and network namespaces; what kubelet writes at fixed places of the host is covered there. It is asked
//! through its own HTTP interface, by `curl`, because the half of it that runs commands speaks TLS with a certificate of its own.

use crate::{
    daemon::Daemon,
    go,
    node::{output_of, run_command},
    process::Process,
    wait,
};
use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// The node's name, which kubelet appends to the names of its static pods.
pub const NODE: &str = "standalone";
/// Longest wait for kubelet to answer after its start.
const START_LIMIT: Duration = Duration::from_secs(180);
/// Longest wait for a pod to become what a test wants it to be.
pub const POD_LIMIT: Duration = Duration::from_secs(240);
/// Kubelet's own address: plain HTTP to look, TLS to act.
const LOOK: &str = "http://127.0.0.1:10255";
const ACT: &str = "https://127.0.0.1:10250";
const CONFIG: &str = "config.json";
/// Fixed places of the host that kubelet writes to, whatever its configuration says.
const COVERED: [&str; 3] = ["/var/lib/kubelet", "/var/log/containers", "/var/log/pods"];

/// A running kubelet. Dropping it ends it; pods stay with the daemon.
pub struct Kubelet {
    process: Option<Process>,
    program: PathBuf,
    directory: PathBuf,
    arguments: Vec<String>,
}

impl Kubelet {
    /// Prepares the host's fixed places and the configuration, whose fields `fields` go over the usual ones.
    pub fn prepare(daemon: &Daemon, fields: Value) -> Result<Kubelet> {
        let program = go::kubernetes("kubelet")?;
        Kubelet::prepare_with(&program, daemon, fields)
    }

    /// The same with a kubelet that was built before.
    pub fn prepare_with(program: &Path, daemon: &Daemon, fields: Value) -> Result<Kubelet> {
        // cgroups for kinds of pods need every controller in one tree; without them kubelet leaves the host's trees alone.
        let by_kind = daemon.cgroup_directory().parent().is_some_and(has_every_controller);
        Kubelet::prepare_over(program, &daemon.path("kubelet"), &daemon.socket(), by_kind, fields)
    }

    /// The same over any runtime's socket, with files in `directory`. `by_kind`: with cgroups for kinds of pods.
    pub fn prepare_over(program: &Path, directory: &Path, socket: &Path, by_kind: bool, fields: Value) -> Result<Kubelet> {
        for place in COVERED {
            fs::create_dir_all(place).with_context(|| format!("create {place}"))?;
            mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
                .with_context(|| format!("cover {place}"))?;
        }
        tell_clock(directory)?;
        for name in ["manifests", "root", "volume-plugins"] {
            fs::create_dir_all(directory.join(name))?;
        }
        let text = |name: &str| directory.join(name).to_string_lossy().into_owned();
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": format!("unix://{}", socket.display()),
            "staticPodPath": text("manifests"), "podLogsDir": "/var/log/pods", "volumePluginDir": text("volume-plugins"),
            "failCgroupV1": false, "cgroupsPerQOS": by_kind, "enforceNodeAllocatable": if by_kind { vec!["pods"] } else { vec![] },
            "enableServer": true, "address": "127.0.0.1", "port": 10250, "readOnlyPort": 10255, "healthzPort": 10248,
            "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
            "authorization": { "mode": "AlwaysAllow" },
            "failSwapOn": false, "makeIPTablesUtilChains": false, "fileCheckFrequency": "1s", "syncFrequency": "5s", "maxPods": 250,
            // How often it looks at how full volumes are; a minute by default, for which a pod's figures would have to be waited for.
            "volumeStatsAggPeriod": "5s",
            "evictionHard": { "memory.available": "50Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%" },
            "resolvConf": "/etc/resolv.conf",
        });
        let file = directory.join(CONFIG);
        fs::write(&file, config.to_string())?;
        let arguments = ["--config", &file.to_string_lossy(), "--root-dir", &text("root"), "--cert-dir", &text("pki")]
            .into_iter()
            .chain(["--hostname-override", NODE, "--node-ip", "127.0.0.1", "--v", "2"])
            .map(str::to_owned)
            .collect();
        let kubelet = Kubelet { process: None, program: program.to_owned(), directory: directory.to_owned(), arguments };
        kubelet.configure(fields)?;
        Ok(kubelet)
    }

    /// With further flags, which go over earlier ones.
    #[must_use]
    pub fn with_arguments(mut self, more: &[&str]) -> Kubelet {
        self.arguments.extend(more.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Sets fields of the configuration for the next start.
    pub fn configure(&self, fields: Value) -> Result<()> {
        let file = self.directory.join(CONFIG);
        let mut config: Value = serde_json::from_slice(&fs::read(&file)?).context("read kubelet's configuration")?;
        for (key, value) in fields.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        Ok(fs::write(file, config.to_string())?)
    }

    /// Starts kubelet and waits until it answers.
    pub fn start(&mut self) -> Result<()> {
        let log = fs::File::options().create(true).append(true).open(self.directory.join("log"))?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.process = Some(command.spawn().context("start kubelet")?.into());
        let deadline = Instant::now() + START_LIMIT * wait::factor();
        while self.look("/healthz").is_err() {
            if let Some(status) = self.process.as_mut().map(|process| process.try_wait()).transpose()?.flatten() {
                bail!("kubelet ended with {status}:\n{}", self.log());
            }
            ensure!(Instant::now() < deadline, "kubelet did not answer within {START_LIMIT:?}:\n{}", self.log());
            wait::pause();
        }
        Ok(())
    }

    /// Ends kubelet; pods go on.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("kubelet runs")?;
        process.kill()?;
        process.wait()?;
        Ok(())
    }

    /// Gives kubelet a pod, or a new form of one.
    pub fn place(&self, pod: &Value) -> Result<()> {
        let name = pod["metadata"]["name"].as_str().context("the pod has a name")?;
        let temporary = self.directory.join("new-manifest");
        fs::write(&temporary, pod.to_string())?;
        Ok(fs::rename(temporary, self.manifest(name))?)
    }

    /// Takes a pod away from kubelet, which ends it.
    pub fn withdraw(&self, name: &str) -> Result<()> {
        let path = self.manifest(name);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.directory.join("manifests").join(format!("{name}.json"))
    }

    /// Every pod as kubelet reports it.
    pub fn pods(&self) -> Result<Vec<Value>> {
        let list: Value = serde_json::from_str(&self.look("/pods")?).context("read kubelet's pods")?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// One pod as kubelet reports it.
    pub fn pod(&self, name: &str) -> Result<Option<Value>> {
        let full = format!("{name}-{NODE}");
        Ok(self.pods()?.into_iter().find(|pod| pod["metadata"]["name"] == full.as_str()))
    }

    /// Waits until the pod is there and `wanted` of it.
    pub fn wait(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        self.wait_within(POD_LIMIT, name, what, wanted)
    }

    /// The same with a limit of its own.
    pub fn wait_within(&self, limit: Duration, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let limit = limit * wait::factor();
        let deadline = Instant::now() + limit;
        loop {
            let pod = self.pod(name)?;
            if let Some(pod) = pod.as_ref().filter(|pod| wanted(pod)) {
                return Ok(pod.clone());
            }
            if Instant::now() > deadline {
                let status = pod.map_or_else(|| "kubelet does not list it".to_owned(), |pod| pod["status"].to_string());
                bail!("pod {name}: not {what} within {limit:?}: {status}\n{}", self.log());
            }
            wait::pause();
        }
    }

    /// Waits until every container of the pod is ready.
    pub fn ready(&self, name: &str) -> Result<Value> {
        self.wait(name, "ready", is_ready)
    }

    /// An answer of the half that looks.
    pub fn look(&self, path: &str) -> Result<String> {
        output_of("curl", &["-sSf", "--max-time", "10", &format!("{LOOK}{path}")])
    }

    /// An answer of the half that acts; `method` is GET or POST.
    pub fn act(&self, method: &str, path: &str) -> Result<String> {
        output_of("curl", &["-sSfk", "--max-time", "30", "-X", method, &format!("{ACT}{path}")])
    }

    /// The log of a container through kubelet.
    pub fn container_log(&self, pod: &str, container: &str) -> Result<String> {
        self.act("GET", &format!("/containerLogs/default/{pod}-{NODE}/{container}"))
    }

    /// Runs a command of words without blanks in a container through kubelet.
    pub fn run(&self, pod: &str, container: &str, command: &str) -> Result<String> {
        self.act("POST", &format!("/run/default/{pod}-{NODE}/{container}?cmd={}", command.replace(' ', "%20")))
    }

    /// The lines of kubelet's own log that have one of these words, at most 60.
    pub fn log_of(&self, words: &[&str]) -> String {
        let text = fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().filter(|line| words.iter().any(|word| line.contains(word))).take(60).collect();
        lines.join("\n")
    }

    /// The end of kubelet's own log.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("WINDLASS_TEST_LOG").is_some() {
            eprintln!("--- kubelet's log\n{}", self.log());
        }
        drop(self.process.take());
        // Its own directory, which it mounts on itself, and volumes; else the files below could not be removed.
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| Path::new(point).starts_with(&self.directory)).collect::<Vec<_>>().into_iter().rev() {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
    }
}

/// What /proc/cpuinfo lacks in the guest: kubelet does not start on a machine that names no clock there.
pub(crate) const CLOCK: &str = "cpu MHz\t\t: 2000.000\n";

fn tell_clock(directory: &Path) -> Result<()> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    if !text.contains("cpu MHz") {
        fs::create_dir_all(directory)?;
        let told = directory.join("cpuinfo");
        fs::write(&told, text + CLOCK)?;
        run_command("mount", &["--bind", &told.to_string_lossy(), "/proc/cpuinfo"])?;
        // Where a part of it is covered, a user namespace gets a /proc of its own only if there is a whole one somewhere.
        let whole = directory.join("proc");
        fs::create_dir_all(&whole)?;
        run_command("mount", &["-t", "proc", "proc", &whole.to_string_lossy()])?;
    }
    Ok(())
}

fn has_every_controller(tree: &Path) -> bool {
    let found = fs::read_to_string(tree.join("cgroup.controllers")).unwrap_or_default();
    ["cpu", "cpuset", "memory", "pids"].iter().all(|wanted| found.split_whitespace().any(|name| name == *wanted))
}

/// Whether the pod's Ready condition holds.
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

/// The status of a container of the pod, an init container's too.
pub fn container_status<'a>(pod: &'a Value, name: &str) -> Option<&'a Value> {
    let lists = ["containerStatuses", "initContainerStatuses"].map(|list| pod["status"][list].as_array());
    lists.into_iter().flatten().flatten().find(|status| status["name"] == name)
}

/// A pod of the test image with one container that runs this script of the shell.
pub fn pod(name: &str, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": name } },
        "spec": { "terminationGracePeriodSeconds": 3, "containers": [container("main", script)] },
    })
}

/// A container of the test image that runs this script of the shell.
pub fn container(name: &str, script: &str) -> Value {
    json!({
        "name": name, "image": crate::image::BUSYBOX, "imagePullPolicy": "Never", "command": ["sh", "-c", script],
    })
}
