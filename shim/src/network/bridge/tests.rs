//! On the real kernel, as root. Each test runs again as a child under `unshare --net --mount` with a private /run, so all it makes
//! is gone with that process. Needs util-linux, iproute2 and nftables.

use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::super::Protocol;
use super::links::host_interface;
use super::*;

const CHILD: &str = "WINDLASS_TEST_NAMESPACE";

/// Runs the named test in namespaces of its own; `false` in the parent, which has nothing more to do.
fn isolated(test: &str) -> bool {
    if std::env::var_os(CHILD).is_some() {
        run("mount", &["-t", "tmpfs", "tmpfs", "/run"]);
        run("ip", &["link", "set", "lo", "up"]);
        // A new namespace may inherit the host's 1.
        for switch in [IP_FORWARD.into(), Path::new(IPV6).join("all/forwarding")] {
            std::fs::write(switch, "0").unwrap();
        }
        return true;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: {test} needs root");
        return false;
    }
    let name = format!("{}::{test}", module_path!().trim_start_matches("windlass::"));
    let output = Command::new("unshare")
        .args(["--net", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &name, "--nocapture", "--include-ignored"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("1 passed"), "no such test: {name}");
    text.lines().filter(|line| line.starts_with("measured")).for_each(|line| println!("{line}"));
    false
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn config() -> BridgeConfig {
    BridgeConfig::new(PathBuf::from("/run/state"), subnets(&["10.99.0.0/24", "fd99::/64"]))
}

fn subnets(texts: &[&str]) -> Vec<Subnet> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn namespace(name: &str) -> PathBuf {
    run("ip", &["netns", "add", name]);
    Path::new("/run/netns").join(name)
}

/// Runs `work` on a thread inside the namespace.
fn inside<T: Send + 'static>(netns: &Path, work: impl FnOnce() -> T + Send + 'static) -> std::thread::JoinHandle<T> {
    let namespace = File::open(netns).unwrap();
    std::thread::spawn(move || {
        move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(LinkNameSpaceType::Network)).unwrap();
        work()
    })
}

fn route_socket(netns: &Path) -> OwnedFd {
    let open = || socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None).unwrap();
    inside(netns, open).join().unwrap()
}

fn attach(bridge: &Bridge, pod: &str, netns: &Path) -> Result<PodNetwork, NetworkError> {
    bridge.inner.attach(attachment(pod, netns))
}

fn attachment(pod: &str, netns: &Path) -> Attachment {
    Attachment {
        pod_id: pod.to_owned(),
        name: pod.to_owned(),
        namespace: "test".to_owned(),
        uid: pod.to_owned(),
        hostname: pod.to_owned(),
        netns: netns.to_owned(),
        route_socket: route_socket(netns),
        port_mappings: Vec::new(),
        annotations: std::collections::BTreeMap::new(),
        dns: super::super::Dns::default(),
        cgroup_parent: String::new(),
    }
}

fn ip4(network: &PodNetwork) -> Ipv4Addr {
    match network.ips[..] {
        [IpAddr::V4(address), IpAddr::V6(_)] => address,
        ref other => panic!("{other:?}"),
    }
}

fn ip6(network: &PodNetwork) -> Ipv6Addr {
    match network.ips[..] {
        [IpAddr::V4(_), IpAddr::V6(address)] => address,
        ref other => panic!("{other:?}"),
    }
}

/// The address the server at `to` saw a client of `from` come from, and how long the connection took.
fn connection(from: &Path, to: &Path, address: impl Into<IpAddr>) -> (IpAddr, Duration) {
    let address = address.into();
    let server = served(to);
    let connect = move || {
        let start = Instant::now();
        TcpStream::connect_timeout(&SocketAddr::from((address, 7777)), Duration::from_secs(5)).unwrap();
        start.elapsed()
    };
    let took = inside(from, connect).join().unwrap();
    (server.join().unwrap(), took)
}

/// A server of both families in the namespace at `to`, which tells whom its first connection comes from.
fn served(to: &Path) -> std::thread::JoinHandle<IpAddr> {
    let listener = inside(to, || TcpListener::bind("[::]:7777").unwrap()).join().unwrap();
    std::thread::spawn(move || listener.accept().unwrap().1.ip().to_canonical())
}

fn host() -> PathBuf {
    PathBuf::from("/proc/self/ns/net")
}

/// The names of all links of the host but `lo` and those that every namespace has.
fn links() -> Vec<String> {
    let links = Socket::open().unwrap().links(None).unwrap();
    links
        .into_iter()
        .filter(|link| matches!(link.kind.as_deref(), Some("veth" | "bridge" | "ifb")))
        .map(|link| link.name)
        .collect()
}

fn stored() -> usize {
    AddressTable::open(Path::new("/run/state/addresses.json"), &config().subnets).unwrap().len()
}

/// Below what a port waits that learns first (a bridge's forward delay is 15 s) or an address that is looked for twice.
const LEARNT: Duration = Duration::from_secs(10);

