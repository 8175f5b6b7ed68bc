//! Signatures that openssl made, and pulls under policies with signatures that are made here.

use super::super::test_images::{Made, Tar, gzip, image};
use super::super::test_registry::Registry;
use super::super::*;
use super::policy::Policy;
use super::signature::{read_keys, verify};
use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use std::fs;

const PAYLOAD: &str = r#"{"critical":{"identity":{"docker-reference":"reg.example/team/app"},"image":{"docker-manifest-digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"},"type":"cosign container image signature"},"optional":null}"#;

/// Key, and its signature over the payload.
const VECTORS: [(&str, &str); 4] = [
    (
        "-----BEGIN PUBLIC KEY-----\n\
         MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEawe8eS/571KBvjS9EnflF6+WaXy5\n\
         zsNEkJhFJ5mCMKqClBHc/hbq2wKZqRnMibPimxrGdgezCkZlkEh8VvN5jg==\n\
         -----END PUBLIC KEY-----\n",
        "MEUCIQD3UNciSgaxV3do6w+p4m/EILn4zwK2QqxkabVjV32JJwIgUlrip3v/vfid59ITz9fe3HV38LwlDPxlY0wKEYjryPw=",
    ),
    (
        "-----BEGIN PUBLIC KEY-----\n\
         MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEZTWgGUg7BPcTFsu2pgjs5eC6dwwiFcTF\n\
         Fsp2I7NMe2snE4dIJGRKVYVus9eu3/brXuRnM44PGRBOJ0rBnp+nwyE5a6Dndlk5\n\
         H+acrK2BqQG2JiUVgeYpr7JxXGbLl3Qd\n\
         -----END PUBLIC KEY-----\n",
        "MGQCMCEPWvJw8YLqR0WVwxQSFVigq/VS4QJUmf4Y0k1Cwtd8iSQ113r+RVLd8dhABUjiJgIwYP+gh3J+JGLxsAlgrznPYjJrQ8cCL0IbOQBC4+DdgDrf9lUxWH/eL9804Csw4Wkk",
    ),
    (
        "-----BEGIN PUBLIC KEY-----\n\
         MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAsBd+QnxFzztE464CvLY1\n\
         z/l3/iWjYu96E9BFAdhvCnFtg6Vhty93qYmNZ5Be/E8OPf9s2E5wual1hpVMQnir\n\
         UM3+MuXkp3xBwcFzrHqKy53labe87ms10O0+TfjUemQwJ1e1ROqVc++GtltpXhyP\n\
         HV/wzexxqGKSIfJaU/1ebPnlMcGcRhLKLsKW0QKJewjkTe3KGWfCSMtp1kBEyGjZ\n\
         L+lq+HqkWYUE7Y1wM/h5jB5NTSco4Ll+TZtq89A7j9TXiHp/91mukqaImMChAQU5\n\
         Gr9iUkVpz35oUo8zbdqrsTeWGgn9nrckbifLu/AcVYnRbG5ampSx7ulMvtNzjfgo\n\
         9wIDAQAB\n\
         -----END PUBLIC KEY-----\n",
        "bEtXRF/X69TR80DOqUJw6FXrC+OT27znIApMYkENoVBOgmdbIa6GLAmI0pX4c9W1iiMUlM7/CeN3GGW5Ka/q3SSNrzPBpiY+lXgXcs7twqZyX+4HdAN7VQ6ggzcR3+mgC4qXQLKvvrAHANi2meJjT3NcTn5Pjx00udLTLb8PRHgyvP+Mkx11X1IJ8mYsBnrPAVLMlXMyijnBMy5uPRFGWVPmo8DuZJcXOxBJpDJoHsnCq+0FkS8dWja2DPtb2GPJfPPjW+7bijyVU/QnQfLANZeet4AwbuqmBzzhWVXNuLrx2kIG92t7qvt/47QnYZaT9kWtzcMl837tEzqh/4QziA==",
    ),
    (
        "-----BEGIN PUBLIC KEY-----\n\
         MCowBQYDK2VwAyEApwYXyNFh/O3oq78dfI7gbgoIkh/JMetlq0bG/BmUosU=\n\
         -----END PUBLIC KEY-----\n",
        "gbPpvSRHBnxivxja45Urf+M2V0pSgVyjtuaSfiwVCtC+ZQUzjWvmTb2W22TPTgJ0h6/ocRF5ETJi0z0SbrmHCg==",
    ),
];

