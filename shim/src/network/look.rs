//! What `windlass doctor` wants to know of this host's network. Nothing that stays is made.

use super::{
    NetworkError,
    bridge::links::{INTERMEDIATE_PREFIX, host_interface, intermediate},
    cni,
    firewall::Firewall,
    netlink::{self, Socket},
};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use nix::sched::{CloneFlags, unshare};
use std::{
    collections::HashSet,
    io,
    path::{Path, PathBuf},
};

/// A configuration file of a CNI network.
#[derive(Debug)]
pub struct CniFile {
    pub path: PathBuf,
    /// The network's name and the plugins of it that are in no directory of programs; or what is wrong with the file.
    pub network: Result<(String, Vec<String>), String>,
}

/// Whether each kind of link can be made: tried in a network namespace that a thread makes and that ends with it. Needs root.
pub fn kinds_of_links() -> Vec<(&'static str, Result<(), String>)> {
    let kinds = [("veth", InfoKind::Veth), ("bridge", InfoKind::Bridge), ("ifb", InfoKind::Ifb)];
    let tried = std::thread::spawn(move || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            let why = format!("make a network namespace: {}", io::Error::from(error));
            return kinds.map(|(name, _)| (name, Err(why.clone()))).to_vec();
        }
        kinds.map(|(name, kind)| (name, make(name, kind).map_err(|error| crate::error::Error::from(error).message))).to_vec()
    });
    tried.join().unwrap_or_default()
}

fn make(name: &str, kind: InfoKind) -> Result<(), NetworkError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(format!("try-{name}")));
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]));
    Socket::open()?.execute(&[netlink::new_link(message, "create link", name)])
}

/// The base chains that drop forwarded packets by policy. An error where `nft` is not there or may not be run.
pub fn dropping_chains(bridge: &str) -> Result<Vec<String>, NetworkError> {
    Firewall::new("windlass", bridge, true)?.dropping_chains()
}

/// Links of this host that have the names of pods' on this bridge, and are of none of these pods.
pub fn strays(bridge: &str, pods: &[String]) -> Result<Vec<String>, NetworkError> {
    let known: HashSet<String> =
        pods.iter().map(|pod| host_interface(pod)).flat_map(|link| [intermediate(&link), link]).collect();
    let mut host = Socket::open()?;
    let Some(bridge) = host.link(bridge)? else { return Ok(Vec::new()) };
    let links = host.links(None)?.into_iter().filter(|link| match link.kind.as_deref() {
        Some("veth") => link.master == Some(bridge.index) && link.name.starts_with("wl"),
        // Others' daemons have such links too, and say so in the alias as the bridge does.
        Some("ifb") => link.name.starts_with(INTERMEDIATE_PREFIX) && link.alias.is_some() && link.alias == bridge.alias,
        _ => false,
    });
    Ok(links.map(|link| link.name).filter(|name| !known.contains(name)).collect())
}

/// The configuration files of a directory in their order, as they are read for pods.
pub fn cni_files(directory: &Path, programs: &Path) -> io::Result<Vec<CniFile>> {
    cni::check(directory, &std::env::split_paths(programs).collect::<Vec<_>>())
}
