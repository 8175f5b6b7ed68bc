//! The images that all runtimes get from the same registry: a small one to run, and those whose pulls are measured.

use super::{config::PAUSE, streams};
use crate::{
    image,
    registry::{Packed, Registry},
};
use anyhow::{Context, Result, ensure};
use flate2::{Compression, write::GzEncoder};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// The image that pods run, without the registry.
pub(super) const RUN: &str = "compare/run:1";

/// The image whose files many pods read, without the registry.
pub(super) const SHARED: &str = "compare/shared:1";

/// An image whose pull is measured.
pub(super) struct Measured {
    /// Without the registry.
    pub(super) name: &'static str,
    pub(super) title: String,
    pub(super) layers: Vec<Packed>,
}

/// Folders of a Debian machine, each a layer of the big image: compiler, headers, texts, two libraries of scripts, programs.
const BIG: [&[&str]; 6] = [
    &["usr/lib/gcc"],
    &["usr/include"],
    &["usr/share/doc", "usr/share/man"],
    &["usr/share/perl", "usr/lib/python3"],
    &["usr/lib/git-core"],
    &["usr/sbin"],
];

/// Gives the registry the images that pods need.
pub(super) fn add_runnable(registry: &Registry) -> Result<()> {
    let config = |command: &[&str]| {
        let config = json!({ "Cmd": command, "Env": ["PATH=/bin"] });
        json!({ "architecture": image::ARCHITECTURE, "os": "linux", "config": config })
    };
    let [busybox, probe] = image::layers()?;
    registry.add_packed("compare/run", "1", &[gzip(&busybox)?], &config(&["sh"]));
    let (name, tag) = streams::IMAGE.split_once(':').context("the image of streams has a tag")?;
    registry.add_packed(name, tag, &[gzip(&busybox)?, gzip(&probe)?], &config(&["sh"]));
    let pause = image::programs_layer(&[("pause", &image::pause()?)])?;
    let (name, tag) = PAUSE.split_once(':').context("the pause image has a tag")?;
    registry.add_packed(name, tag, &[gzip(&pause)?], &config(&["/pause"]));
    Ok(())
}

/// Gives the registry the image that many pods share: programs, and a layer of 125 MB.
pub(super) fn add_shared(registry: &Registry, cache: &Path) -> Result<()> {
    fs::create_dir_all(cache)?;
    let [busybox, _] = image::layers()?;
    let large = cached(&cache.join("big0"), || archive(BIG[0]), "gzip")?;
    let config = json!({ "architecture": image::ARCHITECTURE, "os": "linux", "config": { "Env": ["PATH=/bin"] } });
    registry.add_packed("compare/shared", "1", &[gzip(&busybox)?, large], &config);
    Ok(())
}

/// Makes the images to pull, once for each target folder, and gives them to the registry.
pub(super) fn add_measured(registry: &Registry, cache: &Path) -> Result<Vec<Measured>> {
    fs::create_dir_all(cache)?;
    let mut big = Vec::new();
    for (number, folders) in BIG.iter().enumerate() {
        big.push(cached(&cache.join(format!("big{number}")), || archive(folders), "gzip")?);
    }
    let small = cached(&cache.join("small"), small_files, "gzip")?;
    let zstd = cached(&cache.join("zstd"), || archive(BIG[3]), "zstd")?;
    let images = [("compare/big", big), ("compare/small", vec![small]), ("compare/zstd", vec![zstd])];
    let config = json!({ "architecture": image::ARCHITECTURE, "os": "linux", "config": {} });
    let mut measured = Vec::new();
    for (name, layers) in images {
        registry.add_packed(name, "1", &layers, &config);
        let megabytes = layers.iter().map(|layer| layer.blob.len()).sum::<usize>() as f64 / 1e6;
        let kind = if name.ends_with("zstd") { "zstd" } else { "gzip" };
        let files = if name.ends_with("small") { ", 30,000 files" } else { "" };
        let title = format!("{}: {megabytes:.0} MB {kind}, layers: {}{files}", name.trim_start_matches("compare/"), layers.len());
        measured.push(Measured { name, title, layers });
    }
    Ok(measured)
}

/// A layer from the cache, or made and kept there: the archive packed by a program, beside its digest.
fn cached(path: &Path, archive: impl FnOnce() -> Result<Vec<u8>>, packer: &str) -> Result<Packed> {
    let digest_path = path.with_extension("diff_id");
    if !digest_path.exists() {
        println!("==> make the layer {}", path.display());
        let plain = archive()?;
        let plain_path = path.with_extension("tar");
        fs::write(&plain_path, &plain)?;
        let output =
            Command::new(packer).args(["-c", "-q"]).arg(&plain_path).output().with_context(|| format!("run {packer}"))?;
        ensure!(output.status.success(), "{packer}: {}", String::from_utf8_lossy(&output.stderr));
        fs::remove_file(plain_path)?;
        fs::write(path, output.stdout)?;
        // Last: it says that the layer is whole.
        fs::write(&digest_path, digest(&plain))?;
    }
    let media_type = if packer == "zstd" { ZSTD } else { GZIP };
    Ok(Packed { media_type, blob: fs::read(path)?, diff_id: fs::read_to_string(digest_path)? })
}

fn archive(folders: &[&str]) -> Result<Vec<u8>> {
    let mut tar = Command::new("tar");
    tar.args(["-C", "/", "--sort=name", "--numeric-owner", "--mtime=@1700000000", "-cf", "-"]).args(folders);
    let output = tar.output().context("run tar")?;
    ensure!(output.status.success(), "tar {}: {}", folders.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// 30,000 files of 0 to 4 KiB in 300 folders.
fn small_files() -> Result<Vec<u8>> {
    let mut names = Vec::new();
    for number in 0..30_000usize {
        let line = format!("{number}: {}\n", hex::encode(Sha256::digest(number.to_le_bytes())));
        let length = (number * 7919) % 4096;
        let content: Vec<u8> = line.bytes().cycle().take(length).collect();
        names.push((format!("files/{}/{number}", number % 300), content));
    }
    let files: Vec<(&str, u32, &[u8])> = names.iter().map(|(name, content)| (name.as_str(), 0o644, content.as_slice())).collect();
    image::files_layer(&files)
}

fn gzip(plain: &[u8]) -> Result<Packed> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(plain)?;
    Ok(Packed { media_type: GZIP, blob: encoder.finish()?, diff_id: digest(plain) })
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// What nobody can beat by much: each layer unpacked by gzip or zstd to one file, one after the other. Seconds.
pub(super) fn limit(image: &Measured, folder: &Path) -> Result<f64> {
    let begin = Instant::now();
    for (number, layer) in image.layers.iter().enumerate() {
        let program = if layer.media_type == ZSTD { "zstd" } else { "gzip" };
        let file = fs::File::create(folder.join(number.to_string()))?;
        let mut child = Command::new(program).arg("-dc").stdin(Stdio::piped()).stdout(file).spawn()?;
        child.stdin.take().context("an input")?.write_all(&layer.blob)?;
        ensure!(child.wait()?.success(), "{program} -dc failed");
    }
    Ok(begin.elapsed().as_secs_f64())
}
