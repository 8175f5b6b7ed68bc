//! A runtime that is compared: Windlass, or one of the others, in mount, network and cgroup namespaces of its own, with throw-away
//! folders and all its processes below one cgroup, whose CPU time is then exactly what the runtime and its pods took.
//!
//! Every one sees the same: cgroup v2 and nothing else, a loopback registry on the same port, the same images, no limits on containers.
//! Hierarchies of cgroup v1 are out of sight and stay as they are.

use super::{config, images};
use crate::{daemon, daemon::Daemon, node, registry::Registry, standin::Images, standin_registry::StandinRegistry};
use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

/// Longest wait for a socket.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for the end of a daemon that was asked to end.
const STOP_LIMIT: Duration = Duration::from_secs(10);

static SERIAL: AtomicUsize = AtomicUsize::new(1);

/// Which runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Windlass,
    ContainerdRunc,
    ContainerdCrun,
    CrioCrun,
}

/// How the pods of a runtime are connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Network {
    /// Windlass's own bridge; the others have none, and use CNI.
    Own,
    /// The CNI plugins bridge, host-local and portmap.
    Cni,
}

impl Kind {
    pub(super) const ALL: [Kind; 4] = [Kind::Windlass, Kind::ContainerdRunc, Kind::ContainerdCrun, Kind::CrioCrun];

    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Windlass => "Windlass",
            Kind::ContainerdRunc => "containerd+runc",
            Kind::ContainerdCrun => "containerd+crun",
            Kind::CrioCrun => "CRI-O+crun",
        }
    }

    /// How the command line of a process begins that the runtime keeps beside a pod's own.
    pub(super) fn helpers(self) -> &'static [&'static str] {
        match self {
            Kind::Windlass => &["windlass-monitor"],
            Kind::ContainerdRunc | Kind::ContainerdCrun => &["containerd-shim", "/pause"],
            Kind::CrioCrun => &["conmon", "/pause"],
        }
    }
}

/// A runtime that serves.
pub(super) struct Rival {
    pub(super) kind: Kind,
    pub(super) network: Network,
    pub(super) socket: PathBuf,
    /// Where its images and containers are, as it sees them.
    pub(super) data: PathBuf,
    pub(super) pid: i32,
    /// Below which its processes are.
    cgroups: Vec<PathBuf>,
    directory: Option<tempfile::TempDir>,
    process: Option<Child>,
    daemon: Option<Daemon>,
    // Ends after the daemons that use it.
    _registry: Registry,
}

/// What all have in common.
pub(super) struct Ground<'a> {
    /// Folder of the rivals' programs.
    pub(super) products: &'a Path,
    pub(super) registry: &'a Registry,
    /// Images and containers on a tmpfs, instead of the file system of the temporary directory.
    pub(super) tmpfs: bool,
    /// How Windlass keeps layers: `images.layers` of its configuration.
    pub(super) layers: &'static str,
}

impl Ground<'_> {
    /// Starts a runtime in namespaces of its own; they live as long as its processes.
    pub(super) fn start(&self, kind: Kind, network: Network) -> Result<Rival> {
        let (products, registry, tmpfs, layers) = (self.products.to_owned(), self.registry.twin(), self.tmpfs, self.layers);
        node::run(move || Ground { products: &products, registry: &registry, tmpfs, layers }.start_here(kind, network))
    }

    /// Starts a runtime in the namespaces of the calling thread.
    pub(super) fn start_here(&self, kind: Kind, network: Network) -> Result<Rival> {
        let registry = self.registry.twin().listen()?;
        match kind {
            Kind::Windlass => windlass(self.products, registry, network, self.tmpfs, self.layers),
            _ => other(kind, self.products, registry, self.tmpfs),
        }
        .with_context(|| format!("start {}", kind.name()))
    }
}

/// Starts containerd with runc in the caller's network namespace. These images are there under their published names as long as the second
/// value is.
pub(super) fn containerd(products: &Path, standins: Images) -> Result<(Rival, StandinRegistry)> {
    let registry = Registry::start()?;
    images::add_runnable(&registry)?;
    let standins = StandinRegistry::start(standins)?;
    let rival = other(Kind::ContainerdRunc, products, registry, false).context("start containerd")?;
    standins.write_mirrors(&rival.mirrors().context("containerd has mirrors")?)?;
    Ok((rival, standins))
}

fn mount_data(data: &Path) -> Result<()> {
    fs::create_dir_all(data)?;
    mount(Some("tmpfs"), data, Some("tmpfs"), MsFlags::empty(), Some("mode=755,size=6g")).context("mount a tmpfs")
}

