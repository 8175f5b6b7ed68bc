//! The pod network: gives a pod's network namespace an interface, addresses and a way out, and takes them back.
//!
//! Two implementations: the built-in bridge (its link, its address file, its nftables table) and CNI plugins. Never makes or pins a network namespace (the monitor
//! does), never enters one: the pod's side is configured through a NETLINK_ROUTE socket that was opened inside it. Only the daemon's
//! own network namespace is "the host" here.

pub mod address;
mod attachment;
mod bandwidth;
pub mod bridge;
pub mod cni;
mod conntrack;
mod firewall;
mod hostport;
pub mod look;
mod netlink;
mod nfnetlink;
pub mod subnet;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use attachment::{Attachment, Detachment, Dns, Interface, Kind, PodNetwork, PortMapping, Protocol};

use bridge::{Bridge, BridgeConfig};
use cni::Cni;
use subnet::Subnet;

use crate::config::{NetworkConfig, NetworkMode};

/// What gives pods their network. The implementations share no state, and a pod is taken back by the one that attached it.
#[derive(Debug, Clone)]
pub struct Network {
    mode: NetworkMode,
    bridge: Bridge,
    cni: Cni,
    /// The bridge was made when the daemon started, and has not been looked at since CNI took over.
    bridge_made: Arc<AtomicBool>,
}

/// Failures, by what the caller may do about them. `Display` leaves the cause to `source`.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused one operation on one object; what was acquired before it has been released.
    #[error("{operation} {object}")]
    Kernel {
        operation: &'static str,
        object: String,
        #[source]
        source: io::Error,
    },
    /// A netlink answer could not be understood or did not come within the bound.
    #[error("{operation} {object}: {reason}")]
    Protocol { operation: &'static str, object: String, reason: String },
    /// The address file cannot be read or written (`ENOSPC` on a full disk); no address was given.
    #[error("{operation} {}", path.display())]
    State {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Every address is in use.
    #[error("no free pod address: all {used} of {subnet} are in use")]
    Exhausted { subnet: Subnet, used: usize },
    /// The configuration meets something of the host; the administrator chooses another name or subnet.
    #[error("{0}")]
    Conflict(String),
    /// What the pod asks of its network cannot be read.
    #[error("{0}")]
    Invalid(String),
    /// A port of the host is taken, or cannot lead to this pod; says by whom or why.
    #[error("{0}")]
    HostPort(String),
    /// A plugin failed, or the network is not configured rightly.
    #[error("CNI network {network}: {reason}")]
    Cni { network: String, reason: String },
    /// The nftables rules could not be installed or removed.
    #[error("nftables table {table}: {reason}")]
    Firewall { table: String, reason: String },
    /// The blocking task was lost: the daemon is shutting down.
    #[error("network task of {0} was cancelled")]
    Cancelled(String),
}

impl NetworkError {
    /// Whether trying again later can succeed without a change of configuration.
    pub fn is_exhausted(&self) -> bool {
        matches!(self, Self::Exhausted { .. })
    }

    /// Whether what was asked for makes no sense.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::Invalid(_))
    }

    /// Whether the node is fine, and what was asked for is somebody else's.
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::HostPort(_))
    }
}

impl Network {
    /// Opens both implementations, and makes the bridge where it is the one that attaches. `state` is the folder of their files. Blocks.
    pub fn start(config: &NetworkConfig, bridge: BridgeConfig, state: &Path) -> Result<Network, NetworkError> {
        let cni = Cni::open(config, state.join("cni"))?;
        let network =
            Network { mode: config.mode, bridge: Bridge::open(bridge)?, cni, bridge_made: Arc::new(AtomicBool::new(false)) };
        network.cni.set_pod_cidrs(network.bridge.assigned());
        if network.kind() == Kind::Bridge {
            network.bridge.make();
            network.bridge_made.store(true, Ordering::Relaxed);
        }
        Ok(network)
    }

