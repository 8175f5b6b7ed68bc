//! Stand-ins for the images that critest pulls, built the same each time from Debian's static busybox, a small web server and a
//! set-user-ID program. Owns their contents and names; serving them is `standin_registry`'s.

use crate::{build, node::output_of};
use anyhow::{Context, Result, ensure};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::Path,
    process::Command,
};
use tar::{Builder, EntryType, Header};

const BUSYBOX: &str = "/bin/busybox";
const WEB_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/web");
const NNP_SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go/nnp.c");
const PATH_VARIABLE: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n";
const GROUP: &str = "root:x:0:\ntty:x:5:\nwww-data:x:33:\nusers:x:100:\nnobody:x:65534:\n";
/// Media type of the manifests.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// Everything that a registry of the stand-ins serves.
#[derive(Debug, Default)]
pub struct Images {
    /// Manifests by `repository:tag` and `repository@digest`.
    pub manifests: BTreeMap<String, Vec<u8>>,
    /// Layers and configurations by digest.
    pub blobs: BTreeMap<String, Vec<u8>>,
}

/// `sha256:` and 64 hex digits.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

#[derive(Debug, Clone)]
struct Layer {
    diff_id: String,
    digest: String,
    size: usize,
}

/// A layer in the making: an uncompressed archive with fixed times and owners.
struct Tree(Builder<Vec<u8>>);

impl Tree {
    fn new() -> Tree {
        Tree(Builder::new(Vec::new()))
    }

    fn header(kind: EntryType, mode: u32, size: usize) -> Header {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header
    }

    fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        Ok(self.0.append_data(&mut Tree::header(EntryType::Directory, mode, 0), format!("{path}/"), std::io::empty())?)
    }

    fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        Ok(self.0.append_data(&mut Tree::header(EntryType::Regular, mode, bytes.len()), path, bytes)?)
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        Ok(self.0.append_link(&mut Tree::header(EntryType::Link, 0o755, 0), path, target)?)
    }
}

fn busybox() -> Result<Tree> {
    let mut tree = Tree::new();
    for path in
        ["bin", "dev", "etc", "home", "proc", "root", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/log", "var/run"]
    {
        tree.directory(path, 0o755)?;
    }
    tree.directory("tmp", 0o1777)?;
    let program = fs::read(BUSYBOX).context("read /bin/busybox (Debian package busybox-static)")?;
    tree.file("bin/busybox", 0o755, &program)?;
    let applets = Command::new(BUSYBOX).arg("--list").output().context("list the applets of busybox")?;
    let applets = String::from_utf8(applets.stdout).context("applets of busybox")?;
    // Hard links: a mask over one of them must not cover the others.
    for applet in applets.lines().filter(|name| !["busybox", "sh"].contains(name)) {
        tree.link(&format!("bin/{applet}"), "bin/busybox")?;
    }
    // Debian's build lacks these two; the specs need no more of them than this.
    if !applets.lines().any(|name| name == "pgrep") {
        tree.file(
            "bin/pgrep",
            0o755,
            b"#!/bin/sh\nfor last; do :; done\nout=$(pidof \"$last\") || exit 1\nfor pid in $out; do echo \"$pid\"; done\n",
        )?;
    }
    if !applets.lines().any(|name| name == "ipcs") {
        tree.file("bin/ipcs", 0o755, b"#!/bin/sh\necho '------ Shared Memory Segments --------'\ncat /proc/sysvipc/shm\n")?;
    }
    shell(&mut tree)?;
    tree.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    tree.file("etc/group", 0o644, GROUP.as_bytes())?;
    Ok(tree)
}

/// A shell that executes its tools, as a spec about masked paths expects, with the libraries that it is linked to.
fn shell(tree: &mut Tree) -> Result<()> {
    let program = build::executing_busybox()?;
    tree.file("bin/sh", 0o755, &fs::read(&program).context("read busybox")?)?;
    let needed = output_of("ldd", &[&program.to_string_lossy()])?;
    // `name => path (address)`, and the loader by its path alone.
    let mut made = BTreeSet::new();
    for path in needed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))) {
        let path = Path::new(path);
        for folder in path.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev().skip(1) {
            let name = folder.to_string_lossy().trim_start_matches('/').to_owned();
            if made.insert(name.clone()) {
                tree.directory(&name, 0o755)?;
            }
        }
        tree.file(&path.to_string_lossy()[1..], 0o755, &fs::read(path).with_context(|| format!("read {}", path.display()))?)?;
    }
    Ok(())
}

