//! A registry on loopback for tests of pulling: one thread for each connection, images in memory, and faults on request.
//!
//! Speaks as much of the distribution protocol as a client that pulls needs, over plain HTTP/1.1, one request for a connection.

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// User and password that a guarded registry takes.
pub const CREDENTIALS: (&str, &str) = ("anchor", "chain");
/// What the token endpoint gives out, and takes.
const TOKEN: &str = "a-token-of-the-test";
/// Longest wait for a client that says nothing.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";

/// What a request must carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Guard {
    #[default]
    None,
    /// User and password with each request.
    Basic,
    /// A token, which the token endpoint gives for user and password.
    Token,
}

/// How blobs of layers are served wrongly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fault {
    #[default]
    None,
    /// One byte in the middle differs; the length is right.
    Corrupt,
    /// The connection ends after half of the bytes.
    Cut,
    /// The same, once; then all is well.
    CutOnce,
    /// Nothing but status 503.
    Unavailable,
    /// The bytes of another, valid blob.
    Other,
}

#[derive(Debug, Default)]
struct Content {
    guard: Guard,
    fault: Fault,
    /// Manifests by `repository:tag` and `repository@digest`.
    manifests: BTreeMap<String, (String, Vec<u8>)>,
    blobs: BTreeMap<String, Vec<u8>>,
    /// Digests of layers, whose blobs the fault concerns.
    layers: Vec<String>,
    requests: Vec<String>,
}

/// A registry; its end comes with the drop.
#[derive(Debug)]
pub struct Registry {
    address: SocketAddr,
    content: Arc<Mutex<Content>>,
    _listening: Option<Listening>,
}

#[derive(Debug)]
struct Listening {
    listener: TcpListener,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Registry {
    /// Listens on a free port of loopback, in the network namespace of the calling thread.
    pub fn start() -> Result<Registry> {
        let unbound = Registry {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            content: Arc::new(Mutex::new(Content::default())),
            _listening: None,
        };
        unbound.listen()
    }

    /// One of the same content and address that does not listen yet: for another network namespace.
    pub fn twin(&self) -> Registry {
        Registry { address: self.address, content: self.content.clone(), _listening: None }
    }

    /// Listens, in the network namespace of the calling thread.
    pub fn listen(&self) -> Result<Registry> {
        let listener = TcpListener::bind(self.address).context("listen on loopback")?;
        let address = listener.local_addr()?;
        let stopped = Arc::new(AtomicBool::new(false));
        let (incoming, shared, end) = (listener.try_clone()?, self.content.clone(), stopped.clone());
        let thread = std::thread::Builder::new().name("registry".into()).spawn(move || {
            while !end.load(Ordering::Relaxed) {
                let Ok((stream, _)) = incoming.accept() else { continue };
                let shared = shared.clone();
                std::thread::spawn(move || {
                    // A client that goes away is a thing that tests do.
                    let _ = serve(stream, address, &shared);
                });
            }
        })?;
        let listening = Listening { listener, stopped, thread: Some(thread) };
        Ok(Registry { address, content: self.content.clone(), _listening: Some(listening) })
    }

    /// `127.0.0.1:port`, which begins the names of its images.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    pub fn set_guard(&self, guard: Guard) {
        locked(&self.content).guard = guard;
    }

    pub fn set_fault(&self, fault: Fault) {
        locked(&self.content).fault = fault;
    }

    /// Method and path of every request so far.
    pub fn requests(&self) -> Vec<String> {
        locked(&self.content).requests.clone()
    }

