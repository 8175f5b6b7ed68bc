//! The pod's side of its network: what is asked of it, the intent that is recorded before, and giving it back.

use super::{Pod, Record, files, namespace_modes};
use crate::{
    error::{Error, Result},
    network::{Attachment, Detachment, Dns, Kind, PodNetwork, PortMapping, Protocol, subnet::parse_subnets},
    node::Node,
    telemetry::trace,
};
use rustix::fd::OwnedFd;
use std::{collections::HashMap, path::Path, sync::Arc};
use tracing::Instrument;
use windlass_proto::cri::{self, NamespaceMode, PodSandboxConfig};

/// Connects the pod. What it will have to give back is in its record before anything is made.
pub(super) async fn attach(node: &Node, pod: &Pod, route_socket: OwnedFd) -> Result<PodNetwork> {
    pod.change(node, |record| record.network_attached = true)?;
    let record = pod.record();
    let kind = record.network_kind;
    Ok(node.network.attach(kind, attachment(record, route_socket)?).await?)
}

/// Gives the network back and unpins its namespace. Any number of times.
pub(super) async fn release(node: &Node, pod: &Pod) -> Result<()> {
    let record = pod.record();
    if record.network_attached {
        let span = tracing::info_span!(target: trace::TARGET, "network: detach", pod = %pod.id);
        node.network.detach(record.network_kind, &detachment(&record)).instrument(span).await?;
        pod.change_always(node, |record| record.network_attached = false);
    }
    if !record.netns.as_os_str().is_empty() {
        unpin(&record.netns)?;
    }
    Ok(())
}

/// The pod's sysctls. On the built-in bridge it does not listen to router advertisements unless it asks to: they can only be another pod's.
pub(super) fn sysctls(record: &Record) -> HashMap<String, String> {
    let mut sysctls: HashMap<String, String> =
        record.config.linux.as_ref().map(|linux| linux.sysctls.clone()).unwrap_or_default().into_iter().collect();
    if record.network_kind == Kind::Bridge && !record.netns.as_os_str().is_empty() && Path::new("/proc/sys/net/ipv6").exists() {
        sysctls.entry("net.ipv6.conf.default.accept_ra".into()).or_insert_with(|| "0".into());
    }
    sysctls
}

/// Waits until what was given back is gone, too.
pub(super) async fn gone(node: &Node, pod: &Pod) -> Result<()> {
    let kind = pod.look(|record| record.network_kind);
    Ok(node.network.gone(kind, &pod.id).await?)
}

/// Has new pods get addresses of `pod_cidr`, one network or one of each family with a comma between them. kubelet says what it knows: an
/// empty one changes nothing.
pub async fn assign_subnets(node: &Arc<Node>, pod_cidr: &str) -> Result<()> {
    if pod_cidr.trim().is_empty() {
        return Ok(());
    }
    let subnets = parse_subnets(pod_cidr.split(','))
        .map_err(|reason| Error::invalid(format!("runtime_config.network_config.pod_cidr: {reason}")))?;
    let node = node.clone();
    let assigned = tokio::task::spawn_blocking(move || node.network.assign(&subnets)).await;
    Ok(assigned.map_err(|error| Error::internal(format!("assign subnets to the pod network: {error}")))??)
}

fn attachment(record: Record, route_socket: OwnedFd) -> Result<Attachment> {
    let hostname = files::hostname(&record);
    let meta = record.config.metadata.clone().unwrap_or_default();
    let dns = record.config.dns_config.clone().unwrap_or_default();
    Ok(Attachment {
        pod_id: record.id,
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        hostname,
        netns: record.netns,
        route_socket,
        port_mappings: port_mappings(&record.config)?,
        annotations: record.config.annotations.into_iter().collect(),
        dns: Dns { servers: dns.servers, searches: dns.searches, options: dns.options },
        cgroup_parent: record.cgroup_parent,
    })
}

fn detachment(record: &Record) -> Detachment {
    let meta = record.config.metadata.clone().unwrap_or_default();
    Detachment {
        pod_id: record.id.clone(),
        name: meta.name,
        namespace: meta.namespace,
        uid: meta.uid,
        netns: record.netns.clone(),
        network: record.network.clone(),
    }
}

/// The ports of the host that the pod asks for; none on the host's network, where its own ports are the host's.
pub(super) fn port_mappings(config: &PodSandboxConfig) -> Result<Vec<PortMapping>> {
    if namespace_modes(config).network() == NamespaceMode::Node {
        return Ok(Vec::new());
    }
    let asked = config.port_mappings.iter().enumerate().filter(|(_, mapping)| mapping.host_port != 0);
    asked.map(|(index, mapping)| port_mapping(index, mapping)).collect()
}

fn port_mapping(index: usize, mapping: &cri::PortMapping) -> Result<PortMapping> {
    let invalid =
        |field: &str, value: &dyn std::fmt::Display| Error::invalid(format!("config.port_mappings[{index}].{field}: {value}"));
    let port = |field: &str, value: i32| match u16::try_from(value) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(invalid(field, &format_args!("{value} is not a port"))),
    };
    Ok(PortMapping {
        protocol: match cri::Protocol::try_from(mapping.protocol) {
            Ok(cri::Protocol::Tcp) => Protocol::Tcp,
            Ok(cri::Protocol::Udp) => Protocol::Udp,
            Ok(cri::Protocol::Sctp) => Protocol::Sctp,
            Err(_) => return Err(invalid("protocol", &format_args!("{} is unknown", mapping.protocol))),
        },
        container_port: port("container_port", mapping.container_port)?,
        host_port: port("host_port", mapping.host_port)?,
        host_ip: match mapping.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| invalid("host_ip", &format_args!("{text:?} is not an address")))?),
        },
    })
}

/// Unmounts and removes the file that pins a network namespace.
fn unpin(path: &Path) -> Result<()> {
    use rustix::{io::Errno, mount::UnmountFlags};
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => return Err(Error::io(format_args!("unmount {}", path.display()), error)),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format_args!("remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapped(mapping: cri::PortMapping) -> Result<Vec<PortMapping>> {
        port_mappings(&PodSandboxConfig { port_mappings: vec![mapping], ..Default::default() })
    }

    #[test]
    fn host_ports_are_read_and_wrong_ones_named() {
        let asked = cri::PortMapping { protocol: 1, container_port: 53, host_port: 5353, host_ip: "::1".into() };
        let expected = PortMapping {
            protocol: Protocol::Udp,
            container_port: 53,
            host_port: 5353,
            host_ip: Some(std::net::Ipv6Addr::LOCALHOST.into()),
        };
        assert_eq!(mapped(asked.clone()), Ok(vec![expected]));
        assert_eq!(mapped(cri::PortMapping { host_port: 0, ..asked.clone() }), Ok(vec![]));
        for (wrong, field) in [
            (cri::PortMapping { host_port: 65536, ..asked.clone() }, "[0].host_port: 65536"),
            (cri::PortMapping { container_port: 0, ..asked.clone() }, "[0].container_port: 0"),
            (cri::PortMapping { host_ip: "here".into(), ..asked.clone() }, "[0].host_ip: \"here\""),
            (cri::PortMapping { protocol: 9, ..asked }, "[0].protocol: 9"),
        ] {
            let error = mapped(wrong).expect_err(field);
            assert!(error.message.contains(field), "{error}");
        }
    }
}
