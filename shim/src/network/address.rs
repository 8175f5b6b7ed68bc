//! Which pod holds which addresses and which ports of the host: a table in memory, written whole to one small file before an address is used.
//!
//! Addresses go round the subnet, so that one just released is not given again while a peer may still hold state for it. A pod keeps its
//! addresses when the subnets change; theirs stay in the table until the last of them is gone.
//! The file is replaced by rename and not synced: it must survive the daemon, and after a power loss no pod is left whose
//! address it could protect. Never touches the kernel's network.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::hostport::{self, Element, Held};
use super::subnet::Subnet;
use super::{NetworkError, PortMapping};

/// Version of the address file; a file of another version is set aside, not guessed at.
const FORMAT: u32 = 2;

/// The file's form.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
struct Stored {
    version: u32,
    /// A new pod gets an address of each.
    subnets: Vec<Subnet>,
    /// `subnets` came by UpdateRuntimeConfig, which goes over the configuration and is not said again after a restart.
    #[serde(default)]
    assigned: bool,
    /// Those of before, of which a pod still has an address.
    #[serde(default)]
    earlier: Vec<Subnet>,
    /// The addresses given last; the next search begins after them.
    last: Vec<IpAddr>,
    /// Pod to its addresses.
    pods: BTreeMap<String, Vec<IpAddr>>,
    /// Pod to its ports of the host.
    #[serde(default)]
    ports: BTreeMap<String, Held>,
}

/// The address table of one node.
#[derive(Debug)]
pub struct AddressTable {
    path: PathBuf,
    stored: Stored,
    /// The same relation from the other side, so that a lookup is not a walk.
    by_address: BTreeMap<IpAddr, String>,
}

impl AddressTable {
    /// Reads `path` or begins empty. A damaged file is renamed to `<path>.bad` and reported in the log: live pods' addresses are
    /// then put back with [`AddressTable::adopt`]. `configured` are the subnets for new pods, unless others were assigned.
    pub fn open(path: &Path, configured: &[Subnet]) -> Result<Self, NetworkError> {
        let stored = match std::fs::read(path) {
            Ok(bytes) => parse(&bytes).or_else(|reason| set_aside(path, &reason))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Stored::default(),
            Err(source) => return Err(state("read", path, source)),
        };
        let pods = stored.pods.iter();
        let by_address = pods.flat_map(|(pod, held)| held.iter().map(|address| (*address, pod.clone()))).collect();
        let mut table = Self { path: path.to_owned(), stored, by_address };
        if !table.stored.assigned {
            table.replace_subnets(configured);
        }
        Ok(table)
    }

    /// The subnets of which a new pod gets an address each.
    pub fn subnets(&self) -> &[Subnet] {
        &self.stored.subnets
    }

    /// Those that were assigned, if the configuration's were not.
    pub fn assigned(&self) -> &[Subnet] {
        if self.stored.assigned { &self.stored.subnets } else { &[] }
    }

    /// All subnets that pods have addresses of, those for new pods first.
    pub fn served(&self) -> Vec<Subnet> {
        self.stored.subnets.iter().chain(&self.stored.earlier).copied().collect()
    }

    /// From now on new pods get addresses of these, whatever the configuration says; in the file when this returns. Says whether
    /// that changed anything.
    pub fn assign(&mut self, subnets: &[Subnet]) -> Result<bool, NetworkError> {
        if self.stored.assigned && self.stored.subnets == subnets {
            return Ok(false);
        }
        let before = self.stored.clone();
        self.replace_subnets(subnets);
        self.stored.assigned = true;
        if let Err(error) = self.write() {
            self.stored = before;
            return Err(error);
        }
        Ok(true)
    }

    fn replace_subnets(&mut self, subnets: &[Subnet]) {
        let before = std::mem::replace(&mut self.stored.subnets, subnets.to_vec());
        self.stored.earlier.extend(before);
        self.forget_unused_subnets();
    }

    fn forget_unused_subnets(&mut self) {
        let Stored { subnets, earlier, pods, .. } = &mut self.stored;
        earlier.sort_unstable_by_key(ToString::to_string);
        earlier.dedup();
        earlier.retain(|subnet| !subnets.contains(subnet) && pods.values().flatten().any(|address| subnet.contains(*address)));
    }