#[test]
fn pods_reach_each_other_and_the_host_at_once() {
    if !isolated("pods_reach_each_other_and_the_host_at_once") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    assert_eq!(bridge.ready(), Ok(()));
    let (a, b) = (namespace("a"), namespace("b"));
    let (first, second) = (attach(&bridge, "a", &a).unwrap(), attach(&bridge, "b", &b).unwrap());
    assert_eq!((ip4(&first), ip4(&second)), (Ipv4Addr::new(10, 99, 0, 2), Ipv4Addr::new(10, 99, 0, 3)));
    let (seen, took) = connection(&a, &b, ip4(&second));
    assert_eq!(seen, first.ips[0], "pod to pod keeps the pod's address");
    assert!(took < LEARNT, "the port forwards only after {took:?}");
    let (seen, took) = connection(&a, &b, ip6(&second));
    assert_eq!(seen, first.ips[1]);
    assert!(took < LEARNT, "a first packet of IPv6 waits for {took:?}");
    for (gateway, seen) in second.gateways.iter().zip(&second.ips) {
        assert_eq!(connection(&b, &host(), *gateway).0, *seen);
    }
    connection(&host(), &a, ip4(&first));
    connection(&host(), &a, ip6(&first));
    let shown = run("ip", &["-n", "a", "-br", "addr", "show", "eth0"]);
    assert!(shown.contains("UP") && shown.contains("10.99.0.2/24") && shown.contains("fd99::2/64"), "{shown}");
    assert!(run("ip", &["-n", "a", "link", "show", "eth0"]).contains(&first.mac));
    assert_eq!(std::fs::read_to_string(IP_FORWARD).unwrap().trim(), "1");
}

#[test]
fn what_leaves_the_subnet_is_masqueraded_once_after_three_starts() {
    if !isolated("what_leaves_the_subnet_is_masqueraded_once_after_three_starts") {
        return;
    }
    let outside = namespace("outside");
    run("ip", &["link", "add", "up0", "mtu", "1400", "type", "veth", "peer", "name", "down0", "netns", "outside"]);
    run("ip", &["addr", "add", "192.0.2.1/24", "dev", "up0"]);
    run("ip", &["link", "set", "up0", "up"]);
    run("ip", &["-n", "outside", "addr", "add", "192.0.2.2/24", "dev", "down0"]);
    run("ip", &["-n", "outside", "link", "set", "down0", "up"]);
    run("ip", &["route", "add", "default", "via", "192.0.2.2"]);
    run("ip", &["addr", "add", "2001:db8::1/64", "dev", "up0", "nodad"]);
    run("ip", &["-n", "outside", "addr", "add", "2001:db8::2/64", "dev", "down0", "nodad"]);
    run("nft", &["add table ip other"]);
    let [_, _, bridge] = [(); 3].map(|()| Bridge::start(config()).unwrap());
    let pod = namespace("pod");
    let network = attach(&bridge, "pod", &pod).unwrap();
    let (seen, _) = connection(&pod, &outside, Ipv4Addr::new(192, 0, 2, 2));
    assert_eq!(seen, IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)));
    let (seen, _) = connection(&pod, &outside, "2001:db8::2".parse::<Ipv6Addr>().unwrap());
    assert_eq!(seen, "2001:db8::1".parse::<IpAddr>().unwrap());
    let told = std::fs::read_to_string("/proc/sys/net/ipv6/conf/up0/accept_ra").unwrap();
    assert_eq!(told.trim(), "2", "the host still hears its router");
    let rules = run("nft", &["list", "ruleset"]);
    assert_eq!(rules.matches("masquerade").count(), 4, "of each family one for what leaves, one for host ports: {rules}");
    assert!(rules.contains("table ip other"));
    let shown = run("ip", &["-n", "pod", "link", "show", "eth0"]);
    assert!(shown.contains("mtu 1400"), "the uplink's: {shown}");
    assert!(!network.mac.is_empty());
}

fn ported(pod: &str, netns: &Path, ports: &[(Protocol, u16, Option<&str>)]) -> Attachment {
    let port = |(protocol, host_port, host): &(Protocol, u16, Option<&str>)| PortMapping {
        protocol: *protocol,
        container_port: 7777,
        host_port: *host_port,
        host_ip: host.map(|host| host.parse().unwrap()),
    };
    Attachment { port_mappings: ports.iter().map(port).collect(), ..attachment(pod, netns) }
}

/// What the server in the pod at `to` saw as the client's address, for a connection from `from` to `address`.
fn through(from: &Path, to: &Path, address: SocketAddr) -> IpAddr {
    let server = served(to);
    let connected = inside(from, move || TcpStream::connect_timeout(&address, Duration::from_secs(5)).map(drop)).join().unwrap();
    connected.unwrap_or_else(|error| panic!("{} to {address}: {error}", from.display()));
    server.join().unwrap()
}

fn elements() -> String {
    let listing = run("nft", &["list", "table", "inet", "windlass"]);
    let lines = listing.lines().map(str::trim).skip_while(|line| !line.starts_with("map"));
    lines
        .take_while(|line| !line.starts_with("chain"))
        .filter(|line| line.contains(" : 10.99") || line.contains(" : fd99"))
        .collect()
}

