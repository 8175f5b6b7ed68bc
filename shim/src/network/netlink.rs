//! One NETLINK_ROUTE conversation: requests go out in one datagram, answers are read until each request has its end.
//!
//! Messages are encoded with `netlink-packet-route`. Answers are read attribute by attribute here, and only the few that are needed:
//! a link type that the library cannot decode must not take the pod network down.
//! Sockets block. The kernel handles a request inside `send`, so what takes time is its rtnl lock: callers run on a blocking thread.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLA_ALIGNTO, NLA_HEADER_SIZE, NLA_TYPE_MASK, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoBridgePort, InfoPortData, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with, sockopt};

use super::NetworkError;

/// Bound for one answer; the kernel answers at once or, under a storm of link removals, after tens of milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// The kernel fills at most 32 KiB of a dump into one datagram.
const RECEIVE_BYTES: usize = 64 * 1024;
/// `sizeof(struct ifinfomsg)`, `ifaddrmsg`, `rtmsg`.
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const ROUTE_HEADER: usize = 12;

/// One request and the words for its error.
pub(super) struct Request {
    message: RouteNetlinkMessage,
    flags: u16,
    operation: &'static str,
    object: String,
}

/// A link as far as this module cares.
#[derive(Debug, Clone, Default)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) kind: Option<String>,
    pub(super) master: Option<u32>,
    pub(super) mtu: u32,
    pub(super) alias: Option<String>,
    pub(super) mac: Vec<u8>,
    pub(super) up: bool,
    /// Its operational state is "up" (RFC 2863).
    pub(super) operational: bool,
}

/// A route of the main table.
#[derive(Debug, Clone)]
pub(super) struct Route {
    pub(super) destination: IpAddr,
    pub(super) prefix: u8,
    pub(super) output: Option<u32>,
    pub(super) metric: u32,
}

/// A route socket; lives in whatever namespace it was opened in.
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    pub(super) fn open() -> Result<Self, NetworkError> {
        // NETLINK_ROUTE is protocol 0, which rustix calls `None`.
        let fd = socket_with(rustix::net::AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)
            .map_err(|errno| kernel("open", "netlink route socket", errno.into()))?;
        Self::from_fd(fd)
    }

    /// Uses a socket that another process opened in another namespace.
    pub(super) fn from_fd(fd: OwnedFd) -> Result<Self, NetworkError> {
        bound(fd.as_fd()).map_err(|source| kernel("set timeout of", "netlink route socket", source))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends all requests at once and waits for every acknowledgement. The kernel does not stop at the first failure, so a batch
    /// holds only requests whose failure after another's is harmless; the first failure is returned.
    pub(super) fn execute(&mut self, requests: &[Request]) -> Result<(), NetworkError> {
        self.exchange(requests).map(drop)
    }

    /// The link called `name`, or `None`.
    pub(super) fn link(&mut self, name: &str) -> Result<Option<Link>, NetworkError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let request = Request {
            message: RouteNetlinkMessage::GetLink(message),
            flags: NLM_F_ACK,
            operation: "look up link",
            object: name.to_owned(),
        };
        match self.exchange(&[request]) {
            Ok(answers) => Ok(answers.first().map(|payload| parse_link(payload))),
            Err(error) if errno_of(&error) == Some(rustix::io::Errno::NODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All links; with `master`, the ports of that bridge.
    pub(super) fn links(&mut self, master: Option<u32>) -> Result<Vec<Link>, NetworkError> {
        let mut message = LinkMessage::default();
        message.attributes.extend(master.map(LinkAttribute::Controller));
        let object = master.map_or_else(|| "of the host".to_owned(), |index| format!("of bridge {index}"));
        let request =
            Request { message: RouteNetlinkMessage::GetLink(message), flags: NLM_F_DUMP, operation: "list links", object };
        let answers = self.exchange(&[request])?;
        let links = answers.iter().map(|payload| parse_link(payload));
        Ok(links.filter(|link| master.is_none() || link.master == master).collect())
    }

    /// Unicast routes of the main table, of both families.
    pub(super) fn routes(&mut self) -> Result<Vec<Route>, NetworkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Unspec;
        let request = Request {
            message: RouteNetlinkMessage::GetRoute(message),
            flags: NLM_F_DUMP,
            operation: "list routes",
            object: "of the host".to_owned(),
        };
        Ok(self.exchange(&[request])?.iter().filter_map(|payload| parse_route(payload)).collect())
    }

    /// The addresses of link `index` with their prefix lengths, without those that IPv6 gives every link.
    pub(super) fn addresses(&mut self, index: u32) -> Result<Vec<(IpAddr, u8)>, NetworkError> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Unspec;
        let request = Request {
            message: RouteNetlinkMessage::GetAddress(message),
            flags: NLM_F_DUMP,
            operation: "list addresses",
            object: format!("of link {index}"),
        };
        Ok(self.exchange(&[request])?.iter().filter_map(|payload| parse_address(payload, index)).collect())
    }

    fn exchange(&mut self, requests: &[Request]) -> Result<Vec<Vec<u8>>, NetworkError> {
        let Some(first) = requests.first() else { return Ok(Vec::new()) };
        let start = self.sequence.wrapping_add(1);
        let mut out = Vec::with_capacity(512);
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            encode(request, self.sequence, &mut out);
        }
        let sent = rustix::io::retry_on_intr(|| send(&self.fd, &out, SendFlags::empty()))
            .map_err(|errno| kernel(first.operation, &first.object, errno.into()))?;
        if sent != out.len() {
            return Err(protocol(first, "short send"));
        }
        self.collect(requests, start)
    }

    fn collect(&self, requests: &[Request], start: u32) -> Result<Vec<Vec<u8>>, NetworkError> {
        let mut open = vec![true; requests.len()];
        let mut failure: Option<(usize, i32)> = None;
        let mut answers = Vec::new();
        let mut buffer = vec![0_u8; RECEIVE_BYTES];
        while let Some(waiting) = open.iter().position(|open| *open) {
            let request = &requests[waiting];
            let (_, length) = rustix::io::retry_on_intr(|| recv(&self.fd, &mut buffer[..], RecvFlags::TRUNC))
                .map_err(|errno| kernel(request.operation, &request.object, errno.into()))?;
            let datagram = buffer.get(..length).ok_or_else(|| protocol(request, "answer too long"))?;
            for message in messages(datagram) {
                let (kind, sequence, payload) = message.ok_or_else(|| protocol(request, "malformed answer"))?;
                let position = sequence.wrapping_sub(start) as usize;
                let Some(is_open) = open.get_mut(position) else { continue };
                match kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        *is_open = false;
                        let code = payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                        if code != 0 && failure.is_none_or(|(earlier, _)| position < earlier) {
                            failure = Some((position, code));
                        }
                    }
                    _ => answers.push(payload.to_vec()),
                }
            }
        }
        match failure {
            None => Ok(answers),
            Some((position, code)) => {
                let request = &requests[position];
                Err(kernel(request.operation, &request.object, io::Error::from_raw_os_error(code.saturating_neg())))
            }
        }
    }
}

