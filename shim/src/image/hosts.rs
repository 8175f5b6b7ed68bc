//! Which hosts serve a registry's name. containerd's `certs.d/<registry>/hosts.toml` says it first, then `registries.conf`, then
//! `certs.d/_default/hosts.toml`; else the registry itself does. All are read at each pull.

use super::credentials::Credentials;
use super::error::ImageError;
use super::reference::Reference;
use super::registries_conf::{Place, RegistriesConf};
use super::tls::Transport;
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The directory for registries that have none.
const DEFAULT: &str = "_default";

/// Where it is written how registries are reached.
#[derive(Debug, Clone)]
pub struct RegistryFiles {
    /// containerd's `certs.d`, or several with colons between them, of which the first goes over the others; they need not exist.
    pub hosts: PathBuf,
    /// `registries.conf`, whose `.d` lies beside it; it need not exist.
    pub registries_conf: PathBuf,
    /// Credentials for pulls that bring none, and for mirrors; it need not exist.
    pub auth_file: PathBuf,
}

impl RegistryFiles {
    /// The directories of `hosts`.
    pub(super) fn directories(&self) -> impl Iterator<Item = PathBuf> {
        std::env::split_paths(&self.hosts).filter(|path| !path.as_os_str().is_empty())
    }

    /// `registries.conf` as it is now.
    pub(super) fn conf(&self) -> Result<RegistriesConf, ImageError> {
        RegistriesConf::load(&self.registries_conf)
    }

    /// The credentials as they are now.
    pub(super) fn credentials(&self) -> Result<Credentials, ImageError> {
        Credentials::load(&self.auth_file)
    }
}

/// One place to ask.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// Up to and with `/v2`, without a slash at the end.
    pub(super) base: Url,
    pub(super) transport: Transport,
    /// Sent with every request.
    pub(super) headers: HeaderMap,
    /// Asked for blobs and by digest.
    pub(super) pull: bool,
    /// Asked for tags.
    pub(super) resolve: bool,
    /// Not the registry itself, whose credentials it never gets.
    pub(super) mirror: bool,
    /// The registry's name where the host is to be told it: sent as `ns=`.
    pub(super) namespace: Option<String>,
    /// Where the repository has another name there.
    pub(super) repository: Option<String>,
}

/// Hosts for an image, in the order they are asked.
pub(super) fn hosts_for(files: &RegistryFiles, reference: &Reference) -> Result<Vec<Host>, ImageError> {
    let registry = reference.registry();
    // containerd writes the port's colon as underscores where a file system minds it.
    let names = [registry.to_owned(), registry.replace(':', "_") + "_"];
    if let Some(hosts) = from_first(files, &names, registry)? {
        return Ok(hosts);
    }
    if let Some(places) = files.conf()?.places(reference)? {
        return places
            .into_iter()
            .map(|place| from_place(place, registry))
            .collect::<Result<Vec<_>, _>>()
            .map(|all| all.concat());
    }
    match from_first(files, &[DEFAULT.to_owned()], registry)? {
        Some(hosts) => Ok(hosts),
        None => Ok(vec![upstream(registry)?]),
    }
}

/// What the first of the directories says that has anything of one of these names.
fn from_first(files: &RegistryFiles, names: &[String], registry: &str) -> Result<Option<Vec<Host>>, ImageError> {
    for directory in files.directories() {
        for name in names {
            if let Some(hosts) = from_directory(&directory.join(name), registry)? {
                return Ok(Some(hosts));
            }
        }
    }
    Ok(None)
}

/// What a directory of `certs.d` says: its hosts.toml, else docker's certificates for the registry itself (`*.crt`, `*.cert` with `*.key`).
fn from_directory(directory: &Path, registry: &str) -> Result<Option<Vec<Host>>, ImageError> {
    let path = directory.join("hosts.toml");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let parsed = parse(&text, registry, directory);
            return parsed.map(Some).map_err(|e| e.within(format!("registry configuration {}", path.display())));
        }
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {}
        Err(e) => return Err(ImageError::io(format!("read registry configuration {}", path.display()), e)),
    }
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    let mut host = upstream(registry)?;
    let ends = |path: &Path, with: &str| path.extension().is_some_and(|extension| extension == with);
    for file in files.iter().filter(|file| ends(file, "crt")) {
        host.transport.trust(file)?;
    }
    for file in files.iter().filter(|file| ends(file, "cert")) {
        let key = file.with_extension("key");
        host.transport.prove(file, key.exists().then_some(key.as_path()))?;
    }
    if host.transport == Transport::default() {
        return Ok(None);
    }
    // A certificate says that it speaks TLS, on loopback too.
    host.base = base(registry, "https")?;
    Ok(Some(vec![host]))
}

