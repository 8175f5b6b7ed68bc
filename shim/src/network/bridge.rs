//! The built-in bridge: one bridge link with the gateway's address, one veth pair for each pod, one static nftables table.
//!
//! Order of an attach, each step undone when a later one fails: 1. the address is recorded (intent, then act); 2. one message makes
//! the pair, the host's end on the bridge and up, the pod's end directly in the pod's namespace (moving it there takes 30 ms);
//! 3. through the pod's own socket: interface up, address, default route. Everything is found again from the pod's id: the host's
//! link is named after it and the address file maps to it, so a detach needs no record of the attach.
//! A pod has an address of each subnet, at most one of each family; the bridge keeps the gateway of an earlier subnet while a pod has an
//! address of it. Ports of the host are recorded with the addresses, and put into the nftables maps last. A detach closes the ports; the
//! link goes behind it (`removal`), and the addresses with it. Forwarding is set and never reset: others may have come to need it.

mod limits;
pub(super) mod links;
mod removal;

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use rustix::io::Errno;

use super::address::AddressTable;
use super::bandwidth::Bandwidth;
use super::firewall::Firewall;
use super::netlink::{self, Link, Route, Socket, errno_of, kernel};
use super::nfnetlink::Change;
use super::subnet::Subnet;
use super::{Attachment, NetworkError, PodNetwork, PortMapping, conntrack, hostport};
use crate::config::Family;
use links::{INTERMEDIATE_PREFIX, bridge_link, bridge_mac, host_interface, intermediate, mac_of, pair, remove_link, uplink_mtu};
use removal::Removal;

/// The interface's name inside every pod; kubelet's network statistics expect it.
const POD_INTERFACE: &str = "eth0";
/// How often and how long to wait for the link watch: 100 ms in all, usually none or one round.
const PORT_POLLS: u32 = 1000;
const PORT_POLL: Duration = Duration::from_micros(100);
const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// Settings of IPv6 for each link, and for `all`; absent where the kernel has no IPv6.
const IPV6: &str = "/proc/sys/net/ipv6/conf";

/// What distinguishes one daemon's network from another's on the same host: give each its own of every field.
#[derive(Debug, Clone)]
pub struct BridgeConfig {
    /// Folder of the address file; made if absent.
    pub state_dir: PathBuf,
    /// The bridge link's name, at most 15 bytes.
    pub name: String,
    /// The pods' networks, at most one of each family; the first address of each is the bridge's. Those of IPv6 are left out where
    /// the host has no IPv6.
    pub subnets: Vec<Subnet>,
    /// Which of a pod's addresses is its first; otherwise in the order of the subnets.
    pub preferred: Family,
    /// The nftables table's name, family `inet`.
    pub table: String,
    /// MTU in bytes of the bridge and both ends of a pair; without one, that of the link with the default route.
    pub mtu: Option<u32>,
}

impl BridgeConfig {
    /// `windlass0`.
    pub fn new(state_dir: PathBuf, subnets: Vec<Subnet>) -> Self {
        let (name, table) = ("windlass0".to_owned(), "windlass".to_owned());
        Self { state_dir, name, subnets, preferred: Family::default(), table, mtu: None }
    }
}

/// The bridge as the host has it.
#[derive(Debug, Clone, Copy)]
struct Installed {
    index: u32,
    mtu: Option<u32>,
}

#[derive(Debug)]
struct Inner {
    config: BridgeConfig,
    firewall: Firewall,
    table: Mutex<AddressTable>,
    /// `None` until the bridge and the rules are there; held while they are made, so that it happens once.
    installed: Mutex<Option<Installed>>,
    removal: Removal,
}

/// A handle on the built-in network; clones share it.
#[derive(Debug, Clone)]
pub struct Bridge {
    inner: Arc<Inner>,
}

impl Bridge {
    /// Opens the network and makes or repairs the bridge, forwarding and the rules (about 20 ms, nearly all of it `nft`), so that
    /// the first pod does not wait for it. What the kernel or a missing program refuses is logged, told by `ready`, and tried again by
    /// `ready` and `attach`. Blocks.
    pub fn start(config: BridgeConfig) -> Result<Self, NetworkError> {
        let bridge = Self::open(config)?;
        bridge.make();
        Ok(bridge)
    }

