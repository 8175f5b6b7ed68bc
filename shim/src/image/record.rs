//! The durable form of images and layers: one versioned JSON file each.

use super::error::ImageError;
use super::layers::LayerFormat;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

pub(super) const VERSION: u32 = 1;

/// `<root>/<hex of the config digest>.json`
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ImageRecord {
    pub(super) version: u32,
    pub(super) id: String,
    /// The config as the registry served it: its digest is the id.
    pub(super) config: String,
    pub(super) repo_tags: Vec<String>,
    pub(super) repo_digests: Vec<String>,
    pub(super) layers: Vec<LayerRecord>,
}

/// `<root>/layers/<hex of the chain id>.json`, beside the directory of that name; in an image's record too.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LayerRecord {
    pub(super) version: u32,
    pub(super) chain_id: String,
    pub(super) bytes: u64,
    pub(super) inodes: u64,
    #[serde(default)]
    pub(super) format: LayerFormat,
}

/// Reads a record of a version this program knows.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, ImageError> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let what = || format!("read record {}", path.display());
    let bytes = fs::read(path).map_err(|e| ImageError::io(what(), e))?;
    let Version { version } = serde_json::from_slice(&bytes).map_err(|e| ImageError::Corrupt(format!("{}: {e}", what())))?;
    if version != VERSION {
        return Err(ImageError::Corrupt(format!("{}: version {version} is not known", what())));
    }
    serde_json::from_slice(&bytes).map_err(|e| ImageError::Corrupt(format!("{}: {e}", what())))
}

/// Replaces the record as a whole. With `durable` it is on disk when this returns.
pub(super) fn write(path: &Path, record: &impl Serialize, durable: bool) -> Result<(), ImageError> {
    let temp = path.with_extension("json.tmp");
    let result = try_write(path, &temp, record, durable);
    if result.is_err() {
        let _ = fs::remove_file(&temp);
    }
    result.map_err(|e| ImageError::io(format!("write record {}", path.display()), e))
}

fn try_write(path: &Path, temp: &Path, record: &impl Serialize, durable: bool) -> std::io::Result<()> {
    let mut file = File::create(temp)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    if durable {
        file.sync_all()?;
    }
    let directory = path.parent().filter(|_| durable).map(File::open).transpose()?;
    let before = if durable && path.exists() { Some(fs::read(path)?) } else { None };
    fs::rename(temp, path)?;
    directory.map_or(Ok(()), |directory| directory.sync_all()).inspect_err(|_| {
        // What is said to have failed is not found by the next start.
        let _ = match before {
            Some(before) => fs::write(temp, before).and_then(|()| fs::rename(temp, path)),
            None => fs::remove_file(path),
        };
    })
}

/// Removes the record; one that is absent is fine.
pub(super) fn remove(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(ImageError::io(format!("remove record {}", path.display()), e)),
        _ => Ok(()),
    }
}
