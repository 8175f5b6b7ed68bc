//! Which hosts serve a registry's name: containerd's `certs.d/<registry>/hosts.toml`, read at each pull, and the registry itself.

use super::error::ImageError;
use reqwest::Url;
use std::path::Path;

/// One place to ask.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// Up to and with `/v2`, without a slash at the end.
    pub(super) base: Url,
    pub(super) skip_verify: bool,
    pub(super) pull: bool,
    pub(super) resolve: bool,
    /// The registry's name where the host is a mirror of it: sent as `ns=`.
    pub(super) namespace: Option<String>,
}

/// Hosts for the registry, in the order they are asked.
pub(super) fn hosts_for(config_dir: &Path, registry: &str) -> Result<Vec<Host>, ImageError> {
    // containerd writes the port's colon as underscores where a file system minds it.
    let candidates = [registry.to_owned(), registry.replace(':', "_") + "_", "_default".to_owned()];
    for name in candidates {
        let path = config_dir.join(name).join("hosts.toml");
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                return parse(&text, registry)
                    .map_err(|cause| ImageError::Io(format!("read registry configuration {}: {cause}", path.display())));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(ImageError::io(format!("read registry configuration {}", path.display()), e)),
        }
    }
    Ok(vec![upstream(registry)?])
}

/// The registry itself.
fn upstream(registry: &str) -> Result<Host, ImageError> {
    let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
    let scheme = if is_loopback(host) { "http" } else { "https" };
    let base = Url::parse(&format!("{scheme}://{host}/v2"))
        .map_err(|e| ImageError::InvalidReference { reference: registry.to_owned(), cause: e.to_string() })?;
    Ok(Host { base, skip_verify: false, pull: true, resolve: true, namespace: None })
}

/// Such a host is spoken to without TLS unless configured otherwise.
pub(super) fn is_loopback(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.starts_with("::1]");
    }
    let name = host.split(':').next().unwrap_or(host);
    name == "localhost" || name.parse::<std::net::Ipv4Addr>().is_ok_and(|a| a.is_loopback())
}

fn parse(text: &str, registry: &str) -> Result<Vec<Host>, String> {
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| e.message().to_owned())?;
    let mut hosts = Vec::new();
    if let Some(entries) = table.get("host") {
        let entries = entries.as_table().ok_or("host is not a table")?;
        // The order of the file decides, and a TOML table does not keep it.
        let mut named: Vec<(&String, &toml::Value)> = entries.iter().collect();
        named.sort_by_key(|(url, _)| position(text, url));
        for (url, value) in named {
            hosts.push(host(url, value.as_table().ok_or("a host entry is not a table")?, registry)?);
        }
    }
    hosts.push(match table.get("server") {
        Some(server) => host(server.as_str().ok_or("server is not a string")?, &table, registry)?,
        None => upstream(registry).map_err(|e| e.to_string())?,
    });
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

fn host(url: &str, table: &toml::Table, registry: &str) -> Result<Host, String> {
    let full = match url.split_once("://") {
        Some(_) => url.to_owned(),
        None if is_loopback(url) => format!("http://{url}"),
        None => format!("https://{url}"),
    };
    let mut base = Url::parse(&full).map_err(|e| format!("host {url:?}: {e}"))?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
        return Err(format!("host {url:?}: is not an http or https URL"));
    }
    let flag = |key: &str| table.get(key).and_then(toml::Value::as_bool).unwrap_or(false);
    let path = base.path().trim_end_matches('/').to_owned();
    if !flag("override_path") && !path.ends_with("/v2") {
        base.set_path(&format!("{path}/v2"));
    } else {
        base.set_path(&path);
    }
    let capabilities = table.get("capabilities").and_then(toml::Value::as_array);
    let can = |what: &str| capabilities.is_none_or(|c| c.iter().any(|v| v.as_str() == Some(what)));
    let own = upstream(registry).is_ok_and(|u| u.base.host_str() == base.host_str() && u.base.port() == base.port());
    Ok(Host {
        skip_verify: flag("skip_verify"),
        pull: can("pull"),
        resolve: can("resolve"),
        namespace: (!own).then(|| registry.to_owned()),
        base,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_toml_order_capabilities_and_fallback() {
        let text = "server = \"https://up.example\"\n[host.\"http://z.example:5000\"]\ncapabilities = [\"pull\"]\n\
                    [host.\"https://a.example/mirror\"]\nskip_verify = true\n[host.\"https://b.example/raw\"]\noverride_path = true\n";
        let hosts = parse(text, "docker.io").unwrap();
        let bases: Vec<&str> = hosts.iter().map(|h| h.base.as_str()).collect();
        assert_eq!(
            bases,
            ["http://z.example:5000/v2", "https://a.example/mirror/v2", "https://b.example/raw", "https://up.example/v2"]
        );
        assert!(hosts[0].pull && !hosts[0].resolve);
        assert!(hosts[1].resolve && hosts[1].skip_verify && hosts[1].namespace.as_deref() == Some("docker.io"));
        assert!(parse("host = 3", "docker.io").is_err());
    }

    #[test]
    fn without_configuration_the_registry_itself() {
        let dir = tempfile::tempdir().unwrap();
        for (registry, base) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("q.example:443", "https://q.example/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000/v2"),
            ("[::1]:5000", "http://[::1]:5000/v2"),
        ] {
            assert_eq!(hosts_for(dir.path(), registry).unwrap()[0].base.as_str(), base);
        }
        std::fs::create_dir(dir.path().join("_default")).unwrap();
        std::fs::write(dir.path().join("_default/hosts.toml"), "[host.\"http://127.0.0.1:1\"]").unwrap();
        assert_eq!(hosts_for(dir.path(), "docker.io").unwrap().len(), 2);
    }
}