    /// Makes or repairs what pods are attached to; a failure is logged, and told by `ready`. Blocks.
    pub fn make(&self) {
        match self.inner.installed(true) {
            Ok(_) => self.inner.warn_of_dropping_chains(),
            Err(error) => tracing::error!(error = %chain(&error), "pod network is not ready"),
        }
    }

    /// Reads the address file, and makes nothing on the host before `ready` or `attach` is called. Fails for a bad configuration or
    /// state folder only. Blocks.
    pub fn open(config: BridgeConfig) -> Result<Self, NetworkError> {
        let firewall = Firewall::new(&config.table, &config.name, Path::new(IPV6).exists())?;
        let path = config.state_dir.join("addresses.json");
        std::fs::create_dir_all(&config.state_dir).map_err(|source| NetworkError::State {
            operation: "create",
            path: config.state_dir.clone(),
            source,
        })?;
        let (possible, impossible): (Vec<Subnet>, Vec<Subnet>) =
            config.subnets.iter().partition(|subnet| !subnet.is_ipv6() || ipv6_is_on());
        if !impossible.is_empty() {
            tracing::warn!(subnets = ?impossible.iter().map(ToString::to_string).collect::<Vec<_>>(), "IPv6 is off on this host: pods get none");
        }
        let table = Mutex::new(AddressTable::open(&path, &possible)?);
        let (installed, removal) = (Mutex::new(None), Removal::default());
        Ok(Self { inner: Arc::new(Inner { config, firewall, table, installed, removal }) })
    }

    /// Gives the pod an address and an interface. Called again for the same pod it gives the same address anew; on failure nothing
    /// remains.
    pub async fn attach(&self, pod: Attachment) -> Result<PodNetwork, NetworkError> {
        let id = pod.pod_id.clone();
        self.blocking(&id, move |inner| inner.attach(pod)).await
    }

    /// Takes the pod's ports back, and has its pair removed and its addresses freed behind the return; succeeds when there is nothing.
    pub async fn detach(&self, pod_id: &str) -> Result<(), NetworkError> {
        let id = pod_id.to_owned();
        self.blocking(pod_id, move |inner| inner.close_ports(&id)).await?;
        removal::begin(&self.inner, pod_id);
        Ok(())
    }

    /// Waits until nothing is left of a pod that was detached. On failure its addresses stay taken.
    pub async fn gone(&self, pod_id: &str) -> Result<(), NetworkError> {
        let id = pod_id.to_owned();
        if self.inner.table().get(&id).is_empty() {
            return Ok(());
        }
        removal::begin(&self.inner, pod_id);
        self.blocking(pod_id, move |inner| inner.removal.wait_for(&id)).await
    }

    /// From now on new pods get addresses of these subnets, whatever the configuration says, also after a restart; with `make` the bridge
    /// and the rules follow at once. Blocks.
    pub fn assign(&self, subnets: &[Subnet], make: bool) -> Result<(), NetworkError> {
        if let Some(subnet) = subnets.iter().find(|subnet| subnet.is_ipv6() && !ipv6_is_on()) {
            return Err(NetworkError::Conflict(format!("subnet {subnet}: IPv6 is off on this host")));
        }
        if self.inner.table().assign(subnets)? {
            tracing::info!(subnets = ?subnets.iter().map(ToString::to_string).collect::<Vec<_>>(), "new pods get addresses of other subnets");
        }
        if make { self.inner.installed(true).map(drop) } else { Ok(()) }
    }

    /// The subnets of new pods, if they were assigned.
    pub fn assigned(&self) -> Vec<Subnet> {
        self.inner.table().assigned().to_vec()
    }

    /// The subnets of new pods.
    pub fn subnets(&self) -> Vec<Subnet> {
        self.inner.table().subnets().to_vec()
    }

    /// Frees addresses and pairs of pods that are gone. Failures are logged: they must not keep the daemon from starting. Blocks.
    pub fn reconcile(&self, live_pod_ids: &HashSet<String>) {
        if let Err(error) = self.inner.remove_stale_links(live_pod_ids) {
            tracing::error!(error = %chain(&error), "links of removed pods may remain");
        }
        let before = self.inner.table().all_elements().len();
        let gone = self.inner.table().retain(|pod| live_pod_ids.contains(pod));
        for pod in gone {
            tracing::info!(pod, "released the address of a pod that is gone");
        }
        if self.inner.table().all_elements().len() != before
            && let Err(error) = self.inner.installed(true)
        {
            tracing::error!(error = %chain(&error), "ports of removed pods may remain");
        }
    }

