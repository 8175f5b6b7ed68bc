//! Images from files: an OCI layout (directory, or a tar of one) or a `docker save` archive, plain or compressed.

use super::digest::{hex_of, is_digest};
use super::error::ImageError;
use super::layers::{Layers, TempLayer};
use super::manifest::{self, Descriptor, Document, Manifest, Platform};
use super::reference::Reference;
use super::store::Plan;
use super::transfer::Source;
use super::trust::Origin;
use super::unpack::decompress;
use super::{
    digest,
    extract::{self, Limits},
};
use rustix::fs::{self, CWD, Mode, OFlags, ResolveFlags};
use serde::Deserialize;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

const MAX_DOCUMENT_BYTES: u64 = 4 << 20;
const MAX_IMAGES: usize = 1000;
const MAX_DEPTH: u32 = 3;
const REFERENCE: &str = "org.opencontainers.image.ref.name";

/// The images of an archive and, while their layers are unpacked, where it lies.
pub(super) struct Found {
    pub(super) plans: Vec<(Plan, Origin)>,
    /// Holds the unpacked archive; gone when dropped.
    pub(super) _temp: Option<TempLayer>,
}

/// Reads what the archive holds; blobs are opened, not yet read.
pub(super) fn scan(path: &Path, layers: &Layers, platform: &Platform, limits: Limits) -> Result<Found, ImageError> {
    let what = || format!("import {}", path.display());
    let failed = |e: std::io::Error| ImageError::io(what(), e);
    let real = path.canonicalize().map_err(failed)?;
    if real.is_dir() {
        let plans = scan_dir(&real, &real, platform).map_err(|e| e.within(what()))?;
        return Ok(Found { plans, _temp: None });
    }
    let temp = layers.temp_dir()?;
    let mut raw = BufReader::with_capacity(128 << 10, File::open(path).map_err(failed)?);
    let plain = decompress(&mut raw).map_err(failed)?;
    extract::extract(plain, temp.path(), limits, None).map_err(|e| e.within(what()))?;
    let plans = scan_dir(temp.path(), &real, platform).map_err(|e| e.within(what()))?;
    Ok(Found { plans, _temp: Some(temp) })
}

