//! Elements of our nftables maps, changed in one nfnetlink transaction: all of a pod's or none, and no `nft` program in a pod's way.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NLMSG_ERROR};
use rustix::net::{RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};
use std::os::fd::AsFd;

use super::hostport::Element;
use super::netlink::{bound, messages};

/// What is done with elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Add,
    Delete,
}

const BATCH_BEGIN: u16 = 16; // NFNL_MSG_BATCH_BEGIN
const BATCH_END: u16 = 17;
const NFTABLES: u16 = 10; // NFNL_SUBSYS_NFTABLES
const NEW_ELEMENT: u16 = (NFTABLES << 8) | 12; // NFT_MSG_NEWSETELEM
const DELETE_ELEMENT: u16 = (NFTABLES << 8) | 14; // NFT_MSG_DELSETELEM
pub(super) const NESTED: u16 = 1 << 15;
/// An acknowledgement quotes at most the header of its request; an error the whole of it.
const RECEIVE_BYTES: usize = 16 * 1024;

/// Adds or deletes all of `elements` of the maps of `table` of `family` (NFPROTO_), or none. `NotFound`: the table, or an element to delete, is not there.
pub(super) fn change(family: u8, table: &str, change: Change, elements: &[Element]) -> io::Result<()> {
    if elements.is_empty() {
        return Ok(());
    }
    let socket =
        socket_with(rustix::net::AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER))?;
    bound(socket.as_fd())?;
    let batch = encode(family, table, change, elements)?;
    if rustix::io::retry_on_intr(|| send(&socket, &batch, SendFlags::empty()))? != batch.len() {
        return Err(io::Error::other("short send to nfnetlink"));
    }
    let mut buffer = vec![0_u8; RECEIVE_BYTES];
    let mut waiting = elements.len();
    while waiting > 0 {
        let (_, length) = rustix::io::retry_on_intr(|| recv(&socket, &mut buffer[..], RecvFlags::TRUNC))?;
        for message in messages(buffer.get(..length).unwrap_or_default()) {
            let malformed = || io::Error::other("malformed nfnetlink answer");
            let (kind, _, payload) = message.ok_or_else(malformed)?;
            if kind != NLMSG_ERROR {
                continue;
            }
            match payload.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes)).ok_or_else(malformed)? {
                0 => waiting = waiting.saturating_sub(1),
                // One failure is the failure of all.
                code => return Err(io::Error::from_raw_os_error(code.saturating_neg())),
            }
        }
    }
    Ok(())
}

fn encode(family: u8, table: &str, change: Change, elements: &[Element]) -> io::Result<Vec<u8>> {
    let mut batch = Vec::with_capacity(128 * (elements.len() + 1));
    let [high, low] = NFTABLES.to_be_bytes();
    message(&mut batch, (BATCH_BEGIN, NLM_F_REQUEST, 0), [0, 0, high, low], |_| Ok(()))?;
    let (kind, flags) = match change {
        Change::Add => (NEW_ELEMENT, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE),
        Change::Delete => (DELETE_ELEMENT, NLM_F_REQUEST | NLM_F_ACK),
    };
    for (sequence, element) in (1..).zip(elements) {
        message(&mut batch, (kind, flags, sequence), [family, 0, 0, 0], |out| {
            text(out, 1, table)?; // NFTA_SET_ELEM_LIST_TABLE
            text(out, 2, element.map())?; // NFTA_SET_ELEM_LIST_SET
            // NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_LIST_ELEM, NFTA_SET_ELEM_KEY and _DATA, NFTA_DATA_VALUE
            attribute(out, 3 | NESTED, |out| {
                attribute(out, 1 | NESTED, |out| {
                    attribute(out, 1 | NESTED, |out| value(out, &element.key()))?;
                    match change {
                        Change::Add => attribute(out, 2 | NESTED, |out| value(out, &element.data())),
                        Change::Delete => Ok(()),
                    }
                })
            })
        })?;
    }
    message(&mut batch, (BATCH_END, NLM_F_REQUEST, 0), [0, 0, high, low], |_| Ok(()))?;
    Ok(batch)
}

/// `struct nlmsghdr`, `struct nfgenmsg`, and what `body` writes.
pub(super) fn message(
    out: &mut Vec<u8>,
    (kind, flags, sequence): (u16, u16, u32),
    family: [u8; 4],
    body: impl FnOnce(&mut Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let start = out.len();
    out.extend([0; 4]);
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend([0; 4]);
    out.extend(family);
    body(out)?;
    let length = u32::try_from(out.len() - start).map_err(io::Error::other)?;
    out[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    Ok(())
}

pub(super) fn attribute(out: &mut Vec<u8>, kind: u16, body: impl FnOnce(&mut Vec<u8>) -> io::Result<()>) -> io::Result<()> {
    let start = out.len();
    out.extend([0; 2]);
    out.extend(kind.to_ne_bytes());
    body(out)?;
    let length = u16::try_from(out.len() - start).map_err(io::Error::other)?;
    out[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    out.resize(out.len().next_multiple_of(4), 0);
    Ok(())
}

fn text(out: &mut Vec<u8>, kind: u16, text: &str) -> io::Result<()> {
    attribute(out, kind, |out| {
        out.extend(text.bytes());
        out.push(0);
        Ok(())
    })
}

fn value(out: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    attribute(out, 1, |out| {
        out.extend(bytes);
        Ok(())
    })
}