    /// The subnet that `address` was given from: the narrowest that has it, for an earlier one may lie within one of now.
    pub fn subnet_of(&self, address: IpAddr) -> Option<Subnet> {
        self.served().into_iter().filter(|subnet| subnet.contains(address)).max_by_key(Subnet::prefix)
    }

    /// The pod's addresses: those it has, or the next free one of each subnet, which are in the file when this returns.
    pub fn acquire(&mut self, pod_id: &str) -> Result<Vec<IpAddr>, NetworkError> {
        if let Some(held) = self.stored.pods.get(pod_id) {
            return Ok(held.clone());
        }
        if self.stored.subnets.is_empty() {
            let reason = "no subnet for pods: IPv6 is off on this host, and network.subnets has no other";
            return Err(NetworkError::Conflict(reason.to_owned()));
        }
        let addresses: Vec<IpAddr> =
            self.stored.subnets.iter().map(|subnet| self.next_free(*subnet)).collect::<Result<_, _>>()?;
        let previous = std::mem::replace(&mut self.stored.last, addresses.clone());
        self.stored.pods.insert(pod_id.to_owned(), addresses.clone());
        if let Err(error) = self.write() {
            self.stored.pods.remove(pod_id);
            self.stored.last = previous;
            return Err(error);
        }
        self.by_address.extend(addresses.iter().map(|address| (*address, pod_id.to_owned())));
        Ok(addresses)
    }

