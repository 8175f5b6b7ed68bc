//! Manifests and indexes, OCI and Docker: parsed, checked, and the one for this machine chosen.

use super::digest::is_digest;
use super::error::ImageError;
use serde::Deserialize;

/// Sent as Accept; also what an import understands.
pub(super) const MEDIA_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const MAX_LAYERS: usize = 500;
/// Annotation of what describes another entry of the index.
const ATTESTATION: &str = "vnd.docker.reference.type";

/// An operating system and architecture, as Go names them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// `linux`
    pub os: String,
    /// `amd64`, `arm64`, ...
    pub architecture: String,
}

impl Default for Platform {
    /// This machine's.
    fn default() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Platform { os: "linux".into(), architecture: architecture.into() }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

/// A blob: what it is, its digest and length in bytes.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    #[serde(default)]
    pub(super) size: u64,
    #[serde(default)]
    platform: Option<DescriptorPlatform>,
    #[serde(default)]
    artifact_type: String,
    #[serde(default)]
    pub(super) annotations: std::collections::HashMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct DescriptorPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

/// An image's manifest.
#[derive(Debug)]
pub(super) struct Manifest {
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

#[derive(Debug)]
pub(super) enum Document {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u32,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// Parses either kind; `object` names it in errors.
pub(super) fn parse(bytes: &[u8], object: &str) -> Result<Document, ImageError> {
    let corrupt = |cause: String| ImageError::Corrupt(format!("{object}: {cause}"));
    let raw: Raw = serde_json::from_slice(bytes).map_err(|e| corrupt(format!("is no image manifest: {e}")))?;
    let unsupported = |cause: String| ImageError::Unsupported(format!("{object}: {cause}"));
    if raw.schema_version != 2 {
        return Err(unsupported(format!("manifest schema version {} is not supported", raw.schema_version)));
    }
    match (raw.manifests, raw.config, raw.layers) {
        (Some(manifests), None, None) => {
            check(&manifests).map_err(corrupt)?;
            Ok(Document::Index(manifests))
        }
        (None, Some(config), Some(layers)) => {
            check(std::iter::once(&config).chain(&layers)).map_err(corrupt)?;
            if layers.len() > MAX_LAYERS {
                return Err(ImageError::TooMany(format!("{object}: {} layers are over the limit of {MAX_LAYERS}", layers.len())));
            }
            if let Some(layer) =
                layers.iter().find(|l| l.media_type.contains("foreign") || l.media_type.contains("nondistributable"))
            {
                let (digest, kind) = (&layer.digest, &layer.media_type);
                return Err(unsupported(format!("layer {digest} is foreign ({kind}): such a layer is not in the registry")));
            }
            Ok(Document::Manifest(Manifest { config, layers }))
        }
        _ => Err(corrupt("is neither an image index nor an image manifest".into())),
    }
}

fn check<'a>(descriptors: impl IntoIterator<Item = &'a Descriptor>) -> Result<(), String> {
    match descriptors.into_iter().find(|d| !is_digest(&d.digest)) {
        Some(d) => Err(format!("{:?} is no sha256 digest", d.digest)),
        None => Ok(()),
    }
}

/// The entry for the platform: of several, the one that wants no special processor; one that names none if nothing fits better. Attestations
/// name `unknown`, or say what they are.
pub(super) fn select<'a>(index: &'a [Descriptor], platform: &Platform, object: &str) -> Result<&'a Descriptor, ImageError> {
    let runs = |d: &&Descriptor| {
        d.platform.as_ref().is_some_and(|p| p.os == platform.os && p.architecture == platform.architecture) && d.is_manifest()
    };
    let baseline = || index.iter().filter(runs).find(|d| d.platform.as_ref().is_some_and(DescriptorPlatform::is_baseline));
    let unnamed = || index.iter().find(|d| d.platform.is_none() && d.is_manifest());
    baseline()
        .or_else(|| index.iter().find(runs))
        .or_else(unnamed)
        .ok_or_else(|| ImageError::NoPlatform { object: object.to_owned(), platform: platform.to_string() })
}

/// Refuses an image that its configuration says is for another platform, where no index had a say. What it does not say may be any.
pub(super) fn check_config(config: &[u8], platform: &Platform, object: &str) -> Result<(), ImageError> {
    let corrupt = |cause| ImageError::Corrupt(format!("{object}: its configuration: {cause}"));
    let said: DescriptorPlatform = serde_json::from_slice(config).map_err(corrupt)?;
    let other = |said: &str, own: &str| !said.is_empty() && said != own;
    if other(&said.os, &platform.os) || other(&said.architecture, &platform.architecture) {
        return Err(ImageError::NoPlatform { object: object.to_owned(), platform: platform.to_string() });
    }
    Ok(())
}

