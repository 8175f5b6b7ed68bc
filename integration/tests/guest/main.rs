//! What only a kernel with the whole of cgroup v2 and with AppArmor can show. This program runs itself once more inside the guest; there each
//! test does its work and leaves its result in a file, here each test reads it. One boot serves all of them, and one more those that need
//! systemd as the first process.

mod apparmor;
mod block_io;
mod limits;
mod numbers;
mod oci;
mod parents;
mod systemd;
mod updates;

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    guest_tests::GuestTests,
    leak::Snapshot,
    node,
    wait::until,
};
use windlass_proto::cri;

/// Longest run of all tests in the guest.
const GUEST_LIMIT: Duration = Duration::from_secs(1200);
/// The tree of the guest.
const TREE: &str = "/sys/fs/cgroup";

static GUEST: GuestTests = GuestTests::all(GUEST_LIMIT).with_disk(64);

/// The test `name`: in the guest its body, elsewhere the result that it had there.
fn in_guest(name: &str, body: impl FnOnce(&Bench) -> Result<()> + Send + 'static) -> Result<()> {
    in_guest_with(name, "", body)
}

/// The same with more of a configuration.
fn in_guest_with(
    name: &str,
    configuration: &'static str,
    body: impl FnOnce(&Bench) -> Result<()> + Send + 'static,
) -> Result<()> {
    GUEST.test(name, || {
        node::run(|| {
            let bench = Bench::begin(configuration)?;
            body(&bench)?;
            bench.end()
        })
    })
}

/// A daemon, a pod of it, and what was there before.
struct Bench {
    daemon: Daemon,
    client: Client,
    before: Snapshot,
}

impl Bench {
    fn begin(configuration: &str) -> Result<Bench> {
        Bench::of(Daemon::configured(configuration)?)
    }

    fn of(daemon: Daemon) -> Result<Bench> {
        let client = Client::connect(&daemon)?;
        // The first pod makes what the daemon keeps: bridge, rules, parent cgroup, pipes.
        let id = client.run(&pod(&daemon.path("logs")))?;
        client.remove(&id)?;
        let before = Snapshot::take(&daemon)?;
        Ok(Bench { daemon, client, before })
    }

    /// Fails if anything is left of what the test made.
    fn end(&self) -> Result<()> {
        self.before.expect_again(&self.daemon)
    }

    fn pod(&self) -> cri::PodSandboxConfig {
        pod(&self.daemon.path("logs"))
    }

    /// Runs a pod with one container of these limits; returns both ids.
    fn limited(&self, resources: cri::LinuxContainerResources, command: &[&str]) -> Result<(String, String)> {
        let config = self.pod();
        let id = self.client.run(&config)?;
        let created = self.client.create(&id, &config, &with_resources(container(&config, "main", command), resources))?;
        self.client.start(&created)?;
        Ok((id, created))
    }

    /// The error of creating a container with these limits; the pod is removed.
    fn refusal(&self, resources: cri::LinuxContainerResources) -> Result<tonic::Status> {
        let config = self.pod();
        let id = self.client.run(&config)?;
        let wanted = with_resources(container(&config, "main", &["sleep", "1000"]), resources);
        let created = self.client.create(&id, &config, &wanted);
        self.client.remove(&id)?;
        created.err().context("the container was created")
    }

    fn exited(&self, id: &str) -> Result<cri::ContainerStatus> {
        until("the container exits", || {
            let status = self.client.container(id)?;
            Ok((status.state() == cri::ContainerState::ContainerExited).then_some(status))
        })
    }

    /// The cgroup of a container of a pod without a cgroup parent.
    fn leaf(&self, container: &str) -> PathBuf {
        self.daemon.cgroup_directory().join(container)
    }
}

fn with_resources(mut config: cri::ContainerConfig, resources: cri::LinuxContainerResources) -> cri::ContainerConfig {
    if let Some(linux) = config.linux.as_mut() {
        linux.resources = Some(resources);
    }
    config
}

/// A file of a cgroup, without its last newline.
fn read(cgroup: &Path, file: &str) -> Result<String> {
    let path = cgroup.join(file);
    Ok(fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?.trim_end().to_owned())
}

/// Fails unless the file of the cgroup holds `expected`.
fn expect(cgroup: &Path, file: &str, expected: &str) -> Result<()> {
    let found = read(cgroup, file)?;
    ensure!(found == expected, "{file} is {found:?}, not {expected:?}");
    Ok(())
}

/// The number behind `key` in a file of `key number` lines.
fn counter(cgroup: &Path, file: &str, key: &str) -> Result<u64> {
    let text = read(cgroup, file)?;
    let found = text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
    found.with_context(|| format!("{key} in {file}: {text:?}"))
}