/// A key that is too short, and its true signature over the payload.
const RSA_1024: &str = "-----BEGIN PUBLIC KEY-----\n\
     MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDsxH4b72orawz3PE3KIlIJ4HuC\n\
     5WmWVghini3bYlAUZlCbw+jwYF+/ruKuEQfsyeiIjKOhm06FNTd31ye9DHRIsNOS\n\
     Ugci+9/DoesdduqGGmQkvniJXFG5JPxMs+KVjg12Eq/ZmDveBvhdJvVO0U/4WFOB\n\
     LKY4Sh+SF0qDp0nfewIDAQAB\n\
     -----END PUBLIC KEY-----\n";
const RSA_1024_SIGNATURE: &str = "pHtWNm6Ww5KIx3eWMUtptVJlHb8+RFerPGBWjYKfZfmUG20uuwZiIIv15XD+3Zv3LLQjLZapDtdvMOBKm33O53AwPafP6cJzX07AvLGGkUGcjeslmLJtACPxli798IBUnjes8O4fM8KFTPAwaoRwPsK5FJKGnhDpBLbae5zk+aw=";

/// A key on another curve.
const P256_K1: &str = "-----BEGIN PUBLIC KEY-----\n\
     MFYwEAYHKoZIzj0CAQYFK4EEAAoDQgAE4+DM07W/vvhj46NEhHRGbshSybcZwZ/j\n\
     01NV2814T7WnzvvCyEFHt/m/PCrpPTKhtWrFaW+Y3k4mkr5/4BHBwg==\n\
     -----END PUBLIC KEY-----\n";

#[test]
fn signatures_of_every_kind_of_key() {
    let keys: Vec<Vec<u8>> = VECTORS.iter().flat_map(|(pem, _)| read_keys(pem.as_bytes()).unwrap()).collect();
    assert_eq!(keys.len(), VECTORS.len());
    for (index, (_, signature)) in VECTORS.iter().enumerate() {
        verify(PAYLOAD.as_bytes(), signature, &keys).unwrap();
        assert!(super::bundle::verify(PAYLOAD.as_bytes(), &keys).unwrap_err().contains("its bundle"));
        verify(PAYLOAD.as_bytes(), signature, &keys[index..=index]).unwrap();
        let mut others = keys.clone();
        others.remove(index);
        assert!(verify(PAYLOAD.as_bytes(), signature, &others).unwrap_err().contains("none of the policy's keys"));
        assert!(verify(PAYLOAD.replace("app", "apq").as_bytes(), signature, &keys).is_err());
        assert!(verify(PAYLOAD.as_bytes(), "!", &keys).unwrap_err().contains("base64"));
        assert!(verify(PAYLOAD.as_bytes(), "", &keys).is_err());
    }
    let short = read_keys(RSA_1024.as_bytes()).unwrap();
    assert!(verify(PAYLOAD.as_bytes(), RSA_1024_SIGNATURE, &short).unwrap_err().contains("none of the policy's keys"));
    assert!(read_keys(b"text").unwrap_err().contains("PUBLIC KEY"));
}