#[test]
fn host_ports_lead_to_the_pod_from_everywhere_and_go_with_it() {
    if !isolated("host_ports_lead_to_the_pod_from_everywhere_and_go_with_it") {
        return;
    }
    let outside = namespace("outside");
    run("ip", &["link", "add", "up0", "type", "veth", "peer", "name", "down0", "netns", "outside"]);
    run("ip", &["addr", "add", "192.0.2.1/24", "dev", "up0"]);
    run("ip", &["link", "set", "up0", "up"]);
    run("ip", &["-n", "outside", "addr", "add", "192.0.2.2/24", "dev", "down0"]);
    run("ip", &["-n", "outside", "link", "set", "down0", "up"]);
    run("ip", &["addr", "add", "2001:db8::1/64", "dev", "up0", "nodad"]);
    run("ip", &["-n", "outside", "addr", "add", "2001:db8::2/64", "dev", "down0", "nodad"]);
    let bridge = Bridge::start(config()).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    let start = Instant::now();
    let asked = [
        (Protocol::Tcp, 12000, None),
        (Protocol::Udp, 12000, None),
        (Protocol::Tcp, 81, Some("192.0.2.1")),
        (Protocol::Tcp, 82, Some("2001:db8::1")),
        (Protocol::Tcp, 83, Some("::")),
    ];
    let asked = ported("a", &a, &asked);
    let first = bridge.inner.attach(asked).unwrap();
    println!("measured: attach with three host ports {:?}", start.elapsed());
    let second = attach(&bridge, "b", &b).unwrap();
    let (host_address, gateway) = (IpAddr::from([192, 0, 2, 1]), first.gateways[0]);
    let (host6, gateway6, outside6) =
        ("2001:db8::1".parse::<IpAddr>().unwrap(), first.gateways[1], "2001:db8::2".parse().unwrap());
    for (from, address, port, seen) in [
        (host(), IpAddr::from([127, 0, 0, 1]), 12000, gateway),
        (host(), host_address, 12000, host_address),
        (host(), host_address, 81, host_address),
        (outside.clone(), host_address, 12000, IpAddr::from([192, 0, 2, 2])),
        (outside.clone(), host_address, 81, IpAddr::from([192, 0, 2, 2])),
        (b.clone(), host_address, 12000, gateway),
        (b.clone(), gateway, 12000, gateway),
        (a.clone(), host_address, 12000, gateway),
        (host(), host6, 12000, host6),
        (host(), host6, 82, host6),
        (host(), host6, 83, host6),
        (outside.clone(), host6, 12000, outside6),
        (outside.clone(), host6, 82, outside6),
        (b.clone(), host6, 12000, gateway6),
        (b.clone(), gateway6, 12000, gateway6),
        (a.clone(), host6, 12000, gateway6),
    ] {
        assert_eq!(through(&from, &a, SocketAddr::new(address, port)), seen, "{} {address}:{port}", from.display());
    }
    assert_eq!(connection(&b, &a, ip4(&first)).0, second.ips[0], "without a host port nothing changes");
    let udp = std::thread::spawn({
        let a = a.clone();
        move || inside(&a, || std::net::UdpSocket::bind("0.0.0.0:7777").unwrap()).join().unwrap()
    });
    let server = udp.join().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", "127.0.0.1:12000").unwrap();
    assert_eq!(server.recv_from(&mut [0; 8]).unwrap().1.ip(), gateway);
    // A named address is that address only, and so is a named family.
    for other in ["127.0.0.1:81", "[2001:db8::1]:81", "192.0.2.1:82", "192.0.2.1:83"] {
        let error = TcpStream::connect_timeout(&other.parse().unwrap(), Duration::from_secs(5)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{other}");
    }
    // The other way: route_localnet does not open the host's loopback to pods.
    let private = TcpListener::bind("127.0.0.1:7979").unwrap();
    run("ip", &["-n", "b", "link", "set", "lo", "up"]);
    run("ip", &["-n", "b", "route", "del", "table", "local", "127.0.0.0/8", "dev", "lo"]);
    run("ip", &["-n", "b", "route", "del", "table", "local", "127.0.0.1", "dev", "lo"]);
    run("ip", &["-n", "b", "route", "add", "127.0.0.1", "via", &gateway.to_string()]);
    run("ip", &["netns", "exec", "b", "sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet"]);
    inside(&b, || TcpStream::connect_timeout(&"127.0.0.1:7979".parse().unwrap(), Duration::from_millis(300)).unwrap_err());
    drop(private);

    bridge.inner.detach("a").unwrap();
    assert_eq!(elements(), "");
    let refused = TcpStream::connect_timeout(&"127.0.0.1:12000".parse().unwrap(), Duration::from_secs(5)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    bridge.inner.attach(ported("b", &b, &[(Protocol::Tcp, 12000, None)])).unwrap();
    bridge.inner.detach("b").unwrap();
    assert!(bridge.inner.teardown_if_unused().unwrap());
}

#[test]
fn datagrams_follow_their_port_to_the_pod_of_now() {
    if !isolated("datagrams_follow_their_port_to_the_pod_of_now") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    let server = |netns: &Path| {
        let socket = inside(netns, || std::net::UdpSocket::bind("[::]:7777").unwrap()).join().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        socket
    };
    let (first, second) = (server(&a), server(&b));
    let heard = |server: &std::net::UdpSocket| server.recv_from(&mut [0; 8]).is_ok();
    for host in ["127.0.0.1", "10.99.0.1", "fd99::1"] {
        let target = SocketAddr::new(host.parse().unwrap(), 5353);
        // One client, which never stops and never changes its port.
        let client = std::net::UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }).unwrap();
        let send = || {
            // What the host answers to the datagrams of before (nobody listens) is told at the next.
            let _ = client.send_to(b"x", target);
            client.send_to(b"x", target).unwrap();
        };
        send();
        bridge.inner.attach(ported("a", &a, &[(Protocol::Udp, 5353, None)])).unwrap();
        send();
        assert!(heard(&first), "{host}: a client of before the pod");
        bridge.inner.detach("a").unwrap();
        bridge.inner.attach(ported("b", &b, &[(Protocol::Udp, 5353, None)])).unwrap();
        send();
        assert!(heard(&second), "{host}: a client of the pod before");
        bridge.inner.detach("b").unwrap();
    }
}