/// The hosts of one line of `registries.conf`. An insecure one is asked over TLS with whatever certificate, then without.
fn from_place(place: Place, registry: &str) -> Result<Vec<Host>, ImageError> {
    let mut host = upstream(&place.host)?;
    host.pull = place.digests;
    host.resolve = place.tags;
    host.mirror = place.mirror && place.host != registry;
    host.repository = Some(place.repository);
    if !place.insecure || host.base.scheme() == "http" {
        return Ok(vec![host]);
    }
    host.transport.skip_verify = true;
    let mut plain = host.clone();
    plain.base.set_scheme("http").map_err(|()| ImageError::Io(format!("{}: no http address", place.host)))?;
    Ok(vec![host, plain])
}

/// The registry itself.
fn upstream(registry: &str) -> Result<Host, ImageError> {
    let base = base(registry, if is_loopback(registry) { "http" } else { "https" })?;
    let (transport, headers) = (Transport::default(), HeaderMap::new());
    Ok(Host { base, transport, headers, pull: true, resolve: true, mirror: false, namespace: None, repository: None })
}

fn base(registry: &str, scheme: &str) -> Result<Url, ImageError> {
    let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    Url::parse(&format!("{scheme}://{host}/v2"))
        .map_err(|e| ImageError::InvalidReference { reference: registry.to_owned(), cause: e.to_string() })
}

/// Such a host is spoken to without TLS unless configured otherwise.
pub(super) fn is_loopback(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.starts_with("::1]");
    }
    let name = host.split(':').next().unwrap_or(host);
    name == "localhost" || name.parse::<std::net::Ipv4Addr>().is_ok_and(|a| a.is_loopback())
}

fn parse(text: &str, registry: &str, directory: &Path) -> Result<Vec<Host>, ImageError> {
    let wrong = |cause: String| ImageError::Io(cause);
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| wrong(e.message().to_owned()))?;
    let mut hosts = Vec::new();
    if let Some(entries) = table.get("host") {
        let entries = entries.as_table().ok_or_else(|| wrong("host is not a table".into()))?;
        // The order of the file decides, and a TOML table does not keep it.
        let mut named: Vec<(&String, &toml::Value)> = entries.iter().collect();
        named.sort_by_key(|(url, _)| position(text, url));
        for (url, value) in named {
            let value = value.as_table().ok_or_else(|| wrong(format!("host {url:?} is not a table")))?;
            hosts.push(host(url, value, registry, directory).map_err(|e| e.within(format!("host {url:?}")))?);
        }
    }
    let server = match table.get("server") {
        Some(server) => server.as_str().ok_or_else(|| wrong("server is not a string".into()))?.to_owned(),
        None => upstream(registry)?.base.to_string(),
    };
    // Whoever writes this for one registry says where it itself is.
    let last = host(&server, &table, registry, directory).map_err(|e| e.within("server"))?;
    hosts.push(Host { mirror: last.mirror && directory.ends_with(DEFAULT), ..last });
    Ok(hosts)
}

fn position(text: &str, url: &str) -> usize {
    let header = [format!("\"{url}\""), format!("'{url}'")];
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if line.trim_start().starts_with('[') && header.iter().any(|h| line.contains(h)) {
            return at;
        }
        at += line.len();
    }
    usize::MAX
}

fn host(url: &str, table: &toml::Table, registry: &str, directory: &Path) -> Result<Host, ImageError> {
    let wrong = |cause: String| ImageError::Io(cause);
    let full = match url.split_once("://") {
        Some(_) => url.to_owned(),
        None if is_loopback(url) => format!("http://{url}"),
        None => format!("https://{url}"),
    };
    let mut base = Url::parse(&full).map_err(|e| wrong(e.to_string()))?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
        return Err(wrong("is not an http or https URL".into()));
    }
    let path = base.path().trim_end_matches('/').to_owned();
    if !flag(table, "override_path")? && !path.ends_with("/v2") {
        base.set_path(&format!("{path}/v2"));
    } else {
        base.set_path(&path);
    }
    let capabilities = table.get("capabilities").map(|value| strings("capabilities", value)).transpose()?;
    let can = |what: &str| capabilities.as_ref().is_none_or(|all| all.iter().any(|one| one == what));
    let own = upstream(registry).is_ok_and(|u| u.base.host_str() == base.host_str() && u.base.port() == base.port());
    Ok(Host {
        transport: transport(table, directory)?,
        headers: headers(table)?,
        pull: can("pull"),
        resolve: can("resolve"),
        mirror: !own,
        namespace: (!own).then(|| registry.to_owned()),
        repository: None,
        base,
    })
}