#[test]
fn policies_are_understood_or_refused() {
    let key = STANDARD.encode(VECTORS[0].0);
    let signed = json!([{ "type": "sigstoreSigned", "keyData": key, "signedIdentity": { "type": "matchRepository" } }]);
    let policy = json!({
        "default": [{ "type": "reject" }],
        "transports": {
            "docker": {
                "": [{ "type": "insecureAcceptAnything" }],
                "reg.example:5000": signed, "reg.example:5000/team": signed, "reg.example:5000/team/app": signed,
                "reg.example:5000/team/app:1": signed, "*.example": signed, "*.sub.example": signed, "docker.io/library": signed,
            },
            "docker-archive": { "": [{ "type": "insecureAcceptAnything" }] },
            "oci": { "/srv": signed, "/srv/a:v1": signed },
            "docker-daemon": { "": [{ "type": "signedBy", "keyType": "GPGKeys" }] },
        },
    });
    let text = policy.to_string();
    let digested = format!("reg.example:5000/team/app:1@sha256:{}", "0".repeat(64));
    for (name, scope) in [
        ("reg.example:5000/team/app:1", "\"reg.example:5000/team/app:1\""),
        ("reg.example:5000/team/app:2", "\"reg.example:5000/team/app\""),
        ("reg.example:5000/team/apps", "\"reg.example:5000/team\""),
        ("reg.example:5000/other", "\"reg.example:5000\""),
        ("reg.example:5001/other", "\"*.example\""),
        ("a.sub.example/x", "\"*.sub.example\""),
        ("busybox", "\"docker.io/library\""),
        ("quay.test/x", "\"\""),
        // Anybody can write a tag before any digest.
        (digested.as_str(), "\"reg.example:5000/team/app\""),
    ] {
        let policy = Policy::parse(text.as_bytes()).unwrap();
        assert_eq!(policy.requirements(&name.parse().unwrap()).0, scope, "{name}");
    }
    let from = |transport, path: &str, label: Option<&str>| super::Origin {
        transport,
        path: path.into(),
        label: label.map(str::to_owned),
    };
    for (origin, scope) in [
        (from("docker-archive", "/srv/a.tar", None), "docker-archive \"\""),
        (from("oci", "/srv/a", Some("v1")), "oci \"/srv/a:v1\""),
        (from("oci", "/srv/a", Some("v2")), "oci \"/srv\""),
        (from("oci", "/other", None), "default"),
        (from("oci-archive", "/srv/a", Some("v1")), "default"),
    ] {
        let policy = Policy::parse(text.as_bytes()).unwrap();
        assert_eq!(policy.requirements_of_import(&origin).0, scope, "{origin}");
    }
    let identity = |identity| json!({ "default": [{ "type": "sigstoreSigned", "keyData": key, "signedIdentity": identity }] });
    for (text, why) in [
        (json!({}), "default"),
        (json!({ "default": [] }), "no requirement"),
        (json!({ "default": [{ "type": "signedBy" }] }), "signedBy"),
        (json!({ "default": [{ "type": "reject" }], "more": 1 }), "more"),
        (json!({ "default": [{ "type": "sigstoreSigned" }] }), "exactly one of"),
        (json!({ "default": [{ "type": "sigstoreSigned", "keyData": key, "keyPath": "/k" }] }), "exactly one of"),
        (json!({ "default": [{ "type": "sigstoreSigned", "fulcio": {} }] }), "fulcio"),
        (json!({ "default": [{ "type": "sigstoreSigned", "keyData": key, "rekorPublicKeyData": key }] }), "rekorPublicKeyData"),
        (json!({ "default": [{ "type": "sigstoreSigned", "keyPath": "/nowhere/key" }] }), "/nowhere/key"),
        (json!({ "default": [{ "type": "sigstoreSigned", "keyData": "dGV4dA==" }] }), "PUBLIC KEY"),
        (json!({ "default": [{ "type": "sigstoreSigned", "keyDatas": [] }] }), "no key"),
        (json!({ "default": [{ "type": "reject" }], "transports": { "docker": { "x": [{ "type": "accept" }] } } }), "x"),
        (
            json!({ "default": [{ "type": "sigstoreSigned", "keyData": key, "signedIdentity": { "type": "matchAnything" } }] }),
            "matchAnything",
        ),
        (json!({ "default": [{ "type": "sigstoreSigned", "keyPath": "key.pub" }] }), "not absolute"),
        (
            json!({ "default": [{ "type": "sigstoreSigned", "keyData": STANDARD.encode(VECTORS[0].0.replace("N5jg==", "N5jQ==")) }] }),
            "no usable key",
        ),
        (json!({ "default": [{ "type": "sigstoreSigned", "keyData": STANDARD.encode(P256_K1) }] }), "neither ECDSA"),
        (identity(json!({ "type": "exactReference", "dockerReference": "reg.example/x" })), "neither tag nor digest"),
        (identity(json!({ "type": "exactReference", "dockerReference": "reg.example/X:1" })), "reg.example/X:1"),
        (identity(json!({ "type": "exactRepository", "dockerRepository": "reg.example/x:1" })), "has a tag"),
        (identity(json!({ "type": "remapIdentity", "prefix": "", "signedPrefix": "a" })), "beginning"),
        (identity(json!({ "type": "remapIdentity", "prefix": "a" })), "signedPrefix"),
        (json!({ "default": [{ "type": "reject" }], "transports": { "docker": { "*": [{ "type": "reject" }] } } }), "star"),
        (
            json!({ "default": [{ "type": "reject" }], "transports": { "docker-archive": { "/a": [{ "type": "reject" }] } } }),
            "only",
        ),
        (json!({ "default": [{ "type": "reject" }], "transports": { "oci": { "": [{ "type": "signedBy" }] } } }), "signedBy"),
        (json!({ "default": [{ "type": "reject" }], "transports": { "docker": { "a.*.b": [{ "type": "reject" }] } } }), "star"),
    ] {
        let error = Policy::parse(text.to_string().as_bytes()).unwrap_err();
        assert!(error.contains(why), "{text}: {error}");
    }
}

