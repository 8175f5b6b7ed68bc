//! The one nftables table of the built-in bridge: masquerade for what leaves the pod subnet, and ports of the host that lead to pods.
//!
//! Written by the `nft` program, once, in one transaction that replaces whatever our table held: three starts leave one rule.
//! No rule is added for a pod: ports of the host are elements of maps (`hosts` for a named address of the host, `ports` for all of
//! them, one of each for a family), changed by [`super::nfnetlink`]. What goes through one from a pod, which else would be answered past the host, or from the
//! host's loopback address, is masqueraded; bit 0x1000 of the mark says so on its way through this host. IPv4's `route_localnet` lets the
//! loopback address out over the bridge, and the `guard` chain keeps pods from using it the other way. Other tables are never touched; there is no `accept` for forwarded packets here because
//! in nftables it would not help: a drop in another table's forward chain wins over it, so such a chain is reported instead.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::NetworkError;
use super::hostport::Element;
use super::netlink;
use super::nfnetlink::{self, Change};
use super::subnet::Subnet;

/// Where Debian, Fedora, Alpine and Arch put the program, searched after `PATH`: a service's `PATH` may lack sbin.
const SBIN: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// What the rules of the two families differ in.
struct Family {
    number: u8,
    /// As `nft` calls its header.
    protocol: &'static str,
    /// Sources of the host's own that a bridge can carry.
    loopback: Option<&'static str>,
    multicast: &'static str,
    redirect: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family { number: 4, protocol: "ip", loopback: Some("127.0.0.0/8"), multicast: "224.0.0.0/4", redirect: "icmp type redirect" },
    Family { number: 6, protocol: "ip6", loopback: None, multicast: "ff00::/8", redirect: "icmpv6 type nd-redirect" },
];

impl Family {
    fn maps(&self, _: &Firewall, _: &[Subnet], elements: &[Element]) -> String {
        let number = self.number;
        let of = |map: String| {
            let texts: Vec<String> = elements.iter().filter(|element| element.map() == map).map(Element::text).collect();
            if texts.is_empty() { String::new() } else { format!(" elements = {{ {} }};", texts.join(", ")) }
        };
        let (ports, hosts) = (of(format!("ports{number}")), of(format!("hosts{number}")));
        let (port, address) = ("inet_proto . inet_service", format!("ipv{number}_addr"));
        format!(
            "  map ports{number} {{ type {port} : {address} . inet_service;{ports} }}
  map hosts{number} {{ type {address} . {port} : {address} . inet_service;{hosts} }}\n"
        )
    }

    fn lookups(&self, _: &Firewall, _: &[Subnet], _: &[Element]) -> String {
        let Self { number, protocol, .. } = self;
        format!(
            "    meta nfproto ipv{number} dnat {protocol} to {protocol} daddr . meta l4proto . th dport map @hosts{number}
    meta nfproto ipv{number} dnat {protocol} to meta l4proto . th dport map @ports{number}\n"
        )
    }

    fn masquerades(&self, firewall: &Firewall, subnets: &[Subnet], _: &[Element]) -> String {
        let Self { protocol, multicast, .. } = self;
        let bridge = &firewall.bridge;
        let ours = subnets.iter().filter(|subnet| subnet.is_ipv6() == (self.number == 6));
        let pods: Vec<String> = ours.map(ToString::to_string).collect();
        let sources: Vec<&str> = self.loopback.into_iter().chain(pods.iter().map(String::as_str)).collect();
        let mut rules = String::new();
        if !sources.is_empty() {
            let sources = sources.join(", ");
            rules +=
                &format!("    meta mark & 0x1000 == 0x1000 oifname \"{bridge}\" {protocol} saddr {{ {sources} }} masquerade\n");
        }
        if !pods.is_empty() {
            let pods = pods.join(", ");
            rules += &format!(
                "    {protocol} saddr {{ {pods} }} oifname != \"{bridge}\" {protocol} daddr != {{ {pods}, {multicast} }} masquerade\n"
            );
        }
        rules
    }

    fn redirects(&self, bridge: &str) -> String {
        format!("    oifname \"{bridge}\" {} drop\n", self.redirect)
    }
}

