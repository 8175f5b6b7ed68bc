//! Two registry servers that the world uses, as processes of a test: distribution (Debian's docker-registry) and go-containerregistry's.
//! And the images that are pushed into them, by curl.

use crate::{
    authority::Pair,
    tokens::{ISSUER, SERVICE, Tokens},
};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use windlass_integration::{image, node::output_of, process::Process};

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// An image as a registry has it.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) layers: Vec<Vec<u8>>,
}

impl Image {
    /// Of uncompressed layers, which are stored inside gzip as they are, so that sizes are known.
    pub(crate) fn new(layers: &[Vec<u8>], fields: Value) -> Result<Image> {
        let diff_ids: Vec<String> = layers.iter().map(|layer| digest(layer)).collect();
        let mut inner = json!({ "Cmd": ["sh"], "Env": ["PATH=/bin"] });
        for (key, value) in fields.as_object().into_iter().flatten() {
            inner[key] = value.clone();
        }
        let config = json!({
            "architecture": image::ARCHITECTURE, "os": "linux", "config": inner, "rootfs": { "type": "layers", "diff_ids": diff_ids }
        });
        let layers = layers.iter().map(|layer| packed(layer)).collect::<Result<Vec<_>>>()?;
        let config = config.to_string().into_bytes();
        let described: Vec<Value> = layers.iter().map(|layer| described(LAYER, layer)).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": described_config(&config), "layers": described,
        });
        Ok(Image { manifest: manifest.to_string().into_bytes(), config, layers })
    }

    pub(crate) fn id(&self) -> String {
        digest(&self.config)
    }

    pub(crate) fn digest(&self) -> String {
        digest(&self.manifest)
    }
}

fn described_config(config: &[u8]) -> Value {
    described("application/vnd.oci.image.config.v1+json", config)
}

pub(crate) fn described(media_type: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": digest(bytes), "size": bytes.len() })
}

fn packed(layer: &[u8]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    flate2::read::GzEncoder::new(layer, flate2::Compression::fast()).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// `sha256:` and 64 hex digits.
pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// A registry's process; its end comes with the drop.
pub(crate) struct Server {
    _process: Process,
    pub(crate) address: String,
    scheme: &'static str,
    /// What curl needs to push.
    arguments: Vec<String>,
    directory: PathBuf,
}

/// How a distribution registry is reached.
#[derive(Default, Clone, Copy)]
pub(crate) struct Ways<'a> {
    pub(crate) tls: Option<&'a Pair>,
    pub(crate) tokens: Option<&'a Tokens>,
    /// Where it listens; loopback if nothing is said.
    pub(crate) at: Option<&'a str>,
}