fn predefined_group() -> Result<Tree> {
    let mut tree = Tree::new();
    tree.file("etc/passwd", 0o644, format!("{PASSWD}default-user:x:1000:1000::/home/default-user:/bin/sh\n").as_bytes())?;
    tree.file(
        "etc/group",
        0o644,
        format!("{GROUP}default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n").as_bytes(),
    )?;
    Ok(tree)
}

/// Runs a compiler and reads what it made.
fn compiled(command: &mut Command, output: &Path) -> Result<Vec<u8>> {
    let done = command.arg("-o").arg(output).output().with_context(|| format!("run {command:?}"))?;
    ensure!(done.status.success(), "{command:?}: {}\n{}", done.status, String::from_utf8_lossy(&done.stderr));
    fs::read(output).with_context(|| format!("read {}", output.display()))
}

fn programs() -> Result<(Vec<u8>, Vec<u8>)> {
    let scratch = tempfile::tempdir().context("make a folder for the stand-ins' programs")?;
    let mut web = Command::new("go");
    web.args(["build", "-trimpath", "-ldflags", "-s -w -buildid="])
        .env("GOFLAGS", "-mod=readonly -buildvcs=false")
        .env("GOWORK", "off");
    let web = compiled(web.env("CGO_ENABLED", "0").current_dir(WEB_MODULE), &scratch.path().join("web"))?;
    let mut nnp = Command::new("gcc");
    let nnp = compiled(nnp.args(["-O2", "-static", "-s", "-Wl,--build-id=none", NNP_SOURCE]), &scratch.path().join("nnp"))?;
    Ok((web, nnp))
}

impl Images {
    /// Builds every stand-in.
    pub fn build() -> Result<Images> {
        let mut images = Images::default();
        let base = images.layer(busybox()?)?;
        images.plain(&base)?;
        images.special(&base)?;
        Ok(images)
    }

    /// Writes all of them into a directory, for [`Images::read_from`] on a machine without compilers.
    pub fn write_to(&self, directory: &Path) -> Result<()> {
        for (digest, blob) in &self.blobs {
            fs::write(directory.join(digest), blob).with_context(|| format!("write {digest}"))?;
        }
        let manifests: BTreeMap<&str, _> =
            self.manifests.iter().map(|(name, bytes)| (name.as_str(), String::from_utf8_lossy(bytes))).collect();
        fs::write(directory.join("manifests.json"), serde_json::to_vec(&manifests)?).context("write manifests.json")
    }

    /// Reads what [`Images::write_to`] wrote.
    pub fn read_from(directory: &Path) -> Result<Images> {
        let mut images = Images::default();
        let text = fs::read(directory.join("manifests.json")).context("read manifests.json")?;
        let manifests: BTreeMap<String, String> = serde_json::from_slice(&text)?;
        images.manifests.extend(manifests.into_iter().map(|(name, text)| (name, text.into_bytes())));
        for entry in fs::read_dir(directory)?.flatten() {
            if let Some(digest) = entry.file_name().to_str().filter(|name| name.starts_with("sha256:")) {
                images.blobs.insert(digest.to_owned(), fs::read(entry.path())?);
            }
        }
        Ok(images)
    }

    /// Hex digits of the stand-in whose published digest critest has built in.
    pub fn pinned_digest(&self) -> Result<String> {
        let manifest = self.manifests.get("k8s-staging-cri-tools/test-image-digest:latest").context("the image with a digest")?;
        Ok(hex::encode(Sha256::digest(manifest)))
    }

