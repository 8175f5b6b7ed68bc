//! The policy file: what is required of which images. What is not understood makes the whole file an error, never a weaker policy.

use super::super::reference::Reference;
use super::signature::read_keys;
use base64::Engine as _;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;

/// The only transport that pulls are.
const TRANSPORT: &str = "docker";

#[derive(Debug)]
pub(super) struct Policy {
    default: Vec<Requirement>,
    scopes: BTreeMap<String, Vec<Requirement>>,
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
    #[serde(default)]
    transports: BTreeMap<String, BTreeMap<String, serde_json::Value>>,
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
        // Other transports are no pulls, and may say what is not understood here.
        for (scope, value) in raw.transports.into_iter().filter(|(name, _)| name == TRANSPORT).flat_map(|(_, scopes)| scopes) {
            let place = format!("transports.{TRANSPORT}.{scope:?}");
            let raw: Vec<RawRequirement> = serde_json::from_value(value).map_err(|error| format!("{place}: {error}"))?;
            scopes.insert(scope, requirements(&place, raw)?);
        }
        Ok(Policy { default, scopes })
    }

    /// What is required of an image, and the scope that says so: the most specific one.
    pub(super) fn requirements(&self, reference: &Reference) -> (String, &[Requirement]) {
        for scope in scopes(reference) {
            if let Some(found) = self.scopes.get(&scope) {
                return (format!("{scope:?}"), found);
            }
        }
        ("default".into(), &self.default)
    }
}

/// From the whole name over its repository, namespaces and registry to the registry's domains, and the transport itself.
fn scopes(reference: &Reference) -> Vec<String> {
    let name = reference.name();
    let mut scopes = Vec::new();
    scopes.extend(reference.digest().map(|digest| format!("{name}@{digest}")));
    scopes.extend(reference.tag().map(|tag| format!("{name}:{tag}")));
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
        let pem = std::fs::read(Path::new(&path)).map_err(|error| format!("key {path}: {error}"))?;
        keys.extend(read_keys(&pem).map_err(|why| format!("key {path}: {why}"))?);
    }
    for text in texts {
        let pem = base64::engine::general_purpose::STANDARD.decode(text).map_err(|error| format!("keyData: {error}"))?;
        keys.extend(read_keys(&pem).map_err(|why| format!("keyData: {why}"))?);
    }
    if keys.is_empty() {
        return Err("sigstoreSigned: no key".into());
    }
    Ok(Requirement::Signed { keys, identity })
}