    /// Frees one address that the pod cannot have after all. The file follows with the next write.
    pub fn give_back(&mut self, pod_id: &str, address: IpAddr) {
        if let Some(held) = self.stored.pods.get_mut(pod_id) {
            held.retain(|other| *other != address);
            self.by_address.remove(&address);
        }
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

    /// The pod's ports of the host.
    pub fn ports(&self, pod_id: &str) -> &[PortMapping] {
        self.stored.ports.get(pod_id).map(|held| held.ports.as_slice()).unwrap_or_default()
    }

    /// What the pod's ports are in the kernel; nothing before it has an address.
    pub(super) fn elements(&self, pod_id: &str) -> Vec<Element> {
        let held = self.stored.ports.get(pod_id);
        held.map(|held| Element::of(&held.ports, self.get(pod_id))).unwrap_or_default()
    }

    /// The same for all pods.
    pub(super) fn all_elements(&self) -> Vec<Element> {
        self.stored.ports.keys().flat_map(|pod| self.elements(pod)).collect()
    }

    /// Puts back addresses that a pod's record shows. Says `false` when another pod holds one, or this pod has others.
    pub fn adopt(&mut self, pod_id: &str, addresses: &[IpAddr]) -> bool {
        if let Some(held) = self.stored.pods.get(pod_id) {
            return addresses.iter().all(|address| held.contains(address));
        }
        if addresses.iter().any(|address| self.by_address.contains_key(address)) {
            return false;
        }
        self.stored.pods.insert(pod_id.to_owned(), addresses.to_vec());
        self.by_address.extend(addresses.iter().map(|address| (*address, pod_id.to_owned())));
        self.write_or_log();
        true
    }

    /// Frees the pod's addresses, if any. A file that cannot be written (full disk) does not keep them: the stale line is
    /// dropped by the next write or by `retain` at the next start.
    pub fn release(&mut self, pod_id: &str) -> Vec<IpAddr> {
        let Some(addresses) = self.forget(pod_id) else { return Vec::new() };
        self.forget_unused_subnets();
        self.write_or_log();
        addresses
    }

    /// Frees the addresses of pods that `live` does not name, and returns those pods.
    pub fn retain(&mut self, live: impl Fn(&str) -> bool) -> Vec<String> {
        let known: BTreeSet<&String> = self.stored.pods.keys().chain(self.stored.ports.keys()).collect();
        let gone: Vec<String> = known.into_iter().filter(|pod| !live(pod)).cloned().collect();
        for pod in &gone {
            self.forget(pod);
        }
        if !gone.is_empty() {
            self.forget_unused_subnets();
            self.write_or_log();
        }
        gone
    }

    /// All that the pod holds; `None`: nothing.
    fn forget(&mut self, pod_id: &str) -> Option<Vec<IpAddr>> {
        let ports = self.stored.ports.remove(pod_id);
        let addresses = self.stored.pods.remove(pod_id);
        for address in addresses.iter().flatten() {
            self.by_address.remove(address);
        }
        addresses.or(ports.map(|_| Vec::new()))
    }

    /// The pod's addresses.
    pub fn get(&self, pod_id: &str) -> &[IpAddr] {
        self.stored.pods.get(pod_id).map(Vec::as_slice).unwrap_or_default()
    }

    /// How many pods hold an address.
    pub fn len(&self) -> usize {
        self.stored.pods.len()
    }

    /// Whether no pod holds an address.
    pub fn is_empty(&self) -> bool {
        self.stored.pods.is_empty()
    }

    fn next_free(&self, subnet: Subnet) -> Result<IpAddr, NetworkError> {
        let last = self.stored.last.iter().copied().find(|address| subnet.contains(*address));
        let gateways: Vec<IpAddr> = self.stored.earlier.iter().map(Subnet::gateway).collect();
        let start = subnet.after(last);
        let mut candidate = start;
        loop {
            if !self.by_address.contains_key(&candidate) && !gateways.contains(&candidate) {
                return Ok(candidate);
            }
            candidate = subnet.after(Some(candidate));
            if candidate == start {
                let used = self.by_address.keys().filter(|address| subnet.contains(**address)).count();
                return Err(NetworkError::Exhausted { subnet, used });
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
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let Version { version } = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if version != FORMAT {
        return Err(format!("version {version} is not {FORMAT}"));
    }
    let stored: Stored = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let mut addresses: Vec<&IpAddr> = stored.pods.values().flatten().collect();
    addresses.sort_unstable();
    match addresses.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("two pods hold {}", pair[0])),
        None => Ok(stored),
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
    use std::net::Ipv4Addr;

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

    fn subnets(texts: &[&str]) -> Vec<Subnet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn given(table: &mut AddressTable, pod: &str) -> Vec<String> {
        table.acquire(pod).unwrap().iter().map(ToString::to_string).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn addresses_are_distinct_stable_and_go_round(prefix in 27..=30_u8, steps in prop::collection::vec(step(), 1..80)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("addresses.json");
            let subnet = Subnet::new(Ipv4Addr::new(10, 1, 2, 77).into(), prefix).unwrap();
            let both = [subnet, "fd00::/64".parse().unwrap()];
            let mut table = AddressTable::open(&path, &both).unwrap();
            let mut model: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
            let mut last = None;
            for step in steps {
                match step {
                    Step::Acquire(pod) => {
                        let pod = pod.to_string();
                        match table.acquire(&pod) {
                            Ok(addresses) => {
                                if let Some(held) = model.get(&pod) {
                                    prop_assert_eq!(held, &addresses);
                                } else {
                                    prop_assert_eq!(addresses.len(), 2);
                                    for (address, subnet) in addresses.iter().zip(both) {
                                        prop_assert!(!model.values().flatten().any(|held| held == address));
                                        prop_assert!(subnet.contains(*address) && *address != subnet.gateway() && *address != subnet.last());
                                    }
                                    // Round robin: an address freed just now comes back only if no other is free.
                                    prop_assert!(last != Some(addresses[0]) || model.len() + 1 == subnet.capacity());
                                    last = Some(addresses[0]);
                                    model.insert(pod, addresses);
                                }
                            }
                            Err(error) => {
                                prop_assert!(error.is_exhausted());
                                prop_assert_eq!(model.len(), subnet.capacity());
                            }
                        }
                    }
                    Step::Release(pod) => {
                        prop_assert_eq!(table.release(&pod.to_string()), model.remove(&pod.to_string()).unwrap_or_default());
                    }
                    Step::Reopen => table = AddressTable::open(&path, &both).unwrap(),
                    Step::Keep(limit) => {
                        let live = |pod: &str| pod.parse::<u8>().is_ok_and(|pod| pod < limit);
                        table.retain(live);
                        model.retain(|pod, _| live(pod));
                    }
                }
                prop_assert_eq!(&table.stored.pods, &model);
                prop_assert_eq!(table.by_address.len(), 2 * model.len());
            }
            prop_assert_eq!(&AddressTable::open(&path, &both).unwrap().stored.pods, &model);
        }
    }

    #[test]
    fn pods_keep_their_addresses_when_the_subnets_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("addresses.json");
        let mut table = AddressTable::open(&path, &subnets(&["10.1.0.0/24", "fd00::/64"])).unwrap();
        assert_eq!(given(&mut table, "a"), ["10.1.0.2", "fd00::2"]);
        // The new network has the old one in it, and so its gateway.
        assert!(table.assign(&subnets(&["10.1.0.0/16"])).unwrap());
        assert!(!table.assign(&subnets(&["10.1.0.0/16"])).unwrap());
        assert_eq!(given(&mut table, "a"), ["10.1.0.2", "fd00::2"]);
        assert_eq!(given(&mut table, "b"), ["10.1.0.3"]);
        assert_eq!(table.served(), subnets(&["10.1.0.0/16", "10.1.0.0/24", "fd00::/64"]));
        assert_eq!(table.subnet_of("10.1.0.2".parse().unwrap()).unwrap().prefix(), 24);
        // What was assigned goes over the configuration at the next start.
        let mut table = AddressTable::open(&path, &subnets(&["10.7.0.0/24"])).unwrap();
        assert_eq!(table.subnets(), subnets(&["10.1.0.0/16"]));
        table.release("a");
        table.release("b");
        assert_eq!(table.served(), subnets(&["10.1.0.0/16"]));
    }

    #[test]
    fn a_changed_configuration_is_for_new_pods() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("addresses.json");
        given(&mut AddressTable::open(&path, &subnets(&["10.1.0.0/24"])).unwrap(), "a");
        let mut table = AddressTable::open(&path, &subnets(&["10.0.0.0/8"])).unwrap();
        assert_eq!((given(&mut table, "a"), given(&mut table, "b")), (vec!["10.1.0.2".to_owned()], vec!["10.1.0.3".to_owned()]));
        table.stored.last = vec!["10.1.0.0".parse().unwrap()];
        assert_eq!(given(&mut table, "c"), ["10.1.0.4"], "neither the old gateway nor what is held");
        assert_eq!(AddressTable::open(&path, &[]).unwrap().served(), subnets(&["10.0.0.0/8", "10.1.0.0/24"]));
    }

    #[test]
    fn ports_without_an_address_do_not_outlive_their_pod() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("addresses.json");
        let one = subnets(&["10.1.0.0/30"]);
        let port = PortMapping { protocol: super::super::Protocol::Tcp, container_port: 80, host_port: 80, host_ip: None };
        let claim = |table: &mut AddressTable, pod: &str| table.claim(pod, pod, std::slice::from_ref(&port)).is_ok();
        let mut table = AddressTable::open(&path, &one).unwrap();
        given(&mut table, "a");
        assert!(claim(&mut table, "b") && table.acquire("b").is_err(), "all addresses are in use");
        table.release("b");
        // In the file, too.
        let mut table = AddressTable::open(&path, &one).unwrap();
        assert!(claim(&mut table, "c"));
        // Killed between the two.
        let mut table = AddressTable::open(&path, &one).unwrap();
        assert!(!claim(&mut table, "d"));
        assert_eq!(table.retain(|pod| pod == "a"), ["c"]);
        assert!(claim(&mut table, "d"));
        assert!(AddressTable::open(&path, &[]).unwrap().acquire("e").is_err(), "no subnet, no address");
    }

    #[test]
    fn another_version_and_an_address_twice_are_set_aside() {
        for bad in [
            r#"{"version":1,"last":null,"pods":{}}"#,
            r#"{"version":2,"subnets":[],"last":[],"pods":{"a":["10.0.0.2"],"b":["10.0.0.2"]}}"#,
        ] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("addresses.json");
            std::fs::write(&path, bad).unwrap();
            assert!(AddressTable::open(&path, &subnets(&["10.0.0.0/24"])).unwrap().is_empty());
            assert!(path.with_extension("bad").exists());
        }
    }
}