    /// Images that are busybox and a file or a user of their own.
    fn plain(&mut self, base: &Layer) -> Result<()> {
        let shell = |more: Value| merged(json!({ "Cmd": ["sh"], "Env": [PATH_VARIABLE] }), more);
        let base = std::slice::from_ref(base);
        self.add("e2e-test-images/busybox", "1.29-2", base, &shell(json!({})))?;
        for tag in ["1", "1-glibc", "1-musl", "1-uclibc", "1.35.0-glibc"] {
            self.add("docker/library/busybox", tag, base, &json!({ "Cmd": ["sh"], "Env": [PATH_VARIABLE, format!("T={tag}")] }))?;
        }
        let users = [("uid", "1002"), ("username", "www-data"), ("uid-group", "1003:users"), ("username-group", "www-data:100")];
        for (name, user) in users {
            self.add(&format!("k8s-staging-cri-tools/test-image-user-{name}"), "latest", base, &shell(json!({ "User": user })))?;
        }
        let marked = [
            ("latest", "latest", "latest"),
            ("tag", "test", "tag"),
            ("tag", "all", "all"),
            ("digest", "latest", "digest"),
            ("1", "latest", "1"),
            ("2", "latest", "2"),
            ("3", "latest", "3"),
            ("tags", "1", "tags"),
            ("tags", "2", "tags"),
            ("tags", "3", "tags"),
        ];
        for (name, tag, mark) in marked {
            let mut tree = Tree::new();
            tree.file(&format!("TEST-{mark}"), 0o644, format!("test-{mark}\n").as_bytes())?;
            let layers = [base[0].clone(), self.layer(tree)?];
            self.add(&format!("k8s-staging-cri-tools/test-image-{name}"), tag, &layers, &shell(json!({})))?;
        }
        let layers = [base[0].clone(), self.layer(predefined_group()?)?];
        self.add("k8s-staging-cri-tools/test-image-predefined-group", "latest", &layers, &shell(json!({ "User": "1000" })))
    }

    /// Web servers and the set-user-ID program.
    fn special(&mut self, base: &Layer) -> Result<()> {
        let (web, nnp) = programs()?;
        let mut tree = Tree::new();
        for path in ["usr/sbin", "usr/local", "usr/local/bin"] {
            tree.directory(path, 0o755)?;
        }
        tree.file("usr/sbin/nginx", 0o755, &web)?;
        tree.link("usr/local/bin/httpd-foreground", "usr/sbin/nginx")?;
        let layers = [base.clone(), self.layer(tree)?];
        let server = |program: &str, variable: &str| json!({ "Entrypoint": [program], "Env": [PATH_VARIABLE, variable] });
        self.add("e2e-test-images/nginx", "1.14-2", &layers, &server("/usr/sbin/nginx", "WEB_KIND=nginx"))?;
        self.add("e2e-test-images/httpd", "2.4.39-4", &layers, &server("/usr/local/bin/httpd-foreground", "WEB_KIND=httpd"))?;
        self.add("k8s-staging-cri-tools/hostnet-nginx-amd64", "latest", &layers, &server("/usr/sbin/nginx", "WEB_PORT=12003"))?;
        let mut tree = Tree::new();
        tree.file("nnp", 0o4755, &nnp)?;
        let layers = [self.layer(tree)?];
        self.add("e2e-test-images/nonewprivs", "1.3", &layers, &json!({ "Entrypoint": ["/nnp"], "Env": [PATH_VARIABLE] }))
    }

    fn layer(&mut self, tree: Tree) -> Result<Layer> {
        let plain = tree.0.into_inner()?;
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&plain)?;
        let blob = encoder.finish()?;
        let layer = Layer { diff_id: digest(&plain), digest: digest(&blob), size: blob.len() };
        self.blobs.insert(layer.digest.clone(), blob);
        Ok(layer)
    }

    fn add(&mut self, repository: &str, tag: &str, layers: &[Layer], config: &Value) -> Result<()> {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = serde_json::to_vec(&config)?;
        let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
        let layers: Vec<Value> =
            layers.iter().map(|layer| json!({ "mediaType": kind, "digest": layer.digest, "size": layer.size })).collect();
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": layers,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len() },
        }))?;
        self.blobs.insert(digest(&config), config);
        self.manifests.insert(format!("{repository}@{}", digest(&manifest)), manifest.clone());
        self.manifests.insert(format!("{repository}:{tag}"), manifest);
        Ok(())
    }
}

fn merged(mut base: Value, more: Value) -> Value {
    if let (Some(base), Value::Object(more)) = (base.as_object_mut(), more) {
        base.extend(more);
    }
    base
}
