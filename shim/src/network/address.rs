//! Which pod holds which address and which ports of the host: a table in memory, written whole to one small file before an address is used.
//!
//! Addresses go round the subnet, so that one just released is not given again while a peer may still hold state for it.
//! The file is replaced by rename and not synced: it must survive the daemon, and after a power loss no pod is left whose
//! address it could protect. Never touches the kernel's network.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::hostport::{self, Element, Held};
use super::{NetworkError, PortMapping};

/// Version of the address file; a file of a later version is set aside, not guessed at.
const FORMAT: u32 = 1;

/// An IPv4 network that has room for a gateway and at least one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// The network that contains `address`. `None` unless `prefix` is 8 to 30.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Option<Self> {
        if !(8..=30).contains(&prefix) {
            return None;
        }
        let mask = u32::MAX << (32 - prefix);
        Some(Self { network: Ipv4Addr::from_bits(address.to_bits() & mask), prefix })
    }

    /// Length of the network part in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The first address: the bridge's own and the pods' gateway.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() + 1)
    }

    /// The last address.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | (u32::MAX >> self.prefix))
    }

    /// Whether `address` lies inside.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        Self::new(address, self.prefix).is_some_and(|other| other == *self)
    }

    /// Whether this network and `address/prefix` share an address.
    pub fn overlaps(&self, address: Ipv4Addr, prefix: u8) -> bool {
        let shift = 32 - u32::from(prefix.min(self.prefix));
        let high = |address: Ipv4Addr| address.to_bits().checked_shr(shift).unwrap_or(0);
        high(address) == high(self.network)
    }

    /// How many pods fit: all but the network, the gateway and the broadcast address.
    pub fn capacity(&self) -> usize {
        (self.broadcast().to_bits() - self.gateway().to_bits() - 1) as usize
    }

    fn pod(&self, address: Ipv4Addr) -> bool {
        (self.gateway().to_bits() + 1..self.broadcast().to_bits()).contains(&address.to_bits())
    }

    /// The pods' address after `address`, going round.
    fn after(&self, address: Option<Ipv4Addr>) -> Ipv4Addr {
        let first = Ipv4Addr::from_bits(self.gateway().to_bits() + 1);
        address
            .map(|address| Ipv4Addr::from_bits(address.to_bits().wrapping_add(1)))
            .filter(|next| self.pod(*next))
            .unwrap_or(first)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let subnet = Self::new(address.parse().ok()?, prefix.parse().ok()?)?;
            (subnet.network.to_string() == address).then_some(subnet)
        });
        parsed.ok_or_else(|| format!("{text:?} is not an IPv4 network with a prefix of 8 to 30 bits, such as 10.57.0.0/16"))
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

/// The file's form.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// The address given last; the next search begins after it.
    last: Option<Ipv4Addr>,
    /// Address to pod.
    pods: BTreeMap<Ipv4Addr, String>,
    /// Pod to its ports of the host.
    #[serde(default)]
    ports: BTreeMap<String, Held>,
}

/// The address table of one subnet.
#[derive(Debug)]
pub struct AddressTable {
    subnet: Subnet,
    path: PathBuf,
    stored: Stored,
    /// The same relation from the other side, so that a lookup is not a walk.
    by_pod: BTreeMap<String, Ipv4Addr>,
}

impl AddressTable {
    /// Reads `path` or begins empty. A damaged file is renamed to `<path>.bad` and reported in the log: live pods' addresses are
    /// then put back with [`AddressTable::adopt`]. Addresses outside `subnet` (it was changed) stay with their pods.
    pub fn open(path: &Path, subnet: Subnet) -> Result<Self, NetworkError> {
        let stored = match std::fs::read(path) {
            Ok(bytes) => parse(&bytes).or_else(|reason| set_aside(path, &reason))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Stored::default(),
            Err(source) => return Err(state("read", path, source)),
        };
        let by_pod = stored.pods.iter().map(|(address, pod)| (pod.clone(), *address)).collect();
        Ok(Self { subnet, path: path.to_owned(), stored, by_pod })
    }

    /// The pod's address: the one it has, or the next free one, which is in the file when this returns.
    pub fn acquire(&mut self, pod_id: &str) -> Result<Ipv4Addr, NetworkError> {
        if let Some(address) = self.by_pod.get(pod_id) {
            return Ok(*address);
        }
        let address = self.next_free()?;
        let previous = self.stored.last.replace(address);
        self.stored.pods.insert(address, pod_id.to_owned());
        if let Err(error) = self.write() {
            self.stored.pods.remove(&address);
            self.stored.last = previous;
            return Err(error);
        }
        self.by_pod.insert(pod_id.to_owned(), address);
        Ok(address)
    }

