//! Pulls from registries that want something: TLS with a CA of their own, a client's certificate, tokens, headers, patience.

use super::test_images::{Made, Tar, gzip, image};
use super::test_registry::Registry;
use super::*;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::fs;
use std::sync::Arc;

struct Ground {
    root: tempfile::TempDir,
}

impl Ground {
    fn new() -> Ground {
        Ground { root: tempfile::tempdir().unwrap() }
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    async fn pull(&self, name: &str, auth: Option<RegistryAuth>) -> Result<(), ImageError> {
        let at = |name: &str| self.root.path().join(name);
        let files = RegistryFiles { hosts: at("certs.d"), registries_conf: at("registries.conf"), auth_file: at("auth.json") };
        let mut config = StoreConfig::new(at("images"), files);
        config.platform = Platform { os: "linux".into(), architecture: "amd64".into() };
        let store = Store::open(config)?;
        let pulled = store.pull(name, auth).await.map(|image| assert!(store.get(name).is_some_and(|found| found.id == image.id)));
        store.list().iter().for_each(|image| store.remove(&image.id).unwrap());
        pulled
    }
}

fn small() -> Made {
    let plain = Tar::new().file("f", 0o644, &test_images::noise(3, 100_000)).finish();
    image(&[(plain.clone(), gzip(&plain))], false)
}

fn login(user: &str, password: &str) -> Option<RegistryAuth> {
    Some(RegistryAuth::Basic { username: user.into(), password: password.into() })
}

/// A certificate authority, and a server that only it vouches for.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Certificate and key.
    fn issue(&self, name: &str) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        (CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &self.0).unwrap(), key)
    }

    fn server(&self, wants_client: bool) -> Arc<ServerConfig> {
        let (certificate, key) = self.issue("127.0.0.1");
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
        let builder = if wants_client {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
            builder.with_client_cert_verifier(verifier)
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Arc::new(builder.with_single_cert(vec![certificate.der().clone()], key).unwrap())
    }
}

