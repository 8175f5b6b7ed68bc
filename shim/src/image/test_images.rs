//! Layers and images made for tests.

use super::digest;
use std::io::Write;
use tar::{Builder, EntryType, Header};

pub(super) struct Tar(Builder<Vec<u8>>);

impl Tar {
    pub(super) fn new() -> Tar {
        Tar(Builder::new(Vec::new()))
    }

    /// An entry as it is given: the path is not checked.
    pub(super) fn raw(mut self, path: &str, kind: EntryType, mode: u32, link: &str, data: &[u8]) -> Tar {
        let mut header = header(path, kind, mode, data.len() as u64);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub(super) fn file(self, path: &str, mode: u32, data: &[u8]) -> Tar {
        self.raw(path, EntryType::Regular, mode, "", data)
    }

    pub(super) fn dir(self, path: &str, mode: u32) -> Tar {
        self.raw(path, EntryType::Directory, mode, "", b"")
    }

    pub(super) fn symlink(self, path: &str, target: &str) -> Tar {
        self.raw(path, EntryType::Symlink, 0o777, target, b"")
    }

    pub(super) fn hard_link(self, path: &str, target: &str) -> Tar {
        self.raw(path, EntryType::Link, 0o644, target, b"")
    }

    pub(super) fn device(mut self, path: &str, kind: EntryType, major: u32, minor: u32) -> Tar {
        let mut header = header(path, kind, 0o620, 0);
        header.set_device_major(major).unwrap();
        header.set_device_minor(minor).unwrap();
        header.set_cksum();
        self.0.append(&header, &b""[..]).unwrap();
        self
    }

    /// PAX records for the entry that follows.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Tar {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            write!(data, "{length} {key}=").unwrap();
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.raw("pax", EntryType::XHeader, 0o644, "", &data)
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn header(path: &str, kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(1000);
    header.set_gid(2000);
    header.set_mtime(1_000_000_000);
    header.set_size(size);
    header.set_cksum();
    header
}

pub(super) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn zstd(data: &[u8]) -> Vec<u8> {
    ::zstd::encode_all(data, 1).unwrap()
}

/// Bytes that do not compress, the same for the same seed.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// An image's documents: blobs are the config, then the layers.
pub(super) struct Made {
    pub(super) config: Vec<u8>,
    pub(super) manifest: Vec<u8>,
    pub(super) layers: Vec<Vec<u8>>,
}

/// `layers` are (plain tar, bytes as stored).
pub(super) fn image(layers: &[(Vec<u8>, Vec<u8>)], docker: bool) -> Made {
    image_for("linux", "amd64", layers, docker)
}

/// The same for a platform.
pub(super) fn image_for(os: &str, architecture: &str, layers: &[(Vec<u8>, Vec<u8>)], docker: bool) -> Made {
    let diff_ids: Vec<String> = layers.iter().map(|(plain, _)| digest::of(plain)).collect();
    let config = serde_json::json!({
        "architecture": architecture, "os": os, "config": { "User": "1000", "Cmd": ["sh"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = serde_json::to_vec(&config).unwrap();
    let (kind, of_config, of_layer) = if docker {
        let docker = "application/vnd.docker";
        (
            format!("{docker}.distribution.manifest.v2+json"),
            format!("{docker}.container.image.v1+json"),
            format!("{docker}.image.rootfs.diff.tar.gzip"),
        )
    } else {
        let oci = "application/vnd.oci.image";
        (format!("{oci}.manifest.v1+json"), format!("{oci}.config.v1+json"), format!("{oci}.layer.v1.tar+gzip"))
    };
    let layers: Vec<Vec<u8>> = layers.iter().map(|(_, stored)| stored.clone()).collect();
    let blobs: Vec<_> =
        layers.iter().map(|l| serde_json::json!({ "mediaType": of_layer, "digest": digest::of(l), "size": l.len() })).collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": kind,
        "config": { "mediaType": of_config, "digest": digest::of(&config), "size": config.len() },
        "layers": blobs,
    });
    Made { config, manifest: serde_json::to_vec(&manifest).unwrap(), layers }
}

/// An index of the manifest for linux/amd64 beside one for another machine and an attestation.
pub(super) fn index(manifest: &[u8]) -> Vec<u8> {
    let entry = |digest: &str, os: &str, architecture: &str| {
        serde_json::json!({ "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest, "size": 1,
            "platform": { "os": os, "architecture": architecture } })
    };
    let other = digest::of(b"other");
    serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2,
        "manifests": [entry(&other, "linux", "s390x"), entry(&other, "unknown", "unknown"),
            entry(&digest::of(manifest), "linux", "amd64")],
    }))
    .unwrap()
}
