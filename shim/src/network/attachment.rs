//! What a pod asks of a network, what it got, and what is needed to take it back. Plain data: no implementation is known here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What attached a pod. Part of its record, because the choice for new pods may change while it lives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The built-in bridge; also of records from before there was another.
    #[default]
    Bridge,
    /// CNI plugins.
    Cni,
}

/// A pod that wants a network.
#[derive(Debug)]
pub struct Attachment {
    pub pod_id: String,
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub hostname: String,
    /// Where the pod's network namespace is pinned.
    pub netns: PathBuf,
    /// A NETLINK_ROUTE socket that was opened inside it.
    pub route_socket: OwnedFd,
    pub port_mappings: Vec<PortMapping>,
    pub annotations: BTreeMap<String, String>,
    pub dns: Dns,
    /// Parent of the pod's cgroups, beginning with `/`.
    pub cgroup_parent: String,
}

/// A pod whose network is to be taken back.
#[derive(Debug, Clone)]
pub struct Detachment {
    pub pod_id: String,
    pub name: String,
    pub namespace: String,
    pub uid: String,
    /// Where the network namespace is pinned, if it still is.
    pub netns: PathBuf,
    /// What the record says the pod got; `None` when its attach was never finished.
    pub network: Option<PodNetwork>,
}

/// One port of the host that leads to the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host_port: u16,
    /// The only address of the host that is meant; `None`: all of them.
    pub host_ip: Option<IpAddr>,
}

/// Transport of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

/// The pod's resolver settings.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// What a pod received; part of its record, because kubelet makes a pod anew when its address is not reported after a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// The pod's first interface, inside it.
    pub interface: String,
    /// The other end of the pair, in the daemon's namespace; empty where there is none.
    pub host_interface: String,
    /// The pod's addresses, the preferred one first.
    pub ips: Vec<IpAddr>,
    /// Hardware address of `interface`, six hex octets with colons.
    pub mac: String,
    /// Where the default routes point, at most one of each family.
    #[serde(default)]
    pub gateways: Vec<IpAddr>,
    /// Every interface that was made for the pod, on both sides, where more is known than the fields above say.
    #[serde(default)]
    pub interfaces: Vec<Interface>,
}

/// One interface of a pod's network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub name: String,
    pub mac: String,
    /// Inside the pod; otherwise on the host.
    pub in_pod: bool,
    pub ips: Vec<IpAddr>,
}
