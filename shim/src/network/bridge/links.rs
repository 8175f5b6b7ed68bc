//! The links of the built-in bridge: their names, their hardware addresses, and the messages that make them.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use super::super::NetworkError;
use super::super::netlink::{self, Route, Socket, errno_of};
use super::{Installed, POD_INTERFACE};

/// Names of links that what pods send is limited at begin so.
pub(in crate::network) const INTERMEDIATE_PREFIX: &str = "wi";
/// First octet of hardware addresses made here: locally administered, unicast.
const MAC_FIRST: u8 = 0x0a;

/// `wl` and eleven hex digits: of the id itself when it begins so, as ids of pods do, so that a reader can match them; of its hash otherwise.
pub(in crate::network) fn host_interface(pod_id: &str) -> String {
    match pod_id.get(..11) {
        Some(start) if start.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) => format!("wl{start}"),
        _ => format!("wl{}", &hex::encode(Sha256::digest(pod_id))[..11]),
    }
}

/// The link that what a pod sends is limited at, by the name of the host's end of its pair.
pub(in crate::network) fn intermediate(link: &str) -> String {
    format!("{INTERMEDIATE_PREFIX}{}", link.strip_prefix("wl").unwrap_or(link))
}

/// Of a pod whose first address this is: when it is used again, no neighbour has a stale entry.
pub(super) fn mac_of(address: IpAddr) -> [u8; 6] {
    let (family, [a, b, c, d]) = match address {
        IpAddr::V4(address) => (b'W', address.octets()),
        IpAddr::V6(address) => {
            let [.., a, b, c, d] = address.octets();
            (b'X', [a, b, c, d])
        }
    };
    [MAC_FIRST, family, a, b, c, d]
}

/// Of the bridge `name`; the same whatever its addresses and ports are, so that the pods' entries for their gateway stay true.
pub(super) fn bridge_mac(name: &str) -> [u8; 6] {
    let digest: [u8; 32] = Sha256::digest(name).into();
    let [a, b, c, d, ..] = digest;
    [MAC_FIRST, b'Y', a, b, c, d]
}

pub(super) fn pair(bridge: Installed, link: &str, mac: [u8; 6], namespace: &File) -> LinkMessage {
    let mut peer = LinkMessage::default();
    peer.attributes.push(LinkAttribute::IfName(POD_INTERFACE.to_owned()));
    peer.attributes.push(LinkAttribute::Address(mac.to_vec()));
    peer.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
    peer.attributes.extend(bridge.mtu.map(LinkAttribute::Mtu));
    let mut host = LinkMessage::default();
    // Up in the creating message works for this end only: the peer does not know its pair yet and answers ENOTCONN.
    host.header.flags = LinkFlags::Up;
    host.header.change_mask = LinkFlags::Up;
    host.attributes.push(LinkAttribute::IfName(link.to_owned()));
    host.attributes.push(LinkAttribute::Controller(bridge.index));
    host.attributes.extend(bridge.mtu.map(LinkAttribute::Mtu));
    host.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    host
}

pub(super) fn bridge_link(name: &str) -> LinkMessage {
    let options = vec![InfoBridge::ForwardDelay(0), InfoBridge::StpState(BridgeStpState::Disabled)];
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message
        .attributes
        .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(InfoData::Bridge(options))]));
    message
}

/// Succeeds when there is none.
pub(super) fn remove_link(host: &mut Socket, name: &str) -> Result<(), NetworkError> {
    match host.execute(&[netlink::delete_link(name)]) {
        Err(error) if errno_of(&error) == Some(Errno::NODEV) => Ok(()),
        result => result,
    }
}

/// The MTU in bytes of the link that the host's default route leaves by.
pub(super) fn uplink_mtu(host: &mut Socket, routes: &[Route]) -> Result<Option<u32>, NetworkError> {
    let default = routes.iter().filter(|route| route.prefix == 0);
    let uplink = default.min_by_key(|route| (route.destination.is_ipv6(), route.metric)).and_then(|route| route.output);
    let Some(uplink) = uplink else { return Ok(None) };
    Ok(host.links(None)?.into_iter().find(|link| link.index == uplink).map(|link| link.mtu))
}