/// Whether `table` of `family` (NFPROTO_) exists, asked over nfnetlink: a fork and exec of `nft` costs 3 ms, this 20 us, and Status asks
/// every few seconds. Needed because a reload of the host's own nftables configuration flushes every table.
pub(super) fn nft_table_exists(family: u8, table: &str) -> io::Result<bool> {
    const GET_TABLE: u16 = (10 << 8) | 1; // NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
    const TABLE_NAME: u16 = 1; // NFTA_TABLE_NAME
    let fd = socket_with(rustix::net::AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
    bound(fd.as_fd())?;
    let attribute = 4 + table.len() + 1;
    let length = 16 + 4 + attribute.next_multiple_of(4);
    let mut out = Vec::with_capacity(length);
    out.extend_from_slice(&u32::try_from(length).map_err(io::Error::other)?.to_ne_bytes());
    out.extend_from_slice(&GET_TABLE.to_ne_bytes());
    out.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    out.extend_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]); // sequence (any), port 0
    out.extend_from_slice(&[family, 0, 0, 0]); // nfgenmsg: family, NFNETLINK_V0, resource 0
    out.extend_from_slice(&u16::try_from(attribute).map_err(io::Error::other)?.to_ne_bytes());
    out.extend_from_slice(&TABLE_NAME.to_ne_bytes());
    out.extend_from_slice(table.as_bytes());
    out.resize(length, 0);
    rustix::io::retry_on_intr(|| send(&fd, &out, SendFlags::empty()))?;
    let mut buffer = [0_u8; 4096];
    let (_, received) = rustix::io::retry_on_intr(|| recv(&fd, &mut buffer[..], RecvFlags::TRUNC))?;
    match messages(buffer.get(..received).unwrap_or_default()).next().flatten() {
        Some((NLMSG_ERROR, _, payload)) => match payload.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes)) {
            0 => Ok(true),
            code if io::Error::from_raw_os_error(-code).kind() == io::ErrorKind::NotFound => Ok(false),
            code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        },
        Some(_) => Ok(true),
        None => Err(io::Error::other("malformed nfnetlink answer")),
    }
}