    /// Takes an image of layers that are packed already, as `repository:tag`.
    pub fn add_packed(&self, repository: &str, tag: &str, layers: &[Packed], config: &Value) {
        let mut config = config.clone();
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
        let config = config.to_string().into_bytes();
        let config_digest = digest(&config);
        let mut content = locked(&self.content);
        let mut descriptors = Vec::new();
        for layer in layers {
            let digest = digest(&layer.blob);
            descriptors.push(json!({ "mediaType": layer.media_type, "digest": digest, "size": layer.blob.len() }));
            content.blobs.insert(digest, layer.blob.clone());
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": descriptors,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len() },
        })
        .to_string()
        .into_bytes();
        content.blobs.insert(config_digest, config);
        content.manifests.insert(format!("{repository}@{}", digest(&manifest)), (MANIFEST_TYPE.into(), manifest.clone()));
        content.manifests.insert(format!("{repository}:{tag}"), (MANIFEST_TYPE.into(), manifest));
    }

    /// Takes an image of these uncompressed layers as `repository:tag`, behind an index as publishers make them; returns the
    /// digests of the index and of the configuration.
    pub fn add(&self, repository: &str, tag: &str, layers: &[Vec<u8>], config: &Value) -> Result<Added> {
        let diff_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
        let mut config = config.clone();
        config["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
        let config = config.to_string().into_bytes();
        let mut content = locked(&self.content);
        let mut descriptors = Vec::new();
        for layer in layers {
            let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(layer)?;
            let blob = encoder.finish()?;
            let digest = digest(&blob);
            descriptors.push(json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": blob.len()
            }));
            content.layers.push(digest.clone());
            content.blobs.insert(digest, blob);
        }
        let config_digest = digest(&config);
        let mut blobs: Vec<String> = descriptors.iter().filter_map(|one| one["digest"].as_str().map(str::to_owned)).collect();
        blobs.push(config_digest.clone());
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": descriptors,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len() },
        })
        .to_string()
        .into_bytes();
        let manifest_digest = digest(&manifest);
        let platform = |architecture: &str| json!({ "architecture": architecture, "os": "linux" });
        let foreign = json!({
            "mediaType": MANIFEST_TYPE, "digest": digest(b"for another machine"), "size": 19, "platform": platform("s390x")
        });
        let own = json!({
            "mediaType": MANIFEST_TYPE, "digest": manifest_digest, "size": manifest.len(), "platform": platform(crate::image::ARCHITECTURE)
        });
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [foreign, own] }).to_string().into_bytes();
        let index_digest = digest(&index);
        content.blobs.insert(config_digest.clone(), config);
        content.manifests.insert(format!("{repository}@{manifest_digest}"), (MANIFEST_TYPE.into(), manifest));
        content.manifests.insert(format!("{repository}@{index_digest}"), (INDEX_TYPE.into(), index.clone()));
        content.manifests.insert(format!("{repository}:{tag}"), (INDEX_TYPE.into(), index));
        Ok(Added { index: index_digest, blobs, config: config_digest })
    }

    /// Puts signatures, as payload and base64, where those of the manifest or index `of` are looked for, in place of earlier ones.
    pub fn sign(&self, repository: &str, of: &str, signatures: &[(String, String)]) {
        let mut content = locked(&self.content);
        let mut layers = Vec::new();
        for (payload, signature) in signatures {
            let payload = payload.clone().into_bytes();
            layers.push(json!({
                "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": digest(&payload), "size": payload.len(),
                "annotations": { "dev.cosignproject.cosign/signature": signature },
            }));
            content.blobs.insert(digest(&payload), payload);
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": layers,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(b"{}"), "size": 2 },
        });
        let name = format!("{repository}:{}.sig", of.replace(':', "-"));
        content.manifests.insert(name, (MANIFEST_TYPE.into(), manifest.to_string().into_bytes()));
    }

    /// Sends a registry's name here: writes `<directory>/<name>/hosts.toml`, as containerd reads them.
    pub fn mirror(&self, directory: &Path, name: &str) -> Result<()> {
        let directory = directory.join(name);
        fs::create_dir_all(&directory)?;
        let text =
            format!("server = \"http://{0}\"\n\n[host.\"http://{0}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", self.address);
        fs::write(directory.join("hosts.toml"), text).context("write hosts.toml")
    }
}

/// A layer as a registry has it.
#[derive(Debug, Clone)]
pub struct Packed {
    pub media_type: &'static str,
    pub blob: Vec<u8>,
    /// Digest of the archive in it.
    pub diff_id: String,
}

impl Packed {
    /// A layer that is not compressed.
    pub fn plain(archive: Vec<u8>) -> Packed {
        Packed { media_type: "application/vnd.oci.image.layer.v1.tar", diff_id: digest(&archive), blob: archive }
    }
}

/// Digests of an image that a registry has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Added {
    pub index: String,
    pub config: String,
    /// The configuration and the layers.
    pub blobs: Vec<String>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        // Wakes the thread, whose network namespace may be another one.
        let stopped =
            self.listener.try_clone().and_then(|listener| TcpStream::from(OwnedFd::from(listener)).shutdown(Shutdown::Both));
        if let (Ok(()), Some(thread)) = (stopped, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// `sha256:` and 64 hex digits.
fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn locked(content: &Mutex<Content>) -> MutexGuard<'_, Content> {
    content.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Request {
    method: String,
    path: String,
    authorization: String,
}

fn read_request(stream: &TcpStream) -> Result<Request> {
    let mut reader = BufReader::new(stream.take(64 << 10));
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().context("a method")?, words.next().context("a path")?);
    let mut authorization = String::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(Request { method, path, authorization });
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("authorization")
        {
            value.trim().clone_into(&mut authorization);
        }
    }
}

struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body that are sent before the connection ends.
    sent: usize,
}

impl Answer {
    fn new(status: &'static str, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> Answer {
        Answer { status, headers, sent: body.len(), body }
    }

    fn error(status: &'static str, code: &str) -> Answer {
        let body = json!({ "errors": [{ "code": code, "message": code }] }).to_string().into_bytes();
        Answer::new(status, vec![("Content-Type", "application/json".into())], body)
    }
}

fn serve(mut stream: TcpStream, address: SocketAddr, content: &Mutex<Content>) -> Result<()> {
    stream.set_read_timeout(Some(CLIENT_LIMIT))?;
    stream.set_write_timeout(Some(CLIENT_LIMIT))?;
    let request = read_request(&stream)?;
    let answer = answer(&request, address, &mut locked(content));
    let mut head = format!("HTTP/1.1 {}\r\nConnection: close\r\nContent-Length: {}\r\n", answer.status, answer.body.len());
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method != "HEAD" {
        stream.write_all(&answer.body[..answer.sent])?;
    }
    Ok(())
}

fn answer(request: &Request, address: SocketAddr, content: &mut Content) -> Answer {
    let path = request.path.split('?').next().unwrap_or_default();
    content.requests.push(format!("{} {path}", request.method));
    let basic = format!("Basic {}", STANDARD.encode(format!("{}:{}", CREDENTIALS.0, CREDENTIALS.1)));
    if path == "/token" {
        return match request.authorization == basic {
            true => Answer::new(
                "200 OK",
                vec![("Content-Type", "application/json".into())],
                json!({ "token": TOKEN }).to_string().into(),
            ),
            false => Answer::error("401 Unauthorized", "UNAUTHORIZED"),
        };
    }
    let (wanted, challenge) = match content.guard {
        Guard::None => (request.authorization.clone(), String::new()),
        Guard::Basic => (basic, "Basic realm=\"test\"".to_owned()),
        Guard::Token => (format!("Bearer {TOKEN}"), format!("Bearer realm=\"http://{address}/token\",service=\"test\"")),
    };
    if request.authorization != wanted {
        let mut answer = Answer::error("401 Unauthorized", "UNAUTHORIZED");
        answer.headers.push(("WWW-Authenticate", challenge));
        return answer;
    }
    match path.strip_prefix("/v2/").unwrap_or_default() {
        "" => Answer::new("200 OK", Vec::new(), b"{}".to_vec()),
        rest => match (rest.split_once("/manifests/"), rest.split_once("/blobs/")) {
            (Some((repository, reference)), _) => manifest(content, repository, reference),
            (_, Some((_, digest))) => blob(content, digest),
            _ => Answer::error("404 Not Found", "NAME_UNKNOWN"),
        },
    }
}

fn manifest(content: &Content, repository: &str, reference: &str) -> Answer {
    let separator = if reference.starts_with("sha256:") { '@' } else { ':' };
    match content.manifests.get(&format!("{repository}{separator}{reference}")) {
        Some((kind, body)) => {
            Answer::new("200 OK", vec![("Content-Type", kind.clone()), ("Docker-Content-Digest", digest(body))], body.clone())
        }
        None => Answer::error("404 Not Found", "MANIFEST_UNKNOWN"),
    }
}

fn blob(content: &mut Content, digest: &str) -> Answer {
    let Some(blob) = content.blobs.get(digest) else { return Answer::error("404 Not Found", "BLOB_UNKNOWN") };
    let mut answer = Answer::new("200 OK", vec![("Content-Type", "application/octet-stream".into())], blob.clone());
    if !content.layers.iter().any(|layer| layer == digest) {
        return answer;
    }
    match content.fault {
        Fault::None => {}
        Fault::Corrupt => {
            let middle = answer.body.len() / 2;
            answer.body[middle] ^= 1;
        }
        Fault::Cut => answer.sent = answer.body.len() / 2,
        Fault::CutOnce => {
            answer.sent = answer.body.len() / 2;
            content.fault = Fault::None;
        }
        Fault::Unavailable => return Answer::error("503 Service Unavailable", "UNAVAILABLE"),
        Fault::Other => {
            if let Some(other) = content.layers.iter().find(|layer| *layer != digest).and_then(|layer| content.blobs.get(layer)) {
                answer = Answer::new("200 OK", answer.headers, other.clone());
            }
        }
    }
    answer
}
