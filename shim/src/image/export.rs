//! Writes images as an OCI layout in a tar, which `docker load` takes too. Layers come out as the uncompressed archives that they were
//! made from, so that the image keeps its id.

use super::digest::{HashingReader, hex_of};
use super::error::ImageError;
use super::object::Layer;
use super::record::ImageRecord;
use super::split::{Joined, Kept};
use super::store::Store;
use super::{digest, reference::Reference};
use serde_json::json;
use std::fs::File;
use std::io::{self, Seek, Write};
use tar::{Builder, EntryType, Header};

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

impl Store {
    /// Writes an image as an OCI layout in a tar, with `manifest.json` for docker. Blocks.
    ///
    /// # Errors
    /// `NotFound`, `Io`; `Corrupt` if a layer is damaged, or is a directory of which no archive can be made again.
    pub fn export(&self, name: &str, to: impl Write) -> Result<(), ImageError> {
        let missing = || ImageError::NotFound(format!("image {name}"));
        let image = self.get(name).ok_or_else(missing)?;
        let _lease = self.lease(&image);
        let record = self.0.record_of(&image.id).ok_or_else(missing)?;
        let part = |(layer, diff_id): (&Layer, &String)| match self.0.layers.files(&layer.chain_id)? {
            Some((split, kept)) => Ok(Part { diff_id: diff_id.clone(), split, kept }),
            None => Err(ImageError::Corrupt(format!(
                "export {name}: layer {diff_id} was unpacked by an earlier version, and its archive cannot be made again; \
                 remove the image and pull it anew"
            ))),
        };
        let parts = image.layers.iter().zip(image.config.rootfs().diff_ids()).map(part).collect::<Result<_, _>>()?;
        write(&record, parts, to)
    }
}

/// A layer's archive: its digest, what is kept of it, and the layer.
struct Part {
    diff_id: String,
    split: File,
    kept: Kept,
}

/// Writes the layout. Errors: a layer that is damaged is `Corrupt`, and what was written is of no use.
fn write(record: &ImageRecord, parts: Vec<Part>, to: impl Write) -> Result<(), ImageError> {
    let failed = |e: io::Error| ImageError::io(format!("export {}", record.id), e);
    let mut archive = Builder::new(to);
    document(&mut archive, "oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }).to_string()).map_err(failed)?;
    document(&mut archive, &blob(&record.id), &record.config).map_err(failed)?;
    let mut layers = Vec::new();
    for mut part in parts {
        let length = Joined::length(part.split.try_clone().map_err(failed)?, &part.kept).map_err(failed)?;
        part.split.rewind().map_err(failed)?;
        // One file may be several layers of an image.
        let written = layers.iter().any(|layer: &serde_json::Value| layer["digest"] == part.diff_id.as_str());
        layers.push(json!({ "mediaType": LAYER_TYPE, "digest": part.diff_id, "size": length }));
        if written {
            continue;
        }
        let mut reader = HashingReader::new(Joined::new(part.split, part.kept).map_err(failed)?);
        let mut header = header(length);
        archive.append_data(&mut header, blob(&part.diff_id), &mut reader).map_err(failed)?;
        let found = reader.finish();
        if found != part.diff_id {
            return Err(ImageError::Corrupt(format!("export {}: layer {} has digest {found} now", record.id, part.diff_id)));
        }
    }
    let paths: Vec<String> = layers.iter().filter_map(|layer| layer["digest"].as_str()).map(blob).collect();
    let config = json!({ "mediaType": CONFIG_TYPE, "digest": record.id, "size": record.config.len() });
    let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": layers }).to_string();
    let manifest_digest = digest::of(manifest.as_bytes());
    document(&mut archive, &blob(&manifest_digest), &manifest).map_err(failed)?;
    let descriptor = |annotations: serde_json::Value| json!({ "mediaType": MANIFEST_TYPE, "digest": manifest_digest, "size": manifest.len(), "annotations": annotations });
    let mut manifests: Vec<_> = record.repo_tags.iter().map(|name| descriptor(names(name))).collect();
    if manifests.is_empty() {
        manifests.push(descriptor(json!({})));
    }
    let index = json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests });
    document(&mut archive, "index.json", &index.to_string()).map_err(failed)?;
    let docker = json!([{ "Config": blob(&record.id), "RepoTags": record.repo_tags, "Layers": paths }]);
    document(&mut archive, "manifest.json", &docker.to_string()).map_err(failed)?;
    archive.into_inner().and_then(|mut to| to.flush()).map_err(failed)
}

/// The annotations by which other programs find a name.
fn names(name: &str) -> serde_json::Value {
    let tag = name.parse::<Reference>().ok().and_then(|reference| reference.tag().map(str::to_owned)).unwrap_or_default();
    json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag })
}

fn blob(digest: &str) -> String {
    format!("blobs/sha256/{}", hex_of(digest))
}

/// The same image always becomes the same archive.
fn header(length: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(length);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn document(archive: &mut Builder<impl Write>, name: &str, text: &str) -> io::Result<()> {
    archive.append_data(&mut header(text.len() as u64), name, text.as_bytes())
}
