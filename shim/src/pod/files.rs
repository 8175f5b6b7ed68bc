//! The files that a pod gives to its containers: hosts, hostname and resolv.conf.

use super::{Record, namespace_modes};
use crate::{
    error::{Error, Result},
    store,
};
use std::{fmt::Write, fs, path::Path};
use windlass_proto::cri::{DnsConfig, NamespaceMode};

/// Writes those into the pod's directory that do not tell its addresses.
pub(super) fn write(directory: &Path, record: &Record) -> Result<()> {
    let hostname = hostname(record);
    store::write_file(&directory.join("hostname"), format!("{hostname}\n").as_bytes())?;
    store::write_file(&directory.join("resolv.conf"), resolv_conf(record.config.dns_config.as_ref())?.as_bytes())
}

/// Writes `hosts`, once the pod's addresses are known.
pub(super) fn write_hosts(directory: &Path, record: &Record) -> Result<()> {
    let host = namespace_modes(&record.config).network() == NamespaceMode::Node;
    let text = if host { fs::read_to_string("/etc/hosts").unwrap_or_default() } else { hosts(record) };
    store::write_file(&directory.join("hosts"), text.as_bytes())
}

/// The pod's host name: the configured one, the host's on the host's network.
pub(super) fn hostname(record: &Record) -> String {
    if record.config.hostname.is_empty() {
        return rustix::system::uname().nodename().to_string_lossy().into_owned();
    }
    record.config.hostname.clone()
}

fn hosts(record: &Record) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for address in record.network.iter().flat_map(|network| &network.ips) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{address}\t{}", hostname(record));
    }
    text
}

fn resolv_conf(dns: Option<&DnsConfig>) -> Result<String> {
    let Some(dns) = dns.filter(|dns| !(dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty())) else {
        return Ok(fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    };
    let mut text = String::new();
    if !dns.searches.is_empty() {
        let _ = writeln!(text, "search {}", dns.searches.join(" "));
    }
    for server in &dns.servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !dns.options.is_empty() {
        let _ = writeln!(text, "options {}", dns.options.join(" "));
    }
    let lines = usize::from(!dns.searches.is_empty()) + dns.servers.len() + usize::from(!dns.options.is_empty());
    if text.lines().count() != lines {
        return Err(Error::invalid("dns_config: a server, search or option contains a line break"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf_has_the_kubelet_order() {
        let dns = DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["a.svc".into(), "svc".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(resolv_conf(Some(&dns)).expect("valid"), "search a.svc svc\nnameserver 10.96.0.10\noptions ndots:5\n");
    }

    #[test]
    fn a_line_break_in_a_dns_option_is_refused() {
        let dns = DnsConfig { servers: vec!["1.1.1.1\nnameserver 6.6.6.6".into()], searches: vec![], options: vec![] };
        assert!(resolv_conf(Some(&dns)).is_err());
    }
}
