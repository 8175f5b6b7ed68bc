//! Images and layers as the rest of the daemon sees them.

use super::copy;
use super::digest::hex_of;
use super::error::ImageError;
use super::layers::{LayerFormat, Layers};
use super::read;
use super::record::LayerRecord;
use oci_spec::image::ImageConfiguration;
use rustix::fs::{CWD, FileType, Mode, OFlags, Stat};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One layer of an image.
#[derive(Clone)]
pub struct Layer {
    /// Digest over this layer's and all lower layers' diff ids.
    pub chain_id: String,
    /// The directory with the layer's files and overlayfs whiteouts, or the EROFS image (`.erofs`) of such a one.
    pub path: PathBuf,
    format: LayerFormat,
    bytes: u64,
    layers: Arc<Layers>,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Layer").field(&self.path).finish()
    }
}

impl Layer {
    pub(super) fn new(layers: &Arc<Layers>, record: &LayerRecord) -> Layer {
        let (path, format) = layers.place(&record.chain_id);
        Layer { chain_id: record.chain_id.clone(), path, format, bytes: record.bytes, layers: Arc::clone(layers) }
    }

    /// How it is kept.
    pub fn format(&self) -> LayerFormat {
        self.format
    }

    /// What it takes on disk.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The layer's files as a directory. An EROFS image is mounted for that in the store's tree, and stays.
    ///
    /// # Errors
    /// `Io`.
    pub fn root(&self) -> Result<OwnedFd, ImageError> {
        match self.format {
            LayerFormat::Directory => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let opened = rustix::fs::openat(CWD, &self.path, flags, Mode::empty());
                opened.map_err(|e| ImageError::io(format!("open layer {}", self.path.display()), e))
            }
            LayerFormat::Erofs => self.layers.mounts.open(hex_of(&self.chain_id), &self.path),
        }
    }
}

/// An image on disk, as it was when it was looked up.
#[derive(Debug)]
pub struct Image {
    /// `sha256:` and the digest of the config.
    pub id: String,
    /// Normalised `name:tag`, sorted.
    pub repo_tags: Vec<String>,
    /// Normalised `name@digest`, sorted.
    pub repo_digests: Vec<String>,
    /// Bytes its layers and config take on disk; layers shared with other images count in full.
    pub size_bytes: u64,
    /// The parsed config.
    pub config: ImageConfiguration,
    /// Lowest first.
    pub layers: Vec<Layer>,
}

impl Image {
    /// The content of a regular file of the image, symlinks followed inside it; `None` if there is none.
    ///
    /// # Errors
    /// `TooMany` if the file is longer than `limit_bytes`; `Io`.
    pub fn read_file(&self, path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, ImageError> {
        read::read_file(&self.roots()?, path, limit_bytes)
    }

    /// Whether there is a file or directory at `path`, symlinks followed inside the image.
    ///
    /// # Errors
    /// `Io`.
    pub fn has_path(&self, path: &str) -> Result<bool, ImageError> {
        read::has_path(&self.roots()?, path)
    }

    /// Where `path` leads, symlinks followed inside the image, as a path below its root, and what is there. What is missing is plain names.
    ///
    /// # Errors
    /// `Io`.
    pub fn real_path(&self, path: &str) -> Result<(PathBuf, Option<FileType>), ImageError> {
        read::real_path(&self.roots()?, path)
    }

    /// The owner and mode of the directory at `path`, as [`Image::real_path`] has it; `None` if there is none.
    ///
    /// # Errors
    /// `Io`.
    pub fn directory(&self, path: &Path) -> Result<Option<Stat>, ImageError> {
        read::directory(&self.roots()?, path)
    }

    /// Copies directories, by paths as [`Image::real_path`] has them, into others that exist and that nobody else changes. One that lies in
    /// another is copied alone. Blocks.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub fn copy(&self, directories: &[(PathBuf, PathBuf)]) -> Result<(), ImageError> {
        copy::copy(&copy::joined(&self.layers)?, directories)
    }

    /// The layers' roots, the uppermost first.
    fn roots(&self) -> Result<Vec<OwnedFd>, ImageError> {
        self.layers.iter().rev().map(Layer::root).collect()
    }

    pub(super) fn chain_ids(&self) -> Vec<String> {
        self.layers.iter().map(|l| l.chain_id.clone()).collect()
    }
}