    /// Puts a live pod's address, known from its record, back into the table if the address file was lost. `false`: another pod has it.
    /// The same of its ports, which then are put into the rules again.
    pub fn adopt(&self, pod_id: &str, holder: &str, network: &PodNetwork, ports: &[PortMapping]) -> bool {
        let mut table = self.inner.table();
        let addresses = table.adopt(pod_id, &network.ips);
        let claimed = table.claim(pod_id, holder, ports);
        drop(table);
        match claimed.and_then(|new| if new { self.inner.installed(true).map(drop) } else { Ok(()) }) {
            Ok(()) => addresses,
            Err(error) => {
                tracing::error!(pod = pod_id, error = %chain(&error), "ports of the host not taken over");
                false
            }
        }
    }

    /// Whether pods can be attached. Costs two netlink questions; repairs a bridge or table that somebody removed, which then blocks
    /// for some 20 ms.
    pub fn ready(&self) -> Result<(), String> {
        self.inner.verified().map_err(|error| chain(&error))
    }

    /// Removes bridge and rules if no pod holds an address and the bridge has no port; says whether it did. The next attach makes
    /// them again.
    pub async fn teardown_if_unused(&self) -> Result<bool, NetworkError> {
        self.blocking(&self.inner.config.name, Inner::teardown_if_unused).await
    }

    /// The rtnl lock can be held for tens of milliseconds by somebody else's link removal: never wait for it on an async thread.
    async fn blocking<T: Send + 'static>(
        &self,
        object: &str,
        operation: impl FnOnce(&Inner) -> Result<T, NetworkError> + Send + 'static,
    ) -> Result<T, NetworkError> {
        let inner = Arc::clone(&self.inner);
        let task = tokio::task::spawn_blocking(move || operation(&inner));
        task.await.unwrap_or_else(|_| Err(NetworkError::Cancelled(object.to_owned())))
    }
}

impl Inner {
    fn attach(&self, pod: Attachment) -> Result<PodNetwork, NetworkError> {
        let pod_id = pod.pod_id.as_str();
        if self.removal.has(pod_id) {
            self.removal.wait_for(pod_id)?;
        }
        let limits = Bandwidth::of(&pod.annotations).map_err(NetworkError::Invalid)?;
        let mut bridge = self.installed(false)?;
        let mut addresses = self.acquire(&pod)?;
        let mac = addresses.first().map(|address| mac_of(*address));
        let mac = mac.ok_or_else(|| NetworkError::Conflict(format!("pod {pod_id} has no address on record")));
        let mac = self.release_on_error(pod_id, mac)?;
        let link = host_interface(pod_id);
        let mut connected = self.connect(bridge, &link, mac, &pod.netns);
        if connected.is_err() && self.vanished(bridge) {
            // Somebody deleted the bridge since it was made (the kernel says only EINVAL).
            bridge = self.release_on_error(pod_id, self.installed(true))?;
            connected = self.connect(bridge, &link, mac, &pod.netns);
        }
        self.release_on_error(pod_id, connected)?;
        let configured = self
            .limit(&link, limits)
            .and_then(|()| self.configure_pod(pod_id, &mut addresses, pod.route_socket))
            .and_then(|()| hostport::check_families(&pod.port_mappings, &addresses))
            .and_then(|()| self.open_ports(pod_id))
            .and_then(|()| self.wait_for_port(&link));
        self.release_on_error(pod_id, configured)?;
        match self.config.preferred {
            Family::Ipv4 => addresses.sort_by_key(IpAddr::is_ipv6),
            Family::Ipv6 => addresses.sort_by_key(IpAddr::is_ipv4),
            Family::Cni => {}
        }
        let table = self.table();
        let gateways = addresses.iter().filter_map(|address| table.subnet_of(*address)).map(|subnet| subnet.gateway()).collect();
        Ok(PodNetwork {
            interface: POD_INTERFACE.to_owned(),
            host_interface: link,
            ips: addresses,
            mac: mac.map(|octet| format!("{octet:02x}")).join(":"),
            gateways,
            interfaces: Vec::new(),
        })
    }