#[test]
fn host_ports_are_refused_with_their_holder_and_repaired() {
    if !isolated("host_ports_are_refused_with_their_holder_and_repaired") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    let network =
        bridge.inner.attach(ported("a", &a, &[(Protocol::Tcp, 80, None), (Protocol::Sctp, 80, Some("127.0.0.1"))])).unwrap();
    let (links_before, elements_before) = (links(), elements());
    for (port, expected) in [
        ((Protocol::Tcp, 80, None), "host port 80/tcp: pod test/a holds 80/tcp"),
        ((Protocol::Tcp, 80, Some("127.0.0.1")), "host port 127.0.0.1:80/tcp: pod test/a holds 80/tcp"),
        ((Protocol::Sctp, 80, None), "host port 80/sctp: pod test/a holds 127.0.0.1:80/sctp"),
    ] {
        let error = bridge.inner.attach(ported("b", &b, &[port])).unwrap_err();
        assert_eq!(chain(&error), expected);
    }
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let listener = TcpListener::bind(address).unwrap();
        let taken = listener.local_addr().unwrap().port();
        let error = bridge.inner.attach(ported("b", &b, &[(Protocol::Tcp, taken, None)])).unwrap_err();
        assert_eq!(chain(&error), format!("host port {taken}/tcp: a process of the host listens on it"));
    }
    assert_eq!((links(), elements(), stored()), (links_before, elements_before.clone(), 1), "a refusal leaves nothing");

    // Stale and foreign elements, then a restart.
    run("nft", &["add element inet windlass ports4 { tcp . 9 : 10.99.0.77 . 9 }"]);
    run("nft", &["delete element inet windlass ports4 { tcp . 80 }"]);
    let bridge = Bridge::start(config()).unwrap();
    assert_eq!(elements(), elements_before);
    // Flushed by somebody while it runs: found by Status, and by the next attach and detach.
    run("nft", &["flush", "ruleset"]);
    assert_eq!(bridge.ready(), Ok(()));
    assert_eq!(elements(), elements_before);
    run("nft", &["flush", "ruleset"]);
    bridge.inner.attach(ported("b", &b, &[(Protocol::Tcp, 81, None)])).unwrap();
    assert!(
        elements().contains("tcp . 80 : 10.99.0.2 . 7777") && elements().contains("tcp . 81 : 10.99.0.3 . 7777"),
        "{}",
        elements()
    );
    run("nft", &["flush", "ruleset"]);
    bridge.inner.detach("b").unwrap();
    assert_eq!(elements(), elements_before);
    // The file is lost: the record of the living pod has both.
    std::fs::remove_file("/run/state/addresses.json").unwrap();
    let bridge = Bridge::start(config()).unwrap();
    assert_eq!(elements(), "");
    let ports = ported("a", &a, &[(Protocol::Tcp, 80, None), (Protocol::Sctp, 80, Some("127.0.0.1"))]).port_mappings;
    assert!(bridge.adopt("a", "test/a", &network, &ports));
    assert_eq!(elements(), elements_before);
    bridge.reconcile(&HashSet::new());
    assert_eq!((elements(), stored()), (String::new(), 0));
}

#[test]
fn a_restart_keeps_addresses_and_reconcile_frees_the_lost() {
    if !isolated("a_restart_keeps_addresses_and_reconcile_frees_the_lost") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let (a, b, c) = (namespace("a"), namespace("b"), namespace("c"));
    let first = attach(&bridge, "a", &a).unwrap();
    let lost = attach(&bridge, "b", &b).unwrap();
    drop(bridge);
    let bridge = Bridge::start(config()).unwrap();
    connection(&host(), &a, ip4(&first));
    assert_eq!(attach(&bridge, "a", &a).unwrap(), first, "a retry gives the same");
    connection(&host(), &a, ip4(&first));
    bridge.reconcile(&HashSet::from(["a".to_owned()]));
    assert_eq!(stored(), 1);
    assert!(links().contains(&first.host_interface) && !links().contains(&lost.host_interface));
    let next = attach(&bridge, "c", &c).unwrap();
    assert_eq!(ip4(&next), Ipv4Addr::new(10, 99, 0, 4), "an address is not used again at once");
}

