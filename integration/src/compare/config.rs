//! The configurations of the runtimes that Windlass is compared with: their defaults, but for places and for what this harness lacks
//! (other registries, a privileged init).

use anyhow::{Context, Result};
use serde_json::json;
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where one runtime has its files.
pub(super) struct Place<'a> {
    pub(super) directory: &'a Path,
    pub(super) products: &'a Path,
    /// `127.0.0.1:port`
    pub(super) registry: &'a str,
    /// Tells the bridges apart.
    pub(super) serial: usize,
}

/// The pause image's name, without the registry.
pub(super) const PAUSE: &str = "compare/pause:1";

/// A network of the plugins bridge, host-local and portmap, as kubeadm's users and kind have it.
pub(super) fn write_conflist(directory: &Path, leases: &Path, bridge: &str) -> Result<()> {
    fs::create_dir_all(directory)?;
    let ranges = json!([[{ "subnet": "10.88.0.0/16" }]]);
    let ipam = json!({ "type": "host-local", "dataDir": leases, "ranges": ranges, "routes": [{ "dst": "0.0.0.0/0" }] });
    let conflist = json!({
        "cniVersion": "1.0.0", "name": "compare",
        "plugins": [
            { "type": "bridge", "bridge": bridge, "isGateway": true, "ipMasq": true, "hairpinMode": true, "ipam": ipam },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    });
    fs::write(directory.join("10-compare.conflist"), conflist.to_string()).context("write the conflist")
}

impl Place<'_> {
    fn path(&self, name: &str) -> String {
        self.directory.join(name).to_string_lossy().into_owned()
    }

    pub(super) fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.join("cri.sock")
    }

    fn conflist(&self) -> Result<()> {
        write_conflist(&self.directory.join("cni"), &self.directory.join("ipam"), &format!("wlcompare{}", self.serial))
    }

    /// Writes containerd's configuration; returns its command line.
    pub(super) fn containerd(&self, runtime: &Path) -> Result<Vec<String>> {
        self.conflist()?;
        let host = self.directory.join("certs.d").join(self.registry);
        fs::create_dir_all(&host)?;
        let text =
            format!("server = \"http://{0}\"\n[host.\"http://{0}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", self.registry);
        fs::write(host.join("hosts.toml"), text)?;
        let text = CONTAINERD
            .replace("@DIR@", &self.directory.to_string_lossy())
            .replace("@PRODUCTS@", &self.products.to_string_lossy())
            .replace("@RUNTIME@", &runtime.to_string_lossy())
            .replace("@PAUSE@", &format!("{}/{PAUSE}", self.registry));
        fs::write(self.directory.join("config.toml"), text)?;
        let program = self.products.join("containerd").to_string_lossy().into_owned();
        Ok(vec![program, "--config".into(), self.path("config.toml"), "--log-level".into(), "warn".into()])
    }

    /// Writes CRI-O's configuration; returns its command line.
    pub(super) fn crio(&self) -> Result<Vec<String>> {
        self.conflist()?;
        for name in ["hooks", "exits", "attach", "ns", "logs", "run"] {
            fs::create_dir_all(self.directory.join(name))?;
        }
        fs::write(self.directory.join("policy.json"), "{\"default\":[{\"type\":\"insecureAcceptAnything\"}]}")?;
        let registries = format!(
            "unqualified-search-registries = []\nshort-name-mode = \"disabled\"\n[[registry]]\nprefix = {0:?}\nlocation = {0:?}\ninsecure = true\n",
            self.registry
        );
        fs::write(self.directory.join("registries.conf"), registries)?;
        let text = CRIO
            .replace("@DIR@", &self.directory.to_string_lossy())
            .replace("@PRODUCTS@", &self.products.to_string_lossy())
            .replace("@PAUSE@", &format!("{}/{PAUSE}", self.registry));
        fs::write(self.directory.join("crio.conf"), text)?;
        let words = ["--config", &self.path("crio.conf"), "--config-dir", "", "--registries-conf", &self.path("registries.conf")]
            .map(str::to_owned);
        let program = self.products.join("crio").to_string_lossy().into_owned();
        Ok([program].into_iter().chain(words).chain(["--log-level".into(), "warn".into()]).collect())
    }
}

/// `restrict_oom_score_adj`: a machine on which CAP_SYS_RESOURCE is missing runs it too.
const CONTAINERD: &str = "
version = 3
root = '@DIR@/data'
state = '@DIR@/run'
imports = []
disabled_plugins = ['io.containerd.snapshotter.v1.btrfs', 'io.containerd.snapshotter.v1.zfs', 'io.containerd.snapshotter.v1.devmapper',
  'io.containerd.snapshotter.v1.erofs', 'io.containerd.snapshotter.v1.blockfile', 'io.containerd.tracing.processor.v1.otlp',
  'io.containerd.internal.v1.tracing']
[grpc]
  address = '@DIR@/cri.sock'
[ttrpc]
  address = '@DIR@/cri.sock.ttrpc'
[plugins.'io.containerd.internal.v1.opt']
  path = '@DIR@/opt'
[plugins.'io.containerd.nri.v1.nri']
  socket_path = '@DIR@/nri.sock'
  plugin_path = '@DIR@/nri-plugins'
  plugin_config_path = '@DIR@/nri-conf'
[plugins.'io.containerd.cri.v1.images']
  snapshotter = 'overlayfs'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '@PAUSE@'
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '@DIR@/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['@PRODUCTS@/cni']
  conf_dir = '@DIR@/cni'
[plugins.'io.containerd.cri.v1.runtime'.containerd]
  default_runtime_name = 'runc'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = '@RUNTIME@'
  SystemdCgroup = false
";

const CRIO: &str = "
[crio]
root = '@DIR@/data'
runroot = '@DIR@/run'
storage_driver = 'overlay'
log_dir = '@DIR@/logs'
version_file = '@DIR@/run/version'
clean_shutdown_file = '@DIR@/clean.shutdown'
[crio.api]
listen = '@DIR@/cri.sock'
stream_address = '127.0.0.1'
stream_port = '0'
[crio.runtime]
conmon = '/usr/bin/conmon'
conmon_cgroup = 'pod'
cgroup_manager = 'cgroupfs'
apparmor_profile = ''
hooks_dir = ['@DIR@/hooks']
container_exits_dir = '@DIR@/exits'
container_attach_socket_dir = '@DIR@/attach'
namespaces_dir = '@DIR@/ns'
pinns_path = '@PRODUCTS@/pinns'
irqbalance_config_file = ''
irqbalance_config_restore_file = 'disable'
default_runtime = 'crun'
[crio.runtime.runtimes.crun]
runtime_path = '@PRODUCTS@/crun'
runtime_type = 'oci'
runtime_root = '@DIR@/crun'
monitor_path = '/usr/bin/conmon'
monitor_cgroup = 'pod'
[crio.image]
pause_image = '@PAUSE@'
pause_command = '/pause'
signature_policy = '@DIR@/policy.json'
[crio.network]
network_dir = '@DIR@/cni/'
plugin_dirs = ['@PRODUCTS@/cni']
[crio.metrics]
enable_metrics = false
[crio.nri]
enable_nri = true
nri_listen = '@DIR@/nri.sock'
nri_plugin_dir = '@DIR@/nri-plugins'
nri_plugin_config_dir = '@DIR@/nri-conf'
";