    /// Records the pod's ports and addresses, all or nothing.
    fn acquire(&self, pod: &Attachment) -> Result<Vec<IpAddr>, NetworkError> {
        let mut table = self.table();
        table.claim(&pod.pod_id, &format!("{}/{}", pod.namespace, pod.name), &pod.port_mappings)?;
        let acquired = hostport::check_listeners(&pod.port_mappings).and_then(|()| table.acquire(&pod.pod_id));
        acquired.inspect_err(|_| {
            table.release(&pod.pod_id);
        })
    }

    /// Puts the pod's ports into the rules. Nobody writes the rules anew meanwhile: they would be without these.
    fn open_ports(&self, pod_id: &str) -> Result<(), NetworkError> {
        let elements = self.table().elements(pod_id);
        if elements.is_empty() {
            return Ok(());
        }
        {
            let _installed = self.installed.lock().unwrap_or_else(PoisonError::into_inner);
            // Somebody flushed the rules, or left a stale element.
            if let Err(error) = self.firewall.change(Change::Add, &elements) {
                tracing::warn!(pod = pod_id, %error, "host ports not added; writing all rules anew");
                self.install_rules()?;
            }
        }
        self.forget_flows(pod_id);
        Ok(())
    }

    /// Only flows that began before the rules changed are wrong without this.
    fn forget_flows(&self, pod_id: &str) {
        let (ports, addresses) = {
            let table = self.table();
            (table.ports(pod_id).to_vec(), table.get(pod_id).to_vec())
        };
        if let Err(error) = conntrack::forget(&ports, &addresses) {
            tracing::warn!(pod = pod_id, %error, "datagrams that were on their way go where they went before");
        }
    }

    /// Takes the pod's ports out of the rules, and only then gives them to others.
    fn close_ports(&self, pod_id: &str) -> Result<(), NetworkError> {
        let elements = self.table().elements(pod_id);
        if elements.is_empty() {
            return Ok(());
        }
        let _installed = self.installed.lock().unwrap_or_else(PoisonError::into_inner);
        let closed = self.firewall.change(Change::Delete, &elements);
        self.forget_flows(pod_id);
        self.table().unclaim(pod_id);
        match closed {
            // The pod did not come as far as its elements, or the rules were flushed: what is there is made to fit.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.install_rules(),
            Err(source) => Err(kernel("remove host ports of pod", pod_id, source)),
            Ok(()) => Ok(()),
        }
    }

    /// Makes the pair in one message; a pair left by an interrupted attach of the same pod is replaced.
    fn connect(&self, bridge: Installed, link: &str, mac: [u8; 6], netns: &Path) -> Result<(), NetworkError> {
        let namespace =
            File::open(netns).map_err(|source| kernel("open network namespace", &netns.display().to_string(), source))?;
        let mut host = Socket::open()?;
        let request = [netlink::new_link(pair(bridge, link, mac, &namespace), "create veth pair", link)];
        match host.execute(&request) {
            Err(error) if errno_of(&error) == Some(Errno::EXIST) => {
                remove_link(&mut host, link)?;
                host.execute(&request)?;
            }
            result => result?,
        }
        // Where bridged packets pass the rules (br_netfilter), a pod's way to itself, by a service or by its own port of the host, stays
        // within the bridge.
        host.execute(&[netlink::hairpin_port(link)])
    }

    fn vanished(&self, bridge: Installed) -> bool {
        let link = Socket::open().and_then(|mut host| host.link(&self.config.name));
        link.is_ok_and(|link| link.is_none_or(|link| link.index != bridge.index))
    }

    /// Waits until the kernel's link watch, which runs beside us, has seen both carriers and opened the port. A packet that the pod
    /// sends before is lost, and ARP repeats it only after a second. Bounded, and no failure: the port opens in any case.
    fn wait_for_port(&self, link: &str) -> Result<(), NetworkError> {
        let mut host = Socket::open()?;
        for _ in 0..PORT_POLLS {
            let ends = [host.link(link)?, host.link(&self.config.name)?];
            if ends.iter().flatten().all(|end| end.operational) {
                return Ok(());
            }
            std::thread::sleep(PORT_POLL);
        }
        tracing::warn!(link, "the bridge port is not open yet");
        Ok(())
    }

    fn limit(&self, link: &str, limits: Bandwidth) -> Result<(), NetworkError> {
        if limits == Bandwidth::default() {
            return Ok(());
        }
        limits::apply(&mut Socket::open()?, link, &self.owner(), limits)
    }