#[test]
fn detach_leaves_nothing_and_is_idempotent() {
    if !isolated("detach_leaves_nothing_and_is_idempotent") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    attach(&bridge, "a", &a).unwrap();
    attach(&bridge, "b", &b).unwrap();
    bridge.inner.detach("a").unwrap();
    bridge.inner.detach("a").unwrap();
    bridge.inner.detach("never").unwrap();
    assert!(!bridge.inner.teardown_if_unused().unwrap(), "b is attached");
    run("ip", &["netns", "del", "b"]);
    bridge.inner.detach("b").unwrap();
    assert_eq!((links(), stored()), (vec!["windlass0".to_owned()], 0));
    assert!(bridge.inner.teardown_if_unused().unwrap());
    assert!(bridge.inner.teardown_if_unused().unwrap());
    assert_eq!((links(), run("nft", &["list", "ruleset"])), (vec![], String::new()));
    attach(&bridge, "a", &a).unwrap();
    assert_eq!(bridge.ready(), Ok(()), "made again by the attach");
}

#[test]
fn a_failed_attach_leaves_nothing() {
    if !isolated("a_failed_attach_leaves_nothing") {
        return;
    }
    let bridge = Bridge::start(BridgeConfig { subnets: subnets(&["10.99.0.0/29", "fd99::/64"]), ..config() }).unwrap();
    let a = namespace("a");
    let error = bridge.inner.attach(Attachment { netns: "/run/netns/none".into(), ..attachment("a", &a) }).unwrap_err();
    assert_eq!(chain(&error), "open network namespace /run/netns/none: No such file or directory (os error 2)");
    // A socket of the wrong namespace: the pair exists by then.
    let error = bridge.inner.attach(Attachment { route_socket: route_socket(&host()), ..attachment("a", &a) }).unwrap_err();
    assert!(chain(&error).contains("find in the pod eth0"), "{}", chain(&error));
    assert_eq!((links(), stored()), (vec!["windlass0".to_owned()], 0));
    let pods = [0, 1, 2, 3, 4].map(|pod| attach(&bridge, &format!("pod{pod}"), &namespace(&format!("n{pod}"))).unwrap());
    let error = attach(&bridge, "a", &a).unwrap_err();
    assert!(error.is_exhausted());
    assert_eq!(chain(&error), "no free pod address: all 5 of 10.99.0.0/29 are in use");
    assert_eq!((links().len(), stored()), (6, 5));
    bridge.inner.detach("pod3").unwrap();
    assert_eq!(attach(&bridge, "a", &a).unwrap().ips[0], pods[3].ips[0]);
}

/// Addresses of the bridge itself, without the one that IPv6 gives every link.
fn bridge_addresses() -> Vec<String> {
    let shown = run("ip", &["-br", "addr", "show", "windlass0"]);
    let own = shown.split_whitespace().skip(2).filter(|address| !address.starts_with("fe80"));
    let mut sorted: Vec<String> = own.map(ToOwned::to_owned).collect();
    sorted.sort();
    sorted
}

#[test]
fn assigned_subnets_are_for_new_pods_and_the_old_ones_last_as_long_as_theirs() {
    if !isolated("assigned_subnets_are_for_new_pods_and_the_old_ones_last_as_long_as_theirs") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    let old = attach(&bridge, "a", &a).unwrap();
    let mac = run("ip", &["-br", "link", "show", "windlass0"]);
    bridge.assign(&subnets(&["10.97.1.0/24"]), true).unwrap();
    let new = attach(&bridge, "b", &b).unwrap();
    assert_eq!((&new.ips, &new.gateways), (&vec![IpAddr::from([10, 97, 1, 2])], &vec![IpAddr::from([10, 97, 1, 1])]));
    assert_eq!(bridge_addresses(), ["10.97.1.1/24", "10.99.0.1/24", "fd99::1/64"]);
    assert_eq!(run("ip", &["-br", "link", "show", "windlass0"]), mac, "the gateway's neighbours keep their entry");
    assert_eq!(connection(&a, &b, new.ips[0]).0, old.ips[0]);
    assert_eq!(connection(&b, &a, old.ips[0]).0, new.ips[0]);
    // The next daemon has another configuration, and is not told again.
    let bridge = Bridge::start(BridgeConfig { subnets: subnets(&["10.96.0.0/24"]), ..config() }).unwrap();
    assert_eq!(bridge.ready(), Ok(()));
    connection(&a, &host(), old.gateways[1]);
    assert!(run("nft", &["list", "ruleset"]).contains("10.99.0.0/24"));
    bridge.inner.detach("a").unwrap();
    assert_eq!(bridge_addresses(), ["10.97.1.1/24"]);
    assert!(!run("nft", &["list", "ruleset"]).contains("10.99.0.0/24"));
    assert_eq!(attach(&bridge, "a", &a).unwrap().ips, [IpAddr::from([10, 97, 1, 3])]);
    let bridge = Bridge::start(config()).unwrap();
    assert_eq!(bridge_addresses(), ["10.97.1.1/24"]);
    run("ip", &["link", "add", "other", "type", "veth", "peer", "name", "other1"]);
    run("ip", &["addr", "add", "10.95.0.1/24", "dev", "other"]);
    run("ip", &["link", "set", "other", "up"]);
    let error = bridge.assign(&subnets(&["10.95.0.0/24"]), true).unwrap_err();
    assert_eq!(chain(&error), "pod subnet 10.95.0.0/24 overlaps the route 10.95.0.0/24 of other: configure another subnet");
    bridge.assign(&subnets(&["10.97.1.0/24"]), true).unwrap();
}