/// Creates or changes a link. `exclusive` makes an existing name fail with EEXIST.
pub(super) fn new_link(message: LinkMessage, operation: &'static str, object: &str) -> Request {
    Request {
        message: RouteNetlinkMessage::NewLink(message),
        flags: NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        operation,
        object: object.to_owned(),
    }
}

/// Makes what `message` describes; succeeds when it replaces the same.
pub(super) fn create(message: RouteNetlinkMessage, operation: &'static str, object: &str) -> Request {
    Request { message, flags: NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, operation, object: object.to_owned() }
}

/// Changes the link that the message names or numbers, and raises it.
pub(super) fn raise_link(mut message: LinkMessage, object: &str) -> Request {
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Request {
        message: RouteNetlinkMessage::SetLink(message),
        flags: NLM_F_ACK,
        operation: "configure link",
        object: object.to_owned(),
    }
}

/// Lets a bridge send what came in at port `name` out there again.
pub(super) fn hairpin_port(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)])),
    ]));
    Request {
        message: RouteNetlinkMessage::NewLink(message),
        flags: NLM_F_ACK,
        operation: "set hairpin mode of",
        object: name.to_owned(),
    }
}

/// Removes the link called `name`, and with a veth its peer.
pub(super) fn delete_link(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    Request {
        message: RouteNetlinkMessage::DelLink(message),
        flags: NLM_F_ACK,
        operation: "delete link",
        object: name.to_owned(),
    }
}

/// Puts the link called `name` into a group of links.
pub(super) fn set_group(name: &str, group: u32) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.push(LinkAttribute::Group(group));
    Request {
        message: RouteNetlinkMessage::SetLink(message),
        flags: NLM_F_ACK,
        operation: "set group of link",
        object: name.to_owned(),
    }
}

/// Removes all links of a group, which costs the kernel one wait for all of them.
pub(super) fn delete_group(group: u32) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(group));
    Request {
        message: RouteNetlinkMessage::DelLink(message),
        flags: NLM_F_ACK,
        operation: "delete links",
        object: format!("of group {group}"),
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address_message(index: u32, address: IpAddr, prefix: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = prefix;
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address));
    message.attributes.push(AddressAttribute::Address(address));
    message
}

/// Gives a link an address; succeeds when it has it. One of IPv6 may be used at once: nobody else can have it, so the second in which
/// the kernel would look for a duplicate is saved.
pub(super) fn add_address(index: u32, address: IpAddr, prefix: u8) -> Request {
    let mut message = address_message(index, address, prefix);
    message.attributes.push(match address {
        IpAddr::V4(address) => {
            let host_bits = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            AddressAttribute::Broadcast(Ipv4Addr::from_bits(address.to_bits() | host_bits))
        }
        IpAddr::V6(_) => AddressAttribute::Flags(AddressFlags::Nodad),
    });
    Request {
        message: RouteNetlinkMessage::NewAddress(message),
        flags: NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
        operation: "add address",
        object: format!("{address}/{prefix}"),
    }
}

/// Takes an address from a link.
pub(super) fn delete_address(index: u32, address: IpAddr, prefix: u8) -> Request {
    Request {
        message: RouteNetlinkMessage::DelAddress(address_message(index, address, prefix)),
        flags: NLM_F_ACK,
        operation: "delete address",
        object: format!("{address}/{prefix}"),
    }
}

/// Points the default route of the gateway's family at `gateway` through link `index`.
pub(super) fn add_default_route(index: u32, gateway: IpAddr) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(gateway);
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Gateway(match gateway {
        IpAddr::V4(gateway) => RouteAddress::Inet(gateway),
        IpAddr::V6(gateway) => RouteAddress::Inet6(gateway),
    }));
    message.attributes.push(RouteAttribute::Oif(index));
    Request {
        message: RouteNetlinkMessage::NewRoute(message),
        flags: NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
        operation: "add default route",
        object: format!("via {gateway}"),
    }
}

/// The errno behind a kernel error.
pub(super) fn errno_of(error: &NetworkError) -> Option<rustix::io::Errno> {
    match error {
        NetworkError::Kernel { source, .. } => rustix::io::Errno::from_io_error(source),
        _ => None,
    }
}

