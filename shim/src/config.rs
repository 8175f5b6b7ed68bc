//! The configuration: a TOML file whose every key has a default, under the flags of `windlass serve`.

mod check;

pub(crate) use check::ULIMITS;
pub use check::{Problem, read};

use crate::{
    error::{Error, Result},
    nri::ValidatorConfig,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where the configuration is read from unless `--config` names another file. It need not exist.
pub const DEFAULT_PATH: &str = "/etc/windlass/config.toml";

/// The configuration file with every field, its default and its meaning: what the package installs.
pub const REFERENCE: &str = include_str!("../../manifests/config.toml");

/// Name of the handler that is always there, beside the empty name.
pub const NATIVE_HANDLER: &str = "windlass";

/// Where plugins of NRI look for a runtime.
pub const DEFAULT_NRI_SOCKET: &str = "/var/run/nri/nri.sock";

/// The whole configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Durable state: images, layers, records, writable layers.
    pub root: PathBuf,
    /// State that may go at a reboot: sockets and exit records.
    pub state: PathBuf,
    /// The CRI socket, mode 0660.
    pub socket: PathBuf,
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as `windlass::image=debug`.
    pub log_level: String,
    pub cgroup: CgroupConfig,
    pub containers: ContainerConfig,
    pub devices: DeviceConfig,
    pub checkpoint: CheckpointConfig,
    /// Classes of block I/O, by the names under which annotations of pods ask for them.
    pub block_io_classes: BTreeMap<String, BlockIoClass>,
    /// Other OCI runtimes, by the names under which pods ask for them.
    pub handlers: BTreeMap<String, HandlerConfig>,
    pub network: NetworkConfig,
    pub images: ImageConfig,
    pub streaming: StreamingConfig,
    pub monitor: MonitorConfig,
    pub metrics: MetricsConfig,
    pub tracing: TracingConfig,
    pub cadvisor: CadvisorConfig,
    pub nri: NriConfig,
}

/// `[nri]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NriConfig {
    /// Whether plugins of the Node Resource Interface are started and accepted. Nothing costs anything while there are none.
    pub enable: bool,
    /// Where plugins connect; mode 0660, root's.
    pub socket_path: PathBuf,
    /// Directory of plugins that the daemon starts: executables `NN-name`.
    pub plugin_path: PathBuf,
    /// Directory of their configurations: `NN-name.conf`, else `name.conf`.
    pub plugin_config_path: PathBuf,
    /// Longest wait for a plugin to register, then for the end of what is being made, and for it to take in the pods and containers that there are.
    pub plugin_registration_timeout_ms: u64,
    /// Longest wait for a plugin's answer; one that has none then is let go, or as it has said itself not asked until its answer has come.
    pub plugin_request_timeout_ms: u64,
    /// No socket: only the plugins that the daemon starts.
    pub disable_connections: bool,
    pub validator: ValidatorConfig,
}

/// `[cadvisor]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CadvisorConfig {
    /// Where kubelet's own cAdvisor is answered as by containerd: it looks at `/run/containerd/containerd.sock`. Empty: nowhere.
    pub containerd_socket: PathBuf,
}

/// `[tracing]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TracingConfig {
    /// Where an OpenTelemetry collector takes traces by OTLP over gRPC, `http://address:port`. Empty: nowhere.
    pub otlp_endpoint: String,
    /// Share of the traces that are exported, from 0 to 1. A caller that brings a trace of its own has decided for it.
    pub sampling_ratio: f64,
}

impl Default for TracingConfig {
    fn default() -> TracingConfig {
        TracingConfig { otlp_endpoint: String::new(), sampling_ratio: 1.0 }
    }
}

/// `[checkpoint]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// The CRIU program, 4.0 or newer: a name that is looked for in PATH and the system's directories, or an absolute path.
    pub criu: PathBuf,
    /// Whether an image may be a checkpoint. What it holds runs as whoever made it wants, with ids and a seccomp filter of its own.
    pub restore_images: bool,
}

impl Default for CheckpointConfig {
    fn default() -> CheckpointConfig {
        CheckpointConfig { criu: "criu".into(), restore_images: false }
    }
}

/// `[metrics]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// Where the daemon's own metrics are served for Prometheus, `address:port`. Empty: nowhere.
    pub address: String,
}

/// `[streaming]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StreamingConfig {
    /// Where exec, attach and port-forward are served, `address:port`; port 0 is any free one. kubelet must reach it.
    pub address: String,
    /// PEM file with the certificate, and those it is signed by; empty serves without TLS.
    pub tls_certificate: PathBuf,
    /// PEM file with its private key.
    pub tls_key: PathBuf,
}