    /// Takes ports of the host for the pod, in the file when this returns; all or, when another pod has one, none. Says whether
    /// that changed anything.
    pub fn claim(&mut self, pod_id: &str, holder: &str, ports: &[PortMapping]) -> Result<bool, NetworkError> {
        let held = hostport::claim(&self.stored.ports, pod_id, holder, ports)?;
        if held.ports.is_empty() || self.stored.ports.get(pod_id) == Some(&held) {
            return Ok(false);
        }
        self.stored.ports.insert(pod_id.to_owned(), held);
        if let Err(error) = self.write() {
            self.stored.ports.remove(pod_id);
            return Err(error);
        }
        Ok(true)
    }

    /// Gives the pod's ports back. The file is written by the `release` that follows.
    pub fn unclaim(&mut self, pod_id: &str) {
        self.stored.ports.remove(pod_id);
    }

    /// What the pod's ports are in the kernel; nothing before it has an address.
    pub(super) fn elements(&self, pod_id: &str) -> Vec<Element> {
        let held = self.stored.ports.get(pod_id).zip(self.get(pod_id));
        held.map(|(held, address)| Element::of(&held.ports, address)).unwrap_or_default()
    }

    /// The same for all pods.
    pub(super) fn all_elements(&self) -> Vec<Element> {
        self.stored.ports.keys().flat_map(|pod| self.elements(pod)).collect()
    }

    /// Puts back an address that a pod's record shows. Says `false` when another pod holds it.
    pub fn adopt(&mut self, pod_id: &str, address: Ipv4Addr) -> bool {
        match self.stored.pods.get(&address) {
            Some(holder) => holder == pod_id,
            None if self.by_pod.contains_key(pod_id) => false,
            None => {
                self.stored.pods.insert(address, pod_id.to_owned());
                self.by_pod.insert(pod_id.to_owned(), address);
                self.write_or_log();
                true
            }
        }
    }

    /// Frees the pod's address, if any. A file that cannot be written (full disk) does not keep the address: the stale line is
    /// dropped by the next write or by `retain` at the next start.
    pub fn release(&mut self, pod_id: &str) -> Option<Ipv4Addr> {
        self.stored.ports.remove(pod_id);
        let address = self.by_pod.remove(pod_id)?;
        self.stored.pods.remove(&address);
        self.write_or_log();
        Some(address)
    }

    /// Frees the addresses of pods that `live` does not name, and returns those pods.
    pub fn retain(&mut self, live: impl Fn(&str) -> bool) -> Vec<String> {
        let gone: Vec<String> = self.by_pod.keys().filter(|pod| !live(pod)).cloned().collect();
        for pod in &gone {
            self.stored.ports.remove(pod);
            if let Some(address) = self.by_pod.remove(pod) {
                self.stored.pods.remove(&address);
            }
        }
        if !gone.is_empty() {
            self.write_or_log();
        }
        gone
    }

    /// The pod's address.
    pub fn get(&self, pod_id: &str) -> Option<Ipv4Addr> {
        self.by_pod.get(pod_id).copied()
    }

    /// How many pods hold an address.
    pub fn len(&self) -> usize {
        self.by_pod.len()
    }

    /// Whether no pod holds an address.
    pub fn is_empty(&self) -> bool {
        self.by_pod.is_empty()
    }

    fn next_free(&self) -> Result<Ipv4Addr, NetworkError> {
        let start = self.subnet.after(self.stored.last);
        let mut candidate = start;
        loop {
            if !self.stored.pods.contains_key(&candidate) {
                return Ok(candidate);
            }
            candidate = self.subnet.after(Some(candidate));
            if candidate == start {
                return Err(NetworkError::Exhausted { subnet: self.subnet, used: self.subnet.capacity() });
            }
        }
    }

