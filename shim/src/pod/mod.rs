//! Pods: their record, their state and what may happen to it.
//!
//! ```text
//!            run                      stop, or the monitor is lost
//! (nothing) -----> Creating -> Ready -------------------------> NotReady --remove--> (nothing)
//! ```
//! Transitions of one pod hold its `turn`; reads take a published copy and wait for nobody.

mod files;
mod network;
mod recover;
mod resources;
mod run;
mod scope;
mod stop;
pub mod userns;
mod watch;

pub use network::assign_subnets;
pub use recover::recover;
pub use resources::update;
pub use run::run;
pub use stop::{remove, stop};

use crate::{
    error::{Error, Result, known},
    log::names::{self, Known},
    monitor::Monitor,
    network::{Kind, PodNetwork},
    node::Node,
    nri::Told,
    stats::Ended,
    store,
};
use serde::{Deserialize, Serialize};
use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, RwLock},
};
use windlass_proto::cri::{NamespaceMode, NamespaceOption, PodSandboxConfig};

/// A pod as its record keeps it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    pub config: PodSandboxConfig,
    pub runtime_handler: String,
    pub created_at_ns: i64,
    pub phase: Phase,
    /// Path that the network namespace is pinned at; empty for the host's network.
    pub netns: PathBuf,
    /// True from before the network is attached until it has been detached.
    pub network_attached: bool,
    /// What attached it, and so what detaches it.
    #[serde(default)]
    pub network_kind: Kind,
    pub network: Option<PodNetwork>,
    /// Parent of the pod's cgroups in the v2 tree, beginning with `/`.
    pub cgroup_parent: String,
    /// The systemd scope in it that holds them; empty where the parent does.
    #[serde(default)]
    pub scope: String,
    /// Path in the v2 tree of the cgroup that the monitor's leaf is made in; empty where that is the pod's, as with a scope it always is.
    #[serde(default)]
    pub monitor_parent: String,
    /// The parent is the pod's alone, and was not there before the pod.
    #[serde(default)]
    pub made_parent: bool,
    /// SELinux categories of the pod, `c1,c2`; empty where there are none.
    #[serde(default)]
    pub selinux_categories: String,
    /// The monitor's leaf has the pod's id for its name; in records from before it does not.
    #[serde(default)]
    pub leaf_has_id: bool,
    /// Processor time of removed containers, where the pod has no cgroup that counts it.
    #[serde(default)]
    pub removed_cpu_ns: u64,
}

/// Where a pod is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    Creating,
    Ready,
    NotReady,
}

/// A pod of this node.
pub struct Pod {
    pub id: String,
    record: RwLock<Record>,
    monitor: Mutex<Option<Arc<Monitor>>>,
    ended: Mutex<Ended>,
    /// Whether plugins of NRI have been told that it has stopped.
    pub(crate) end_told: Told,
    /// Held by the one transition of this pod that is under way.
    pub turn: tokio::sync::Mutex<()>,
    _names: Known,
}

const POISON: &str = "never poisoned: no panic while held";

impl Pod {
    pub fn new(record: Record) -> Pod {
        Pod {
            id: record.id.clone(),
            _names: names::learn(&record.id, || {
                let meta = record.config.metadata.clone().unwrap_or_default();
                vec![("pod", meta.name), ("namespace", meta.namespace)]
            }),
            ended: Mutex::new(Ended::since(record.removed_cpu_ns)),
            end_told: Told::new(record.phase == Phase::NotReady),
            record: RwLock::new(record),
            monitor: Mutex::new(None),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    /// A copy of the record as it is now.
    pub fn record(&self) -> Record {
        self.record.read().expect(POISON).clone()
    }

    /// Looks at the record without copying it.
    pub fn look<T>(&self, view: impl FnOnce(&Record) -> T) -> T {
        view(&self.record.read().expect(POISON))
    }

    pub fn phase(&self) -> Phase {
        self.look(|record| record.phase)
    }

    /// Changes the record, on disk first.
    pub fn change(&self, node: &Node, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut guard = self.record.write().expect(POISON);
        let mut next = guard.clone();
        change(&mut next);
        store::write(&node.pod_directory(&self.id).join("record.json"), &next)?;
        *guard = next;
        Ok(())
    }

    /// Changes the published record even when the disk is full: a dead pod must not look alive.
    pub fn change_always(&self, node: &Node, change: impl Fn(&mut Record)) {
        if let Err(error) = self.change(node, &change) {
            tracing::error!(pod = %self.id, %error, "pod record not written");
            change(&mut self.record.write().expect(POISON));
        }
    }

    /// The connection to the pod's monitor, an error when there is none.
    pub fn monitor(&self) -> Result<Arc<Monitor>> {
        let monitor = self.monitor.lock().expect(POISON).clone();
        monitor
            .filter(|monitor| !monitor.is_closed())
            .ok_or_else(|| Error::precondition(format!("pod {} has no monitor: it is not running", self.id)))
    }

    pub fn set_monitor(&self, monitor: Option<Arc<Monitor>>) {
        *self.monitor.lock().expect(POISON) = monitor;
    }

    /// What its ended containers used, for as long as it is held.
    pub fn ended(&self) -> MutexGuard<'_, Ended> {
        self.ended.lock().expect(POISON)
    }

    /// True when the pod uses the host's network.
    pub fn host_network(&self) -> bool {
        self.look(|record| namespace_modes(&record.config).network() == NamespaceMode::Node)
    }
}

impl Record {
    /// Path in the v2 tree of the cgroup that the pod's leaves are made in.
    pub fn cgroup(&self) -> String {
        if self.scope.is_empty() { self.cgroup_parent.clone() } else { below(&self.cgroup_parent, &self.scope) }
    }

