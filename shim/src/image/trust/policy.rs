//! The policy file: what is required of which images. What is not understood makes the whole file an error, never a weaker policy.

use super::super::reference::Reference;
use super::signature::read_keys;
use base64::Engine as _;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Where images come from: pulls, and imports of the three kinds.
const TRANSPORTS: [&str; 4] = [PULL, DOCKER_ARCHIVE, "oci", "oci-archive"];
const PULL: &str = "docker";
const DOCKER_ARCHIVE: &str = "docker-archive";
/// Most bytes of a policy or key file.
const MAX_FILE_BYTES: u64 = 1 << 20;

#[derive(Debug)]
pub(super) struct Policy {
    default: Vec<Requirement>,
    /// By transport and scope.
    scopes: BTreeMap<(String, String), Vec<Requirement>>,
}

/// All requirements of a scope must hold.
#[derive(Debug)]
pub(super) enum Requirement {
    Accept,
    Reject,
    /// A signature that one of the keys (SubjectPublicKeyInfo, DER) made, for an image of this name.
    Signed {
        keys: Vec<Vec<u8>>,
        identity: Identity,
    },
}

/// Which names a signature may be for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub(super) enum Identity {
    /// The image's name with its tag; with a digest, its repository.
    MatchRepoDigestOrExact,
    /// The image's name with its tag.
    MatchExact,
    /// The image's repository, with any tag or none.
    MatchRepository,
    /// Any name or none: the digest alone says what is signed. Windlass's own, for sigstore bundles, in which cosign names no image.
    MatchDigest,
    /// This name.
    ExactReference { docker_reference: String },
    /// This repository.
    ExactRepository { docker_repository: String },
    /// As `matchRepoDigestOrExact`, with `signedPrefix` in place of `prefix`.
    #[serde(rename = "remapIdentity")]
    Remap { prefix: String, signed_prefix: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    default: Vec<RawRequirement>,
    #[serde(default, deserialize_with = "transports")]
    transports: BTreeMap<String, Scopes>,
}

type Scopes = BTreeMap<String, Vec<RawRequirement>>;

/// The scopes of [`TRANSPORTS`]. Others are no way into the store, and may say what is not understood here.
fn transports<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Scopes>, D::Error> {
    struct Transports;
    impl<'de> Visitor<'de> for Transports {
        type Value = BTreeMap<String, Scopes>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of transports")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut transports = BTreeMap::new();
            while let Some(name) = map.next_key::<String>()? {
                if !TRANSPORTS.contains(&name.as_str()) {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
                let scopes = map.next_value::<Once>().map_err(|error| A::Error::custom(format!("transports.{name}: {error}")))?;
                if transports.insert(name.clone(), scopes.0).is_some() {
                    return Err(A::Error::custom(format!("transports.{name} is there twice")));
                }
            }
            Ok(transports)
        }
    }
    deserializer.deserialize_map(Transports)
}

/// Scopes, each of them once: of two, a reader would see one and the other would hold.
struct Once(Scopes);

impl<'de> Deserialize<'de> for Once {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Once, D::Error> {
        struct AsMap;
        impl<'de> Visitor<'de> for AsMap {
            type Value = Once;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of scopes")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Once, A::Error> {
                let mut scopes = Scopes::new();
                while let Some(scope) = map.next_key::<String>()? {
                    let place = format!("{scope:?}");
                    let requirements = map.next_value().map_err(|error| A::Error::custom(format!("{place}: {error}")))?;
                    if scopes.insert(scope, requirements).is_some() {
                        return Err(A::Error::custom(format!("{place} is there twice")));
                    }
                }
                Ok(Once(scopes))
            }
        }
        deserializer.deserialize_map(AsMap)
    }
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
enum RawRequirement {
    InsecureAcceptAnything,
    Reject,
    SigstoreSigned {
        key_path: Option<String>,
        key_data: Option<String>,
        key_paths: Option<Vec<String>>,
        key_datas: Option<Vec<String>>,
        signed_identity: Option<Identity>,
    },
}

