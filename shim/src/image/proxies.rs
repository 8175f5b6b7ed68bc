//! Proxies by the environment, with the rules of Go's net/http, which the environment of a node is written for: `HTTP_PROXY`,
//! `HTTPS_PROXY` and `NO_PROXY`, in capitals first; loopback is never asked by way of a proxy.

use super::error::ImageError;
use reqwest::Url;
use std::net::IpAddr;

/// What the environment says.
#[derive(Debug, Default, Clone)]
pub(super) struct Proxies {
    http: Option<Way>,
    https: Option<Way>,
    exempt: Vec<Exempt>,
}

/// One proxy, or why the variable names none.
#[derive(Debug, Clone)]
struct Way {
    url: Result<Url, String>,
    variable: String,
}

/// One word of `NO_PROXY`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exempt {
    All,
    /// Address and length of a prefix in bits.
    Network(IpAddr, u32),
    Address(IpAddr, Option<u16>),
    /// A name with a dot before it, its port, and whether the name itself counts besides what ends with it.
    Domain(String, Option<u16>, bool),
}

impl Proxies {
    /// Those of this process.
    pub(super) fn of_environment() -> Proxies {
        Proxies::new(|name| std::env::var(name).ok())
    }

    fn new(variable: impl Fn(&str) -> Option<String>) -> Proxies {
        let first = |name: &str| {
            let named = [name.to_owned(), name.to_ascii_lowercase()];
            named.into_iter().find_map(|name| Some((variable(&name).filter(|text| !text.is_empty())?, name)))
        };
        let way = |name: &str| first(name).map(|(text, variable)| Way { url: parse(&text), variable });
        let exempt = first("NO_PROXY").map(|(text, _)| text.split(',').filter_map(exempt).collect()).unwrap_or_default();
        Proxies { http: way("HTTP_PROXY"), https: way("HTTPS_PROXY"), exempt }
    }

    /// By way of which proxy a URL is asked for.
    ///
    /// # Errors
    /// The variable that says it names no proxy.
    pub(super) fn of(&self, url: &Url) -> Result<Option<&Url>, ImageError> {
        let way = if url.scheme() == "https" { &self.https } else { &self.http };
        match way {
            Some(way) if !self.is_exempt(url) => match &way.url {
                Ok(proxy) => Ok(Some(proxy)),
                Err(cause) => Err(ImageError::Io(format!("{}: {cause}", way.variable))),
            },
            _ => Ok(None),
        }
    }

    fn is_exempt(&self, url: &Url) -> bool {
        let Some(host) = url.host_str() else { return true };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
        let address: Option<IpAddr> = host.parse().ok();
        if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
            return true;
        }
        let port = url.port_or_known_default();
        self.exempt.iter().any(|one| one.matches(&host, port, address))
    }
}

impl Exempt {
    fn matches(&self, host: &str, port: Option<u16>, address: Option<IpAddr>) -> bool {
        let at = |wanted: &Option<u16>| wanted.is_none() || *wanted == port;
        match self {
            Exempt::All => true,
            Exempt::Network(network, bits) => {
                address.is_some_and(|address| first_bits(address, *bits) == first_bits(*network, *bits))
            }
            Exempt::Address(one, wanted) => address == Some(*one) && at(wanted),
            Exempt::Domain(name, wanted, itself) => {
                (host.ends_with(name.as_str()) || (*itself && Some(host) == name.get(1..))) && at(wanted)
            }
        }
    }
}

/// The prefix of an address, with its family.
fn first_bits(address: IpAddr, bits: u32) -> (bool, u128) {
    let (value, width) = match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()), 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    };
    (address.is_ipv4(), value.checked_shr(width - bits.min(width)).unwrap_or(0))
}

/// A URL; without a scheme that of an http proxy.
fn parse(text: &str) -> Result<Url, String> {
    let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
    // Go leaves names to either kind of SOCKS proxy.
    let full = full.strip_prefix("socks5://").map_or_else(|| full.clone(), |rest| format!("socks5h://{rest}"));
    let url: Url = full.parse().map_err(|error| format!("is no proxy's address: {error}"))?;
    match url.scheme() {
        "http" | "https" | "socks5h" if url.host_str().is_some_and(|host| !host.is_empty()) => Ok(url),
        "http" | "https" | "socks5h" => Err("names no host".into()),
        other => Err(format!("a proxy of the kind {other:?} is not known")),
    }
}

