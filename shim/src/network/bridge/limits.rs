//! Limits of a pod's bandwidth on the built-in bridge: token buckets (tc-tbf(8)) that the pod cannot reach.
//!
//! What goes to the pod leaves the host by its end of the pair, which gets a bucket. What comes from it is redirected, as it comes in there,
//! to an intermediate link (`ifb`) that has the other bucket. That link goes with the pair (`removal`).

use netlink_packet_core::DefaultNla;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute, TcFilterMatchAllOption,
    TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use rustix::io::Errno;

use super::super::NetworkError;
use super::super::bandwidth::Bandwidth;
use super::super::netlink::{self, Link, Request, Socket, errno_of, kernel};
use super::links::{intermediate, remove_link};

/// Most of a second's bytes that may go at once, and the least burst: a bucket smaller than a packet passes nothing.
const BURST_SHARE: u64 = 50;
const BURST_MIN_BYTES: u64 = 32 * 1024;
/// Most of a second's bytes that wait in a bucket; what comes then is lost, and TCP slows down.
const QUEUE_SHARE: u64 = 20;
/// `ETH_P_ALL`.
const ANY_PROTOCOL: u16 = 3;

/// Sets the limits of the pod behind `link`. What was made when one cannot be set goes with the link.
pub(super) fn apply(host: &mut Socket, link: &str, owner: &str, limits: Bandwidth) -> Result<(), NetworkError> {
    let found = |link: Option<Link>, name: &str| link.ok_or_else(|| kernel("find link", name, Errno::NODEV.into()));
    let end = found(host.link(link)?, link)?;
    if let Some(rate) = limits.ingress {
        host.execute(&[bucket(end.index, link, rate)])?;
    }
    let Some(rate) = limits.egress else { return Ok(()) };
    let name = intermediate(link);
    let made = netlink::new_link(intermediate_link(&name), "create link", &name);
    match host.execute(std::slice::from_ref(&made)) {
        // Left by an interrupted attach of the same pod.
        Err(error) if errno_of(&error) == Some(Errno::EXIST) => {
            remove_link(host, &name)?;
            host.execute(&[made])?;
        }
        result => result?,
    }
    let other = found(host.link(&name)?, &name)?;
    // By its alias a later daemon knows it; the kernel takes none when it makes a link.
    let mut named = LinkMessage::default();
    named.header.index = other.index;
    named.attributes.push(LinkAttribute::IfAlias(owner.to_owned()));
    host.execute(&[netlink::raise_link(named, &name)])?;
    host.execute(&[bucket(other.index, &name, rate)])?;
    host.execute(&[incoming(end.index, link)])?;
    // One of the two classifiers is in every kernel that has any.
    match host.execute(&[redirect("matchall", matchall(other.index), end.index, link)]) {
        Err(error) if errno_of(&error) == Some(Errno::NOENT) => {
            host.execute(&[redirect("u32", every_packet(other.index), end.index, link)])
        }
        result => result,
    }
}

fn intermediate_link(name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]));
    message
}

fn message(index: u32, parent: TcHandle, kind: &str, options: Vec<TcOption>) -> TcMessage {
    let mut message = TcMessage::with_index(i32::from_ne_bytes(index.to_ne_bytes()));
    message.header.parent = parent;
    message.attributes.push(TcAttribute::Kind(kind.to_owned()));
    message.attributes.push(TcAttribute::Options(options));
    message
}

/// A token bucket as what link `index` sends through.
fn bucket(index: u32, name: &str, bits_per_second: u64) -> Request {
    const PARAMETERS: u16 = 1; // TCA_TBF_PARMS
    const RATE64: u16 = 4; // TCA_TBF_RATE64
    const BURST: u16 = 6; // TCA_TBF_BURST
    const ETHERNET: u8 = 1; // TC_LINKLAYER_ETHERNET
    let rate = bits_per_second.div_ceil(8);
    let word = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let burst = word((rate / BURST_SHARE).max(BURST_MIN_BYTES));
    let limit = word((rate / QUEUE_SHARE).saturating_add(burst.into()));
    // struct tc_tbf_qopt: two struct tc_ratespec (the second, of peaks, is none), limit, buffer (BURST says it), mtu.
    let mut parameters = vec![0, ETHERNET, 0, 0, 0, 0, 0, 0];
    parameters.extend(word(rate).to_ne_bytes());
    parameters.extend([0; 12]);
    parameters.extend(limit.to_ne_bytes());
    parameters.extend([0; 8]);
    let mut options = vec![(PARAMETERS, parameters), (BURST, burst.to_ne_bytes().to_vec())];
    if rate >= u32::MAX.into() {
        options.push((RATE64, rate.to_ne_bytes().to_vec()));
    }
    let options = options.into_iter().map(|(kind, value)| TcOption::Other(DefaultNla::new(kind, value))).collect();
    let message = message(index, TcHandle::ROOT, "tbf", options);
    netlink::create(RouteNetlinkMessage::NewQueueDiscipline(message), "limit the bandwidth of link", name)
}

/// Where the filters of what comes in by link `index` are.
fn incoming(index: u32, name: &str) -> Request {
    let mut message = message(index, TcHandle::INGRESS, "ingress", Vec::new());
    message.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    netlink::create(RouteNetlinkMessage::NewQueueDiscipline(message), "limit what comes in by link", name)
}

/// A filter that has all that comes in by link `index`.
fn redirect(classifier: &str, options: Vec<TcOption>, index: u32, name: &str) -> Request {
    let mut message = message(index, TcHandle { major: u16::MAX, minor: 0 }, classifier, options);
    message.header.info = 1 << 16 | u32::from(ANY_PROTOCOL.to_be());
    netlink::create(RouteNetlinkMessage::NewTrafficFilter(message), "redirect what comes in by link", name)
}

fn matchall(to: u32) -> Vec<TcOption> {
    vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![steal(to)]))]
}

fn every_packet(to: u32) -> Vec<TcOption> {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys.push(TcU32Key::default());
    let action = TcFilterU32Option::Action(vec![steal(to)]);
    vec![TcOption::U32(TcFilterU32Option::Selector(selector)), TcOption::U32(action)]
}

/// Sends a packet out by link `to` instead.
fn steal(to: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.tab = 1;
    action.attributes.push(TcActionAttribute::Kind("mirred".to_owned()));
    action.attributes.push(TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]));
    action
}
