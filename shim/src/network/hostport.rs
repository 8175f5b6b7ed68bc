//! Ports of the host that lead to pods: which pod holds which, what a conflict is, and their form as elements of our nftables maps.
//!
//! Each is one element of a map that static rules look up, so a packet costs the same however many there are. A port for one
//! address of the host and the same port for all of them conflict. A port that another process of the host listens on is refused too:
//! the pod would silently take, say, sshd's connections. Who begins to listen later is not seen. IPv4 only.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};

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
    pod: Ipv4Addr,
}

impl Element {
    pub(super) fn of(ports: &[PortMapping], pod: Ipv4Addr) -> Vec<Element> {
        ports.iter().map(|port| Element { port: port.clone(), pod }).collect()
    }

    /// `ports` for every address of the host, `hosts` for a named one.
    pub(super) fn map(&self) -> &'static str {
        if host(&self.port).is_some() { "hosts" } else { "ports" }
    }

    /// As the kernel keeps it: each part in network order and padded to four bytes.
    pub(super) fn key(&self) -> Vec<u8> {
        let mut key = host(&self.port).map(|host| host.octets().to_vec()).unwrap_or_default();
        key.extend([number(self.port.protocol), 0, 0, 0]);
        key.extend(padded(self.port.host_port));
        key
    }

    pub(super) fn data(&self) -> Vec<u8> {
        let mut data = self.pod.octets().to_vec();
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

/// The one address of the host that is meant; `0.0.0.0` is all of them.
fn host(port: &PortMapping) -> Option<Ipv4Addr> {
    match port.host_ip {
        Some(IpAddr::V4(host)) if !host.is_unspecified() => Some(host),
        _ => None,
    }
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

/// `8080/tcp`, or `192.0.2.1:8080/tcp`.
fn told(port: &PortMapping) -> String {
    let host = host(port).map(|host| format!("{host}:")).unwrap_or_default();
    format!("{host}{}/{}", port.host_port, name(port.protocol))
}

fn overlap(one: &PortMapping, other: &PortMapping) -> bool {
    let hosts = match (host(one), host(other)) {
        (Some(one), Some(other)) => one == other,
        _ => true,
    };
    one.protocol == other.protocol && one.host_port == other.host_port && hosts
}

/// The ports to hold for `pod_id`, twice the same once; an error names the one who has such a port.
pub(super) fn claim(
    held: &BTreeMap<String, Held>,
    pod_id: &str,
    holder: &str,
    asked: &[PortMapping],
) -> Result<Held, NetworkError> {
    let refused = |port: &PortMapping, why: String| NetworkError::HostPort(format!("host port {}: {why}", told(port)));
    let mut ports: Vec<PortMapping> = Vec::new();
    for port in asked {
        if let Some(IpAddr::V6(host)) = port.host_ip {
            return Err(refused(
                port,
                format!("host_ip {host} is IPv6, and pods of the built-in bridge have IPv4 addresses only"),
            ));
        }
        if ports.contains(port) {
            continue;
        }
        if let Some(other) = ports.iter().find(|other| overlap(port, other)) {
            return Err(refused(port, format!("the same pod asks for {} too", told(other))));
        }
        let others = held.iter().filter(|(pod, _)| *pod != pod_id).map(|(_, held)| held);
        for other in others {
            if let Some(taken) = other.ports.iter().find(|taken| overlap(port, taken)) {
                return Err(refused(port, format!("pod {} holds {}", other.holder, told(taken))));
            }
        }
        ports.push(port.clone());
    }
    Ok(Held { holder: holder.to_owned(), ports })
}

/// Fails if a process of the host listens on one of the ports. SCTP is not looked at.
pub(super) fn check_listeners(ports: &[PortMapping]) -> Result<(), NetworkError> {
    for port in ports {
        let address = SocketAddrV4::new(host(port).unwrap_or(Ipv4Addr::UNSPECIFIED), port.host_port);
        let bound = match port.protocol {
            Protocol::Tcp => TcpListener::bind(address).map(drop),
            Protocol::Udp => UdpSocket::bind(address).map(drop),
            Protocol::Sctp => Ok(()),
        };
        // Only this one error says so: an address that the host does not have yet may come.
        if bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
            return Err(NetworkError::HostPort(format!("host port {}: a process of the host listens on it", told(port))));
        }
    }
    Ok(())
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
        ] {
            let ports: Vec<_> = asked.iter().map(|text| port(text)).collect();
            let told = claim(&held, "mine", "a/b", &ports).err().map(|error| error.to_string());
            assert_eq!(told.as_deref(), expected, "{asked:?}");
            assert!(claim(&held, "other", "a/b", &ports).is_ok() || asked.len() == 2, "its own are no conflict");
        }
        let six = PortMapping { host_ip: Some("::1".parse().unwrap()), ..port("80/tcp") };
        assert!(claim(&held, "mine", "a/b", &[six]).is_err());
    }

    #[test]
    fn elements_are_what_the_kernel_and_nft_read() {
        let pod = Ipv4Addr::new(10, 57, 0, 2);
        let [any, one] =
            [&Element::of(&[port("8080/tcp")], pod)[0], &Element::of(&[port("127.0.0.1:53/udp")], pod)[0]].map(Clone::clone);
        assert_eq!((any.map(), any.key()), ("ports", vec![6, 0, 0, 0, 0x1f, 0x90, 0, 0]));
        assert_eq!((one.map(), one.key()), ("hosts", vec![127, 0, 0, 1, 17, 0, 0, 0, 0, 53, 0, 0]));
        assert_eq!(any.data(), [10, 57, 0, 2, 0, 80, 0, 0]);
        assert_eq!(
            (any.text(), one.text()),
            ("tcp . 8080 : 10.57.0.2 . 80".into(), "127.0.0.1 . udp . 53 : 10.57.0.2 . 80".into())
        );
    }
}
