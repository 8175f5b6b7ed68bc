//! Manifests and indexes, OCI and Docker: parsed, checked, and the one for this machine chosen.

use super::digest::is_digest;
use super::error::ImageError;
use serde::Deserialize;

/// Sent as Accept; also what an import understands.
pub(super) const MEDIA_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
const MAX_LAYERS: usize = 500;

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
    pub(super) annotations: std::collections::HashMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct DescriptorPlatform {
    os: String,
    architecture: String,
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
    if raw.schema_version != 2 {
        return Err(corrupt(format!("manifest schema version {} is not supported", raw.schema_version)));
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
                return Err(corrupt(format!("layer {} is foreign ({}), which is not supported", layer.digest, layer.media_type)));
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

/// The first entry for the platform; one that names none is taken if nothing fits better. Attestations name `unknown`.
pub(super) fn select<'a>(index: &'a [Descriptor], platform: &Platform, object: &str) -> Result<&'a Descriptor, ImageError> {
    let exact = index
        .iter()
        .find(|d| d.platform.as_ref().is_some_and(|p| p.os == platform.os && p.architecture == platform.architecture));
    let unnamed = || index.iter().find(|d| d.platform.is_none());
    exact.or_else(unnamed).ok_or_else(|| ImageError::NoPlatform { object: object.to_owned(), platform: platform.to_string() })
}