/// Of two keys of the same name a reader would see the one, and the other would hold.
#[test]
fn what_is_said_twice_is_refused() {
    for text in [
        r#"{"default":[{"type":"reject"}],"default":[{"type":"insecureAcceptAnything"}]}"#,
        r#"{"default":[{"type":"reject","type":"insecureAcceptAnything"}]}"#,
        r#"{"default":[{"type":"reject"}],"transports":{"docker":{"a":[{"type":"reject"}],"a":[{"type":"insecureAcceptAnything"}]}}}"#,
        r#"{"default":[{"type":"reject"}],"transports":{"docker":{"a":[{"type":"reject"}]},"docker":{}}}"#,
        r#"{"default":[{"type":"reject"}],"transports":{},"transports":{}}"#,
    ] {
        let error = Policy::parse(text.as_bytes()).unwrap_err();
        assert!(error.contains("twice") || error.contains("duplicate"), "{text}: {error}");
    }
}

struct Signer(EcdsaKeyPair);

impl Signer {
    fn new() -> Signer {
        Signer(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap())
    }

    fn pem(&self) -> String {
        let der = self.0.public_key().as_der().unwrap();
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(der.as_ref()))
    }

    /// Puts a signature of `digest`, said to be of `name`, where the one of `of` is looked for.
    fn sign(&self, registry: &Registry, repository: &str, of: &str, digest: &str, name: &str) {
        let payload = json!({ "critical": {
            "type": "cosign container image signature",
            "image": { "docker-manifest-digest": digest },
            "identity": { "docker-reference": name },
        }})
        .to_string();
        let signature = STANDARD.encode(self.0.sign(&SystemRandom::new(), payload.as_bytes()).unwrap());
        let layer = json!({
            "mediaType": super::signature::PAYLOAD_TYPE, "digest": digest::of(payload.as_bytes()), "size": payload.len(),
            "annotations": { "dev.cosignproject.cosign/signature": signature },
        });
        let config = json!({ "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest::of(b"{}"), "size": 2 });
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer] }).to_string();
        let mut content = registry.content.lock().unwrap();
        content.objects.insert(format!("{repository}/manifests/{}.sig", of.replace(':', "-")), manifest.into_bytes());
        content.objects.insert(format!("{repository}/blobs/{}", digest::of(payload.as_bytes())), payload.into_bytes());
    }

    /// A bundle as cosign writes it: a statement of this predicate, about a digest and perhaps a name.
    fn bundle(&self, digest: &str, name: Option<&str>, predicate: &str) -> serde_json::Value {
        let mut subject = json!({ "digest": { "sha256": digest::hex_of(digest) } });
        name.iter().for_each(|name| subject["name"] = json!(name));
        let statement = json!({ "_type": "https://in-toto.io/Statement/v1", "predicateType": predicate, "subject": [subject], "predicate": {} });
        let (kind, payload) = ("application/vnd.in-toto+json", statement.to_string());
        let signature = self.0.sign(&SystemRandom::new(), &super::bundle::encoded(kind, payload.as_bytes())).unwrap();
        json!({
            "mediaType": BUNDLE_TYPE,
            "verificationMaterial": { "publicKey": { "hint": "k" }, "tlogEntries": [] },
            "dsseEnvelope": { "payload": STANDARD.encode(payload), "payloadType": kind, "signatures": [{ "sig": STANDARD.encode(signature) }] },
        })
    }
}

