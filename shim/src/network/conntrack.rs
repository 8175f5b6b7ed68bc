//! Flows that the kernel remembers (conntrack) and that a change of host ports makes wrong.
//!
//! Rules are asked for the first packet of a flow only. A client that sends datagrams from one port without a pause would reach a pod that
//! is gone, or the host itself, for as long as it goes on. TCP needs none of this: the other end resets the connection.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

use super::netlink::{bound, messages};
use super::nfnetlink::{NESTED, attribute, message};
use super::{PortMapping, Protocol};

const DELETE: u16 = (1 << 8) | 2; // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
const TUPLE_ORIG: u16 = 1 | NESTED; // CTA_TUPLE_ORIG
const TUPLE_REPLY: u16 = 2 | NESTED;
const FILTER: u16 = 25 | NESTED; // CTA_FILTER, linux 5.8
/// What of a tuple counts: CTA_FILTER_FLAG of CTA_IP_SRC, CTA_PROTO_NUM and CTA_PROTO_DST_PORT.
const BY_SOURCE: u32 = 1;
const BY_PROTOCOL: u32 = 1 << 3;
const BY_PORT: u32 = 1 << 5;
const UDP: u8 = 17;

/// Forgets what was sent to the UDP ports among `ports` before they led to the pod, and what still goes to the pod by them.
pub(super) fn forget(ports: &[PortMapping], pod: &[IpAddr]) -> io::Result<()> {
    let ports = || ports.iter().filter(|port| port.protocol == Protocol::Udp);
    if ports().next().is_none() {
        return Ok(());
    }
    for address in pod {
        let family = if address.is_ipv4() { 2 } else { 10 };
        delete(family, TUPLE_REPLY, BY_SOURCE | BY_PROTOCOL, |out| {
            attribute(out, 1 | NESTED, |out| match address {
                IpAddr::V4(address) => attribute(out, 1, |out| bytes(out, &address.octets())), // CTA_IP_V4_SRC
                IpAddr::V6(address) => attribute(out, 3, |out| bytes(out, &address.octets())),
            })?;
            attribute(out, 2 | NESTED, |out| attribute(out, 1, |out| bytes(out, &[UDP])))
        })?;
        for port in ports() {
            delete(family, TUPLE_ORIG, BY_PROTOCOL | BY_PORT, |out| {
                // CTA_TUPLE_PROTO: CTA_PROTO_NUM, CTA_PROTO_DST_PORT
                attribute(out, 2 | NESTED, |out| {
                    attribute(out, 1, |out| bytes(out, &[UDP]))?;
                    attribute(out, 3, |out| bytes(out, &port.host_port.to_be_bytes()))
                })
            })?;
        }
    }
    Ok(())
}

fn bytes(out: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    out.extend(bytes);
    Ok(())
}

/// Deletes the flows of a family whose `which` tuple is as `tuple` writes, as far as `flags` say that it counts.
fn delete(family: u8, which: u16, flags: u32, tuple: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> io::Result<()> {
    const COUNTS: u16 = 1; // CTA_FILTER_ORIG_FLAGS; CTA_FILTER_REPLY_FLAGS is the next
    let socket =
        socket_with(rustix::net::AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
    bound(socket.as_fd())?;
    let mut request = Vec::with_capacity(128);
    // Version 1: the family counts.
    message(&mut request, (DELETE, NLM_F_REQUEST | NLM_F_ACK, 1), [family, 1, 0, 0], |out| {
        attribute(out, which, tuple)?;
        let (orig, reply) = if which == TUPLE_ORIG { (flags, 0) } else { (0, flags) };
        attribute(out, FILTER, |out| {
            attribute(out, COUNTS, |out| bytes(out, &orig.to_ne_bytes()))?;
            attribute(out, COUNTS + 1, |out| bytes(out, &reply.to_ne_bytes()))
        })
    })?;
    rustix::io::retry_on_intr(|| send(&socket, &request, SendFlags::empty()))?;
    let mut buffer = [0_u8; 4096];
    let (_, length) = rustix::io::retry_on_intr(|| recv(&socket, &mut buffer[..], RecvFlags::TRUNC))?;
    let answer = messages(buffer.get(..length).unwrap_or_default()).next().flatten();
    let code = answer.filter(|(kind, ..)| *kind == NLMSG_ERROR).and_then(|(.., payload)| payload.first_chunk().copied());
    match code.map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::Error::other("malformed answer of ctnetlink")),
    }
}
