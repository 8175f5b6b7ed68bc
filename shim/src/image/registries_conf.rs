//! `registries.conf` and the files of `registries.conf.d` (containers-registries.conf(5), version 2): where the images of a prefix come
//! from, which registries are blocked, and what short names mean. Read at each use.

use super::error::ImageError;
use super::reference::Reference;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct RegistriesConf {
    unqualified_search_registries: Option<Vec<String>>,
    #[serde(default)]
    registry: Vec<Registry>,
    #[serde(default)]
    aliases: BTreeMap<String, String>,
    /// Version 1 of the format, which is not read.
    registries: Option<toml::Table>,
    #[serde(skip)]
    file: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Registry {
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror_by_digest_only: bool,
    #[serde(default)]
    mirror: Vec<Mirror>,
    #[serde(skip)]
    file: PathBuf,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Mirror {
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    pull_from_mirror: PullFrom,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PullFrom {
    #[default]
    All,
    DigestOnly,
    TagOnly,
}

/// One place to ask: a host and the repository there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// With its port.
    pub(super) host: String,
    pub(super) repository: String,
    pub(super) insecure: bool,
    /// Not the registry that the name says.
    pub(super) mirror: bool,
    /// Whether names are asked for by tag, and by digest.
    pub(super) tags: bool,
    pub(super) digests: bool,
}

impl RegistriesConf {
    /// Reads the file and those beside it. What is not there is empty.
    pub(super) fn load(path: &Path) -> Result<RegistriesConf, ImageError> {
        let mut whole = read(path)?.unwrap_or_default();
        let mut directory = path.as_os_str().to_owned();
        directory.push(".d");
        let mut more: Vec<PathBuf> = match std::fs::read_dir(&directory) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(ImageError::io(format!("read {}", Path::new(&directory).display()), e)),
            Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        };
        more.retain(|path| path.extension().is_some_and(|extension| extension == "conf"));
        more.sort();
        for path in more {
            if let Some(part) = read(&path)? {
                whole.merge(part);
            }
        }
        Ok(whole)
    }

    /// A later file goes over an earlier one: its list of registries to search, its aliases, its registries of the same prefix.
    fn merge(&mut self, other: RegistriesConf) {
        if other.unqualified_search_registries.is_some() {
            self.unqualified_search_registries = other.unqualified_search_registries;
            self.file = other.file;
        }
        self.aliases.extend(other.aliases);
        for registry in other.registry {
            self.registry.retain(|own| own.prefix() != registry.prefix());
            self.registry.push(registry);
        }
    }

    /// What a name may mean, in the order it is tried. Only a name without a registry can mean anything but itself.
    pub(super) fn meanings(&self, name: &str) -> Result<Vec<Reference>, ImageError> {
        let whole: Reference = name.parse()?;
        let end = name.find(['@', ':']).unwrap_or(name.len());
        let (bare, rest) = name.split_at(end);
        let first = name.split('/').next().unwrap_or_default();
        let short = !(name.contains('/') && (first.contains(['.', ':']) || first == "localhost"));
        if !short || whole.registry() != "docker.io" {
            return Ok(vec![whole]);
        }
        if let Some(alias) = self.aliases.get(bare).filter(|alias| !alias.is_empty()) {
            return Ok(vec![format!("{alias}{rest}").parse()?]);
        }
        match &self.unqualified_search_registries {
            Some(registries) if !registries.is_empty() => {
                registries.iter().map(|registry| format!("{registry}/{name}").parse()).collect()
            }
            _ => Ok(vec![whole]),
        }
    }

    /// Where to ask for a repository, mirrors first; `None` if nothing is said of it. Errors: it is blocked.
    pub(super) fn places(&self, reference: &Reference) -> Result<Option<Vec<Place>>, ImageError> {
        let name = reference.name();
        let matching = self.registry.iter().filter_map(|registry| Some((registry.matched(&name)?, registry)));
        let Some((matched, registry)) = matching.max_by_key(|(matched, _)| *matched) else { return Ok(None) };
        if registry.blocked {
            let (prefix, file) = (registry.prefix(), registry.file.display());
            return Err(ImageError::Unauthorized(format!("{name}: registry {prefix} is blocked by {file}")));
        }
        let rest = name.get(matched..).unwrap_or_default();
        let place = |location: &str, insecure, mirror, from: PullFrom| {
            let full = format!("{location}{rest}");
            let (host, repository) = full.split_once('/').ok_or_else(|| {
                ImageError::Io(format!(
                    "{}: location {location:?} of {} names no repository",
                    registry.file.display(),
                    registry.prefix()
                ))
            })?;
            let (host, repository) = (host.to_owned(), repository.to_owned());
            let (tags, digests) = (from != PullFrom::DigestOnly, from != PullFrom::TagOnly);
            Ok(Place { host, repository, insecure, mirror, tags, digests })
        };
        let mut places = Vec::new();
        for mirror in &registry.mirror {
            let from = if registry.mirror_by_digest_only { PullFrom::DigestOnly } else { mirror.pull_from_mirror };
            places.push(place(mirror.location.trim_end_matches('/'), mirror.insecure, true, from)?);
        }
        let own = match registry.location.trim_end_matches('/') {
            "" => name.get(..matched).unwrap_or_default(),
            location => location,
        };
        places.push(place(own, registry.insecure, !name.starts_with(own), PullFrom::All)?);
        Ok(Some(places))
    }
}

impl Registry {
    fn prefix(&self) -> &str {
        if self.prefix.is_empty() { &self.location } else { &self.prefix }
    }

    /// How many bytes of the name the prefix takes.
    fn matched(&self, name: &str) -> Option<usize> {
        let prefix = self.prefix().trim_end_matches('/');
        if let Some(domain) = prefix.strip_prefix('*') {
            let host = name.split('/').next().unwrap_or_default();
            return host.ends_with(domain).then_some(host.len());
        }
        let rest = name.strip_prefix(prefix)?;
        (!prefix.is_empty() && (rest.is_empty() || rest.starts_with('/'))).then_some(prefix.len())
    }
}

fn read(path: &Path) -> Result<Option<RegistriesConf>, ImageError> {
    let failed = |cause: String| ImageError::Io(format!("registry configuration {}: {cause}", path.display()));
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| failed(e.to_string()))?,
    };
    let mut conf: RegistriesConf = toml::from_str(&text).map_err(|e| failed(e.to_string()))?;
    if conf.registries.is_some() {
        return Err(failed("[registries] is version 1 of the format; write [[registry]] tables".into()));
    }
    conf.file = path.to_owned();
    for registry in &mut conf.registry {
        if registry.prefix().is_empty() {
            return Err(failed("a [[registry]] has neither prefix nor location".into()));
        }
        if registry.mirror.iter().any(|mirror| mirror.location.is_empty()) {
            return Err(failed(format!("a mirror of {} has no location", registry.prefix())));
        }
        registry.file = path.to_owned();
    }
    Ok(Some(conf))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn conf(main: &str, more: &[(&str, &str)]) -> Result<RegistriesConf, ImageError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("registries.conf");
        fs::write(&path, main).unwrap();
        fs::create_dir(directory.path().join("registries.conf.d")).unwrap();
        for (name, text) in more {
            fs::write(directory.path().join("registries.conf.d").join(name), text).unwrap();
        }
        RegistriesConf::load(&path)
    }

    fn shown(conf: &RegistriesConf, name: &str) -> Vec<String> {
        let places = conf.places(&name.parse().unwrap()).unwrap().unwrap_or_default();
        let show = |place: Place| {
            let flags = [(place.insecure, "i"), (place.mirror, "m"), (place.tags, "t"), (place.digests, "d")];
            let flags: String = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| *flag).collect();
            format!("{}/{} {flags}", place.host, place.repository)
        };
        places.into_iter().map(show).collect()
    }

    #[test]
    fn prefixes_locations_and_mirrors() {
        let conf = conf(
            "[[registry]]\nprefix = \"docker.io\"\nlocation = \"hub.example/proxy\"\n\
             [[registry.mirror]]\nlocation = \"m1.example:5000/x\"\ninsecure = true\npull-from-mirror = \"tag-only\"\n\
             [[registry]]\nlocation = \"docker.io/library/nginx\"\nmirror-by-digest-only = true\n\
             [[registry.mirror]]\nlocation = \"m2.example/nginx\"\n\
             [[registry]]\nprefix = \"*.corp.example\"\nlocation = \"cache.example\"\ninsecure = true\n\
             [[registry]]\nlocation = \"bad.example\"\nblocked = true\n",
            &[
                ("10.conf", "[[registry]]\nlocation = \"later.example\"\ninsecure = true\n"),
                ("20.conf", "[[registry]]\nlocation = \"later.example\"\n"),
                ("30.txt", "nonsense ["),
            ],
        )
        .unwrap();
        assert_eq!(shown(&conf, "busybox"), ["m1.example:5000/x/library/busybox imt", "hub.example/proxy/library/busybox mtd"]);
        assert_eq!(shown(&conf, "nginx"), ["m2.example/nginx md", "docker.io/library/nginx td"]);
        assert_eq!(shown(&conf, "nginx2")[1], "hub.example/proxy/library/nginx2 mtd");
        assert_eq!(shown(&conf, "a.b.corp.example/team/app:1"), ["cache.example/team/app imtd"]);
        assert_eq!(shown(&conf, "later.example/x"), ["later.example/x td"]);
        assert!(shown(&conf, "other.example/x").is_empty());
        let error = conf.places(&"bad.example/x".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("bad.example is blocked by") && error.ends_with("registries.conf"), "{error}");
    }

    #[test]
    fn short_names() {
        let meanings = |conf: &RegistriesConf, name: &str| -> Vec<String> {
            conf.meanings(name).unwrap().iter().map(ToString::to_string).collect()
        };
        let none = RegistriesConf::default();
        assert_eq!(meanings(&none, "busybox"), ["docker.io/library/busybox:latest"]);
        let conf = conf(
            "unqualified-search-registries = [\"a.example\"]\n[aliases]\nfedora = \"reg.example/fedora/fedora\"\n",
            &[(
                "1.conf",
                "unqualified-search-registries = [\"b.example\", \"docker.io\"]\n[aliases]\n\"team/app\" = \"c.example/app\"\n",
            )],
        )
        .unwrap();
        assert_eq!(meanings(&conf, "fedora:40"), ["reg.example/fedora/fedora:40"]);
        assert_eq!(meanings(&conf, "team/app"), ["c.example/app:latest"]);
        assert_eq!(meanings(&conf, "busybox:1"), ["b.example/busybox:1", "docker.io/library/busybox:1"]);
        for whole in ["docker.io/library/fedora:1", "localhost/fedora:1", "localhost:5000/fedora:1", "reg.example/x:1"] {
            assert_eq!(meanings(&conf, whole), [whole]);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, why) in [
            ("[[registry]]\ninsecure = true\n", "neither prefix nor location"),
            ("[[registry]]\nlocation = \"a\"\n[[registry.mirror]]\n", "mirror of a has no location"),
            ("[[registry]]\nlocation = 3\n", "location"),
            ("[registries.search]\nregistries = []\n", "version 1"),
            ("[[registry]]\nlocation = \"a\"\n[[registry.mirror]]\nlocation = \"b\"\npull-from-mirror = \"never\"\n", "never"),
        ] {
            let error = conf(text, &[]).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("registries.conf"), "{error}");
        }
    }
}
