//! One signature: a payload in the "simple signing" form, and a signature over its bytes. Nothing of the payload is read before a key has
//! vouched for it.

use super::super::reference::Reference;
use super::policy::{Identity, is_whole};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA256_ASN1, ECDSA_P521_SHA256_ASN1, ED25519, RSA_PKCS1_2048_8192_SHA256,
    UnparsedPublicKey, VerificationAlgorithm,
};
use base64::Engine as _;
use rustls_pki_types::SubjectPublicKeyInfoDer;
use rustls_pki_types::pem::PemObject;
use serde::Deserialize;

/// Media type of a payload.
pub(super) const PAYLOAD_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";

/// Type of a manifest of payloads that refers to the image that it is about.
pub(super) const ARTIFACT_TYPE: &str = "application/vnd.dev.cosign.artifact.sig.v1+json";

/// Object identifiers of keys, as they stand in a SubjectPublicKeyInfo (RFC 5480, RFC 8017, RFC 8410). cosign hashes with SHA-256
/// whatever the curve.
const ALGORITHMS: [(&[u8], &dyn VerificationAlgorithm); 5] = [
    (&[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07], &ECDSA_P256_SHA256_ASN1),
    (&[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22], &ECDSA_P384_SHA256_ASN1),
    (&[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23], &ECDSA_P521_SHA256_ASN1),
    (&[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01], &RSA_PKCS1_2048_8192_SHA256),
    (&[0x06, 0x03, 0x2b, 0x65, 0x70], &ED25519),
];

/// The identifiers stand at the beginning.
const IDENTIFIER_BYTES: usize = 32;

fn algorithm(key: &[u8]) -> Option<&'static dyn VerificationAlgorithm> {
    let beginning = key.get(..key.len().min(IDENTIFIER_BYTES))?;
    ALGORITHMS.iter().find(|(id, _)| beginning.windows(id.len()).any(|found| found == *id)).map(|(_, algorithm)| *algorithm)
}

/// The public keys of a PEM file, as DER.
pub(super) fn read_keys(pem: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let mut keys = Vec::new();
    for key in SubjectPublicKeyInfoDer::pem_slice_iter(pem) {
        let key = key.map_err(|error| error.to_string())?.as_ref().to_vec();
        let algorithm = algorithm(&key).ok_or("is neither ECDSA (P-256, P-384, P-521), RSA nor Ed25519")?;
        UnparsedPublicKey::new(algorithm, &key).parse().map_err(|error| format!("is no usable key: {error}"))?;
        keys.push(key);
    }
    if keys.is_empty() { Err("holds no PUBLIC KEY in PEM".into()) } else { Ok(keys) }
}

/// What a signature says, once a key has vouched for it: of one of these images at least.
#[derive(Debug)]
pub(super) struct Claim(pub(super) Vec<Subject>);

/// An image that is signed.
#[derive(Debug)]
pub(super) struct Subject {
    pub(super) digest: String,
    /// The name that it was signed for, if it was.
    pub(super) name: Option<String>,
}

#[derive(Deserialize)]
struct Payload {
    critical: Critical,
}

#[derive(Deserialize)]
struct Critical {
    #[serde(rename = "type")]
    kind: String,
    image: CriticalImage,
    identity: CriticalIdentity,
}

#[derive(Deserialize)]
struct CriticalImage {
    #[serde(rename = "docker-manifest-digest")]
    digest: String,
}

#[derive(Deserialize)]
struct CriticalIdentity {
    #[serde(rename = "docker-reference")]
    reference: String,
}

/// The claim, if one of the keys made the signature (in base64).
pub(super) fn verify(payload: &[u8], signature: &str, keys: &[Vec<u8>]) -> Result<Claim, String> {
    let signature = base64::engine::general_purpose::STANDARD.decode(signature.trim());
    let signature = signature.map_err(|error| format!("it is not base64: {error}"))?;
    if !made_by_one_of(keys, payload, &signature) {
        return Err("none of the policy's keys made it".into());
    }
    let payload: Payload = serde_json::from_slice(payload).map_err(|error| format!("its payload: {error}"))?;
    let critical = payload.critical;
    if critical.kind != "cosign container image signature" {
        return Err(format!("it is of type {:?}, which is none of images", critical.kind));
    }
    Ok(Claim(vec![Subject { digest: critical.image.digest, name: Some(critical.identity.reference) }]))
}

/// Whether one of the keys made the signature of these bytes.
pub(super) fn made_by_one_of(keys: &[Vec<u8>], bytes: &[u8], signature: &[u8]) -> bool {
    let made_by = |key: &Vec<u8>| {
        algorithm(key).is_some_and(|algorithm| UnparsedPublicKey::new(algorithm, key).verify(bytes, signature).is_ok())
    };
    keys.iter().any(made_by)
}

impl Claim {
    /// Whether the claim is about this image.
    pub(super) fn holds(&self, reference: &Reference, digests: &[&str], identity: &Identity) -> Result<(), String> {
        let mut last = "it is for no image".into();
        for subject in &self.0 {
            match subject.holds(reference, digests, identity) {
                Ok(()) => return Ok(()),
                Err(why) => last = why,
            }
        }
        Err(last)
    }
}

impl Subject {
    fn holds(&self, reference: &Reference, digests: &[&str], identity: &Identity) -> Result<(), String> {
        if !digests.contains(&self.digest.as_str()) {
            return Err(format!("it is for {}, another image", self.digest));
        }
        if *identity == Identity::MatchDigest {
            return Ok(());
        }
        let name = self.name.as_deref().ok_or("it is for no name, and signedIdentity is not matchDigest")?;
        let signed: Reference = name.parse().map_err(|error| format!("its name: {error}"))?;
        // A name without a tag is the repository's, whatever an image of that name would be.
        let named = is_whole(name);
        let same_repository = |other: &str| signed.name() == other;
        let same = |other: &Reference| {
            named && signed.name() == other.name() && signed.tag() == other.tag() && signed.digest() == other.digest()
        };
        let by_tag = |wanted: &Reference| {
            if wanted.digest().is_some() { same_repository(&wanted.name()) } else { same(wanted) }
        };
        let holds = match identity {
            Identity::MatchRepoDigestOrExact => by_tag(reference),
            Identity::MatchExact => same(reference),
            Identity::MatchDigest => true,
            Identity::MatchRepository => same_repository(&reference.name()),
            Identity::ExactReference { docker_reference } => docker_reference.parse().is_ok_and(|wanted| same(&wanted)),
            Identity::ExactRepository { docker_repository } => {
                docker_repository.parse::<Reference>().is_ok_and(|wanted| same_repository(&wanted.name()))
            }
            Identity::Remap { prefix, signed_prefix } => {
                remapped(reference, prefix, signed_prefix).is_some_and(|wanted| by_tag(&wanted))
            }
        };
        if holds { Ok(()) } else { Err(format!("it is for the name {name:?}")) }
    }
}

/// The name with another beginning; itself if it has not the first one.
fn remapped(reference: &Reference, prefix: &str, signed_prefix: &str) -> Option<Reference> {
    // Only the name is looked at: a registry on another port is another registry.
    match reference.name().strip_prefix(prefix) {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => {
            format!("{signed_prefix}{}", &reference.to_string()[prefix.len()..]).parse().ok()
        }
        _ => Some(reference.clone()),
    }
}