pub(super) fn kernel(operation: &'static str, object: &str, source: io::Error) -> NetworkError {
    NetworkError::Kernel { operation, object: object.to_owned(), source }
}

fn protocol(request: &Request, reason: &str) -> NetworkError {
    NetworkError::Protocol { operation: request.operation, object: request.object.clone(), reason: reason.to_owned() }
}

pub(super) fn bound(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    Ok(sockopt::set_socket_timeout(fd, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?)
}

fn encode(request: &Request, sequence: u32, out: &mut Vec<u8>) {
    let mut message = NetlinkMessage::from(request.message.clone());
    debug_assert!(matches!(message.payload, NetlinkPayload::InnerMessage(_)));
    message.header.flags = request.flags | NLM_F_REQUEST;
    message.header.sequence_number = sequence;
    message.finalize();
    let start = out.len();
    out.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut out[start..]);
}

/// Splits a datagram into (type, sequence, payload); `None` at the first malformed message.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = Option<(u16, u32, &[u8])>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Ok(header) = NetlinkBuffer::new_checked(rest) else {
            rest = &[];
            return Some(None);
        };
        let length = header.length() as usize;
        let message = (header.message_type(), header.sequence_number(), &rest[16..length]);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Some(message))
    })
}

/// Attributes after a header of `header` bytes, up to the first malformed one.
fn attributes(payload: &[u8], header: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = payload.get(header..).unwrap_or_default();
    std::iter::from_fn(move || {
        let [l0, l1, k0, k1] = *rest.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = rest.get(NLA_HEADER_SIZE..length)?;
        rest = rest.get(length.next_multiple_of(NLA_ALIGNTO)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & NLA_TYPE_MASK, value))
    })
}

fn word(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(|octets| Ipv4Addr::from(octets).into());
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(|octets| Ipv6Addr::from(octets).into())).ok()
}

fn parse_link(payload: &[u8]) -> Link {
    let mut link = Link {
        index: word(payload.get(4..).unwrap_or_default()),
        up: word(payload.get(8..).unwrap_or_default()) & LinkFlags::Up.bits() != 0,
        ..Link::default()
    };
    for (kind, value) in attributes(payload, LINK_HEADER) {
        match kind {
            1 => link.mac = value.to_vec(),        // IFLA_ADDRESS
            3 => link.name = text(value),          // IFLA_IFNAME
            4 => link.mtu = word(value),           // IFLA_MTU
            10 => link.master = Some(word(value)), // IFLA_MASTER
            16 => link.operational = value == [6], // IFLA_OPERSTATE, IF_OPER_UP
            18 => {
                // IFLA_LINKINFO holding IFLA_INFO_KIND
                link.kind = attributes(value, 0).find(|(kind, _)| *kind == 1).map(|(_, value)| text(value));
            }
            20 => link.alias = Some(text(value)), // IFLA_IFALIAS
            _ => {}
        }
    }
    link
}

fn parse_route(payload: &[u8]) -> Option<Route> {
    let header = payload.first_chunk::<ROUTE_HEADER>()?;
    if header[4] != RouteHeader::RT_TABLE_MAIN || header[7] != u8::from(RouteType::Unicast) {
        return None;
    }
    let anywhere = match header[0] {
        2 => Ipv4Addr::UNSPECIFIED.into(),  // AF_INET
        10 => Ipv6Addr::UNSPECIFIED.into(), // AF_INET6
        _ => return None,
    };
    let mut route = Route { destination: anywhere, prefix: header[1], output: None, metric: 0 };
    for (kind, value) in attributes(payload, ROUTE_HEADER) {
        match kind {
            1 => route.destination = address(value)?, // RTA_DST
            4 => route.output = Some(word(value)),    // RTA_OIF
            6 => route.metric = word(value),          // RTA_PRIORITY
            _ => {}
        }
    }
    Some(route)
}

fn parse_address(payload: &[u8], index: u32) -> Option<(IpAddr, u8)> {
    const LINK_SCOPE: u8 = 253; // RT_SCOPE_LINK
    let header = payload.first_chunk::<ADDRESS_HEADER>()?;
    // IFA_LOCAL, and IFA_ADDRESS where IPv6 has no other.
    let (own, shown) = match header[0] {
        2 => (2, true),
        10 => (1, header[3] != LINK_SCOPE),
        _ => return None,
    };
    if word(&header[4..]) != index || !shown {
        return None;
    }
    let (_, value) = attributes(payload, ADDRESS_HEADER).find(|(kind, _)| *kind == own)?;
    Some((address(value)?, header[1]))
}
