//! The one nftables table of the built-in bridge: masquerade for what leaves the pod subnet, and ports of the host that lead to pods.
//!
//! Written by the `nft` program, once, in one transaction that replaces whatever our table held: three starts leave one rule.
//! No rule is added for a pod: ports of the host are elements of two maps (`hosts` for a named address of the host, `ports` for all of
//! them), changed by [`super::nfnetlink`]. What goes through one from a pod, which else would be answered past the host, or from the
//! host's loopback address, is masqueraded; bit 0x1000 of the mark says so on its way through this host. `route_localnet` lets the
//! loopback address out over the bridge, and the `guard` chain keeps pods from using it the other way. Other tables are never touched; there is no `accept` for forwarded packets here because
//! in nftables it would not help: a drop in another table's forward chain wins over it, so such a chain is reported instead.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::NetworkError;
use super::address::Subnet;
use super::hostport::Element;
use super::netlink;
use super::nfnetlink::{self, Change};

/// Where Debian, Fedora, Alpine and Arch put the program, searched after `PATH`: a service's `PATH` may lack sbin.
const SBIN: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// Our table in the host's namespace.
#[derive(Debug)]
pub(super) struct Firewall {
    table: String,
    bridge: String,
    subnet: Subnet,
}

impl Firewall {
    pub(super) fn new(table: &str, bridge: &str, subnet: Subnet) -> Result<Self, NetworkError> {
        let plain = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        let starts_well = table.starts_with(|c: char| c.is_ascii_alphabetic());
        if !plain(table) || !starts_well || table.len() > 64 || !plain(bridge) || bridge.len() > 15 {
            return Err(NetworkError::Conflict(format!(
                "bridge name {bridge:?} (at most 15 bytes) and table name {table:?} take letters, digits, - and _"
            )));
        }
        Ok(Self { table: table.to_owned(), bridge: bridge.to_owned(), subnet })
    }

    /// Replaces the table with exactly our rules and these elements.
    pub(super) fn install(&self, elements: &[Element]) -> Result<(), NetworkError> {
        self.run(&self.script(elements)).map(drop)
    }

    fn script(&self, elements: &[Element]) -> String {
        let Self { table, bridge, subnet } = self;
        let of = |map: &str| {
            let texts: Vec<String> = elements.iter().filter(|element| element.map() == map).map(Element::text).collect();
            if texts.is_empty() { String::new() } else { format!(" elements = {{ {} }};", texts.join(", ")) }
        };
        let (ports, hosts) = (of("ports"), of("hosts"));
        format!(
            r#"add table ip {table}
delete table ip {table}
table ip {table} {{
  map ports {{ type inet_proto . inet_service : ipv4_addr . inet_service;{ports} }}
  map hosts {{ type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service;{hosts} }}
  chain lookup {{
    meta l4proto != {{ tcp, udp, sctp }} return
    meta mark set meta mark | 0x1000
    dnat to ip daddr . meta l4proto . th dport map @hosts
    dnat to meta l4proto . th dport map @ports
    meta mark set meta mark & 0xffffefff
  }}
  chain prerouting {{
    type nat hook prerouting priority -100; policy accept;
    fib daddr type local jump lookup
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    fib daddr type local jump lookup
  }}
  chain postrouting {{
    type nat hook postrouting priority 100; policy accept;
    meta mark & 0x1000 == 0x1000 oifname "{bridge}" ip saddr {{ 127.0.0.0/8, {subnet} }} masquerade
    ip saddr {subnet} oifname != "{bridge}" ip daddr != {{ {subnet}, 224.0.0.0/4 }} masquerade
  }}
  chain guard {{
    type filter hook prerouting priority -300; policy accept;
    iifname "{bridge}" ip daddr 127.0.0.0/8 drop
    iifname "{bridge}" ip saddr 127.0.0.0/8 drop
  }}
  chain redirects {{
    type filter hook output priority 0; policy accept;
    oifname "{bridge}" icmp type redirect drop
  }}
}}
"#
        )
    }

