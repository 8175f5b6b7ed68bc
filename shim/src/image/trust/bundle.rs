//! Signatures as newer versions of cosign write them: a sigstore bundle (JSON) with a DSSE envelope, in it an in-toto statement whose
//! subject is the image. The transparency log's entries and certificates of a bundle are not read: a key vouches for it, or nobody.

use super::signature::{Claim, Subject, made_by_one_of};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;

/// What the media types of all versions begin with.
pub(super) const TYPE: &str = "application/vnd.dev.sigstore.bundle";
const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
/// What is said of the subject: that it is signed. Other statements, of what an image is made of, are no signatures.
const PREDICATE_TYPE: &str = "https://sigstore.dev/cosign/sign/v1";
const STATEMENTS: [&str; 2] = ["https://in-toto.io/Statement/v1", "https://in-toto.io/Statement/v0.1"];

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Bundle {
    media_type: String,
    dsse_envelope: Option<Envelope>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Deserialize)]
struct Signature {
    sig: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Statement {
    #[serde(rename = "_type")]
    kind: String,
    predicate_type: String,
    subject: Vec<StatementSubject>,
}

#[derive(Deserialize)]
struct StatementSubject {
    #[serde(default)]
    name: String,
    digest: BTreeMap<String, String>,
}

/// The claim, if one of the keys made a signature of the bundle.
pub(super) fn verify(bundle: &[u8], keys: &[Vec<u8>]) -> Result<Claim, String> {
    let bundle: Bundle = serde_json::from_slice(bundle).map_err(|error| format!("its bundle: {error}"))?;
    if !bundle.media_type.starts_with(TYPE) {
        return Err(format!("its bundle is of type {:?}", bundle.media_type));
    }
    let envelope = bundle.dsse_envelope.ok_or("its bundle has no DSSE envelope")?;
    let plain = |text: &str| STANDARD.decode(text).map_err(|error| format!("its bundle is not base64: {error}"));
    let payload = plain(&envelope.payload)?;
    let signed = encoded(&envelope.payload_type, &payload);
    let mut vouched = false;
    for signature in &envelope.signatures {
        vouched |= made_by_one_of(keys, &signed, &plain(&signature.sig)?);
    }
    if !vouched {
        return Err("none of the policy's keys made it".into());
    }
    if envelope.payload_type != PAYLOAD_TYPE {
        return Err(format!("its payload is of type {:?}", envelope.payload_type));
    }
    let statement: Statement = serde_json::from_slice(&payload).map_err(|error| format!("its statement: {error}"))?;
    if !STATEMENTS.contains(&statement.kind.as_str()) || statement.predicate_type != PREDICATE_TYPE {
        return Err(format!("it is a statement of type {:?}, which is none of images", statement.predicate_type));
    }
    let subject = |one: StatementSubject| {
        let digest = one.digest.get("sha256").map(|hex| format!("sha256:{hex}"));
        digest.map(|digest| Subject { digest, name: Some(one.name).filter(|name| !name.is_empty()) })
    };
    Ok(Claim(statement.subject.into_iter().filter_map(subject).collect()))
}

/// What a signature of an envelope is made of (DSSE's pre-authentication encoding).
pub(super) fn encoded(kind: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {kind} {} ", kind.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}