impl Default for StreamingConfig {
    fn default() -> StreamingConfig {
        StreamingConfig { address: "127.0.0.1:0".into(), tls_certificate: PathBuf::new(), tls_key: PathBuf::new() }
    }
}

/// `[cgroup]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CgroupConfig {
    /// Who makes the cgroups of pods.
    pub driver: DriverChoice,
    /// Parent of pods that name none: a path, or a slice. Under systemd a path is the slice of that name, `/a/b` is `a-b.slice`.
    pub parent: String,
    /// Refuse a limit that this host cannot enforce, instead of saying so and running without it.
    pub strict: bool,
}

/// `cgroup.driver`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DriverChoice {
    /// systemd where it is the first process and answers, else cgroupfs.
    #[default]
    Auto,
    /// This runtime alone.
    Cgroupfs,
    /// systemd down to a scope for each pod, or the daemon does not start.
    Systemd,
}

/// `[containers]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerConfig {
    /// Resource limits of every process, by the names of getrlimit(2) in small letters and without `RLIMIT_`. A limit that is not
    /// named is the daemon's own.
    pub default_ulimits: BTreeMap<String, Ulimit>,
    /// Size of a pod's /dev/shm in bytes.
    pub shm_size_bytes: u64,
    /// What becomes of the volumes that an image declares (`VOLUME`) and that no mount of the pod covers.
    pub image_volumes: ImageVolumes,
    /// Annotations of pods that the bundles of their containers have, for hooks: patterns of names, in which `*` stands for all but `/`.
    pub pod_annotations: Vec<String>,
    /// Annotations of containers that their bundles have.
    pub container_annotations: Vec<String>,
}

/// `containers.image_volumes`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageVolumes {
    /// A directory of the container's own for each, with what the image has there, writable also where the root is read-only.
    #[default]
    Bind,
    /// A directory in the container's root where the image lacks it.
    Mkdir,
    /// Nothing.
    Ignore,
}

/// One resource limit, in the unit of getrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ulimit {
    /// What holds.
    pub soft: u64,
    /// What the process may raise it to.
    pub hard: u64,
}

/// `[handlers.NAME]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HandlerConfig {
    /// The runtime's program, absolute: runc, crun, or another with the commands of the OCI runtime command line whose containers are
    /// processes of the host's kernel. Commands of an exec and new limits are Windlass's own work in them.
    pub path: PathBuf,
    /// Annotations of pods that the runtime is told: patterns of names, in which `*` stands for all but `/`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pod_annotations: Vec<String>,
    /// Annotations of containers that it is told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub container_annotations: Vec<String>,
}

/// Patterns of the annotations that bundles have of a runtime handler.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PassedAnnotations<'a> {
    pub(crate) of_pods: &'a [String],
    pub(crate) of_containers: &'a [String],
}

/// `[block_io_classes.NAME]`: what a container of the class may do to block devices.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockIoClass {
    /// Share of busy devices, 10 to 1000, as the OCI configuration has it. 0: not set.
    #[serde(default)]
    pub weight: u16,
    /// Limits of single devices.
    #[serde(default)]
    pub devices: Vec<BlockIoLimit>,
}

/// `[[block_io_classes.NAME.devices]]`: limits of one device. A limit of 0 is none.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockIoLimit {
    /// A whole block device (not a partition), as `/dev/sda`.
    pub path: PathBuf,
    /// Share of this device, 10 to 1000. 0: the class's.
    #[serde(default)]
    pub weight: u16,
    #[serde(default)]
    pub read_bytes_per_second: u64,
    #[serde(default)]
    pub write_bytes_per_second: u64,
    #[serde(default)]
    pub reads_per_second: u64,
    #[serde(default)]
    pub writes_per_second: u64,
}

/// `[devices]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceConfig {
    /// Directories of CDI files; a later one goes over an earlier one. They are read at each request that names a CDI device.
    pub cdi_spec_dirs: Vec<PathBuf>,
}

/// `[network]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Name of the built-in bridge, at most 15 bytes.
    pub bridge: String,
    /// Subnets of the built-in bridge, at most one of each family, until UpdateRuntimeConfig assigns others. IPv6 is left out where the host
    /// has it off.
    pub subnets: Vec<String>,
    /// Directory that network namespaces are pinned in.
    pub netns_dir: PathBuf,
    /// What attaches pods.
    pub mode: NetworkMode,
    /// Which of a pod's addresses is its first.
    pub preferred_family: Family,
    /// Directory of CNI configuration files; the first valid one by name is the pods' network. It is watched.
    pub cni_conf_dir: PathBuf,
    /// Directory of CNI plugins, or several with colons between them.
    pub cni_bin_dir: PathBuf,
    /// Longest ADD or DEL of all plugins of a pod; what still runs then is killed.
    pub cni_timeout_seconds: u64,
    /// Most plugins at once; 0: twice as many as there are cores.
    pub cni_max_plugins: usize,
}

