//! The pod network: gives a pod's network namespace an interface, addresses and a way out, and takes them back.
//!
//! Owns the built-in bridge: its link, its address file, its nftables table. Never makes or pins a network namespace (the monitor
//! does), never enters one: the pod's side is configured through a NETLINK_ROUTE socket that was opened inside it. Only the daemon's
//! own network namespace is "the host" here.

pub mod address;
mod attachment;
pub mod bridge;
mod firewall;
mod hostport;
mod netlink;
mod nfnetlink;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;

pub use attachment::{Attachment, Detachment, Dns, Interface, Kind, PodNetwork, PortMapping, Protocol};

use address::Subnet;
use bridge::Bridge;

/// What gives pods their network. The implementations share no state, and a pod is taken back by the one that attached it.
#[derive(Debug, Clone)]
pub struct Network {
    bridge: Bridge,
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
    /// A port of the host is taken, or cannot lead to this pod; says by whom or why.
    #[error("{0}")]
    HostPort(String),
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

    /// Whether the node is fine, and what was asked for is somebody else's.
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::HostPort(_))
    }
}

impl Network {
    /// Puts the implementations together.
    pub fn new(bridge: Bridge) -> Network {
        Network { bridge }
    }

    /// What attaches a pod from now on.
    pub fn kind(&self) -> Kind {
        Kind::Bridge
    }

    /// Connects a pod by the implementation that its record names; on failure nothing remains, or it is taken back later.
    pub async fn attach(&self, kind: Kind, pod: Attachment) -> Result<PodNetwork, NetworkError> {
        match kind {
            Kind::Bridge | Kind::Cni => self.bridge.attach(pod).await,
        }
    }

    /// Takes back all that `attach` gave; succeeds when there is nothing.
    pub async fn detach(&self, kind: Kind, pod: &Detachment) -> Result<(), NetworkError> {
        match kind {
            Kind::Bridge | Kind::Cni => self.bridge.detach(&pod.pod_id).await,
        }
    }

    /// Releases what belongs to pods that are not in `live`. Called once, when the daemon has read its records.
    pub fn reconcile(&self, live: &HashMap<String, Kind>) {
        let bridged = live.iter().filter(|(_, kind)| **kind == Kind::Bridge).map(|(pod, _)| pod.clone()).collect();
        self.bridge.reconcile(&bridged);
    }

    /// Takes over what a record says a live pod has; false if another pod holds it.
    pub fn adopt(&self, kind: Kind, pod_id: &str, holder: &str, network: &PodNetwork, ports: &[PortMapping]) -> bool {
        kind != Kind::Bridge || self.bridge.adopt(pod_id, holder, network, ports)
    }

    /// `Err` says, for Status's NetworkReady, why pods cannot be attached.
    pub fn ready(&self) -> Result<(), String> {
        self.bridge.ready()
    }

    /// Removes what the network keeps on the host if no pod uses it; says whether it did.
    pub async fn teardown_if_unused(&self) -> Result<bool, NetworkError> {
        self.bridge.teardown_if_unused().await
    }
}