fn windlass(products: &Path, registry: Registry, network: Network, tmpfs: bool, layers: &str) -> Result<Rival> {
    let mut daemon = Daemon::prepare(&[])?;
    daemon.configure(&format!("[images]\nlayers = {layers:?}\n"))?;
    let data = daemon.root();
    if tmpfs {
        mount_data(&data)?;
    }
    if network == Network::Cni {
        let conflists = daemon.path("cni");
        config::write_conflist(&conflists, &daemon.path("ipam"), "wlcompare")?;
        let own = fs::read_to_string(daemon.path("config.toml"))?;
        let keys = format!("cni_bin_dir = {:?}\n", products.join("cni"));
        fs::write(daemon.path("config.toml"), own.replace("[network]\n", &format!("[network]\n{keys}")))?;
    }
    daemon.serve()?;
    let pid = daemon.pid().context("the daemon runs")?.cast_signed();
    let pods = daemon.cgroup_directory();
    let own = pods.with_file_name(format!("{}-daemon", daemon.cgroup.trim_start_matches('/')));
    fs::create_dir_all(&own)?;
    fs::write(own.join("cgroup.procs"), pid.to_string()).context("move the daemon into a cgroup")?;
    Ok(Rival {
        kind: Kind::Windlass,
        network,
        socket: daemon.socket(),
        data,
        pid,
        cgroups: vec![own, pods],
        directory: None,
        process: None,
        daemon: Some(daemon),
        _registry: registry,
    })
}

/// Becomes the daemon, as the first of a cgroup namespace whose root is all of /sys/fs/cgroup.
const ENTER: &str = "echo $$ > $0/cgroup.procs && exec unshare --cgroup --mount --propagation slave sh -c '
    mount --bind $0 /sys/fs/cgroup && mkdir /sys/fs/cgroup/daemon && echo $$ > /sys/fs/cgroup/daemon/cgroup.procs && exec \"$@\"' \"$0\" \"$@\"";

fn other(kind: Kind, products: &Path, registry: Registry, tmpfs: bool) -> Result<Rival> {
    let directory = tempfile::Builder::new().prefix("windlass-compare-").tempdir()?;
    let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
    let place = config::Place { directory: directory.path(), products, registry: &registry.host(), serial };
    let data = place.data();
    if tmpfs {
        mount_data(&data)?;
    }
    let cgroup = daemon::cgroup_root().join(directory.path().file_name().context("a name")?);
    fs::create_dir(&cgroup).with_context(|| format!("create {}", cgroup.display()))?;
    let words = match kind {
        Kind::ContainerdRunc => place.containerd(&oci_runtime(products, "runc"))?,
        Kind::ContainerdCrun => place.containerd(&oci_runtime(products, "crun"))?,
        _ => place.crio()?,
    };
    // What networks CNI connected is remembered there, whoever asked.
    let remembered = directory.path().join("cni-results");
    fs::create_dir_all(&remembered)?;
    fs::create_dir_all("/var/lib/cni")?;
    mount(Some(&remembered), "/var/lib/cni", None::<&str>, MsFlags::MS_BIND, None::<&str>).context("mount CNI's results")?;
    let log = fs::File::create(directory.path().join("log"))?;
    let mut command = Command::new("sh");
    command.args(["-ec", ENTER]).arg(&cgroup).args(words);
    command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", products.display()));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    let process = command.spawn().context("start the daemon")?;
    let socket = place.socket();
    let mut rival = Rival {
        kind,
        network: Network::Cni,
        socket,
        data,
        pid: process.id().cast_signed(),
        cgroups: vec![cgroup],
        directory: Some(directory),
        process: Some(process),
        daemon: None,
        _registry: registry,
    };
    rival.wait_for_socket()?;
    Ok(rival)
}

/// The OCI runtime, bare of CPU shares where this machine's cgroup v2 has no cpu controller.
fn oci_runtime(products: &Path, name: &str) -> PathBuf {
    let controllers = fs::read_to_string(daemon::cgroup_root().join("cgroup.controllers")).unwrap_or_default();
    let complete = controllers.split_whitespace().any(|controller| controller == "cpu");
    products.join(if complete { name.to_owned() } else { format!("bare-{name}") })
}