    /// Raises the pod's interface and gives it the addresses. One of IPv6 is dropped where the pod's own sysctls turn IPv6 off.
    fn configure_pod(&self, pod_id: &str, addresses: &mut Vec<IpAddr>, route_socket: OwnedFd) -> Result<(), NetworkError> {
        let mut pod = Socket::from_fd(route_socket)?;
        let inside = pod.link(POD_INTERFACE)?;
        let inside = inside.ok_or_else(|| kernel("find in the pod", POD_INTERFACE, Errno::NODEV.into()))?;
        let mut up = LinkMessage::default();
        up.header.index = inside.index;
        let subnets: Vec<_> =
            addresses.iter().filter_map(|address| Some((*address, self.table().subnet_of(*address)?))).collect();
        let requests = |ipv6: bool| {
            let ours = subnets.iter().filter(move |(address, _)| address.is_ipv6() == ipv6);
            ours.flat_map(|(address, subnet)| {
                [
                    netlink::add_address(inside.index, *address, subnet.prefix()),
                    netlink::add_default_route(inside.index, subnet.gateway()),
                ]
            })
        };
        pod.execute(&std::iter::once(netlink::raise_link(up, POD_INTERFACE)).chain(requests(false)).collect::<Vec<_>>())?;
        match pod.execute(&requests(true).collect::<Vec<_>>()) {
            Err(error) if errno_of(&error) == Some(Errno::ACCESS) && addresses.iter().any(IpAddr::is_ipv4) => {
                tracing::info!(pod = pod_id, "the pod's sysctls turn IPv6 off: it has no address of it");
                for address in addresses.extract_if(.., |address| address.is_ipv6()) {
                    self.table().give_back(pod_id, address);
                }
                Ok(())
            }
            result => result,
        }
    }

    /// The whole of a detach in place.
    fn detach(&self, pod_id: &str) -> Result<(), NetworkError> {
        self.close_ports(pod_id)?;
        // The link first: an address is free only when nobody can answer for it.
        removal::remove_links(&mut Socket::open()?, pod_id)?;
        self.release([pod_id]);
        Ok(())
    }