/// `skip_verify`, `ca`, `client` and `dial_timeout`; paths are relative to the file.
fn transport(table: &toml::Table, directory: &Path) -> Result<Transport, ImageError> {
    let mut transport = Transport { skip_verify: flag(table, "skip_verify")?, ..Transport::default() };
    if let Some(value) = table.get("ca") {
        for path in strings("ca", value)? {
            transport.trust(&directory.join(path))?;
        }
    }
    // A file with both, a list of such, or a list of pairs.
    let single = |path: &str| (directory.join(path), None);
    let clients: Vec<(PathBuf, Option<PathBuf>)> = match table.get("client") {
        None => Vec::new(),
        Some(toml::Value::Array(all)) if all.iter().any(toml::Value::is_array) => {
            let pair = |value: &toml::Value| match strings("client", value)?.as_slice() {
                [both] => Ok(single(both)),
                [certificate, key] if key.is_empty() => Ok(single(certificate)),
                [certificate, key] => Ok((directory.join(certificate), Some(directory.join(key)))),
                other => Err(ImageError::Io(format!("client: a pair of {} files", other.len()))),
            };
            all.iter().map(pair).collect::<Result<_, _>>()?
        }
        Some(value) => strings("client", value)?.iter().map(|path| single(path)).collect(),
    };
    for (certificate, key) in clients {
        transport.prove(&certificate, key.as_deref())?;
    }
    if let Some(value) = table.get("dial_timeout") {
        let text = value.as_str().unwrap_or_default();
        let seconds =
            duration(text).ok_or_else(|| ImageError::Io(format!("dial_timeout {value} is not a time such as \"3s\"")))?;
        transport.dial_timeout = Some(seconds);
    }
    Ok(transport)
}

fn headers(table: &toml::Table) -> Result<HeaderMap, ImageError> {
    let mut headers = HeaderMap::new();
    let Some(value) = table.get("header") else { return Ok(headers) };
    let value = value.as_table().ok_or_else(|| ImageError::Io("header is not a table".into()))?;
    for (name, value) in value {
        let wrong = |cause: String| ImageError::Io(format!("header {name:?}: {cause}"));
        let key: HeaderName = name.parse().map_err(|e| wrong(format!("{e}")))?;
        for text in strings("header", value)? {
            headers.append(key.clone(), HeaderValue::from_str(&text).map_err(|e| wrong(e.to_string()))?);
        }
    }
    Ok(headers)
}

fn flag(table: &toml::Table, key: &str) -> Result<bool, ImageError> {
    match table.get(key) {
        None => Ok(false),
        Some(value) => value.as_bool().ok_or_else(|| ImageError::Io(format!("{key} is not true or false"))),
    }
}

