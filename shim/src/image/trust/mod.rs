//! Whether an image may be used: a policy (containers-policy.json(5)) that accepts, rejects, or wants signatures made with given keys,
//! by registry and namespace. Asked at each pull, of images that are here already too: a rejection comes before any request, signatures are
//! looked for after the manifest and before anything else is fetched. Imports are asked about as well, by where they come from; the files
//! of an import have no signatures.
//!
//! Signatures are those of cosign and sigstore with a key of one's own: a payload that names the manifest's digest, and a signature
//! over it, in the image's own repository under the tag `sha256-<digest>.sig`, or as an artifact that refers to the image (OCI 1.1);
//! or a sigstore bundle (`bundle`) that refers to the image. Certificates and transparency logs are not read: a policy
//! that wants them is refused. Verified by aws-lc-rs, which TLS brings along: the sigstore crates would bring a hundred others.

mod bundle;
mod policy;
mod signature;
#[cfg(test)]
mod tests;

use super::digest::is_digest;
use super::error::ImageError;
use super::manifest::{self, Document};
use super::reference::Reference;
use super::registry::Session;
pub(super) use policy::Origin;
use policy::{Identity, Policy, Requirement};
use serde::Deserialize;
use std::path::PathBuf;

/// Most signatures of one image that are looked at.
const MAX_SIGNATURES: usize = 100;
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";

/// Where the policies are.
#[derive(Debug, Clone, Default)]
pub struct TrustFiles {
    /// The policy; empty for none, which accepts everything.
    pub policy: PathBuf,
    /// Directory of `<namespace>.json`, which go over `policy` for pulls of that namespace; empty for none.
    pub by_namespace: PathBuf,
}

impl TrustFiles {
    /// The policy for pulls of a namespace, as it is now. Errors: a file that cannot be read or says what is not understood; nothing
    /// may be pulled then.
    fn load(&self, namespace: &str) -> Result<Option<Policy>, ImageError> {
        let mut paths = Vec::new();
        if !namespace.is_empty() && !self.by_namespace.as_os_str().is_empty() {
            if !namespace.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
                return Err(ImageError::Untrusted(format!(
                    "sandbox_config.metadata.namespace: {namespace:?} is no name of a namespace"
                )));
            }
            paths.push(self.by_namespace.join(format!("{namespace}.json")));
        }
        let own = paths.len();
        if !self.policy.as_os_str().is_empty() {
            paths.push(self.policy.clone());
        }
        for (index, path) in paths.iter().enumerate() {
            let failed = |cause: String| ImageError::Untrusted(format!("policy {}: {cause}", path.display()));
            match policy::read_file(path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound && index < own => {}
                Err(error) => return Err(failed(error.to_string())),
                Ok(text) => return Policy::parse(&text).map(Some).map_err(failed),
            }
        }
        Ok(None)
    }

    /// Whether every policy can be read, by its file.
    pub(super) fn check(&self) -> Vec<(PathBuf, Result<(), String>)> {
        let own = (!self.policy.as_os_str().is_empty()).then(|| self.policy.clone());
        let mut paths: Vec<PathBuf> = std::fs::read_dir(&self.by_namespace)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == "json"))
            .collect();
        paths.sort();
        let parsed = |path: &PathBuf| {
            let text = policy::read_file(path).map_err(|error| error.to_string())?;
            Policy::parse(&text).map(drop)
        };
        own.into_iter()
            .chain(paths)
            .map(|path| {
                let found = parsed(&path);
                (path, found)
            })
            .collect()
    }

    /// What must hold for an image, as far as that can be said before the registry is asked. Errors: `Untrusted` if it is rejected or the
    /// policy cannot be read.
    pub(super) fn demand(&self, reference: &Reference, namespace: &str) -> Result<Demand, ImageError> {
        let Some(policy) = self.load(namespace)? else { return Ok(Demand::default()) };
        let (scope, requirements) = policy.requirements(reference);
        let demand = Demand { scope, requirements };
        if demand.rejects() {
            return Err(demand.refused(reference, "images of it are rejected"));
        }
        Ok(demand)
    }

    /// Whether an image may be imported from there. Errors: `Untrusted` if it may not, or the policy cannot be read.
    pub(super) fn check_import(&self, from: &Origin) -> Result<(), ImageError> {
        let Some(policy) = self.load("")? else { return Ok(()) };
        let (scope, requirements) = policy.requirements_of_import(from);
        let demand = Demand { scope, requirements };
        if demand.rejects() {
            return Err(demand.refused(from, "images of it are rejected"));
        }
        if demand.requirements.iter().any(|one| matches!(one, Requirement::Signed { .. })) {
            return Err(demand.refused(from, "a signature is wanted, and files have none"));
        }
        Ok(())
    }
}

/// Requirements, all of which must hold, and the scope of the policy that has them.
#[derive(Default)]
pub(super) struct Demand {
    scope: String,
    requirements: Vec<Requirement>,
}

impl Demand {
    fn rejects(&self) -> bool {
        self.requirements.iter().any(|one| matches!(one, Requirement::Reject))
    }

    fn refused(&self, what: &impl std::fmt::Display, why: &str) -> ImageError {
        ImageError::Untrusted(format!("{what}: policy for {}: {why}", self.scope))
    }