    /// Changes elements, all or none; what [`nfnetlink::change`] says.
    pub(super) fn change(&self, change: Change, elements: &[Element]) -> std::io::Result<()> {
        nfnetlink::change(&self.table, change, elements)
    }

    /// Removes the table; succeeds when there is none.
    pub(super) fn remove(&self) -> Result<(), NetworkError> {
        match netlink::nft_table_exists(&self.table) {
            Ok(false) => Ok(()),
            _ => self.run(&format!("add table ip {0}\ndelete table ip {0}\n", self.table)).map(drop),
        }
    }

    /// Whether the table is there and `nft` can be run.
    pub(super) fn check(&self) -> Result<bool, NetworkError> {
        self.program()?;
        netlink::nft_table_exists(&self.table).map_err(|source| netlink::kernel("look up nftables table", &self.table, source))
    }

    /// The base chains that drop forwarded packets by policy, as Docker's does, so that pods cannot reach beyond the host.
    pub(super) fn dropping_chains(&self) -> Result<Vec<String>, NetworkError> {
        Ok(dropping(&self.run("list chains ip\n")?))
    }

    fn program(&self) -> Result<PathBuf, NetworkError> {
        find(std::env::var_os("PATH").as_deref()).ok_or_else(|| {
            self.failure("the program nft is not installed: install the package nftables, or configure CNI".to_owned())
        })
    }

    fn run(&self, script: &str) -> Result<String, NetworkError> {
        let program = self.program()?;
        let mut child = Command::new(&program)
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| self.failure(format!("start {}: {error}", program.display())))?;
        // The script is far below a pipe's capacity, so the write cannot wait for a reader.
        let written = child.stdin.take().map_or(Ok(()), |mut input| input.write_all(script.as_bytes()));
        let output = child.wait_with_output().map_err(|error| self.failure(format!("wait for nft: {error}")))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            return Err(self.failure(format!("nft: {}: {}", output.status, stderr.trim())));
        }
        written.map_err(|error| self.failure(format!("write to nft: {error}")))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn failure(&self, reason: String) -> NetworkError {
        NetworkError::Firewall { table: self.table.clone(), reason }
    }
}

fn find(path: Option<&std::ffi::OsStr>) -> Option<PathBuf> {
    let directories = path.map(|path| std::env::split_paths(path).collect::<Vec<_>>()).unwrap_or_default();
    let candidates = directories.into_iter().chain(SBIN.iter().map(PathBuf::from));
    candidates.filter(|directory| directory.is_absolute()).map(|directory| directory.join("nft")).find(|file| executable(file))
}

fn executable(file: &Path) -> bool {
    rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
}

/// Reads `nft list chains`: `table ip NAME {`, `chain NAME {`, `type filter hook forward priority filter; policy drop;`.
fn dropping(listing: &str) -> Vec<String> {
    let (mut table, mut chain, mut found) = ("", "", Vec::new());
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches([' ', '{']);
        } else if let Some(name) = line.strip_prefix("chain ") {
            chain = name.trim_end_matches([' ', '{']);
        } else if line.contains("hook forward") && line.contains("policy drop") {
            found.push(format!("{table} {chain}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forward_chain_that_drops_is_named() {
        let listing = "table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n\
                       \tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n\
                       table ip x {\n\tchain f {\n\t\ttype filter hook forward priority 0; policy accept;\n\t}\n}\n";
        assert_eq!(dropping(listing), ["ip filter FORWARD"]);
    }

    #[test]
    fn names_that_nft_would_read_as_syntax_are_refused() {
        let subnet: Subnet = "10.0.0.0/24".parse().unwrap();
        for (table, bridge) in [("a b", "br"), ("", "br"), ("t;", "br"), ("t", "br\""), ("t", "a-name-of-16-byt"), ("0t", "br")] {
            assert!(Firewall::new(table, bridge, subnet).is_err(), "{table:?} {bridge:?}");
        }
        assert!(Firewall::new("windlass", "windlass0", subnet).is_ok());
    }

    #[test]
    fn nft_is_found_in_sbin_without_a_path() {
        assert_eq!(find(None), find(Some(std::ffi::OsStr::new("relative"))));
    }
}
