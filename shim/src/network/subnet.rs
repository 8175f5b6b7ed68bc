//! A network of pods, of either family: which addresses it has, and what they are for.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A network that has room for a gateway and at least one pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// The network that contains `address`. `None` unless `prefix` is 8 to 30, or 8 to 126 for IPv6.
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let (bits, width) = bits(address);
        let host_bits = width.checked_sub(prefix).filter(|host_bits| *host_bits >= 2 && prefix >= 8)?;
        Some(Self { network: address_of(bits >> host_bits << host_bits, address), prefix })
    }

    /// Length of the network part in bits.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether its addresses are those of IPv6.
    pub fn is_ipv6(&self) -> bool {
        self.network.is_ipv6()
    }

    /// The first address: the bridge's own and the pods' gateway.
    pub fn gateway(&self) -> IpAddr {
        self.at(1)
    }

    /// The last address, which is the broadcast address of IPv4 and not used in IPv6 either.
    pub fn last(&self) -> IpAddr {
        self.at(self.span())
    }

    /// Whether `address` lies inside.
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.prefix).is_some_and(|other| other == *self)
    }

    /// Whether this network and `address/prefix` share an address.
    pub fn overlaps(&self, address: IpAddr, prefix: u8) -> bool {
        let ((one, width), (other, other_width)) = (bits(self.network), bits(address));
        let shift = u32::from(width.saturating_sub(prefix.min(self.prefix)));
        width == other_width && one.checked_shr(shift) == other.checked_shr(shift)
    }

    /// How many pods fit: all but the network, the gateway and the last address.
    pub fn capacity(&self) -> usize {
        usize::try_from(self.span() - 2).unwrap_or(usize::MAX)
    }

    /// The pods' address after `address`, going round.
    pub(super) fn after(&self, address: Option<IpAddr>) -> IpAddr {
        let offset =
            address.filter(|address| self.contains(*address)).map_or(1, |address| bits(address).0 - bits(self.network).0);
        let next = offset.max(1) + 1;
        self.at(if next < self.span() { next } else { 2 })
    }

    /// The address that is `offset` after the network's own.
    fn at(&self, offset: u128) -> IpAddr {
        address_of(bits(self.network).0 + offset, self.network)
    }

    /// The offset of the last address.
    fn span(&self) -> u128 {
        (1 << (bits(self.network).1 - self.prefix)) - 1
    }
}

/// An address as a number, and how many bits addresses of its family have.
fn bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (address.to_bits().into(), 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

/// The address of `family`'s family that is the number `bits`.
fn address_of(bits: u128, family: IpAddr) -> IpAddr {
    match family {
        // What is above 32 bits is always 0 here.
        IpAddr::V4(_) => Ipv4Addr::from_bits(u32::try_from(bits).unwrap_or(u32::MAX)).into(),
        IpAddr::V6(_) => Ipv6Addr::from_bits(bits).into(),
    }
}

/// Reads `10.57.0.0/16,fd57:494e:444c::/64`, as UpdateRuntimeConfig has it: one network, or one of each family.
pub fn parse_subnets<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Vec<Subnet>, String> {
    let subnets: Vec<Subnet> = texts.into_iter().map(|text| text.trim().parse()).collect::<Result<_, _>>()?;
    match subnets[..] {
        [] => Err("no subnet for pods".to_owned()),
        [_] => Ok(subnets),
        [one, other] if one.is_ipv6() != other.is_ipv6() => Ok(subnets),
        [one, other, ..] => Err(format!("{one} and {other}: pods take addresses of at most one subnet of each family")),
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
            let address = address.parse().ok()?;
            Self::new(address, prefix.parse().ok()?).filter(|subnet| subnet.network == address)
        });
        parsed.ok_or_else(|| {
            format!(
                "{text:?} is not a network with a prefix of 8 to 30 bits, or 8 to 126 for IPv6, such as 10.57.0.0/16 or fd57:494e:444c::/64"
            )
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn subnets_are_read_strictly() {
        for bad in
            ["10.0.0.1/24", "10.0.0.0", "10.0.0.0/31", "10.0.0.0/7", "fd00::/127", "fd00::1/64", "f000::/4", "10.0.0.0/x", ""]
        {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
        for (text, gateway, last, capacity) in [
            ("10.4.0.0/14", "10.4.0.1", "10.7.255.255", (1 << 18) - 3),
            ("10.0.0.4/30", "10.0.0.5", "10.0.0.7", 1),
            ("fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff", usize::MAX - 2),
            ("fd00::/8", "fd00::1", "fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", usize::MAX),
            ("fd00::8/126", "fd00::9", "fd00::b", 1),
        ] {
            let subnet = subnet(text);
            let told = (subnet.gateway().to_string(), subnet.last().to_string(), subnet.capacity());
            assert_eq!(told, (gateway.to_owned(), last.to_owned(), capacity), "{text}");
            assert_eq!(subnet.to_string(), text);
        }
    }

    #[test]
    fn overlap_is_seen_from_both_sides() {
        for (one, address, prefix, expected) in [
            ("10.99.0.0/16", "10.99.7.0", 24, true),
            ("10.99.0.0/16", "10.0.0.0", 8, true),
            ("10.99.0.0/16", "10.98.0.0", 16, false),
            ("10.99.0.0/16", "10.98.0.0", 15, true),
            ("10.99.0.0/16", "0.0.0.0", 0, true),
            ("10.99.0.0/16", "::", 0, false),
            ("fd00::/64", "::", 0, true),
            ("fd00::/64", "fd00::7:0", 112, true),
            ("fd00::/64", "fd00:0:0:1::", 64, false),
        ] {
            assert_eq!(subnet(one).overlaps(address.parse().unwrap(), prefix), expected, "{one} {address}/{prefix}");
        }
    }

    #[test]
    fn addresses_go_round() {
        let next = |text: &str, address: &str| subnet(text).after(address.parse().ok()).to_string();
        assert_eq!(next("10.0.0.0/29", ""), "10.0.0.2");
        assert_eq!(next("10.0.0.0/29", "10.0.0.2"), "10.0.0.3");
        assert_eq!(next("10.0.0.0/29", "10.0.0.6"), "10.0.0.2");
        assert_eq!(next("10.0.0.0/29", "10.0.0.0"), "10.0.0.2");
        assert_eq!(next("10.0.0.0/29", "10.0.1.3"), "10.0.0.2", "of another subnet");
        assert_eq!(next("fd00::/64", "fd00::ffff"), "fd00::1:0");
        assert_eq!(next("fd00::/126", "fd00::2"), "fd00::2");
    }

    #[test]
    fn one_of_each_family_at_most() {
        assert_eq!(parse_subnets(["10.1.0.0/24", " fd00::/64"]).unwrap(), [subnet("10.1.0.0/24"), subnet("fd00::/64")]);
        assert_eq!(parse_subnets(["fd00::/64"]).unwrap(), [subnet("fd00::/64")]);
        for bad in [&[][..], &["10.1.0.0/24", "10.2.0.0/24"], &["fd00::/64", "10.1.0.0/24", "fd01::/64"], &["10.1.0.0/24", ""]] {
            assert!(parse_subnets(bad.iter().copied()).is_err(), "{bad:?}");
        }
    }
}