    /// Frees the addresses of pods whose links are gone; gateway and rules of an earlier subnet go with its last pod.
    fn release<'a>(&self, pod_ids: impl IntoIterator<Item = &'a str>) {
        let unchanged = {
            let mut table = self.table();
            let before = table.served();
            for pod_id in pod_ids {
                table.release(pod_id);
            }
            before == table.served()
        };
        if !unchanged && let Err(error) = self.installed(true) {
            tracing::error!(error = %chain(&error), "rules of an earlier subnet may remain until the next pod");
        }
    }

    fn detach_or_log(&self, pod_id: &str) {
        if let Err(error) = self.detach(pod_id) {
            tracing::error!(pod = pod_id, error = %chain(&error), "undo of a failed attach is left to removal");
        }
    }

    fn release_on_error<T>(&self, pod_id: &str, result: Result<T, NetworkError>) -> Result<T, NetworkError> {
        result.inspect_err(|_| self.detach_or_log(pod_id))
    }

    /// The bridge, made or repaired if it is not known to be there or `anew` is asked.
    fn installed(&self, anew: bool) -> Result<Installed, NetworkError> {
        let mut installed = self.installed.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(installed), false) = (*installed, anew) {
            return Ok(installed);
        }
        *installed = None;
        let made = self.install()?;
        *installed = Some(made);
        Ok(made)
    }

    fn install_rules(&self) -> Result<(), NetworkError> {
        let (subnets, elements) = {
            let table = self.table();
            (table.served(), table.all_elements())
        };
        self.firewall.install(&subnets, &elements)
    }

    fn install(&self) -> Result<Installed, NetworkError> {
        // The rules first: without them a pod would speak to the outside with an address that nobody can answer.
        self.install_rules()?;
        let mut host = Socket::open()?;
        let existing = host.link(&self.config.name)?;
        let routes = host.routes()?;
        self.check_overlap(&mut host, &routes, existing.as_ref())?;
        let mtu = match self.config.mtu {
            Some(mtu) => Some(mtu),
            None => uplink_mtu(&mut host, &routes)?,
        };
        if let Some(link) = &existing {
            self.check_ownership(&mut host, link)?;
        } else {
            host.execute(&[netlink::new_link(bridge_link(&self.config.name), "create bridge", &self.config.name)])?;
        }
        let link = host.link(&self.config.name)?;
        let link = link.ok_or_else(|| kernel("find bridge", &self.config.name, Errno::NODEV.into()))?;
        self.configure_bridge(&mut host, &link, &routes, mtu)?;
        let route_localnet = Path::new("/proc/sys/net/ipv4/conf").join(&self.config.name).join("route_localnet");
        set(Path::new(IP_FORWARD), "1", "enable forwarding in")?;
        set(&route_localnet, "1", "let loopback out by")?;
        Ok(Installed { index: link.index, mtu })
    }

    fn configure_bridge(&self, host: &mut Socket, link: &Link, routes: &[Route], mtu: Option<u32>) -> Result<(), NetworkError> {
        // An earlier subnet may be on a bridge of another name, where its pods still are.
        let mut subnets = self.table().served();
        subnets.retain(|subnet| foreign(routes, Some(link), *subnet).is_none());
        let mut message = LinkMessage::default();
        message.header.index = link.index;
        // A fixed hardware address: otherwise a bridge takes the lowest of its ports, and pods' entries for the gateway go stale.
        message.attributes.push(LinkAttribute::Address(bridge_mac(&self.config.name).to_vec()));
        message.attributes.push(LinkAttribute::IfAlias(self.owner()));
        message.attributes.extend(mtu.map(LinkAttribute::Mtu));
        if subnets.iter().any(Subnet::is_ipv6) {
            forward_ipv6()?;
            let switch = |name: &str| Path::new(IPV6).join(&self.config.name).join(name);
            set(&switch("disable_ipv6"), "0", "turn IPv6 on by")?;
            // A pod must not become the host's router.
            set(&switch("accept_ra"), "0", "refuse router advertisements by")?;
        }
        let wanted: Vec<(IpAddr, u8)> = subnets.iter().map(|subnet| (subnet.gateway(), subnet.prefix())).collect();
        let mut requests = vec![netlink::raise_link(message, &self.config.name)];
        for (address, prefix) in host.addresses(link.index)? {
            if !wanted.contains(&(address, prefix)) {
                requests.push(netlink::delete_address(link.index, address, prefix));
            }
        }
        requests.extend(wanted.iter().map(|(address, prefix)| netlink::add_address(link.index, *address, *prefix)));
        host.execute(&requests)
    }

    /// Two networks that share addresses would lose packets silently; the default route overlaps everything and is no conflict.
    fn check_overlap(&self, host: &mut Socket, routes: &[Route], bridge: Option<&Link>) -> Result<(), NetworkError> {
        let subnets = self.table().subnets().to_vec();
        let conflict = subnets.iter().find_map(|subnet| Some((subnet, foreign(routes, bridge, *subnet)?)));
        let Some((subnet, route)) = conflict else { return Ok(()) };
        let device = host.links(None)?.into_iter().find(|link| Some(link.index) == route.output);
        Err(NetworkError::Conflict(format!(
            "pod subnet {subnet} overlaps the route {}/{} of {}: configure another subnet",
            route.destination,
            route.prefix,
            device.map_or_else(|| "another link".to_owned(), |link| link.name)
        )))
    }

    /// A bridge of our name is ours, unless another daemon's pods are on it: then both would give the same addresses.
    fn check_ownership(&self, host: &mut Socket, link: &Link) -> Result<(), NetworkError> {
        let name = &self.config.name;
        if link.kind.as_deref() != Some("bridge") {
            return Err(NetworkError::Conflict(format!("link {name} exists and is not a bridge: configure another name")));
        }
        match &link.alias {
            Some(alias) if *alias == self.owner() => Ok(()),
            alias if host.links(Some(link.index))?.is_empty() => {
                tracing::info!(bridge = name, previous = alias.as_deref(), "taking over an unused bridge");
                Ok(())
            }
            alias => Err(NetworkError::Conflict(format!(
                "bridge {name} is in use by {}: configure another name and subnet",
                alias.as_deref().unwrap_or("something else")
            ))),
        }
    }

    /// Written on the bridge as its alias (the kernel takes up to 255 bytes).
    fn owner(&self) -> String {
        let owner = format!("windlass {}", self.config.state_dir.display());
        owner.chars().take(60).collect()
    }

    fn verified(&self) -> Result<(), NetworkError> {
        let known = *self.installed.lock().unwrap_or_else(PoisonError::into_inner);
        let bridge = Socket::open()?.link(&self.config.name)?;
        let same = known.is_some_and(|known| bridge.is_some_and(|link| link.index == known.index && link.up));
        if self.firewall.check()? && same {
            return Ok(());
        }
        self.installed(true).map(drop)
    }

    fn remove_stale_links(&self, live: &HashSet<String>) -> Result<(), NetworkError> {
        let mut host = Socket::open()?;
        let Some(bridge) = host.link(&self.config.name)? else { return Ok(()) };
        let names: HashSet<String> =
            live.iter().map(|pod| host_interface(pod)).flat_map(|link| [intermediate(&link), link]).collect();
        let ports = host.links(Some(bridge.index))?.into_iter();
        let ports = ports.filter(|link| link.name.starts_with("wl") && link.kind.as_deref() == Some("veth"));
        let intermediates = host.links(None)?.into_iter().filter(|link| {
            let ours = link.name.starts_with(INTERMEDIATE_PREFIX) && link.alias.as_deref() == Some(self.owner().as_str());
            ours && link.kind.as_deref() == Some("ifb")
        });
        for link in ports.chain(intermediates).filter(|link| !names.contains(&link.name)) {
            tracing::info!(link = link.name, "removing the link of a pod that is gone");
            remove_link(&mut host, &link.name)?;
        }
        Ok(())
    }

    fn teardown_if_unused(&self) -> Result<bool, NetworkError> {
        self.removal.wait_for_all();
        // Held throughout: an attach waits here and then finds that it must make the bridge anew.
        let mut installed = self.installed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut host = Socket::open()?;
        let bridge = host.link(&self.config.name)?;
        if let Some(bridge) = &bridge {
            if !self.table().is_empty() || !host.links(Some(bridge.index))?.is_empty() {
                return Ok(false);
            }
            self.check_ownership(&mut host, bridge)?;
        }
        *installed = None;
        remove_link(&mut host, &self.config.name)?;
        self.firewall.remove()?;
        Ok(true)
    }

    fn warn_of_dropping_chains(&self) {
        match self.firewall.dropping_chains() {
            Ok(chains) if chains.is_empty() => {}
            Ok(chains) => {
                tracing::warn!(?chains, "forwarded packets are dropped by policy: pods will not reach beyond this host")
            }
            Err(error) => tracing::debug!(error = %chain(&error), "forward policy is unknown"),
        }
    }

    fn table(&self) -> MutexGuard<'_, AddressTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The route of another link to addresses of `subnet`.