impl Policy {
    pub(super) fn parse(text: &[u8]) -> Result<Policy, String> {
        let raw: Raw = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let default = requirements("default", raw.default)?;
        let mut scopes = BTreeMap::new();
        let all = raw.transports.into_iter();
        let all = all.flat_map(|(transport, scopes)| scopes.into_iter().map(move |(scope, raw)| (transport.clone(), scope, raw)));
        for (transport, scope, raw) in all {
            let place = format!("transports.{transport}.{scope:?}");
            let wildcard = scope.strip_prefix("*.").is_some_and(|domain| !domain.is_empty() && !domain.contains('/'));
            if transport == DOCKER_ARCHIVE && !scope.is_empty() {
                return Err(format!("{place}: the only scope is \"\""));
            }
            if transport == PULL
                && (scope.strip_prefix("*.").unwrap_or(&scope).contains('*') || (scope.starts_with('*') && !wildcard))
            {
                return Err(format!("{place}: a star stands only before the domain of a registry, as in \"*.example.com\""));
            }
            scopes.insert((transport, scope), requirements(&place, raw)?);
        }
        Ok(Policy { default, scopes })
    }

    /// What is required of an image, and the scope that says so: the most specific one.
    pub(super) fn requirements(self, reference: &Reference) -> (String, Vec<Requirement>) {
        self.first(PULL, scopes(reference))
    }

    /// What is required of an image that is imported, and the scope that says so.
    pub(super) fn requirements_of_import(self, from: &Origin) -> (String, Vec<Requirement>) {
        self.first(from.transport, from.scopes())
    }

    fn first(mut self, transport: &str, scopes: Vec<String>) -> (String, Vec<Requirement>) {
        for scope in scopes {
            if let Some(found) = self.scopes.remove(&(transport.to_owned(), scope.clone())) {
                let place = if transport == PULL { format!("{scope:?}") } else { format!("{transport} {scope:?}") };
                return (place, found);
            }
        }
        ("default".into(), self.default)
    }
}

/// Where an image is imported from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Origin {
    /// `docker-archive`, `oci` (a layout in a directory) or `oci-archive` (a layout in an archive).
    pub(in super::super) transport: &'static str,
    /// Without symlinks.
    pub(in super::super) path: PathBuf,
    /// What the layout calls the image.
    pub(in super::super) label: Option<String>,
}

impl Origin {
    /// From the image over its path and directories to the transport itself.
    fn scopes(&self) -> Vec<String> {
        let mut scopes = Vec::new();
        if self.transport != DOCKER_ARCHIVE {
            let path = self.path.to_string_lossy();
            scopes.extend(self.label.as_ref().map(|label| format!("{path}:{label}")));
            scopes.extend(self.path.ancestors().map(|above| above.to_string_lossy().into_owned()));
        }
        scopes.push(String::new());
        scopes
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.transport, self.path.display())?;
        self.label.iter().try_for_each(|label| write!(f, ":{label}"))
    }
}

/// From the whole name over its repository, namespaces and registry to the registry's domains, and the transport itself.
fn scopes(reference: &Reference) -> Vec<String> {
    let name = reference.name();
    // A tag beside a digest chooses nothing: what is said of the tag must not hold for any image that a caller calls so.
    let whole = match (reference.digest(), reference.tag()) {
        (Some(digest), _) => Some(format!("{name}@{digest}")),
        (None, tag) => tag.map(|tag| format!("{name}:{tag}")),
    };
    let mut scopes: Vec<String> = whole.into_iter().collect();
    let mut at = name.as_str();
    loop {
        scopes.push(at.to_owned());
        match at.rsplit_once('/') {
            Some((shorter, _)) => at = shorter,
            None => break,
        }
    }
    let host = reference.registry().split(':').next().unwrap_or_default();
    let mut domain = host;
    while let Some((_, rest)) = domain.split_once('.') {
        scopes.push(format!("*.{rest}"));
        domain = rest;
    }
    scopes.push(String::new());
    scopes
}