    /// Whether the image may be used. `digests` are those of the manifest and of the index that it was chosen from: a signature of
    /// either will do. Errors: `Untrusted`, with the requirement that did not hold; `RegistryUnavailable`.
    pub(super) async fn check(&self, session: &Session, reference: &Reference, digests: &[&str]) -> Result<(), ImageError> {
        let mut fetched = None;
        for requirement in &self.requirements {
            match requirement {
                Requirement::Accept => {}
                Requirement::Reject => return Err(self.refused(reference, "images of it are rejected")),
                Requirement::Signed { keys, identity } => {
                    let found = match fetched.take() {
                        Some(found) => found,
                        None => fetch(session, digests).await.map_err(|error| match error {
                            ImageError::RegistryUnavailable(_) => error,
                            // Whatever is wrong with a signature, it is the signature that is missing, not the image.
                            other => self.refused(reference, &other.to_string()),
                        })?,
                    };
                    one_holds(&found, keys, identity, reference, digests).map_err(|why| self.refused(reference, &why))?;
                    fetched = Some(found);
                }
            }
        }
        Ok(())
    }
}

/// A signature as it came: nothing of it is true yet.
enum Found {
    /// A payload, and its signature in base64.
    Payload(Vec<u8>, String),
    Bundle(Vec<u8>),
}

fn one_holds(
    found: &[Found],
    keys: &[Vec<u8>],
    identity: &Identity,
    reference: &Reference,
    digests: &[&str],
) -> Result<(), String> {
    if found.is_empty() {
        return Err("a signature is wanted, and the image has none".into());
    }
    let mut last = String::new();
    for one in found {
        let claim = match one {
            Found::Payload(payload, signature) => signature::verify(payload, signature, keys),
            Found::Bundle(bundle) => bundle::verify(bundle, keys),
        };
        match claim.and_then(|claim| claim.holds(reference, digests, identity)) {
            Ok(()) => return Ok(()),
            Err(why) => last = why,
        }
    }
    Err(match found.len() {
        1 => format!("its signature does not hold: {last}"),
        many => format!("none of its {many} signatures holds; the last one: {last}"),
    })
}

/// All signatures that the repository has for these manifests: those under the tags, and those that refer to them.
async fn fetch(session: &Session, digests: &[&str]) -> Result<Vec<Found>, ImageError> {
    let mut found = Vec::new();
    for digest in digests {
        let tag = format!("{}.sig", digest.replace(':', "-"));
        match session.manifest(&tag).await {
            Ok((bytes, _)) => read_signatures(session, &bytes, &tag, &mut found).await?,
            Err(ImageError::NotFound(_)) => {}
            Err(error) => return Err(error.within("fetch signatures")),
        }
    }
    for digest in digests {
        let bytes = match session.referrers(digest).await {
            Ok(bytes) => bytes,
            Err(_) if !found.is_empty() => continue,
            Err(error @ ImageError::RegistryUnavailable(_)) => return Err(error.within("fetch signatures")),
            Err(_) => continue,
        };
        let corrupt = |e: serde_json::Error| ImageError::Corrupt(format!("referrers of {digest}: {e}"));
        let referrers: Referrers = serde_json::from_slice(&bytes).map_err(corrupt)?;
        let signing = |one: &&Referrer| one.may_sign() && is_digest(&one.digest);
        for one in referrers.manifests.iter().filter(signing).take(MAX_SIGNATURES) {
            let read = match session.manifest(&one.digest).await {
                Ok((bytes, _)) => read_signatures(session, &bytes, &one.digest, &mut found).await,
                Err(error) => Err(error),
            };
            match read {
                Err(error @ (ImageError::RegistryUnavailable(_) | ImageError::TooMany(_))) => {
                    return Err(error.within("fetch signatures"));
                }
                // One that is broken does not hide another that holds.
                Err(error) => tracing::debug!(%error, referrer = one.digest, "reading a signature"),
                Ok(()) => {}
            }
        }
    }
    Ok(found)
}

#[derive(Deserialize)]
struct Referrers {
    manifests: Vec<Referrer>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Referrer {
    digest: String,
    #[serde(default)]
    artifact_type: String,
}

impl Referrer {
    /// Some writers of an index leave the type out, or write that of the empty configuration: then the manifest itself says what it is.
    fn may_sign(&self) -> bool {
        let kind = self.artifact_type.as_str();
        kind == signature::ARTIFACT_TYPE || kind.starts_with(bundle::TYPE) || matches!(kind, "" | EMPTY_TYPE)
    }
}

/// Adds the signatures that are the layers of a manifest.
async fn read_signatures(session: &Session, bytes: &[u8], object: &str, found: &mut Vec<Found>) -> Result<(), ImageError> {
    let Document::Manifest(manifest) = manifest::parse(bytes, object)? else { return Ok(()) };
    for layer in &manifest.layers {
        let signature = layer.annotations.get("dev.cosignproject.cosign/signature");
        let signature = signature.filter(|_| layer.media_type == signature::PAYLOAD_TYPE);
        if signature.is_none() && !layer.media_type.starts_with(bundle::TYPE) {
            continue;
        }
        if found.len() == MAX_SIGNATURES {
            return Err(ImageError::TooMany(format!("{object}: more than {MAX_SIGNATURES} signatures")));
        }
        let content = session.small_blob(layer).await.map_err(|e| e.within("fetch a signature's payload"))?;
        found.push(match signature {
            Some(signature) => Found::Payload(content, signature.clone()),
            None => Found::Bundle(content),
        });
    }
    Ok(())
}