impl Rival {
    fn wait_for_socket(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if std::os::unix::net::UnixStream::connect(&self.socket).is_ok() {
                return Ok(());
            }
            if let Some(status) = self.process.as_mut().and_then(|process| process.try_wait().ok().flatten()) {
                bail!("ended with {status}:\n{}", self.log());
            }
            if Instant::now() > deadline {
                bail!("no socket in {START_LIMIT:?}:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Where one of the others looks for the mirrors of registries.
    pub(super) fn mirrors(&self) -> Option<PathBuf> {
        self.directory.as_ref().map(|directory| directory.path().join("certs.d"))
    }

    /// What it wrote.
    pub(super) fn log(&self) -> String {
        match (&self.daemon, &self.directory) {
            (Some(daemon), _) => daemon.log(),
            (None, Some(directory)) => fs::read_to_string(directory.path().join("log")).unwrap_or_default(),
            (None, None) => String::new(),
        }
    }

    /// Its name, with the network where that is not the usual one.
    pub(super) fn label(&self) -> String {
        match (self.kind, self.network) {
            (Kind::Windlass, Network::Cni) => "Windlass, CNI".into(),
            (kind, _) => kind.name().into(),
        }
    }

    /// CPU seconds of the runtime and all that it ever started.
    pub(super) fn cpu_seconds(&self) -> f64 {
        self.cgroups.iter().map(|cgroup| usage(cgroup).unwrap_or(0.0)).sum()
    }

    /// Bytes that its images and containers take on their file system, on tmpfs and elsewhere alike.
    pub(super) fn disk_bytes(&self) -> Result<u64> {
        let seen = PathBuf::from(format!("/proc/{}/root", self.pid)).join(self.data.strip_prefix("/")?);
        let output = Command::new("du").args(["-s", "-B1"]).arg(seen.join(".")).output().context("run du")?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.split_whitespace().next().and_then(|bytes| bytes.parse().ok()).with_context(|| format!("du said {text:?}"))
    }

    /// Bytes that it passed to write(2) and its kin, its ended children's included.
    pub(super) fn written_bytes(&self) -> u64 {
        let io = fs::read_to_string(format!("/proc/{}/io", self.pid)).unwrap_or_default();
        io.lines().find_map(|line| line.strip_prefix("wchar: ")).and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0)
    }

    /// Proportional set size in KiB: of the daemon, and of the processes that it keeps beside those of pods.
    pub(super) fn memory_kib(&self) -> (u64, u64) {
        let mut helpers = 0;
        for pid in self.cgroups.iter().flat_map(|cgroup| processes(cgroup)).filter(|pid| *pid != self.pid) {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let program = String::from_utf8_lossy(line.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned();
            let name = program.rsplit_once('/').map_or(program.as_str(), |(_, name)| name);
            if self.kind.helpers().iter().any(|helper| name.starts_with(helper.trim_start_matches('/'))) {
                helpers += pss_kib(pid).unwrap_or(0);
            }
        }
        (pss_kib(self.pid).unwrap_or(0), helpers)
    }

    /// What of its pods the machine has, in the namespaces of the calling thread and in its own: links, pins of namespaces, mounts, cgroups,
    /// and processes.
    pub(super) fn traces(&self) -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        for line in node::output_of("ip", &["-o", "link"])?.lines() {
            found.insert(format!("link {}", line.split(": ").nth(1).unwrap_or(line)));
        }
        for entry in fs::read_dir("/run/netns")?.flatten() {
            found.insert(format!("pin {}", entry.file_name().to_string_lossy()));
        }
        for process in ["thread-self".to_owned(), self.pid.to_string()] {
            let text = fs::read_to_string(format!("/proc/{process}/mountinfo"))?;
            let points = text.lines().filter_map(|line| line.split(' ').nth(4));
            found.extend(points.map(|point| format!("mount {point} of {process}")));
        }
        for cgroup in &self.cgroups {
            below(cgroup, &mut found);
            found.extend(processes(cgroup).into_iter().map(|pid| format!("process {pid}")));
        }
        Ok(found)
    }

    /// Proportional set size in KiB of all processes of containers.
    pub(super) fn containers_pss_kib(&self) -> u64 {
        let all = self.cgroups.iter().flat_map(|cgroup| processes(cgroup)).filter(|pid| *pid != self.pid);
        all.filter_map(pss_kib).sum::<u64>().saturating_sub(self.memory_kib().1)
    }

    /// Ends it and all that it started, and removes its folders.
    pub(super) fn stop(mut self) -> Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.stop()?;
        }
        Ok(())
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), nix::sys::signal::Signal::SIGTERM);
            let deadline = Instant::now() + STOP_LIMIT;
            while process.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = process.kill();
            let _ = process.wait();
        }
        drop(self.daemon.take());
        for cgroup in &self.cgroups {
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            daemon::remove_cgroup(cgroup);
        }
    }
}

fn usage(cgroup: &Path) -> Option<f64> {
    let stat = fs::read_to_string(cgroup.join("cpu.stat")).ok()?;
    let microseconds: f64 = stat.lines().find_map(|line| line.strip_prefix("usage_usec "))?.parse().ok()?;
    Some(microseconds / 1e6)
}

fn below(cgroup: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        found.insert(format!("cgroup {}", entry.path().display()));
        below(&entry.path(), found);
    }
}

/// Processes in a cgroup and below it.
fn processes(cgroup: &Path) -> Vec<i32> {
    let own = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut found: Vec<i32> = own.lines().filter_map(|line| line.parse().ok()).collect();
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(processes(&entry.path()));
        }
    }
    found
}

fn pss_kib(pid: i32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.trim().trim_end_matches(" kB").trim().parse().ok()
}
