//! Ports of the host that lead to pods: which pod holds which, what a conflict is, and their form as elements of our nftables maps.
//!
//! Each is one element of a map that static rules look up, so a packet costs the same however many there are. A port for one
//! address of the host and the same port for all of them conflict. Without an address of the host a port is one of both families, as far
//! as the pod has addresses of both. A port that another process of the host listens on is refused too:
//! the pod would silently take, say, sshd's connections. Who begins to listen later is not seen.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
use serde::{Deserialize, Serialize};

use super::{NetworkError, PortMapping, Protocol};

/// The ports of one pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Held {
    /// Namespace and name of the pod, for the messages of others.
    pub holder: String,
    pub ports: Vec<PortMapping>,
}

/// One element of a map of the table: where packets to a port go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Element {
    port: PortMapping,
    pod: IpAddr,
}

impl Element {
    /// Of each port one for each of the pod's addresses that it can lead to.
    pub(super) fn of(ports: &[PortMapping], pod: &[IpAddr]) -> Vec<Element> {
        let all = ports.iter().flat_map(|port| pod.iter().map(move |pod| (port, *pod)));
        let fitting = all.filter(|(port, pod)| port.host_ip.is_none_or(|host| host.is_ipv4() == pod.is_ipv4()));
        fitting.map(|(port, pod)| Element { port: port.clone(), pod }).collect()
    }

    /// `ports` for every address of the host, `hosts` for a named one, and the family.
    pub(super) fn map(&self) -> &'static str {
        match (host(&self.port).is_some(), self.pod.is_ipv4()) {
            (false, true) => "ports4",
            (true, true) => "hosts4",
            (false, false) => "ports6",
            (true, false) => "hosts6",
        }
    }

    /// As the kernel keeps it: each part in network order and padded to four bytes.
    pub(super) fn key(&self) -> Vec<u8> {
        let mut key = host(&self.port).map(octets).unwrap_or_default();
        key.extend([number(self.port.protocol), 0, 0, 0]);
        key.extend(padded(self.port.host_port));
        key
    }

    pub(super) fn data(&self) -> Vec<u8> {
        let mut data = octets(self.pod);
        data.extend(padded(self.port.container_port));
        data
    }

    /// As `nft` reads it.
    pub(super) fn text(&self) -> String {
        let host = host(&self.port).map(|host| format!("{host} . ")).unwrap_or_default();
        let PortMapping { protocol, host_port, container_port, .. } = &self.port;
        format!("{host}{} . {host_port} : {} . {container_port}", name(*protocol), self.pod)
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The one address of the host that is meant; `0.0.0.0` is all of IPv4, `::` all of IPv6.
fn host(port: &PortMapping) -> Option<IpAddr> {
    port.host_ip.filter(|host| !host.is_unspecified())
}

fn padded(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
        Protocol::Sctp => 132,
    }
}

fn name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// `8080/tcp`, `192.0.2.1:8080/tcp` or `[::]:8080/tcp`.
fn told(port: &PortMapping) -> String {
    let (number, protocol) = (port.host_port, name(port.protocol));
    match port.host_ip.filter(|host| *host != IpAddr::V4(Ipv4Addr::UNSPECIFIED)) {
        None => format!("{number}/{protocol}"),
        Some(host) => format!("{}/{protocol}", SocketAddr::new(host, number)),
    }
}

fn overlap(one: &PortMapping, other: &PortMapping) -> bool {
    let hosts = match (one.host_ip, other.host_ip) {
        (Some(one), Some(other)) => {
            one == other || one.is_ipv4() == other.is_ipv4() && (one.is_unspecified() || other.is_unspecified())
        }
        _ => true,
    };
    one.protocol == other.protocol && one.host_port == other.host_port && hosts
}

fn refused(port: &PortMapping, why: &str) -> NetworkError {
    NetworkError::HostPort(format!("host port {}: {why}", told(port)))
}

/// Fails if a port is for an address of a family that the pod gets no address of.
pub(super) fn check_families(ports: &[PortMapping], pod: &[IpAddr]) -> Result<(), NetworkError> {
    let lost = ports.iter().find(|port| Element::of(std::slice::from_ref(*port), pod).is_empty());
    lost.map_or(Ok(()), |port| {
        let family = if port.host_ip.is_some_and(|host| host.is_ipv6()) { "IPv6" } else { "IPv4" };
        Err(refused(port, &format!("pods of the built-in bridge have no {family} address here")))
    })
}

/// The ports to hold for `pod_id`, twice the same once; an error names the one who has such a port.
pub(super) fn claim(
    held: &BTreeMap<String, Held>,
    pod_id: &str,
    holder: &str,
    asked: &[PortMapping],
) -> Result<Held, NetworkError> {
    let mut ports: Vec<PortMapping> = Vec::new();
    for port in asked {
        if ports.contains(port) {
            continue;
        }
        if let Some(other) = ports.iter().find(|other| overlap(port, other)) {
            return Err(refused(port, &format!("the same pod asks for {} too", told(other))));
        }
        let others = held.iter().filter(|(pod, _)| *pod != pod_id).map(|(_, held)| held);
        for other in others {
            if let Some(taken) = other.ports.iter().find(|taken| overlap(port, taken)) {
                return Err(refused(port, &format!("pod {} holds {}", other.holder, told(taken))));
            }
        }
        ports.push(port.clone());
    }
    Ok(Held { holder: holder.to_owned(), ports })
}