/// Our table in the host's namespace.
#[derive(Debug)]
pub(super) struct Firewall {
    table: String,
    bridge: String,
    /// The kernel has IPv6, and with it tables of both families.
    ipv6: bool,
}

impl Firewall {
    pub(super) fn new(table: &str, bridge: &str, ipv6: bool) -> Result<Self, NetworkError> {
        let plain = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        let starts_well = table.starts_with(|c: char| c.is_ascii_alphabetic());
        if !plain(table) || !starts_well || table.len() > 64 || !plain(bridge) || bridge.len() > 15 {
            return Err(NetworkError::Conflict(format!(
                "bridge name {bridge:?} (at most 15 bytes) and table name {table:?} take letters, digits, - and _"
            )));
        }
        Ok(Self { table: table.to_owned(), bridge: bridge.to_owned(), ipv6 })
    }

    /// Replaces the table with exactly our rules for pods of `subnets`, and these elements.
    pub(super) fn install(&self, subnets: &[Subnet], elements: &[Element]) -> Result<(), NetworkError> {
        self.run(&self.script(subnets, elements)).map(drop)
    }

    /// Name and number (NFPROTO_) of the table's family.
    fn family(&self) -> (&'static str, u8) {
        if self.ipv6 { ("inet", 1) } else { ("ip", 2) }
    }

    fn script(&self, subnets: &[Subnet], elements: &[Element]) -> String {
        let Self { table, bridge, ipv6 } = self;
        let family = self.family().0;
        let families = if *ipv6 { &FAMILIES[..] } else { &FAMILIES[..1] };
        let each = |part: fn(&Family, &Self, &[Subnet], &[Element]) -> String| -> String {
            families.iter().map(|family| part(family, self, subnets, elements)).collect()
        };
        let (maps, lookups, masquerades) = (each(Family::maps), each(Family::lookups), each(Family::masquerades));
        let redirects: String = families.iter().map(|family| family.redirects(bridge)).collect();
        format!(
            r#"add table {family} {table}
delete table {family} {table}
table {family} {table} {{
{maps}  chain lookup {{
    meta l4proto != {{ tcp, udp, sctp }} return
    meta mark set meta mark | 0x1000
{lookups}    meta mark set meta mark & 0xffffefff
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
{masquerades}  }}
  chain guard {{
    type filter hook prerouting priority -300; policy accept;
    iifname "{bridge}" ip daddr 127.0.0.0/8 drop
    iifname "{bridge}" ip saddr 127.0.0.0/8 drop
  }}
  chain redirects {{
    type filter hook output priority 0; policy accept;
{redirects}  }}
}}
"#
        )
    }

    /// Changes elements, all or none; what [`nfnetlink::change`] says.
    pub(super) fn change(&self, change: Change, elements: &[Element]) -> std::io::Result<()> {
        nfnetlink::change(self.family().1, &self.table, change, elements)
    }

    /// Removes the table; succeeds when there is none.
    pub(super) fn remove(&self) -> Result<(), NetworkError> {
        let (family, number) = self.family();
        match netlink::nft_table_exists(number, &self.table) {
            Ok(false) => Ok(()),
            _ => self.run(&format!("add table {family} {0}\ndelete table {family} {0}\n", self.table)).map(drop),
        }
    }

    /// Whether the table is there and `nft` can be run.
    pub(super) fn check(&self) -> Result<bool, NetworkError> {
        self.program()?;
        netlink::nft_table_exists(self.family().1, &self.table)
            .map_err(|source| netlink::kernel("look up nftables table", &self.table, source))
    }

    /// The base chains that drop forwarded packets by policy, as Docker's does, so that pods cannot reach beyond the host.
    pub(super) fn dropping_chains(&self) -> Result<Vec<String>, NetworkError> {
        Ok(dropping(&self.run("list chains\n")?))
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
        for (table, bridge) in [("a b", "br"), ("", "br"), ("t;", "br"), ("t", "br\""), ("t", "a-name-of-16-byt"), ("0t", "br")] {
            assert!(Firewall::new(table, bridge, true).is_err(), "{table:?} {bridge:?}");
        }
        assert!(Firewall::new("windlass", "windlass0", true).is_ok());
    }

    #[test]
    fn nft_is_found_in_sbin_without_a_path() {
        assert_eq!(find(None), find(Some(std::ffi::OsStr::new("relative"))));
    }
}