    /// What attaches a pod from now on. Where CNI has once been chosen it stays: while its configuration is replaced, pods wait for
    /// it and do not come up on another network. Looks at the configuration of now.
    pub fn kind(&self) -> Kind {
        if self.mode != NetworkMode::Bridge {
            self.cni.refresh();
        }
        match self.mode {
            NetworkMode::Bridge => Kind::Bridge,
            NetworkMode::Cni => Kind::Cni,
            NetworkMode::Auto if self.cni.seen() => Kind::Cni,
            NetworkMode::Auto => Kind::Bridge,
        }
    }

    /// Connects a pod by the implementation that its record names; on failure nothing remains, or it is taken back later.
    pub async fn attach(&self, kind: Kind, pod: Attachment) -> Result<PodNetwork, NetworkError> {
        match kind {
            Kind::Bridge => self.bridge.attach(pod).await,
            Kind::Cni => {
                if self.bridge_made.swap(false, Ordering::Relaxed) {
                    self.leave_bridge();
                }
                self.cni.attach(pod).await
            }
        }
    }

    /// Takes back all that `attach` gave; succeeds when there is nothing. A link of the bridge goes behind the return.
    pub async fn detach(&self, kind: Kind, pod: &Detachment) -> Result<(), NetworkError> {
        match kind {
            Kind::Bridge => {
                self.bridge.detach(&pod.pod_id).await?;
                if self.kind() == Kind::Cni {
                    self.leave_bridge();
                }
                Ok(())
            }
            Kind::Cni => self.cni.detach(pod).await,
        }
    }

    /// Waits until nothing is left of a pod that was detached.
    pub async fn gone(&self, kind: Kind, pod_id: &str) -> Result<(), NetworkError> {
        match kind {
            Kind::Bridge => self.bridge.gone(pod_id).await,
            Kind::Cni => Ok(()),
        }
    }

    /// Takes over the node's subnets for pods (UpdateRuntimeConfig), of which the bridge gives addresses from now on, and plugins that have
    /// the capability `ipRanges`. Blocks.
    pub fn assign(&self, subnets: &[Subnet]) -> Result<(), NetworkError> {
        self.bridge.assign(subnets, self.kind() == Kind::Bridge)?;
        self.cni.set_pod_cidrs(self.bridge.assigned());
        Ok(())
    }

    /// Removes the bridge, which CNI has taken over from, beside everything else if no pod is on it any more.
    fn leave_bridge(&self) {
        let bridge = self.bridge.clone();
        tokio::spawn(async move {
            if let Err(error) = bridge.teardown_if_unused().await {
                tracing::warn!(error = %bridge::chain(&error), "the built-in bridge is not removed");
            }
        });
    }

    /// Releases what belongs to pods that are not in `live`. Called once, when the daemon has read its records.
    pub fn reconcile(&self, live: &HashMap<String, Kind>) {
        let bridged = live.iter().filter(|(_, kind)| **kind == Kind::Bridge).map(|(pod, _)| pod.clone()).collect();
        self.bridge.reconcile(&bridged);
        self.cni.start(live, self.mode != NetworkMode::Bridge);
    }

    /// Takes over what a record says a live pod has; false if another pod holds it.
    pub fn adopt(&self, kind: Kind, pod_id: &str, holder: &str, network: &PodNetwork, ports: &[PortMapping]) -> bool {
        kind != Kind::Bridge || self.bridge.adopt(pod_id, holder, network, ports)
    }

    /// `Err` says, for Status's NetworkReady, why pods cannot be attached.
    pub fn ready(&self) -> Result<(), String> {
        match self.kind() {
            Kind::Bridge => self.bridge.ready(),
            Kind::Cni => self.cni.ready(),
        }
    }

    /// For a person: what attaches pods, and how it is.
    pub fn describe(&self) -> serde_json::Value {
        serde_json::json!({ "mode": self.mode, "attaches": self.kind(), "subnets": self.bridge.subnets(), "cni": self.cni.describe() })
    }

    /// Removes what the network keeps on the host if no pod uses it; says whether it did.
    pub async fn teardown_if_unused(&self) -> Result<bool, NetworkError> {
        self.bridge.teardown_if_unused().await
    }
}