#[test]
fn a_pod_whose_sysctls_turn_ipv6_off_has_ipv4() {
    if !isolated("a_pod_whose_sysctls_turn_ipv6_off_has_ipv4") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    run("ip", &["netns", "exec", "a", "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"]);
    let network = bridge.inner.attach(ported("a", &a, &[(Protocol::Tcp, 80, None)])).unwrap();
    assert_eq!(network.ips, [IpAddr::from([10, 99, 0, 2])]);
    assert!(!elements().contains("fd99"), "{}", elements());
    run("ip", &["netns", "exec", "b", "sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1"]);
    let error = bridge.inner.attach(ported("b", &b, &[(Protocol::Tcp, 81, Some("::"))])).unwrap_err();
    assert_eq!(chain(&error), "host port [::]:81/tcp: pods of the built-in bridge have no IPv6 address here");
    assert_eq!((links().len(), stored()), (2, 1));
}

#[test]
fn a_host_without_ipv6_gives_ipv4() {
    if !isolated("a_host_without_ipv6_gives_ipv4") {
        return;
    }
    std::fs::write(Path::new(IPV6).join("all/disable_ipv6"), "1").unwrap();
    let bridge = Bridge::start(config()).unwrap();
    assert_eq!(bridge.ready(), Ok(()));
    let a = namespace("a");
    assert_eq!(attach(&bridge, "a", &a).unwrap().ips, [IpAddr::from([10, 99, 0, 2])]);
    let error = bridge.assign(&subnets(&["fd98::/64"]), true).unwrap_err();
    assert_eq!(chain(&error), "subnet fd98::/64: IPv6 is off on this host");
}

#[test]
fn the_preferred_family_comes_first() {
    if !isolated("the_preferred_family_comes_first") {
        return;
    }
    let bridge = Bridge::start(BridgeConfig { preferred: Family::Ipv6, ..config() }).unwrap();
    let network = attach(&bridge, "a", &namespace("a")).unwrap();
    assert!(network.ips[0].is_ipv6() && network.gateways[0].is_ipv6() && network.ips[1].is_ipv4(), "{network:?}");
    let bridge = Bridge::start(BridgeConfig { subnets: subnets(&["fd98::/64"]), ..config() }).unwrap();
    let network = attach(&bridge, "b", &namespace("b")).unwrap();
    assert_eq!(network.ips, ["fd98::2".parse::<IpAddr>().unwrap()]);
    assert_eq!(network.mac, "0a:58:00:00:00:02");
}

#[test]
fn a_link_goes_behind_the_detach_and_its_address_with_it() {
    if !isolated("a_link_goes_behind_the_detach_and_its_address_with_it") {
        return;
    }
    let bridge = Bridge::start(BridgeConfig { subnets: subnets(&["10.99.0.0/29"]), ..config() }).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let spaces: Vec<_> = (0..5).map(|n| namespace(&format!("n{n}"))).collect();
    // Every round needs every address again: one that came free before its link was gone would be seen.
    for round in 0..10 {
        let ids: Vec<String> = (0..5).map(|n| format!("{round}{n}")).collect();
        for (id, netns) in ids.iter().zip(&spaces) {
            attach(&bridge, id, netns).unwrap();
        }
        runtime.block_on(async {
            for id in &ids {
                bridge.detach(id).await.unwrap();
                bridge.detach(id).await.unwrap();
            }
            for id in &ids {
                bridge.gone(id).await.unwrap();
            }
        });
        assert_eq!((links(), stored()), (vec!["windlass0".to_owned()], 0));
    }
    // Attached again while it goes.
    attach(&bridge, "a", &spaces[0]).unwrap();
    runtime.block_on(bridge.detach("a")).unwrap();
    attach(&bridge, "a", &spaces[0]).unwrap();
    assert_eq!((links().len(), stored()), (2, 1));
    // Killed while it goes: the record no longer has the pod, the file still does.
    runtime.block_on(bridge.detach("a")).unwrap();
    let next = Bridge::start(config()).unwrap();
    next.reconcile(&HashSet::new());
    assert_eq!((links(), stored()), (vec!["windlass0".to_owned()], 0));
    assert!(bridge.inner.removal.wait_for_all());
}

/// Seconds that `bytes` take from one namespace to an address of the other.
fn seconds(from: &Path, to: &Path, address: IpAddr, bytes: usize) -> f64 {
    use std::io::Write;
    let listener = inside(to, || TcpListener::bind("[::]:7778").unwrap()).join().unwrap();
    let reader = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let start = Instant::now();
        assert_eq!(io::copy(&mut stream, &mut io::sink()).unwrap(), bytes as u64);
        start.elapsed().as_secs_f64()
    });
    inside(from, move || TcpStream::connect((address, 7778)).unwrap().write_all(&vec![0; bytes]).unwrap()).join().unwrap();
    reader.join().unwrap()
}