struct Ground {
    root: tempfile::TempDir,
    registry: Registry,
    made: Made,
}

impl Ground {
    fn new() -> Ground {
        let plain = Tar::new().file("f", 0o644, b"f").finish();
        let made = image(&[(plain.clone(), gzip(&plain))], false);
        let registry = Registry::start();
        registry.push("team/app", "t", &made);
        Ground { root: tempfile::tempdir().unwrap(), registry, made }
    }

    fn digest(&self) -> String {
        digest::of(&self.made.manifest)
    }

    fn require(&self, requirement: serde_json::Value) {
        self.require_all(json!([requirement]));
    }

    fn require_all(&self, requirements: serde_json::Value) {
        let scope = self.registry.address.clone();
        let policy = json!({ "default": [{ "type": "reject" }], "transports": { "docker": { scope: requirements } } });
        fs::write(self.root.path().join("policy.json"), policy.to_string()).unwrap();
    }

    async fn pull(&self, name: &str, namespace: &str) -> Result<(), ImageError> {
        let at = |name: &str| self.root.path().join(name);
        let files = RegistryFiles { hosts: at("certs.d"), registries_conf: at("registries.conf"), auth_file: at("auth.json") };
        let mut config = StoreConfig::new(at("images"), files);
        config.platform = Platform { os: "linux".into(), architecture: "amd64".into() };
        config.trust = TrustFiles { policy: at("policy.json"), by_namespace: at("policies") };
        Store::open(config)?.pull_for(name, None, namespace).await.map(drop)
    }

