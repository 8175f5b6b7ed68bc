//! Counters of a pod's interfaces, without entering its namespace: /proc/<pid>/net/dev of one of its processes, and for a pod of the
//! built-in bridge without a process the host's end of its pair, seen from the other side.

pub use super::parse::Traffic;

use super::parse;
use crate::pod;
use std::{cell::OnceCell, collections::HashMap, fs, os::unix::fs::MetadataExt};

/// The host's own interfaces, read once for all pods of a request, when one of them needs it.
#[derive(Default)]
pub struct Host(OnceCell<HashMap<String, Traffic>>);

impl Host {
    fn interface(&self, name: &str) -> Option<Traffic> {
        self.0.get_or_init(|| read("/proc/thread-self/net/dev").into_iter().collect()).get(name).copied()
    }
}

fn read(path: &str) -> Vec<(String, Traffic)> {
    fs::read_to_string(path).map(|text| parse::interfaces(&text)).unwrap_or_default()
}

/// The pod's interfaces but its loopback, the default one first. `pids` are processes that may be the pod's.
pub fn of(record: &pod::Record, pids: &[i32], host: &Host) -> Vec<(String, Traffic)> {
    let Some(network) = &record.network else { return Vec::new() };
    let mut found = pids.iter().find_map(|pid| inside(record, *pid)).unwrap_or_default();
    if found.is_empty()
        && !network.host_interface.is_empty()
        && let Some(seen) = host.interface(&network.host_interface)
    {
        found.push((network.interface.clone(), other_side(seen)));
    }
    found.retain(|(name, traffic)| name != "lo" && (*name == network.interface || *traffic != Traffic::default()));
    found.sort_by_key(|(name, _)| *name != network.interface);
    found
}

/// A number may belong to another process by now, and a container may have the host's network: the namespace is compared.
fn inside(record: &pod::Record, pid: i32) -> Option<Vec<(String, Traffic)>> {
    let pinned = fs::metadata(&record.netns).ok()?;
    let same =
        || fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|own| own.ino() == pinned.ino() && own.dev() == pinned.dev());
    let found = same().then(|| read(&format!("/proc/{pid}/net/dev")))?;
    same().then_some(found).filter(|found| !found.is_empty())
}

fn other_side(seen: Traffic) -> Traffic {
    Traffic {
        rx_bytes: seen.tx_bytes,
        rx_packets: seen.tx_packets,
        rx_errors: seen.tx_errors,
        rx_dropped: seen.tx_dropped,
        tx_bytes: seen.rx_bytes,
        tx_packets: seen.rx_packets,
        tx_errors: seen.rx_errors,
        tx_dropped: seen.rx_dropped,
    }
}