#[test]
fn bandwidth_is_limited_in_both_directions_and_leaves_nothing() {
    if !isolated("bandwidth_is_limited_in_both_directions_and_leaves_nothing") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    let limited = |pod: &str, netns: &Path, egress: &str| {
        let annotations = [("kubernetes.io/ingress-bandwidth", "40M"), ("kubernetes.io/egress-bandwidth", egress)];
        let annotations = annotations.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        bridge.inner.attach(Attachment { annotations, ..attachment(pod, netns) })
    };
    let error = limited("a", &a, "1Z").unwrap_err();
    assert_eq!(chain(&error), "annotation kubernetes.io/egress-bandwidth \"1Z\" is no rate between 1k and 1P bits per second");
    assert_eq!(links(), ["windlass0"]);
    let first = limited("a", &a, "80M").unwrap();
    let second = attach(&bridge, "b", &b).unwrap();
    // 2 MB at 5 MB/s, and at 10 MB/s; the first 20 ms of each are free.
    for (family, rate, from, to, network) in [
        ("IPv4", 5e6, &b, &a, &first),
        ("IPv6", 5e6, &b, &a, &first),
        ("IPv4", 1e7, &a, &b, &second),
        ("IPv6", 1e7, &a, &b, &second),
    ] {
        let address = network.ips[usize::from(family == "IPv6")];
        let took = seconds(from, to, address, 2_000_000);
        println!("measured: 2 MB at {rate} bytes/s over {family} took {took:.3} s");
        let least = 2e6 / rate;
        assert!(took > 0.8 * least && took < 3.0 * least + 10.0, "{family}: {took} s, of {least}");
    }
    // Not by the pod itself, which may do what it likes at its own end.
    run("ip", &["netns", "exec", "a", "sh", "-c", "tc qdisc del dev eth0 root; tc qdisc del dev eth0 ingress; true"]);
    assert!(seconds(&a, &b, second.ips[0], 2_000_000) > 0.16);
    // An interrupted attach, a daemon that was killed, and a detach.
    limited("a", &a, "80M").unwrap();
    assert_eq!(links().len(), 4);
    let next = Bridge::start(config()).unwrap();
    next.reconcile(&HashSet::from(["a".to_owned()]));
    assert_eq!(links().len(), 3);
    next.reconcile(&HashSet::new());
    assert_eq!(links(), ["windlass0"]);
    bridge.inner.detach("b").unwrap();
    limited("a", &a, "80M").unwrap();
    limited("c", &b, "80M").unwrap();
    removal::begin(&bridge.inner, "a");
    removal::begin(&bridge.inner, "c");
    assert!(bridge.inner.removal.wait_for_all());
    assert_eq!((links(), stored()), (vec!["windlass0".to_owned()], 0));
}

#[test]
fn twenty_attaches_and_detaches_at_once() {
    if !isolated("twenty_attaches_and_detaches_at_once") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let pods: Vec<_> =
        (0..20).map(|n| (format!("{n:064x}").chars().rev().collect::<String>(), namespace(&format!("p{n}")))).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    let start = Instant::now();
    let networks: Vec<_> = runtime.block_on(async {
        let attaches = pods.iter().map(|(id, netns)| bridge.attach(attachment(id, netns)));
        futures_util::future::try_join_all(attaches).await.unwrap()
    });
    println!("measured: 20 attaches at once {:?}", start.elapsed());
    let addresses: HashSet<_> = networks.iter().map(ip4).collect();
    assert_eq!((addresses.len(), stored(), links().len()), (20, 20, 21));
    for (network, (_, netns)) in networks.iter().zip(&pods) {
        connection(&host(), netns, ip4(network));
    }
    let start = Instant::now();
    runtime.block_on(async { futures_util::future::try_join_all(pods.iter().map(|(id, _)| bridge.detach(id))).await.unwrap() });
    println!("measured: 20 detaches at once {:?}", start.elapsed());
    assert!(bridge.inner.removal.wait_for_all());
    println!("measured: 20 detaches at once until all is gone {:?}", start.elapsed());
    assert_eq!((links().len(), stored()), (1, 0));
}

#[test]
fn what_others_removed_is_repaired() {
    if !isolated("what_others_removed_is_repaired") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let a = namespace("a");
    run("nft", &["flush", "ruleset"]);
    assert_eq!(bridge.ready(), Ok(()));
    assert!(run("nft", &["list", "ruleset"]).contains("masquerade"));
    run("ip", &["link", "del", "windlass0"]);
    let network = attach(&bridge, "a", &a).unwrap();
    connection(&host(), &a, ip4(&network));
    run("ip", &["link", "del", "windlass0"]);
    assert_eq!(bridge.ready(), Ok(()));
    assert!(links().contains(&"windlass0".to_owned()));
}