fn exempt(word: &str) -> Option<Exempt> {
    let word = word.trim().to_ascii_lowercase();
    if word.is_empty() {
        return None;
    }
    if word == "*" {
        return Some(Exempt::All);
    }
    if let Some((network, bits)) = word.split_once('/')
        && let (Ok(network), Ok(bits)) = (network.parse(), bits.parse())
    {
        return Some(Exempt::Network(network, bits));
    }
    // An IPv6 address has colons of its own.
    let (host, port) = match word.rsplit_once(':') {
        Some((host, port)) if host.starts_with('[') || !host.contains(':') => (host, Some(port.parse().ok()?)),
        _ => (word.as_str(), None),
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = host.parse() {
        return Some(Exempt::Address(address, port));
    }
    let name = host.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(host);
    match name.strip_prefix('.') {
        Some("") => None,
        Some(_) => Some(Exempt::Domain(name.to_owned(), port, false)),
        None if name.is_empty() => None,
        None => Some(Exempt::Domain(format!(".{name}"), port, true)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Proxies {
        Proxies::new(|name| variables.iter().find(|(found, _)| *found == name).map(|(_, value)| (*value).to_owned()))
    }

    fn way(proxies: &Proxies, url: &str) -> String {
        let found = proxies.of(&url.parse().expect("a URL")).map(|proxy| proxy.map(Url::to_string));
        found.map_or_else(|error| error.to_string(), Option::unwrap_or_default)
    }

    #[test]
    fn which_variable_counts() {
        let both =
            [("HTTP_PROXY", "http://p:1"), ("HTTPS_PROXY", "q:2"), ("http_proxy", "http://x:3"), ("ALL_PROXY", "http://y:4")];
        for (variables, url, expected) in [
            (&both[..], "http://a.example/", "http://p:1/"),
            (&both[..], "https://a.example/", "http://q:2/"),
            (&both[2..], "http://a.example/", "http://x:3/"),
            (&both[2..], "https://a.example/", ""),
            (&[("https_proxy", "https://u:w@q:2")], "https://a.example/", "https://u:w@q:2/"),
            (&[("https_proxy", "socks5://q:2")], "https://a.example/", "socks5h://q:2"),
            (&[("HTTPS_PROXY", ""), ("https_proxy", "q:2")], "https://a.example/", "http://q:2/"),
            (&[("HTTPS_PROXY", "ftp://q")], "https://a.example/", "HTTPS_PROXY: a proxy of the kind \"ftp\" is not known"),
            (&[("HTTPS_PROXY", "ftp://q")], "https://127.0.0.1/", ""),
            (&[], "https://a.example/", ""),
        ] {
            assert_eq!(way(&proxies(variables), url), expected, "{variables:?} {url}");
        }
    }

    #[test]
    fn who_is_exempt() {
        for (words, exempt, not) in [
            (
                "",
                &["http://localhost:5000", "http://127.9.9.9", "https://[::1]:5000"][..],
                &["http://a.example", "http://10.0.0.1"][..],
            ),
            ("a.example", &["http://a.example", "https://deep.a.example:5000"], &["http://ba.example", "http://example"]),
            (".a.example", &["http://x.a.example"], &["http://a.example"]),
            ("*.a.example", &["http://x.a.example"], &["http://a.example"]),
            (
                "A.Example:5000 , b.example",
                &["http://A.example:5000", "http://b.example:1"],
                &["http://a.example:5001", "http://a.example"],
            ),
            ("a.example:443", &["https://a.example"], &["http://a.example"]),
            (
                "10.0.0.0/8,fd00::/8",
                &["http://10.1.2.3:5000", "http://[fd12::1]"],
                &["http://11.1.2.3", "http://[fe80::1]", "http://10.a"],
            ),
            (
                "10.0.0.1, [fd00::1]:5000",
                &["http://10.0.0.1:99", "http://[fd00::1]:5000"],
                &["http://10.0.0.2", "http://[fd00::1]:5001"],
            ),
            ("fd00::1", &["http://[fd00::1]:5000"], &["http://[fd00::2]"]),
            ("0.0.0.0/0", &["http://10.0.0.1"], &["http://[fd00::1]", "http://a.example"]),
            ("*", &["http://a.example", "http://10.0.0.1"], &[]),
            (" , :80, *., a.example", &["http://a.example"], &["http://b.example", "http://10.0.0.1"]),
        ] {
            let proxies = proxies(&[("http_proxy", "p:1"), ("https_proxy", "p:1"), ("no_proxy", words)]);
            for url in exempt {
                assert_eq!(way(&proxies, url), "", "{words:?} exempts {url}");
            }
            for url in not {
                assert_eq!(way(&proxies, url), "http://p:1/", "{words:?} does not exempt {url}");
            }
        }
    }
}
