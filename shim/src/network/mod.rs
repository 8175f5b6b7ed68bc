//! The pod network: gives a pod's network namespace an interface, addresses and a way out, and takes them back.
//!
//! Owns the built-in bridge: its link, its address file, its nftables table. Never makes or pins a network namespace (the monitor
//! does), never enters one: the pod's side is configured through a NETLINK_ROUTE socket that was opened inside it. Only the daemon's
//! own network namespace is "the host" here.

pub mod address;
pub mod bridge;
mod firewall;
mod netlink;

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use address::Subnet;
use bridge::Bridge;

/// What gives pods their network. An enum and not a trait object: the choice is made once, when the daemon starts, and the
/// implementations share no state.
#[derive(Debug, Clone)]
pub enum Network {
    /// The built-in bridge, used when no CNI configuration exists.
    Bridge(Bridge),
}

/// What a pod received; part of its record, because kubelet makes a pod anew when its address is not reported after a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// Interface inside the pod.
    pub interface: String,
    /// The other end of the pair, in the daemon's namespace.
    pub host_interface: String,
    /// The pod's addresses, the preferred one first.
    pub ips: Vec<IpAddr>,
    /// Hardware address of `interface`, six hex octets with colons.
    pub mac: String,
    /// Where the default route points.
    pub gateway: IpAddr,
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
}

impl Network {
    /// Connects the namespace pinned at `netns`; see [`Bridge::attach`].
    pub async fn attach(&self, pod_id: &str, netns: &Path, route_socket: OwnedFd) -> Result<PodNetwork, NetworkError> {
        match self {
            Self::Bridge(bridge) => bridge.attach(pod_id, netns, route_socket).await,
        }
    }

    /// Takes back all that `attach` gave; succeeds when there is nothing.
    pub async fn detach(&self, pod_id: &str) -> Result<(), NetworkError> {
        match self {
            Self::Bridge(bridge) => bridge.detach(pod_id).await,
        }
    }

    /// Releases what belongs to pods that are not in `live_pod_ids`. Called once, when the daemon has read its records.
    pub fn reconcile(&self, live_pod_ids: &HashSet<String>) {
        match self {
            Self::Bridge(bridge) => bridge.reconcile(live_pod_ids),
        }
    }

    /// Takes over what a record says a live pod has; false if another pod holds it. See [`Bridge::adopt`].
    pub fn adopt(&self, pod_id: &str, network: &PodNetwork) -> bool {
        match self {
            Self::Bridge(bridge) => bridge.adopt(pod_id, network),
        }
    }

    /// `Err` says, for Status's NetworkReady, why pods cannot be attached.
    pub fn ready(&self) -> Result<(), String> {
        match self {
            Self::Bridge(bridge) => bridge.ready(),
        }
    }

    /// Removes what the network keeps on the host if no pod uses it; says whether it did.
    pub async fn teardown_if_unused(&self) -> Result<bool, NetworkError> {
        match self {
            Self::Bridge(bridge) => bridge.teardown_if_unused().await,
        }
    }
}