/// `network.mode`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// CNI from when the configuration directory has a valid network, at start or later; the built-in bridge until then.
    #[default]
    Auto,
    /// CNI; not ready while there is no network.
    Cni,
    /// The built-in bridge, whatever is configured.
    Bridge,
}

/// `network.preferred_family`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    #[default]
    Ipv4,
    Ipv6,
    /// The order of the plugins' result.
    Cni,
}

/// `[images]`
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImageConfig {
    /// Directory of `<host>/hosts.toml` files, as containerd reads them, or several with colons between them: of each registry the first that
    /// has it counts.
    pub registry_config_dir: PathBuf,
    /// `registries.conf` (containers-registries.conf(5)); the files of `<it>.d` go over it. Where `registry_config_dir` has a
    /// registry, that counts.
    pub registries_conf: PathBuf,
    /// Credentials (containers-auth.json(5), docker's config.json) for pulls that bring none, and for mirrors.
    pub auth_file: PathBuf,
    /// Which images may be pulled and imported (containers-policy.json(5): accept, reject, sigstoreSigned with keys). Empty: all.
    pub policy: PathBuf,
    /// Directory of `<namespace>.json`, which go over `policy` for pods of that namespace. Empty: none.
    pub policy_dir: PathBuf,
    /// Images that kubelet's garbage collection and `windlass image prune` leave alone: names, or beginnings of whole names
    /// (`registry.example/team/*`).
    pub pinned: Vec<String>,
    /// How layers are kept from now on.
    pub layers: LayerChoice,
    /// Layers that are fetched and unpacked at the same time, over all pulls and imports.
    pub max_parallel_layers: usize,
    /// Longest wait for the next bytes of a registry; then the connection is given up, and taken up again where it broke off.
    pub progress_timeout_seconds: u64,
}

/// `images.layers`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerChoice {
    /// As EROFS images where this host can mount them from files, else as directories.
    #[default]
    Auto,
    /// As EROFS images, or the daemon does not start.
    Erofs,
    /// As directories.
    Directory,
}

/// `[monitor]`
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MonitorConfig {
    /// The `windlass-monitor` program. Empty: the one beside this program, else /usr/libexec/windlass/windlass-monitor.
    pub path: PathBuf,
    /// Whose limits hold for the monitor of a pod, and whose use its own is.
    pub account: Account,
}

/// `monitor.account`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Account {
    /// The pod's: nobody pays for a pod but the pod. One that has used up its processor's time slows its own stops and execs.
    #[default]
    Pod,
    /// The system's: monitors are below `cgroup.parent`, beside each other.
    System,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            root: "/var/lib/windlass".into(),
            state: "/run/windlass".into(),
            socket: "/run/windlass/windlass.sock".into(),
            log_level: "info".into(),
            cgroup: CgroupConfig::default(),
            containers: ContainerConfig::default(),
            devices: DeviceConfig::default(),
            checkpoint: CheckpointConfig::default(),
            block_io_classes: BTreeMap::new(),
            handlers: BTreeMap::new(),
            network: NetworkConfig::default(),
            images: ImageConfig::default(),
            streaming: StreamingConfig::default(),
            monitor: MonitorConfig::default(),
            metrics: MetricsConfig::default(),
            tracing: TracingConfig::default(),
            cadvisor: CadvisorConfig::default(),
            nri: NriConfig::default(),
        }
    }
}

impl Default for NriConfig {
    fn default() -> NriConfig {
        NriConfig {
            // As containerd and CRI-O have it: charts of plugins and of device drivers expect the socket on every node.
            enable: true,
            socket_path: DEFAULT_NRI_SOCKET.into(),
            plugin_path: "/opt/nri/plugins".into(),
            plugin_config_path: "/etc/nri/conf.d".into(),
            plugin_registration_timeout_ms: 5000,
            plugin_request_timeout_ms: 2000,
            disable_connections: false,
            validator: ValidatorConfig::default(),
        }
    }
}

impl Default for CgroupConfig {
    fn default() -> CgroupConfig {
        CgroupConfig { driver: DriverChoice::Auto, parent: "/windlass".into(), strict: false }
    }
}

impl Default for ContainerConfig {
    fn default() -> ContainerConfig {
        // systemd's own for services: programs that close every possible descriptor stay quick, those that need more may raise it.
        let nofile = Ulimit { soft: 1024, hard: 524_288 };
        ContainerConfig {
            default_ulimits: [("nofile".to_owned(), nofile)].into(),
            shm_size_bytes: 64 << 20,
            image_volumes: ImageVolumes::Bind,
            pod_annotations: Vec::new(),
            container_annotations: vec!["*".into(), "*/*".into()],
        }
    }
}