/// One string or a list of them.
fn strings(key: &str, value: &toml::Value) -> Result<Vec<String>, ImageError> {
    let wrong = || ImageError::Io(format!("{key} is not a string or a list of strings"));
    let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    list.iter().map(|one| one.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
}

/// A time as Go writes it, in one unit.
fn duration(text: &str) -> Option<Duration> {
    let end = text.find(|c: char| !c.is_ascii_digit())?;
    let (count, unit) = text.split_at(end);
    let count: u64 = count.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(count)),
        "s" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_secs(count.checked_mul(60)?)),
        "h" => Some(Duration::from_secs(count.checked_mul(3600)?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_toml_order_capabilities_and_fallback() {
        let text = "server = \"https://up.example\"\n[host.\"http://z.example:5000\"]\ncapabilities = [\"pull\"]\n\
                    [host.\"https://a.example/mirror\"]\nskip_verify = true\n[host.\"https://b.example/raw\"]\noverride_path = true\n";
        let hosts = parse(text, "docker.io", Path::new("/")).unwrap();
        let bases: Vec<&str> = hosts.iter().map(|h| h.base.as_str()).collect();
        assert_eq!(
            bases,
            ["http://z.example:5000/v2", "https://a.example/mirror/v2", "https://b.example/raw", "https://up.example/v2"]
        );
        assert!(hosts[0].pull && !hosts[0].resolve);
        let mirrors: Vec<bool> = hosts.iter().map(|host| host.mirror).collect();
        assert_eq!(mirrors, [true, true, true, false], "the server is the registry itself");
        let hosts_of_any = parse(text, "docker.io", Path::new("/certs.d/_default")).unwrap();
        assert!(hosts_of_any[3].mirror, "one server for every registry is none of them");
        assert!(hosts[1].resolve && hosts[1].transport.skip_verify && hosts[1].namespace.as_deref() == Some("docker.io"));
        for (text, why) in [
            ("host = 3", "host is not a table"),
            ("server = 3", "server is not a string"),
            ("[host.\"ftp://x\"]", "not an http"),
            ("[host.\"x\"]\nskip_verify = \"yes\"", "skip_verify is not true or false"),
            ("[host.\"x\"]\nca = \"missing.crt\"", "missing.crt"),
            ("[host.\"x\"]\nca = 1", "ca is not a string"),
            ("[host.\"x\"]\nclient = [[\"a\", \"b\", \"c\"]]", "a pair of 3 files"),
            ("[host.\"x\"]\ndial_timeout = \"soon\"", "dial_timeout"),
            ("[host.\"x\".header]\n\"a b\" = \"c\"", "header"),
        ] {
            let error = parse(text, "docker.io", Path::new("/nowhere")).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    fn files(directory: &Path) -> RegistryFiles {
        let at = |name: &str| directory.join(name);
        RegistryFiles { hosts: at("certs.d"), registries_conf: at("registries.conf"), auth_file: at("auth.json") }
    }

    fn bases(directory: &Path, registry: &str) -> Vec<String> {
        let reference = format!("{registry}/a/b").parse().unwrap();
        hosts_for(&files(directory), &reference).unwrap().iter().map(|host| host.base.to_string()).collect()
    }

    #[test]
    fn the_first_directory_that_has_the_registry_counts() {
        let dir = tempfile::tempdir().unwrap();
        for (name, mirror) in
            [("b/one.example", 1), ("c/one.example", 2), ("c/two.example", 3), ("c/_default", 4), ("b/three.example", 0)]
        {
            let path = dir.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            if mirror > 0 {
                std::fs::write(path.join("hosts.toml"), format!("[host.\"http://127.0.0.1:{mirror}\"]")).unwrap();
            }
        }
        let hosts = std::env::join_paths(["a", "b", "c"].map(|name| dir.path().join(name))).unwrap();
        let files = RegistryFiles { hosts: hosts.into(), ..files(dir.path()) };
        for (registry, mirror) in [("one.example", 1), ("two.example", 3), ("three.example", 4)] {
            let hosts = hosts_for(&files, &format!("{registry}/a").parse().unwrap()).unwrap();
            assert_eq!(hosts[0].base.as_str(), format!("http://127.0.0.1:{mirror}/v2"), "{registry}");
        }
    }

    #[test]
    fn the_nearest_configuration_counts() {
        let dir = tempfile::tempdir().unwrap();
        for (registry, base) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("q.example:443", "https://q.example/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
        ] {
            assert_eq!(bases(dir.path(), registry), [base]);
        }
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("certs.d/_default/hosts.toml", "[host.\"http://127.0.0.1:1\"]");
        assert_eq!(bases(dir.path(), "q.example"), ["http://127.0.0.1:1/v2", "https://q.example/v2"]);
        write("registries.conf", "[[registry]]\nlocation = \"q.example\"\ninsecure = true\n");
        assert_eq!(bases(dir.path(), "q.example"), ["https://q.example/v2", "http://q.example/v2"]);
        assert_eq!(bases(dir.path(), "other.example").len(), 2);
        write("certs.d/localhost:80/ca.crt", "pem");
        assert_eq!(bases(dir.path(), "localhost:80"), ["https://localhost:80/v2"]);
        write("certs.d/q.example/ca.crt", "pem");
        write("certs.d/q.example/client.cert", "certificate");
        write("certs.d/q.example/client.key", "key");
        let hosts = hosts_for(&files(dir.path()), &"q.example/a".parse().unwrap()).unwrap();
        assert_eq!(hosts[0].transport.client.as_deref(), Some(&b"certificate\nkey"[..]));
        assert_eq!((hosts.len(), hosts[0].transport.ca.len()), (1, 1));
        write(
            "certs.d/q.example/hosts.toml",
            "[host.\"m.example\"]\nca = [\"ca.crt\"]\nclient = [[\"client.cert\", \"client.key\"]]\n\
              dial_timeout = \"250ms\"\n[host.\"m.example\".header]\nX-One = \"1\"\nX-Two = [\"2\", \"3\"]\n",
        );
        let hosts = hosts_for(&files(dir.path()), &"q.example/a".parse().unwrap()).unwrap();
        assert_eq!((hosts[0].transport.ca.len(), hosts[0].headers.len(), hosts[0].mirror), (1, 3, true));
        assert_eq!(hosts[0].transport.dial_timeout, Some(Duration::from_millis(250)));
        assert!(!hosts[1].mirror && hosts[1].transport.ca.is_empty());
    }
}