    /// The pull is refused for this reason, before a layer or the config was asked for.
    async fn refused(&self, name: &str, why: &str) {
        let blobs = |made: &Made| [&made.config, &made.layers[0]].map(|blob| self.registry.requests(&digest::of(blob)));
        let before = blobs(&self.made);
        let error = self.pull(name, "").await.unwrap_err();
        assert!(matches!(&error, ImageError::Untrusted(text) if text.contains(why)), "{why}: {error}");
        assert_eq!(blobs(&self.made), before, "{why}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_signed_is_pulled() {
    let ground = Ground::new();
    let (name, digest, repository) = (ground.registry.name("team/app:t"), ground.digest(), ground.registry.name("team/app"));
    let (signer, other) = (Signer::new(), Signer::new());
    let key = ground.root.path().join("key.pub");
    fs::write(&key, signer.pem()).unwrap();
    let signed = |identity: serde_json::Value| json!({ "type": "sigstoreSigned", "keyPath": key, "signedIdentity": identity });
    let repositories = signed(json!({ "type": "matchRepository" }));
    ground.refused(&name, "policy.json").await;
    ground.require(repositories.clone());
    ground.refused(&name, "has none").await;
    other.sign(&ground.registry, "team/app", &digest, &digest, &repository);
    ground.refused(&name, "none of the policy's keys").await;
    signer.sign(&ground.registry, "team/app", &digest, &format!("sha256:{}", "0".repeat(64)), &repository);
    ground.refused(&name, "another image").await;
    signer.sign(&ground.registry, "team/app", &digest, &digest, &ground.registry.name("team/other"));
    ground.refused(&name, "for the name").await;
    signer.sign(&ground.registry, "team/app", &digest, &digest, &repository);
    ground.pull(&name, "").await.unwrap();
    ground.pull(&format!("{repository}@{digest}"), "").await.unwrap();
    // A name without a tag is not the name with one, unless a digest says which image is meant.
    ground.require(signed(json!({ "type": "matchRepoDigestOrExact" })));
    ground.refused(&name, "for the name").await;
    ground.pull(&format!("{repository}@{digest}"), "").await.unwrap();
    signer.sign(&ground.registry, "team/app", &digest, &digest, &name);
    ground.pull(&name, "").await.unwrap();
    let exact = |name: &str| signed(json!({ "type": "exactReference", "dockerReference": name }));
    ground.require(exact("reg.example/x:1"));
    ground.refused(&name, "for the name").await;
    ground.require(exact(&name));
    ground.pull(&name, "").await.unwrap();
    signer.sign(&ground.registry, "team/app", &digest, &digest, "origin.example/team/app:t");
    ground.refused(&name, "for the name").await;
    let prefix = ground.registry.address.clone();
    ground.require(signed(json!({ "type": "remapIdentity", "prefix": prefix, "signedPrefix": "origin.example" })));
    ground.pull(&name, "").await.unwrap();
    // A registry on a port is not the registry without one.
    let host = prefix.split(':').next().unwrap();
    ground.require(signed(json!({ "type": "remapIdentity", "prefix": host, "signedPrefix": "origin.example" })));
    ground.refused(&name, "for the name").await;
    ground.require(signed(json!({ "type": "exactRepository", "dockerRepository": "origin.example/team/app" })));
    ground.pull(&name, "").await.unwrap();
    // Whatever is wrong with the signature's own objects, it is the signature that is missing.
    let sig = format!("team/app/manifests/{}.sig", digest.replace(':', "-"));
    ground.registry.content.lock().unwrap().objects.insert(sig, b"{".to_vec());
    ground.refused(&name, "no image manifest").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_requirements_must_hold_and_a_rejection_asks_nobody() {
    let ground = Ground::new();
    let (name, digest) = (ground.registry.name("team/app:t"), ground.digest());
    let (one, two) = (Signer::new(), Signer::new());
    one.sign(&ground.registry, "team/app", &digest, &digest, &name);
    let by = |signer: &Signer| json!({ "type": "sigstoreSigned", "keyData": STANDARD.encode(signer.pem()) });
    let accept = json!({ "type": "insecureAcceptAnything" });
    ground.require_all(json!([accept, by(&one), by(&two)]));
    ground.refused(&name, "none of the policy's keys").await;
    ground.require_all(json!([by(&one), accept, by(&one)]));
    ground.pull(&name, "").await.unwrap();
    ground.require_all(json!([by(&one), { "type": "reject" }]));
    let before = ground.registry.requests("");
    ground.refused(&name, "are rejected").await;
    assert_eq!(ground.registry.requests(""), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_may_be_signed_in_place_of_its_images() {
    let ground = Ground::new();
    let signer = Signer::new();
    let list = test_images::index(&ground.made.manifest);
    ground.registry.content.lock().unwrap().objects.insert("team/app/manifests/multi".into(), list.clone());
    let signed = json!({ "type": "sigstoreSigned", "keyData": STANDARD.encode(signer.pem()), "signedIdentity": { "type": "matchRepository" } });
    ground.require(signed);
    let (name, repository) = (ground.registry.name("team/app:multi"), ground.registry.name("team/app"));
    ground.refused(&name, "has none").await;
    let digest = digest::of(&list);
    signer.sign(&ground.registry, "team/app", &digest, &digest, &repository);
    ground.pull(&name, "").await.unwrap();
    ground.refused(&ground.registry.name("team/app:t"), "has none").await;
}

/// By the registry's own call, and by the tag that stands for it.
#[tokio::test(flavor = "multi_thread")]
async fn signatures_that_refer_to_the_image() {
    for place in ["referrers/sha256:", "manifests/sha256-"] {
        let ground = Ground::new();
        let (signer, name, digest) = (Signer::new(), ground.registry.name("team/app:t"), ground.digest());
        ground.require(json!({ "type": "sigstoreSigned", "keyData": STANDARD.encode(signer.pem()) }));
        signer.sign(&ground.registry, "team/app", &digest, &digest, &name);
        let index = |kind: &str, digest: &str| json!({ "schemaVersion": 2, "manifests": [{ "artifactType": kind, "digest": digest, "size": 1 }] });
        let insert = |index: serde_json::Value| {
            let path = format!("team/app/{place}{}", digest::hex_of(&digest));
            ground.registry.content.lock().unwrap().objects.insert(path, index.to_string().into_bytes());
        };
        let sig = {
            let mut content = ground.registry.content.lock().unwrap();
            let manifest = content.objects.remove(&format!("team/app/manifests/{}.sig", digest.replace(':', "-"))).unwrap();
            let sig = digest::of(&manifest);
            content.objects.insert(format!("team/app/manifests/{sig}"), manifest);
            sig
        };
        ground.refused(&name, "has none").await;
        insert(index("application/spdx+json", &sig));
        ground.refused(&name, "has none").await;
        insert(index(super::signature::ARTIFACT_TYPE, "t"));
        ground.refused(&name, "has none").await;
        insert(index(super::signature::ARTIFACT_TYPE, &sig));
        ground.pull(&name, "").await.unwrap();
    }
}

const BUNDLE_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const SIGNED: &str = "https://sigstore.dev/cosign/sign/v1";

/// Artifacts that refer to the image, each with a bundle; the index calls them of `kind`.
fn attach(ground: &Ground, place: &str, bundles: &[serde_json::Value], kind: &str) {
    let mut content = ground.registry.content.lock().unwrap();
    let mut referrers = Vec::new();
    for bundle in bundles {
        let bundle = bundle.to_string().into_bytes();
        let layer = json!({ "mediaType": BUNDLE_TYPE, "digest": digest::of(&bundle), "size": bundle.len() });
        let config = json!({ "mediaType": "application/vnd.oci.empty.v1+json", "digest": digest::of(b"{}"), "size": 2 });
        let manifest =
            json!({ "schemaVersion": 2, "artifactType": BUNDLE_TYPE, "config": config, "layers": [layer] }).to_string();
        let digest = digest::of(manifest.as_bytes());
        content.objects.insert(format!("team/app/blobs/{}", digest::of(&bundle)), bundle);
        content.objects.insert(format!("team/app/manifests/{digest}"), manifest.into_bytes());
        referrers.push(json!({ "artifactType": kind, "digest": digest, "size": 1 }));
    }
    let index = json!({ "schemaVersion": 2, "manifests": referrers }).to_string();
    content.objects.insert(format!("team/app/{place}{}", digest::hex_of(&ground.digest())), index.into_bytes());
}

/// By the registry's own call, and by the tag that stands for it; and where the index does not say what its entries are.
#[tokio::test(flavor = "multi_thread")]
async fn bundles_that_refer_to_the_image() {
    for (place, kind) in [
        ("referrers/sha256:", BUNDLE_TYPE),
        ("manifests/sha256-", BUNDLE_TYPE),
        ("manifests/sha256-", "application/vnd.oci.empty.v1+json"),
        ("manifests/sha256-", ""),
    ] {
        let ground = Ground::new();
        let (signer, other, name, digest) = (Signer::new(), Signer::new(), ground.registry.name("team/app:t"), ground.digest());
        let signed = |identity: &str| json!({ "type": "sigstoreSigned", "keyData": STANDARD.encode(signer.pem()), "signedIdentity": { "type": identity } });
        let attach = |bundles: &[serde_json::Value]| attach(&ground, place, bundles, kind);
        ground.require(signed("matchDigest"));
        ground.refused(&name, "has none").await;
        attach(&[other.bundle(&digest, None, SIGNED)]);
        ground.refused(&name, "none of the policy's keys").await;
        attach(&[signer.bundle(&format!("sha256:{}", "0".repeat(64)), None, SIGNED)]);
        ground.refused(&name, "another image").await;
        attach(&[signer.bundle(&digest, None, "https://slsa.dev/provenance/v1")]);
        ground.refused(&name, "which is none of images").await;
        let mut changed = signer.bundle(&format!("sha256:{}", "0".repeat(64)), None, SIGNED);
        changed["dsseEnvelope"]["payload"] = other.bundle(&digest, None, SIGNED)["dsseEnvelope"]["payload"].clone();
        attach(&[changed]);
        ground.refused(&name, "none of the policy's keys").await;
        let mut of_blob = signer.bundle(&digest, None, SIGNED);
        of_blob["messageSignature"] = of_blob.as_object_mut().unwrap().remove("dsseEnvelope").unwrap();
        attach(&[of_blob]);
        ground.refused(&name, "no DSSE envelope").await;
        let mut of_other_type = signer.bundle(&digest, None, SIGNED);
        of_other_type["dsseEnvelope"]["payloadType"] = json!("text/plain");
        attach(&[of_other_type, json!("no bundle")]);
        ground.refused(&name, "none of its 2 signatures holds").await;
        attach(&[other.bundle(&digest, None, SIGNED), signer.bundle(&digest, None, SIGNED)]);
        ground.pull(&name, "").await.unwrap();
        // One that is for no name is not for this one.
        ground.require(signed("matchRepository"));
        ground.refused(&name, "signedIdentity is not matchDigest").await;
        attach(&[signer.bundle(&digest, Some(&ground.registry.name("team/other")), SIGNED)]);
        ground.refused(&name, "for the name").await;
        attach(&[signer.bundle(&digest, Some(&ground.registry.name("team/app")), SIGNED)]);
        ground.pull(&name, "").await.unwrap();
        // Signatures of both forms are looked at.
        other.sign(&ground.registry, "team/app", &digest, &digest, &name);
        ground.pull(&name, "").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_are_asked_about_by_where_they_come_from() {
    let ground = Ground::new();
    let at = |name: &str| ground.root.path().join(name);
    fs::write(at("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).unwrap();
    let files = RegistryFiles { hosts: at("certs.d"), registries_conf: at("registries.conf"), auth_file: at("auth.json") };
    let mut config = StoreConfig::new(at("images"), files);
    config.platform = Platform { os: "linux".into(), architecture: "amd64".into() };
    config.trust = TrustFiles { policy: at("policy.json"), by_namespace: at("policies") };
    let store = Store::open(config).unwrap();
    let name = ground.registry.name("team/app:t");
    store.pull(&name, None).await.unwrap();
    // One archive is docker's and a layout at once; without its list it is a layout.
    let (docker, layout, packed) = (at("docker.tar"), at("layout"), at("layout.tar"));
    store.export(&name, fs::File::create(&docker).unwrap()).unwrap();
    fs::create_dir(&layout).unwrap();
    let tar = |words: &[&str], at: &std::path::Path| {
        let status = std::process::Command::new("tar").args(words).current_dir(at).status();
        assert!(status.unwrap().success());
    };
    tar(&["--exclude=manifest.json", "-xf", "../docker.tar"], &layout);
    tar(&["-cf", "../layout.tar", "."], &layout);
    let accept = json!([{ "type": "insecureAcceptAnything" }]);
    let reject = json!([{ "type": "reject" }]);
    let signed = json!([{ "type": "sigstoreSigned", "keyData": STANDARD.encode(Signer::new().pem()) }]);
    let place = layout.canonicalize().unwrap();
    let cases = [
        (json!({ "default": accept }), [true, true, true]),
        (json!({ "default": reject }), [false, false, false]),
        (json!({ "default": signed }), [false, false, false]),
        (json!({ "default": reject, "transports": { "docker": { "": accept } } }), [false, false, false]),
        (json!({ "default": reject, "transports": { "docker-archive": { "": accept } } }), [true, false, false]),
        (json!({ "default": reject, "transports": { "oci": { (place.to_string_lossy()): accept } } }), [false, true, false]),
        (
            json!({ "default": accept, "transports": { "oci": { (format!("{}:t", place.display())): reject } } }),
            [true, false, true],
        ),
        (
            json!({ "default": accept, "transports": { "oci-archive": { (ground.root.path().to_string_lossy()): signed } } }),
            [true, true, false],
        ),
    ];
    for (policy, expected) in cases {
        fs::write(at("policy.json"), policy.to_string()).unwrap();
        for (path, expected) in [&docker, &layout, &packed].into_iter().zip(expected) {
            let imported = store.import(path).await;
            match &imported {
                Ok(images) => assert!(expected && images.len() == 1, "{policy}: {path:?}"),
                Err(ImageError::Untrusted(why)) => assert!(!expected && why.contains("policy for"), "{policy}: {path:?}: {why}"),
                Err(error) => panic!("{policy}: {path:?}: {error}"),
            }
        }
    }
    assert_eq!(
        fs::read_dir(at("images/layers"))
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("tmp"))
            .count(),
        0
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_may_have_a_policy_of_its_own() {
    let ground = Ground::new();
    let name = ground.registry.name("team/app:t");
    ground.require(json!({ "type": "reject" }));
    ground.refused(&name, "are rejected").await;
    let policies = ground.root.path().join("policies");
    fs::create_dir(&policies).unwrap();
    fs::write(policies.join("free.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).unwrap();
    fs::write(policies.join("broken.json"), "{").unwrap();
    ground.pull(&name, "free").await.unwrap();
    for (namespace, why) in [("other", "are rejected"), ("broken", "broken.json"), ("../free", "namespace"), ("", "are rejected")]
    {
        let error = ground.pull(&name, namespace).await.unwrap_err().to_string();
        assert!(error.contains(why), "{namespace}: {error}");
    }
}