fn foreign<'a>(routes: &'a [Route], bridge: Option<&Link>, subnet: Subnet) -> Option<&'a Route> {
    let ours = bridge.map(|link| link.index);
    routes.iter().find(|route| {
        route.prefix != 0 && route.output.is_some() && route.output != ours && subnet.overlaps(route.destination, route.prefix)
    })
}

/// Whether the host uses IPv6 at all.
fn ipv6_is_on() -> bool {
    std::fs::read(Path::new(IPV6).join("all/disable_ipv6")).is_ok_and(|value| value.first() == Some(&b'0'))
}

/// Lets the host forward IPv6. A host that forwards forgets the routers that it knows by their advertisements, so links that listen to
/// these are told to do so even then (`accept_ra` 2).
fn forward_ipv6() -> Result<(), NetworkError> {
    let forwarding = Path::new(IPV6).join("all/forwarding");
    if std::fs::read(&forwarding).is_ok_and(|value| value.first() == Some(&b'1')) {
        return Ok(());
    }
    let links = std::fs::read_dir(IPV6).map_err(|source| kernel("list links in", IPV6, source))?;
    for link in links.flatten() {
        let accept = link.path().join("accept_ra");
        // A link may go meanwhile.
        if std::fs::read(&accept).is_ok_and(|value| value.first() == Some(&b'1')) && accept.exists() {
            set(&accept, "2", "keep router advertisements by")?;
        }
    }
    set(&forwarding, "1", "enable forwarding in")
}

/// Writes `value` into a switch of the kernel, unless it is there.
fn set(switch: &Path, value: &str, operation: &'static str) -> Result<(), NetworkError> {
    let failed = |source: io::Error| kernel(operation, &switch.display().to_string(), source);
    if std::fs::read(switch).map_err(failed)?.trim_ascii() == value.as_bytes() {
        return Ok(());
    }
    std::fs::write(switch, value).map_err(failed)
}

/// The error and its causes on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests;