    /// The slice that the scope is in.
    fn slice(&self) -> &str {
        self.cgroup_parent.rsplit('/').next().filter(|last| last.ends_with(".slice")).unwrap_or("-.slice")
    }

    /// Path of the monitor's leaf in the v2 tree. Without a scope, which has the pod's id, the leaf has it for its name: kubelet and cAdvisor
    /// look there for the sandbox.
    pub fn monitor_path(&self) -> String {
        if !self.scope.is_empty() {
            return below(&self.cgroup(), "monitor");
        }
        let parent = if self.monitor_parent.is_empty() { &self.cgroup_parent } else { &self.monitor_parent };
        below(parent, &if self.leaf_has_id { self.id.clone() } else { format!("{}-monitor", self.id) })
    }

    /// Path of the leaf of the built-in init of a shared pid namespace. No id is in it, which would name a second sandbox.
    fn init_path(&self) -> String {
        match (self.scope.is_empty(), self.leaf_has_id) {
            (false, _) => below(&self.cgroup(), "init"),
            (true, true) => below(&self.cgroup(), &format!("init-{}", self.short_id())),
            (true, false) => below(&self.cgroup(), &format!("{}-init", self.id)),
        }
    }

    /// Path of a container's leaf in the v2 tree.
    pub fn container_path(&self, container_id: &str) -> String {
        below(&self.cgroup(), container_id)
    }

    /// Absolute directory of the monitor's leaf.
    pub fn monitor_cgroup(&self, node: &Node) -> PathBuf {
        node.tree.directory(&self.monitor_path())
    }

    /// Absolute directory of the leaf of the built-in init of a shared pid namespace.
    pub fn init_cgroup(&self, node: &Node) -> PathBuf {
        node.tree.directory(&self.init_path())
    }

    /// Absolute directory of a container's leaf.
    pub fn container_cgroup(&self, node: &Node, container_id: &str) -> PathBuf {
        node.tree.directory(&self.container_path(container_id))
    }

    /// Names a leaf that no id names: a parent may hold those of several pods.
    fn short_id(&self) -> &str {
        self.id.get(..32).unwrap_or(&self.id)
    }

    /// Path in the v2 tree of the cgroup that holds this pod and nothing else, where there is one: kubelet's, else the scope.
    pub fn own_cgroup(&self) -> Option<String> {
        if self.owns_parent() { Some(self.cgroup_parent.clone()) } else { (!self.scope.is_empty()).then(|| self.cgroup()) }
    }

    /// Path in the v2 tree of the cgroup that holds this pod and nothing else, and that this runtime made.
    pub fn made_cgroup(&self) -> Option<String> {
        let kubelets = self.owns_parent() && !self.made_parent;
        (!kubelets && (self.made_parent || !self.scope.is_empty())).then(|| self.cgroup())
    }

    /// True when the cgroup parent is the pod's alone: kubelet puts the pod's uid into its last part, with `_` for `-` under systemd.
    fn owns_parent(&self) -> bool {
        let uid = self.config.metadata.as_ref().map(|meta| meta.uid.as_str()).unwrap_or_default();
        let last = self.cgroup_parent.rsplit('/').next().unwrap_or_default();
        !uid.is_empty()
            && (last.ends_with(&format!("pod{uid}")) || last.ends_with(&format!("pod{}.slice", uid.replace('-', "_"))))
    }

    /// Directory of container logs; empty when the pod keeps none.
    pub fn log_directory(&self) -> &str {
        &self.config.log_directory
    }

    /// Name and namespace for logs.
    pub fn name(&self) -> String {
        self.config.metadata.as_ref().map(|meta| format!("{}/{}", meta.namespace, meta.name)).unwrap_or_default()
    }
}

/// A path below another one of the v2 tree.
fn below(path: &str, name: &str) -> String {
    format!("{}/{name}", path.trim_end_matches('/'))
}

/// The pod's wish for SELinux labels.
pub fn selinux_options(config: &PodSandboxConfig) -> Option<&windlass_proto::cri::SeLinuxOption> {
    config.linux.as_ref()?.security_context.as_ref()?.selinux_options.as_ref()
}

/// Whether the pod was declared to have privileged containers.
pub fn is_privileged(config: &PodSandboxConfig) -> bool {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    security.is_some_and(|security| security.privileged)
}

/// Refuses modes that are none of the CRI's. `field`: where the options are.
pub fn check_modes(field: &str, options: &NamespaceOption) -> Result<()> {
    for (name, mode) in [("network", options.network), ("pid", options.pid), ("ipc", options.ipc)] {
        known::<NamespaceMode>(format_args!("{field}.{name}"), mode)?;
    }
    let users = options.userns_options.as_ref().map_or(0, |users| users.mode);
    known::<NamespaceMode>(format_args!("{field}.userns_options.mode"), users).map(drop)
}

/// The pod's namespace options; absent ones are the pod's own.
pub fn namespace_modes(config: &PodSandboxConfig) -> NamespaceOption {
    config
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref())
        .and_then(|security| security.namespace_options.clone())
        .unwrap_or_default()
}
