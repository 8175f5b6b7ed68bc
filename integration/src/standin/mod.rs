//! Stand-ins for the images that suites pull, built the same each time from Debian's programs, a small web server and a set-user-ID
//! program. Owns their contents and names; serving them is `standin_registry`'s.

mod critest;
mod e2e;

use crate::image::{ARCHITECTURE, libraries};
use anyhow::{Context, Result, ensure};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::{Path, PathBuf},
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
#[derive(Debug, Clone, Default)]
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
struct Tree {
    archive: Builder<Vec<u8>>,
    /// What programs brought: libraries, and their folders.
    libraries: BTreeSet<PathBuf>,
}

impl Tree {
    fn new() -> Tree {
        Tree { archive: Builder::new(Vec::new()), libraries: BTreeSet::new() }
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
        Ok(self.archive.append_data(&mut Tree::header(EntryType::Directory, mode, 0), format!("{path}/"), std::io::empty())?)
    }

    fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        Ok(self.archive.append_data(&mut Tree::header(EntryType::Regular, mode, bytes.len()), path, bytes)?)
    }

    fn link(&mut self, path: &str, target: &str) -> Result<()> {
        Ok(self.archive.append_link(&mut Tree::header(EntryType::Link, 0o755, 0), path, target)?)
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        Ok(self.archive.append_link(&mut Tree::header(EntryType::Symlink, 0o777, 0), path, target)?)
    }

    /// A program of this machine, with the libraries that it is linked to where they are here.
    fn program(&mut self, path: &str, program: &Path) -> Result<()> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        self.file(path, 0o755, &read(program)?)?;
        for library in libraries(program)? {
            for folder in library.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev().skip(1) {
                if self.libraries.insert(folder.to_owned()) {
                    self.directory(&folder.to_string_lossy()[1..], 0o755)?;
                }
            }
            if self.libraries.insert(library.clone()) {
                self.file(&library.to_string_lossy()[1..], 0o755, &read(&library)?)?;
            }
        }
        Ok(())
    }
}

/// busybox with its tools, and another shell, which executes them: the static busybox calls them within itself.
fn busybox(shell: &Path) -> Result<Tree> {
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
    tree.program("bin/sh", shell)?;
    tree.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
    tree.file("etc/group", 0o644, GROUP.as_bytes())?;
    Ok(tree)
}

/// Runs a compiler and reads what it made.
fn compiled(command: &mut Command, output: &Path) -> Result<Vec<u8>> {
    let done = command.arg("-o").arg(output).output().with_context(|| format!("run {command:?}"))?;
    ensure!(done.status.success(), "{command:?}: {}\n{}", done.status, String::from_utf8_lossy(&done.stderr));
    fs::read(output).with_context(|| format!("read {}", output.display()))
}

/// The web server and the set-user-ID program.
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

    fn layer(&mut self, tree: Tree) -> Result<Layer> {
        let plain = tree.archive.into_inner()?;
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
            "architecture": ARCHITECTURE, "os": "linux", "config": config,
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