/// docker's `manifest.json` first: archives that have both name their tags only there in full. `real` is what was asked for, be it the
/// archive of the directory.
fn scan_dir(path: &Path, real: &Path, platform: &Platform) -> Result<Vec<(Plan, Origin)>, ImageError> {
    let root = fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| ImageError::io("open", e))?;
    if let Some(bytes) = read_document(&root, "manifest.json")? {
        let origin = || Origin { transport: "docker-archive", path: real.to_path_buf(), label: None };
        return Ok(docker_archive(&root, &bytes)?.into_iter().map(|plan| (plan, origin())).collect());
    }
    let transport = if path == real { "oci" } else { "oci-archive" };
    match read_document(&root, "index.json")? {
        Some(bytes) => {
            let origin = |(plan, label)| (plan, Origin { transport, path: real.to_path_buf(), label });
            Ok(oci_layout(&root, &bytes, platform)?.into_iter().map(origin).collect())
        }
        None => Err(ImageError::Corrupt("is neither an OCI layout nor a docker archive: no index.json, no manifest.json".into())),
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEntry {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn docker_archive(root: &OwnedFd, bytes: &[u8]) -> Result<Vec<Plan>, ImageError> {
    let entries: Vec<DockerEntry> =
        serde_json::from_slice(bytes).map_err(|e| ImageError::Corrupt(format!("manifest.json: {e}")))?;
    bounded(entries.len())?;
    let mut plans = Vec::new();
    for entry in entries {
        let config = document(root, &entry.config)?;
        let mut tags = Vec::new();
        for tag in entry.repo_tags.unwrap_or_default() {
            tags.extend(tag.parse::<Reference>()?.tagged());
        }
        let mut plan = Plan::new(config, tags, Vec::new())?;
        let sources = entry.layers.iter().map(|name| Ok(Source::File(open(root, name)?, None)));
        plan.set_sources(sources.collect::<Result<_, ImageError>>()?)?;
        plans.push(plan);
    }
    Ok(plans)
}

/// Each image, and what the layout calls it.
fn oci_layout(root: &OwnedFd, bytes: &[u8], platform: &Platform) -> Result<Vec<(Plan, Option<String>)>, ImageError> {
    let Document::Index(index) = manifest::parse(bytes, "index.json")? else {
        return Err(ImageError::Corrupt("index.json: is no index".into()));
    };
    bounded(index.len())?;
    let mut plans = Vec::new();
    for descriptor in &index {
        let image = resolve(root, descriptor, platform, 0)?;
        let config = blob(root, &image.config)?;
        let name = named(descriptor);
        let tags = name.as_ref().and_then(Reference::tagged);
        let digests = name.as_ref().map(|n| n.with_digest(&descriptor.digest));
        let mut plan = Plan::new(config, tags.into_iter().collect(), digests.into_iter().collect())?;
        let sources = image.layers.iter().map(|l| Ok(Source::File(open(root, &blob_path(&l.digest))?, Some(l.digest.clone()))));
        plan.set_sources(sources.collect::<Result<_, ImageError>>()?)?;
        plans.push((plan, descriptor.annotations.get(REFERENCE).cloned()));
    }
    Ok(plans)
}

/// The manifest behind a descriptor, through indexes.
fn resolve(root: &OwnedFd, descriptor: &Descriptor, platform: &Platform, depth: u32) -> Result<Manifest, ImageError> {
    let bytes = blob(root, descriptor)?;
    match manifest::parse(&bytes, &descriptor.digest)? {
        Document::Manifest(manifest) => Ok(manifest),
        Document::Index(_) if depth >= MAX_DEPTH => {
            Err(ImageError::TooMany(format!("{}: indexes nest too deep", descriptor.digest)))
        }
        Document::Index(index) => resolve(root, manifest::select(&index, platform, &descriptor.digest)?, platform, depth + 1),
    }
}

/// A full name in the layout's annotations; a bare tag names no image.
fn named(descriptor: &Descriptor) -> Option<Reference> {
    let full = descriptor.annotations.get("io.containerd.image.name");
    let name = full.or_else(|| descriptor.annotations.get(REFERENCE).filter(|n| n.contains(['/', ':'])))?;
    name.parse().ok()
}

fn bounded(images: usize) -> Result<(), ImageError> {
    if images > MAX_IMAGES {
        return Err(ImageError::TooMany(format!("{images} images are over the limit of {MAX_IMAGES}")));
    }
    Ok(())
}

fn blob_path(digest: &str) -> String {
    format!("blobs/sha256/{}", hex_of(digest))
}

fn blob(root: &OwnedFd, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
    debug_assert!(is_digest(&descriptor.digest));
    let bytes = document(root, &blob_path(&descriptor.digest))?;
    let found = digest::of(&bytes);
    if found != descriptor.digest {
        return Err(ImageError::Corrupt(format!("blob {}: its bytes have digest {found}", descriptor.digest)));
    }
    Ok(bytes)
}

fn document(root: &OwnedFd, name: &str) -> Result<Vec<u8>, ImageError> {
    read_document(root, name)?.ok_or_else(|| ImageError::Corrupt(format!("{name} is missing")))
}

fn read_document(root: &OwnedFd, name: &str) -> Result<Option<Vec<u8>>, ImageError> {
    let file = match open_raw(root, name) {
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        other => other.map_err(|e| ImageError::io(format!("open {name}"), e))?,
    };
    let mut bytes = Vec::new();
    file.take(MAX_DOCUMENT_BYTES + 1).read_to_end(&mut bytes).map_err(|e| ImageError::io(format!("read {name}"), e))?;
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(ImageError::TooMany(format!("{name} is over the limit of {MAX_DOCUMENT_BYTES} bytes")));
    }
    Ok(Some(bytes))
}

fn open(root: &OwnedFd, name: &str) -> Result<File, ImageError> {
    open_raw(root, name).map_err(|e| match e {
        rustix::io::Errno::NOENT => ImageError::Corrupt(format!("{name} is missing")),
        e => ImageError::io(format!("open {name}"), e),
    })
}

/// Never leads out of the archive; a fifo in it is not waited for.
fn open_raw(root: &OwnedFd, name: &str) -> Result<File, rustix::io::Errno> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let fd = fs::openat2(root, name, flags, Mode::empty(), resolve)?;
    match fs::FileType::from_raw_mode(fs::fstat(&fd)?.st_mode) {
        fs::FileType::RegularFile => Ok(File::from(fd)),
        _ => Err(rustix::io::Errno::INVAL),
    }
}