impl Server {
    /// Debian's docker-registry, over what lies in `storage`: several may share that.
    pub(crate) fn distribution(directory: &Path, storage: &Path, ways: Ways<'_>) -> Result<Server> {
        let mut http = json!({ "addr": format!("{}:0", ways.at.unwrap_or("127.0.0.1")) });
        if let Some(pair) = ways.tls {
            http["tls"] = json!({ "certificate": pair.certificate, "key": pair.key });
        }
        let mut config = json!({
            "version": "0.1", "log": { "level": "info" }, "http": http, "storage": { "filesystem": { "rootdirectory": storage } }
        });
        if let Some(tokens) = ways.tokens {
            let token = json!({ "realm": tokens.realm, "service": SERVICE, "issuer": ISSUER, "rootcertbundle": tokens.bundle });
            config["auth"] = json!({ "token": token });
        }
        // JSON is YAML, too.
        let path = tempfile::Builder::new().prefix("registry-").suffix(".yml").tempfile_in(directory)?.keep()?.1;
        fs::write(&path, config.to_string())?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&path).env("OTEL_TRACES_EXPORTER", "none").stdin(Stdio::null());
        let mut process =
            Process::from(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().context("start docker-registry")?);
        let log = BufReader::new(process.stderr.take().context("its log")?);
        let mut server = Server {
            _process: process,
            address: String::new(),
            scheme: if ways.tls.is_some() { "https" } else { "http" },
            arguments: Vec::new(),
            directory: directory.to_owned(),
        };
        let mut said = String::new();
        let mut lines = log.lines();
        for line in lines.by_ref().map_while(Result::ok) {
            if let Some((_, rest)) = line.split_once("listening on ") {
                server.address = rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
                // The rest of what it says is of no interest, but must go somewhere.
                std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
                return Ok(server);
            }
            said.push_str(&line);
            said.push('\n');
        }
        bail!("docker-registry ended: {said}")
    }

    /// go-containerregistry's, built by [`windlass_integration::go::registry`].
    pub(crate) fn containerregistry(
        directory: &Path,
        program: &Path,
        tls: Option<(&Pair, &Path)>,
        client: Option<&Pair>,
        login: Option<&str>,
    ) -> Result<Server> {
        let mut command = Command::new(program);
        let mut arguments = Vec::new();
        if let Some((pair, authority)) = tls {
            command.arg("-certificate").arg(&pair.certificate).arg("-key").arg(&pair.key);
            arguments.extend(["--cacert".into(), authority.display().to_string()]);
            if let Some(client) = client {
                command.arg("-client-ca").arg(authority);
                arguments.extend(["--cert".into(), client.certificate.display().to_string()]);
                arguments.extend(["--key".into(), client.key.display().to_string()]);
            }
        }
        if let Some(login) = login {
            command.args(["-login", login]);
            arguments.extend(["--user".into(), login.to_owned()]);
        }
        let mut process = Process::from(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?);
        let mut address = String::new();
        BufReader::new(process.stdout.take().context("its output")?).read_line(&mut address)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        Ok(Server { _process: process, address: address.trim().into(), scheme, arguments, directory: directory.to_owned() })
    }

    /// `127.0.0.1:port/rest`
    pub(crate) fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    fn curl(&self, words: &[&str], body: Option<&[u8]>) -> Result<String> {
        let mut all = vec!["-sS", "--fail-with-body", "-D", "-", "-o", "/dev/null", "--noproxy", "*"];
        all.extend(self.arguments.iter().map(String::as_str));
        let file = self.directory.join("body");
        let data = format!("@{}", file.display());
        if let Some(body) = body {
            fs::write(&file, body)?;
            all.extend(["--data-binary", &data, "-H", "Expect:"]);
        }
        all.extend(words);
        output_of("curl", &all)
    }

    pub(crate) fn push_blob(&self, repository: &str, blob: &[u8]) -> Result<()> {
        let begin = format!("{}/v2/{repository}/blobs/uploads/", self.url());
        let head = self.curl(&["-X", "POST", &begin], Some(b""))?;
        let location = head.lines().find_map(|line| {
            let (name, value) = line.split_once(": ")?;
            name.eq_ignore_ascii_case("location").then(|| value.trim().to_owned())
        });
        let location = location.with_context(|| format!("no place for a blob: {head}"))?;
        let location = if location.starts_with('/') { self.url() + &location } else { location };
        let separator = if location.contains('?') { '&' } else { '?' };
        let end = format!("{location}{separator}digest={}", digest(blob));
        self.curl(&["-X", "PUT", "-H", "Content-Type: application/octet-stream", &end], Some(blob)).map(drop)
    }

    pub(crate) fn push_manifest(&self, repository: &str, reference: &str, media_type: &str, manifest: &[u8]) -> Result<()> {
        let url = format!("{}/v2/{repository}/manifests/{reference}", self.url());
        self.curl(&["-X", "PUT", "-H", &format!("Content-Type: {media_type}"), &url], Some(manifest)).map(drop)
    }

    pub(crate) fn push(&self, repository: &str, tag: &str, image: &Image) -> Result<()> {
        for blob in image.layers.iter().chain([&image.config]) {
            self.push_blob(repository, blob)?;
        }
        self.push_manifest(repository, tag, MANIFEST, &image.manifest)
    }
}