/// Fails if a process of the host listens on one of the ports. SCTP is not looked at.
pub(super) fn check_listeners(ports: &[PortMapping]) -> Result<(), NetworkError> {
    const EVERYWHERE: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    for port in ports.iter().filter(|port| port.protocol != Protocol::Sctp) {
        let hosts = port.host_ip.map_or(EVERYWHERE.to_vec(), |host| vec![host]);
        // Only this one error says so: an address that the host does not have yet may come.
        if hosts.into_iter().any(|host| bound(port, host) == Err(Errno::ADDRINUSE)) {
            return Err(refused(port, "a process of the host listens on it"));
        }
    }
    Ok(())
}

/// Binds the port for as long as this takes.
fn bound(port: &PortMapping, host: IpAddr) -> Result<(), Errno> {
    let kind = if port.protocol == Protocol::Tcp { SocketType::STREAM } else { SocketType::DGRAM };
    let family = if host.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    if host.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    // Connections that are over do not hold a port.
    sockopt::set_socket_reuseaddr(&socket, port.protocol == Protocol::Tcp)?;
    bind(&socket, &SocketAddr::new(host, port.host_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> PortMapping {
        let (host, rest) = text.rsplit_once(':').map_or((None, text), |(host, rest)| (Some(host.parse().unwrap()), rest));
        let (number, protocol) = rest.split_once('/').unwrap();
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => Protocol::Sctp,
        };
        PortMapping { protocol, container_port: 80, host_port: number.parse().unwrap(), host_ip: host }
    }

    #[test]
    fn a_conflict_names_the_holder() {
        let held = BTreeMap::from([(
            "other".to_owned(),
            Held { holder: "shop/web".into(), ports: vec![port("80/tcp"), port("192.0.2.1:53/udp")] },
        )]);
        for (asked, expected) in [
            (&["80/tcp"][..], Some("host port 80/tcp: pod shop/web holds 80/tcp")),
            (&["80/udp", "80/sctp", "81/tcp", "81/tcp"], None),
            (&["0.0.0.0:80/tcp"], Some("host port 80/tcp: pod shop/web holds 80/tcp")),
            (&["127.0.0.1:80/tcp"], Some("host port 127.0.0.1:80/tcp: pod shop/web holds 80/tcp")),
            (&["53/udp"], Some("host port 53/udp: pod shop/web holds 192.0.2.1:53/udp")),
            (&["192.0.2.1:53/udp"], Some("host port 192.0.2.1:53/udp: pod shop/web holds 192.0.2.1:53/udp")),
            (&["192.0.2.2:53/udp"], None),
            (&["81/tcp", "127.0.0.1:81/tcp"], Some("host port 127.0.0.1:81/tcp: the same pod asks for 81/tcp too")),
            (&["::1:80/tcp"], Some("host port [::1]:80/tcp: pod shop/web holds 80/tcp")),
            (&["::1:53/udp", ":::53/udp"], Some("host port [::]:53/udp: the same pod asks for [::1]:53/udp too")),
            (&[":::53/udp", "192.0.2.2:53/udp"], None),
        ] {
            let ports: Vec<_> = asked.iter().map(|text| port(text)).collect();
            let told = claim(&held, "mine", "a/b", &ports).err().map(|error| error.to_string());
            assert_eq!(told.as_deref(), expected, "{asked:?}");
            assert!(claim(&held, "other", "a/b", &ports).is_ok() || asked.len() == 2, "its own are no conflict");
        }
    }

    #[test]
    fn elements_are_what_the_kernel_and_nft_read() {
        let pod = [IpAddr::from([10, 57, 0, 2]), "fd57::2".parse().unwrap()];
        let [any, any6] = &Element::of(&[port("8080/tcp")], &pod)[..] else { panic!() };
        let [one] = &Element::of(&[port("127.0.0.1:53/udp")], &pod)[..] else { panic!() };
        let [one6] = &Element::of(&[port("::1:53/udp")], &pod)[..] else { panic!() };
        assert_eq!((any.map(), any.key()), ("ports4", vec![6, 0, 0, 0, 0x1f, 0x90, 0, 0]));
        assert_eq!((any6.map(), any6.key()), ("ports6", vec![6, 0, 0, 0, 0x1f, 0x90, 0, 0]));
        assert_eq!((one.map(), one.key()), ("hosts4", vec![127, 0, 0, 1, 17, 0, 0, 0, 0, 53, 0, 0]));
        assert_eq!(any.data(), [10, 57, 0, 2, 0, 80, 0, 0]);
        assert_eq!((one6.map(), one6.key().len(), any6.data().len()), ("hosts6", 24, 20));
        assert_eq!(
            [any, any6, one, one6].map(Element::text),
            [
                "tcp . 8080 : 10.57.0.2 . 80",
                "tcp . 8080 : fd57::2 . 80",
                "127.0.0.1 . udp . 53 : 10.57.0.2 . 80",
                "::1 . udp . 53 : fd57::2 . 80"
            ]
        );
        let told = check_families(&[port("81/tcp"), port(":::80/tcp")], &pod[..1]).unwrap_err().to_string();
        assert_eq!(told, "host port [::]:80/tcp: pods of the built-in bridge have no IPv6 address here");
    }
}