impl Default for DeviceConfig {
    fn default() -> DeviceConfig {
        DeviceConfig { cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()] }
    }
}

impl Default for NetworkConfig {
    fn default() -> NetworkConfig {
        NetworkConfig {
            bridge: "windlass0".into(),
            // Networks that Docker, Podman, kind, flannel, Calico and k3s do not choose by default.
            subnets: vec!["10.57.0.0/16".into(), "fd57:494e:444c::/64".into()],
            netns_dir: "/run/netns".into(),
            mode: NetworkMode::Auto,
            preferred_family: Family::Ipv4,
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dir: "/opt/cni/bin".into(),
            cni_timeout_seconds: 60,
            cni_max_plugins: 0,
        }
    }
}

impl Default for ImageConfig {
    fn default() -> ImageConfig {
        ImageConfig {
            registry_config_dir: "/etc/windlass/certs.d:/etc/containerd/certs.d:/etc/docker/certs.d".into(),
            registries_conf: "/etc/containers/registries.conf".into(),
            auth_file: "/etc/windlass/auth.json".into(),
            policy: PathBuf::new(),
            policy_dir: PathBuf::new(),
            pinned: Vec::new(),
            layers: LayerChoice::Auto,
            max_parallel_layers: 4,
            progress_timeout_seconds: 30,
        }
    }
}

impl Config {
    /// The program of a runtime handler, empty for the native one. `None`: no handler has this name.
    pub fn handler(&self, name: &str) -> Option<&Path> {
        match name {
            "" | NATIVE_HANDLER => Some(Path::new("")),
            other => self.handlers.get(other).map(|handler| handler.path.as_path()),
        }
    }

    /// What to say of a name that no handler has.
    pub fn unknown_handler(&self, name: &str) -> String {
        let others = self.handlers.keys().map(|name| format!(", {name:?}")).collect::<String>();
        format!("runtime_handler {name:?} is not configured; this node has \"\", {NATIVE_HANDLER:?}{others}")
    }

    /// Which annotations the bundles of this handler's containers have.
    pub(crate) fn passed_annotations(&self, handler: &str) -> PassedAnnotations<'_> {
        let (of_pods, of_containers) = match self.handlers.get(handler) {
            Some(other) => (&other.pod_annotations, &other.container_annotations),
            None => (&self.containers.pod_annotations, &self.containers.container_annotations),
        };
        PassedAnnotations { of_pods, of_containers }
    }

    /// Reads `path`, or the defaults where the default path has no file. The error names every problem of the file.
    pub fn load(path: Option<&Path>) -> Result<Config> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && path.is_none() => return Ok(Config::default()),
            Err(error) => return Err(Error::io(format_args!("read configuration {}", file.display()), error)),
        };
        read(&text).map_err(|problems| {
            let list: String = problems.iter().map(|problem| format!("\n  {problem}")).collect();
            Error::invalid(format!(
                "configuration {} is not taken:{list}\n`windlass config default` prints every field with its meaning; correct the file, and see by `windlass config check`",
                file.display()
            ))
        })
    }

    /// What of its values makes no sense.
    pub fn problems(&self) -> Vec<Problem> {
        let told = check::senseless(self).into_iter();
        told.map(|(field, what)| Problem { line: None, field, what }).collect()
    }

    /// The `windlass-monitor` program to run.
    pub fn monitor_path(&self) -> PathBuf {
        if !self.monitor.path.as_os_str().is_empty() {
            return self.monitor.path.clone();
        }
        let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name("windlass-monitor"));
        match beside {
            Some(path) if path.try_exists().unwrap_or(true) => path,
            _ => "/usr/libexec/windlass/windlass-monitor".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// manifests/config.toml shows every key with its default.
    #[test]
    fn the_reference_is_the_default() {
        let reference = REFERENCE;
        let parsed = read(reference).expect("the reference is taken");
        assert_eq!(serde_json::json!(parsed), serde_json::json!(Config::default()));
        let flat = toml::to_string(&Config::default()).expect("encodes");
        for key in flat.lines().filter_map(|line| line.split_once(" =").map(|(key, _)| key)) {
            assert!(reference.lines().any(|line| line.starts_with(&format!("{key} ="))), "{key} is not in the reference");
        }
    }

    #[test]
    fn a_named_file_that_is_absent_is_an_error() {
        assert!(Config::load(Some(Path::new("/nonexistent/windlass.toml"))).is_err());
    }
}