fn unavailable(result: Result<(), ImageError>) {
    assert!(matches!(result, Err(ImageError::RegistryUnavailable(_))), "{result:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_a_ca_of_its_own_and_client_certificates() {
    let (ground, authority) = (Ground::new(), Authority::new());
    let registry = Registry::start_tls(authority.server(true));
    registry.push("a/b", "t", &small());
    registry.content.lock().unwrap().login = Some("me:secret".into());
    let (name, address) = (registry.name("a/b:t"), registry.address.clone());
    let hosts = format!("certs.d/{address}/hosts.toml");
    let auth = login("me", "secret");
    ground.write(&hosts, &format!("server = \"https://{address}\"\n"));
    unavailable(ground.pull(&name, auth.clone()).await);
    ground.write(&format!("certs.d/{address}/ca.pem"), &authority.0.pem());
    ground.write(&hosts, &format!("server = \"https://{address}\"\nca = \"ca.pem\"\n"));
    unavailable(ground.pull(&name, auth.clone()).await);
    let (certificate, key) = authority.issue("a node");
    ground.write(&format!("certs.d/{address}/node.pem"), &certificate.pem());
    ground.write(&format!("certs.d/{address}/node.key"), &key.serialize_pem());
    let pair = "client = [[\"node.pem\", \"node.key\"]]\n";
    ground.write(&hosts, &format!("server = \"https://{address}\"\nca = [\"ca.pem\"]\n{pair}"));
    ground.pull(&name, auth.clone()).await.unwrap();
    let result = ground.pull(&name, login("me", "wrong")).await;
    assert!(matches!(result, Err(ImageError::Unauthorized(_))), "{result:?}");
    // Somebody else's CA.
    ground.write(&format!("certs.d/{address}/ca.pem"), &Authority::new().0.pem());
    unavailable(ground.pull(&name, auth.clone()).await);
    ground.write(&hosts, &format!("server = \"https://{address}\"\nskip_verify = true\n{pair}"));
    ground.pull(&name, auth.clone()).await.unwrap();
    ground.write(&hosts, &format!("server = \"https://{address}\"\nca = \"node.key\"\n"));
    let error = ground.pull(&name, auth).await.unwrap_err().to_string();
    assert!(error.contains("TLS"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_conf_says_where_images_come_from() {
    let (ground, authority) = (Ground::new(), Authority::new());
    let (registry, mirror) = (Registry::start_tls(authority.server(false)), Registry::start());
    registry.push("deep/team/app", "t", &small());
    mirror.push("copy/app", "t", &small());
    let location = format!("[[registry]]\nprefix = \"corp.example/team\"\nlocation = \"{}/deep/team\"\n", registry.address);
    // A loopback address is spoken to without TLS, whatever else is said of it.
    ground.write("registries.conf", &location);
    unavailable(ground.pull("corp.example/team/app:t", None).await);
    let mirrored = format!("{location}insecure = true\n[[registry.mirror]]\nlocation = \"{}/copy\"\n", mirror.address);
    ground.write("registries.conf", &mirrored);
    ground.pull("corp.example/team/app:t", None).await.unwrap();
    assert!(mirror.requests("/v2/copy/app/manifests/t") == 1 && registry.requests("/v2") == 0);
    ground.write("registries.conf", &format!("{location}blocked = true\n"));
    let error = ground.pull("corp.example/team/app:t", None).await.unwrap_err();
    assert!(matches!(&error, ImageError::Unauthorized(why) if why.contains("blocked by")), "{error}");
    // Short names: an alias, and registries that are searched in order.
    let other = Registry::start();
    other.push("tool", "latest", &small());
    let search = format!("unqualified-search-registries = [\"{}\", \"{}\"]\n", mirror.address, other.address);
    ground.write("registries.conf", &format!("{search}[aliases]\n\"app\" = \"{}/copy/app\"\n", mirror.address));
    ground.pull("app:t", None).await.unwrap();
    ground.pull("tool", None).await.unwrap();
    let error = ground.pull("missing", None).await.unwrap_err();
    assert!(matches!(error, ImageError::NotFound(_)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_go_where_they_belong() {
    let ground = Ground::new();
    let (registry, mirror) = (Registry::start(), Registry::start());
    for (one, user) in [(&registry, "main:1"), (&mirror, "mirror:2")] {
        one.push("a/b", "t", &small());
        one.content.lock().unwrap().login = Some(user.into());
    }
    let name = registry.name("a/b:t");
    ground.write(&format!("certs.d/{}/hosts.toml", registry.address), &format!("[host.\"http://{}\"]\n", mirror.address));
    ground.pull(&name, login("main", "1")).await.unwrap();
    let seen = mirror.content.lock().unwrap().authorizations.clone();
    assert!(!seen.is_empty() && seen.iter().all(String::is_empty), "the mirror saw {seen:?}");
    let asked = registry.requests("/v2");
    let encode = |text: &str| RegistryFileEntry::auth(text);
    let file = serde_json::json!({ "auths": { &mirror.address: encode("mirror:2"), format!("{}/a", registry.address): encode("main:1") } });
    ground.write("auth.json", &file.to_string());
    ground.pull(&name, None).await.unwrap();
    assert_eq!(registry.requests("/v2"), asked, "the mirror served it all");
    mirror.content.lock().unwrap().objects.clear();
    ground.pull(&name, None).await.unwrap();
    assert!(registry.requests("/v2") > asked);
    // A refresh token.
    registry.content.lock().unwrap().identity = Some("refresh".into());
    let identity = |token: &str| Some(RegistryAuth::Identity { token: token.into() });
    ground.pull(&name, identity("refresh")).await.unwrap();
    let result = ground.pull(&name, identity("other")).await;
    assert!(matches!(result, Err(ImageError::Unauthorized(_))), "{result:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_file_of_credentials_fails_the_pulls_that_want_it() {
    let (ground, registry, open) = (Ground::new(), Registry::start(), Registry::start());
    registry.push("a/b", "t", &small());
    registry.content.lock().unwrap().login = Some("me:secret".into());
    open.push("a/b", "t", &small());
    ground.write("auth.json", "{ \"auths\": ");
    let name = registry.name("a/b:t");
    ground.pull(&name, login("me", "secret")).await.expect("it brings its own");
    ground.pull(&open.name("a/b:t"), None).await.expect("nobody asks for any");
    let error = ground.pull(&name, None).await.unwrap_err().to_string();
    assert!(error.contains("read credentials") && error.contains("auth.json"), "{error}");
}

struct RegistryFileEntry;

impl RegistryFileEntry {
    fn auth(text: &str) -> serde_json::Value {
        use base64::Engine as _;
        serde_json::json!({ "auth": base64::engine::general_purpose::STANDARD.encode(text) })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_that_want_patience() {
    let ground = Ground::new();
    let (registry, elsewhere) = (Registry::start(), Registry::start());
    for one in [&registry, &elsewhere] {
        one.push("a/b", "t", &small());
    }
    let name = registry.name("a/b:t");
    registry.content.lock().unwrap().busy = vec!["Retry-After: 0".into(), "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT".into()];
    ground.pull(&name, None).await.unwrap();
    // A token that ends in the middle of a pull.
    {
        let mut content = registry.content.lock().unwrap();
        content.login = Some("me:secret".into());
        content.token_lasts = Some(3);
    }
    ground.pull(&name, login("me", "secret")).await.unwrap();
    assert_eq!(registry.requests("/token"), 2);
    // Blobs are somewhere else, where the credentials are nobody's business.
    registry.content.lock().unwrap().redirect = Some(format!("http://{}", elsewhere.address));
    ground.pull(&name, login("me", "secret")).await.unwrap();
    let seen = elsewhere.content.lock().unwrap().authorizations.clone();
    assert!(!seen.is_empty() && seen.iter().all(String::is_empty), "{seen:?}");
    // A header that the configuration gives.
    registry.content.lock().unwrap().redirect = None;
    registry.content.lock().unwrap().header = Some(("x-tenant".into(), "7".into()));
    let hosts = format!("certs.d/{}/hosts.toml", registry.address);
    let result = ground.pull(&name, login("me", "secret")).await;
    assert!(result.is_err());
    ground.write(&hosts, &format!("server = \"http://{}\"\n[header]\nx-tenant = \"7\"\n", registry.address));
    ground.pull(&name, login("me", "secret")).await.unwrap();
    ground.write(&hosts, "server = 7\n");
    let error = ground.pull(&name, None).await.unwrap_err().to_string();
    assert!(error.contains("hosts.toml") && error.contains("server is not a string"), "{error}");
}