impl Descriptor {
    /// Whether it may be an image's manifest, or an index of such.
    fn is_manifest(&self) -> bool {
        (self.media_type.is_empty() || MEDIA_TYPES.split(", ").any(|one| one == self.media_type))
            && self.artifact_type.is_empty()
            && !self.annotations.contains_key(ATTESTATION)
    }
}

impl DescriptorPlatform {
    /// Whether every processor of the architecture will do.
    fn is_baseline(&self) -> bool {
        match self.architecture.as_str() {
            "amd64" => matches!(self.variant.as_str(), "" | "v1"),
            "arm64" => matches!(self.variant.as_str(), "" | "v8" | "v8.0"),
            _ => self.variant.is_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn chosen(entries: &[Value]) -> Option<usize> {
        let manifests: Vec<Value> = entries
            .iter()
            .enumerate()
            .map(|(number, entry)| {
                let mut entry = entry.clone();
                entry["digest"] = json!(format!("sha256:{number:064x}"));
                entry
            })
            .collect();
        let bytes = json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
        let Document::Index(index) = parse(bytes.as_bytes(), "index").unwrap() else { panic!("an index") };
        let platform = Platform { os: "linux".into(), architecture: "amd64".into() };
        let digest = &select(&index, &platform, "index").ok()?.digest;
        index.iter().position(|entry| entry.digest == *digest)
    }

    #[test]
    fn the_entry_that_runs_here() {
        let on = |os: &str, architecture: &str| json!({ "platform": { "os": os, "architecture": architecture } });
        let variant = |name: &str| json!({ "platform": { "os": "linux", "architecture": "amd64", "variant": name } });
        let attestation = json!({
            "platform": { "os": "unknown", "architecture": "unknown" }, "annotations": { ATTESTATION: "attestation-manifest" }
        });
        let unnamed_attestation = json!({ "annotations": { ATTESTATION: "attestation-manifest" } });
        let artifact = json!({ "artifactType": "application/spdx+json" });
        let other = json!({ "mediaType": "application/vnd.example.thing" });
        for (entries, expected) in [
            (vec![attestation.clone(), on("linux", "s390x"), on("linux", "amd64")], Some(2)),
            (vec![on("windows", "amd64"), on("darwin", "amd64"), on("linux", "amd64")], Some(2)),
            (vec![variant("v3"), variant("v2"), on("linux", "amd64")], Some(2)),
            (vec![variant("v3"), variant("v1")], Some(1)),
            (vec![variant("v2")], Some(0)),
            (vec![on("plan9", "mips"), json!({})], Some(1)),
            (vec![json!({}), on("linux", "amd64")], Some(1)),
            (vec![unnamed_attestation, artifact, other, json!({})], Some(3)),
            (vec![attestation, on("linux", "arm64")], None),
            (vec![], None),
        ] {
            assert_eq!(chosen(&entries), expected, "{entries:?}");
        }
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let layer = |kind: &str| json!({ "mediaType": kind, "digest": format!("sha256:{:064x}", 1), "size": 3 });
        let manifest = |kind: &str| json!({ "schemaVersion": 2, "config": layer(""), "layers": [layer(kind)] });
        for (document, why) in [
            (json!({ "schemaVersion": 1, "fsLayers": [] }), "schema version 1"),
            (manifest("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), "is foreign"),
            (manifest("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"), "is foreign"),
        ] {
            let error = parse(document.to_string().as_bytes(), "manifest m").unwrap_err();
            assert!(
                matches!(&error, ImageError::Unsupported(text) if text.contains(why) && text.starts_with("manifest m")),
                "{error}"
            );
        }
        for (document, why) in [
            (json!({ "schemaVersion": 2 }), "neither"),
            (json!({ "schemaVersion": 2, "config": { "digest": "sha256:1" }, "layers": [] }), "no sha256 digest"),
            (json!([]), "is no image manifest"),
        ] {
            let error = parse(document.to_string().as_bytes(), "manifest m").unwrap_err();
            assert!(matches!(&error, ImageError::Corrupt(text) if text.contains(why)), "{error}");
        }
    }
}