    fn write(&mut self) -> Result<(), NetworkError> {
        self.stored.version = FORMAT;
        let temporary = self.path.with_extension("tmp");
        let bytes = serde_json::to_vec(&self.stored).map_err(|error| state("encode", &self.path, error.into()))?;
        let written = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, &self.path));
        written.map_err(|source| {
            // A half-written temporary file would keep a full disk full; that it may not exist is no news.
            let _ = std::fs::remove_file(&temporary);
            state("write", &self.path, source)
        })
    }

    fn write_or_log(&mut self) {
        if let Err(error) = self.write() {
            tracing::warn!(path = %self.path.display(), error = %super::bridge::chain(&error), "address file is stale until the next write");
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Stored, String> {
    let stored: Stored = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let mut pods: Vec<&String> = stored.pods.values().collect();
    pods.sort_unstable();
    match stored.version {
        FORMAT if pods.windows(2).any(|pair| pair[0] == pair[1]) => Err("a pod holds two addresses".to_owned()),
        FORMAT => Ok(stored),
        version => Err(format!("version {version} is not {FORMAT}")),
    }
}

fn set_aside(path: &Path, reason: &str) -> Result<Stored, NetworkError> {
    let bad = path.with_extension("bad");
    std::fs::rename(path, &bad).map_err(|source| state("set aside", path, source))?;
    tracing::error!(path = %bad.display(), reason, "damaged address file set aside");
    Ok(Stored::default())
}

fn state(operation: &'static str, path: &Path, source: io::Error) -> NetworkError {
    NetworkError::State { operation, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Acquire(u8),
        Release(u8),
        Reopen,
        Keep(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..20_u8).prop_map(Step::Acquire),
            4 => (0..20_u8).prop_map(Step::Release),
            1 => Just(Step::Reopen),
            1 => (0..20_u8).prop_map(Step::Keep),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn addresses_are_distinct_stable_and_go_round(prefix in 27..=30_u8, steps in prop::collection::vec(step(), 1..80)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("addresses.json");
            let subnet = Subnet::new(Ipv4Addr::new(10, 1, 2, 77), prefix).unwrap();
            let mut table = AddressTable::open(&path, subnet).unwrap();
            let mut model: BTreeMap<String, Ipv4Addr> = BTreeMap::new();
            let mut last = None;
            for step in steps {
                match step {
                    Step::Acquire(pod) => {
                        let pod = pod.to_string();
                        match table.acquire(&pod) {
                            Ok(address) => {
                                if let Some(held) = model.get(&pod) {
                                    prop_assert_eq!(*held, address);
                                } else {
                                    prop_assert!(!model.values().any(|held| *held == address));
                                    prop_assert!(subnet.contains(address) && address != subnet.gateway() && address != subnet.broadcast());
                                    // Round robin: an address freed just now comes back only if no other is free.
                                    prop_assert!(last != Some(address) || model.len() + 1 == subnet.capacity());
                                    model.insert(pod, address);
                                    last = Some(address);
                                }
                            }
                            Err(error) => {
                                prop_assert!(error.is_exhausted());
                                prop_assert_eq!(model.len(), subnet.capacity());
                            }
                        }
                    }
                    Step::Release(pod) => prop_assert_eq!(table.release(&pod.to_string()), model.remove(&pod.to_string())),
                    Step::Reopen => table = AddressTable::open(&path, subnet).unwrap(),
                    Step::Keep(limit) => {
                        let live = |pod: &str| pod.parse::<u8>().is_ok_and(|pod| pod < limit);
                        table.retain(live);
                        model.retain(|pod, _| live(pod));
                    }
                }
                prop_assert_eq!(&table.by_pod, &model);
            }
            prop_assert_eq!(&AddressTable::open(&path, subnet).unwrap().by_pod, &model);
        }
    }

    #[test]
    fn subnets_are_read_strictly() {
        for bad in ["10.0.0.1/24", "10.0.0.0", "10.0.0.0/31", "10.0.0.0/7", "::/64", "10.0.0.0/x"] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        let subnet: Subnet = "10.4.0.0/14".parse().unwrap();
        assert_eq!((subnet.gateway().to_string(), subnet.broadcast().to_string()), ("10.4.0.1".into(), "10.7.255.255".into()));
    }

    #[test]
    fn overlap_is_seen_from_both_sides() {
        let subnet: Subnet = "10.99.0.0/16".parse().unwrap();
        for (address, prefix, expected) in [
            ("10.99.7.0", 24, true),
            ("10.0.0.0", 8, true),
            ("10.98.0.0", 16, false),
            ("10.98.0.0", 15, true),
            ("0.0.0.0", 0, true),
        ] {
            assert_eq!(subnet.overlaps(address.parse().unwrap(), prefix), expected, "{address}/{prefix}");
        }
    }

    #[test]
    fn a_later_version_is_set_aside() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("addresses.json");
        std::fs::write(&path, r#"{"version":2,"last":null,"pods":{}}"#).unwrap();
        assert!(AddressTable::open(&path, "10.0.0.0/24".parse().unwrap()).unwrap().is_empty());
        assert!(path.with_extension("bad").exists());
    }
}