#[test]
fn conflicts_are_named() {
    if !isolated("conflicts_are_named") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let a = namespace("a");
    let second = Bridge::start(BridgeConfig { name: "windlass1".into(), ..config() }).unwrap();
    let reason = "pod subnet 10.99.0.0/24 overlaps the route 10.99.0.0/24 of windlass0: configure another subnet";
    assert_eq!(second.ready(), Err(reason.to_owned()));
    attach(&bridge, "a", &a).unwrap();
    let other = BridgeConfig { state_dir: "/run/other".into(), ..config() };
    let reason = "bridge windlass0 is in use by windlass /run/state: configure another name and subnet";
    assert_eq!(Bridge::start(other).unwrap().ready(), Err(reason.to_owned()));
    run("ip", &["link", "add", "taken", "type", "veth", "peer", "name", "taken1"]);
    let other = BridgeConfig { name: "taken".into(), subnets: subnets(&["10.98.0.0/24"]), ..config() };
    let reason = "link taken exists and is not a bridge: configure another name";
    assert_eq!(Bridge::start(other).unwrap().ready(), Err(reason.to_owned()));
    let side = BridgeConfig { name: "w1".into(), table: "w1".into(), state_dir: "/run/w1".into(), ..config() };
    let side = Bridge::start(BridgeConfig { subnets: subnets(&["10.98.0.0/24"]), ..side }).unwrap();
    assert_eq!((side.ready(), bridge.ready()), (Ok(()), Ok(())), "two daemons side by side");
}

#[test]
fn a_damaged_address_file_is_set_aside_and_live_pods_are_adopted() {
    if !isolated("a_damaged_address_file_is_set_aside_and_live_pods_are_adopted") {
        return;
    }
    let bridge = Bridge::start(config()).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    let network = attach(&bridge, "a", &a).unwrap();
    std::fs::write("/run/state/addresses.json", "{").unwrap();
    let bridge = Bridge::start(config()).unwrap();
    assert!(Path::new("/run/state/addresses.bad").exists());
    assert!(bridge.adopt("a", "test/a", &network, &[]) && bridge.adopt("a", "test/a", &network, &[]));
    assert!(!bridge.adopt("b", "test/b", &network, &[]));
    assert_ne!(attach(&bridge, "b", &b).unwrap().ips, network.ips);
}

#[test]
fn a_full_disk_refuses_attach_and_still_detaches() {
    if !isolated("a_full_disk_refuses_attach_and_still_detaches") {
        return;
    }
    std::fs::create_dir("/run/small").unwrap();
    run("mount", &["-t", "tmpfs", "-o", "size=8k", "tmpfs", "/run/small"]);
    let bridge = Bridge::start(BridgeConfig { state_dir: "/run/small".into(), ..config() }).unwrap();
    let (a, b) = (namespace("a"), namespace("b"));
    attach(&bridge, "a", &a).unwrap();
    let _ = std::fs::write("/run/small/fill", [0; 16384]);
    let error = attach(&bridge, "b", &b).unwrap_err();
    assert_eq!(chain(&error), "write /run/small/addresses.json: No space left on device (os error 28)");
    bridge.inner.detach("a").unwrap();
    assert_eq!(links(), ["windlass0"]);
    std::fs::remove_file("/run/small/fill").unwrap();
    attach(&bridge, "b", &b).unwrap();
}

#[test]
fn attach_and_detach_are_quick() {
    if !isolated("attach_and_detach_are_quick") {
        return;
    }
    let start = Instant::now();
    let bridge = Bridge::start(config()).unwrap();
    println!("measured: first start {:?}", start.elapsed());
    let start = Instant::now();
    Bridge::start(config()).unwrap();
    println!("measured: second start {:?}", start.elapsed());
    let start = Instant::now();
    bridge.ready().unwrap();
    println!("measured: ready {:?}", start.elapsed());
    let (mut attaches, mut detaches, mut firsts) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..50 {
        let (name, netns) = (format!("p{n}"), namespace(&format!("p{n}")));
        let socket = route_socket(&netns);
        let start = Instant::now();
        let network = bridge.inner.attach(Attachment { route_socket: socket, ..attachment(&name, &netns) }).unwrap();
        attaches.push(start.elapsed());
        if n % 5 == 0 {
            firsts.push(
                connection(
                    &netns,
                    &host(),
                    match network.gateways[0] {
                        IpAddr::V4(gateway) => gateway,
                        IpAddr::V6(_) => panic!(),
                    },
                )
                .1,
            );
        }
    }
    for n in 0..50 {
        let start = Instant::now();
        bridge.inner.detach(&format!("p{n}")).unwrap();
        detaches.push(start.elapsed());
    }
    for (what, times) in [("attach", &mut attaches), ("detach", &mut detaches), ("first connection", &mut firsts)] {
        times.sort_unstable();
        println!("measured: {what} median {:?} max {:?}", times[times.len() / 2], times[times.len() - 1]);
    }
}

#[test]
fn host_names_fit_and_follow_the_id() {
    assert_eq!(host_interface("0123456789abcdef"), "wl0123456789a");
    for id in ["", "pod", "ü-is-not-hex-at-all", "0123456789ABCDEF"] {
        let name = host_interface(id);
        assert!(name.len() == 13 && name.is_ascii(), "{name}");
    }
}