fn requirements(place: &str, raw: Vec<RawRequirement>) -> Result<Vec<Requirement>, String> {
    if raw.is_empty() {
        return Err(format!("{place}: no requirement; write reject or insecureAcceptAnything"));
    }
    raw.into_iter().map(|one| requirement(one).map_err(|why| format!("{place}: {why}"))).collect()
}

fn requirement(raw: RawRequirement) -> Result<Requirement, String> {
    let (paths, texts, identity) = match raw {
        RawRequirement::InsecureAcceptAnything => return Ok(Requirement::Accept),
        RawRequirement::Reject => return Ok(Requirement::Reject),
        RawRequirement::SigstoreSigned { key_path, key_data, key_paths, key_datas, signed_identity } => {
            let given = [key_path.is_some(), key_data.is_some(), key_paths.is_some(), key_datas.is_some()];
            if given.iter().filter(|given| **given).count() != 1 {
                return Err("sigstoreSigned: exactly one of keyPath, keyData, keyPaths and keyDatas".into());
            }
            let paths: Vec<String> = key_path.into_iter().chain(key_paths.into_iter().flatten()).collect();
            let texts: Vec<String> = key_data.into_iter().chain(key_datas.into_iter().flatten()).collect();
            (paths, texts, signed_identity.unwrap_or(Identity::MatchRepoDigestOrExact))
        }
    };
    let mut keys = Vec::new();
    for path in paths {
        if !Path::new(&path).is_absolute() {
            return Err(format!("key {path}: the path is not absolute"));
        }
        let pem = read_file(Path::new(&path)).map_err(|error| format!("key {path}: {error}"))?;
        keys.extend(read_keys(&pem).map_err(|why| format!("key {path}: {why}"))?);
    }
    for text in texts {
        let pem = base64::engine::general_purpose::STANDARD.decode(text).map_err(|error| format!("keyData: {error}"))?;
        keys.extend(read_keys(&pem).map_err(|why| format!("keyData: {why}"))?);
    }
    if keys.is_empty() {
        return Err("sigstoreSigned: no key".into());
    }
    check_identity(&identity).map_err(|why| format!("sigstoreSigned: signedIdentity: {why}"))?;
    Ok(Requirement::Signed { keys, identity })
}

/// Names that could never match, or would match another image than the reader thinks.
fn check_identity(identity: &Identity) -> Result<(), String> {
    let parsed = |name: &str| name.parse::<Reference>().map(drop).map_err(|error| error.to_string());
    match identity {
        Identity::MatchRepoDigestOrExact | Identity::MatchExact | Identity::MatchRepository | Identity::MatchDigest => Ok(()),
        Identity::ExactReference { docker_reference } if !is_whole(docker_reference) => {
            Err(format!("dockerReference {docker_reference:?} has neither tag nor digest"))
        }
        Identity::ExactReference { docker_reference } => parsed(docker_reference),
        Identity::ExactRepository { docker_repository } if is_whole(docker_repository) => {
            Err(format!("dockerRepository {docker_repository:?} has a tag or digest"))
        }
        Identity::ExactRepository { docker_repository } => parsed(docker_repository),
        Identity::Remap { prefix, signed_prefix } => {
            match [prefix, signed_prefix].iter().find(|p| p.is_empty() || p.ends_with('/')) {
                Some(bad) => Err(format!("{bad:?} is no beginning of a name")),
                None => Ok(()),
            }
        }
    }
}

/// Whether a name says more than a repository.
pub(super) fn is_whole(name: &str) -> bool {
    name.rsplit('/').next().is_some_and(|last| last.contains([':', '@']))
}

/// A policy or key file, as it is now.
pub(super) fn read_file(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut content = Vec::new();
    std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!("is over the limit of {MAX_FILE_BYTES} bytes")));
    }
    Ok(content)
}
