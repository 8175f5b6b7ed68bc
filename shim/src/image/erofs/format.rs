//! Structures of the image as bytes.

use super::BLOCK;
use std::io;

/// `EROFS_SUPER_MAGIC_V1`
const MAGIC: u32 = 0xe0f5_e1e2;
/// Where the superblock lies in the first block, and its length.
const SUPER_AT: usize = 1024;
const SUPER_BYTES: usize = 128;
/// A unit of inode numbers.
const SLOT: usize = 32;
/// The root's inode lies behind the superblock: its number has 16 bits only.
pub(super) const ROOT_AT: usize = SUPER_AT + SUPER_BYTES;
/// `struct erofs_inode_extended`
pub(super) const INODE_BYTES: usize = 64;
/// `struct erofs_xattr_ibody_header`
const XATTR_HEADER_BYTES: usize = 12;
/// Longest value: its length has 16 bits.
const XATTR_VALUE_MAX: usize = u16::MAX as usize;
/// All of an inode's: their number of words has 16 bits.
const XATTRS_MAX: usize = 4 * (u16::MAX as usize - 1);
/// `EROFS_NULL_ADDR`
const NO_BLOCK: u32 = u32::MAX;
/// `EROFS_FEATURE_COMPAT_MTIME`: times are those of the last modification.
const COMPAT_MTIME: u32 = 2;

/// Type bits of a mode (inode(7)).
pub(super) mod kind {
    pub(in super::super) const FIFO: u16 = 0o010_000;
    pub(in super::super) const CHARACTER: u16 = 0o020_000;
    pub(in super::super) const DIRECTORY: u16 = 0o040_000;
    pub(in super::super) const BLOCK: u16 = 0o060_000;
    pub(in super::super) const REGULAR: u16 = 0o100_000;
    pub(in super::super) const SYMLINK: u16 = 0o120_000;
}

/// What every inode has. `mode` is with the type bits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub(super) mtime: (i64, u32),
    /// The inode's attributes as they are stored: [`xattrs`].
    pub(super) xattrs: Vec<u8>,
}

/// Where an inode's content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Nowhere.
    Empty,
    /// In blocks from this one on.
    Blocks(u32),
    /// Whole blocks from this one on (if there are any), and the rest behind the inode.
    Tail(Option<u32>),
    /// It is a device: major and minor number.
    Device(u32, u32),
}

/// The number of the inode at this place.
pub(super) fn number(at: u64) -> u64 {
    at / SLOT as u64
}

/// The place of an inode.
pub(super) fn place(number: u64) -> u64 {
    number * SLOT as u64
}

/// Where an inode of these attributes keeps the number of its links.
pub(super) const LINKS_AT: u64 = 44;

/// The inode with its extended attributes.
pub(super) fn inode(attributes: &Attributes, serial: u32, links: u32, size: u64, content: Content) -> Vec<u8> {
    const EXTENDED: u16 = 1;
    const PLAIN: u16 = 0;
    const INLINE: u16 = 2;
    let layout = if matches!(content, Content::Tail(_)) { INLINE } else { PLAIN };
    let union = match content {
        Content::Empty | Content::Tail(None) => NO_BLOCK,
        Content::Blocks(block) | Content::Tail(Some(block)) => block,
        Content::Device(major, minor) => (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
    };
    let words = match attributes.xattrs.len() {
        0 => 0,
        bytes => 1 + (bytes - XATTR_HEADER_BYTES) / 4,
    };
    let mut out = Vec::with_capacity(INODE_BYTES + attributes.xattrs.len());
    out.extend((layout << 1 | EXTENDED).to_le_bytes());
    out.extend(u16::try_from(words).unwrap_or(0).to_le_bytes());
    out.extend(attributes.mode.to_le_bytes());
    out.extend([0; 2]);
    out.extend(size.to_le_bytes());
    out.extend(union.to_le_bytes());
    out.extend(serial.to_le_bytes());
    out.extend(attributes.uid.to_le_bytes());
    out.extend(attributes.gid.to_le_bytes());
    out.extend(attributes.mtime.0.to_le_bytes());
    out.extend(attributes.mtime.1.to_le_bytes());
    out.extend(links.to_le_bytes());
    out.extend([0; 16]);
    out.extend(&attributes.xattrs);
    out
}

/// Extended attributes as they lie behind an inode. Left out is what the format has no prefix for: a file system that does not know an
/// attribute does not keep it either.
pub(super) fn xattrs<'a>(pairs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> io::Result<Vec<u8>> {
    let mut entries = Vec::new();
    for (key, value) in pairs {
        let Some((index, name)) = prefixed(key) else { continue };
        let too_long = |_| io::Error::new(io::ErrorKind::InvalidData, "an extended attribute is too long");
        if value.len() > XATTR_VALUE_MAX {
            return Err(too_long(()));
        }
        entries.push(u8::try_from(name.len()).map_err(|_| too_long(()))?);
        entries.push(index);
        entries.extend(u16::try_from(value.len()).map_err(|_| too_long(()))?.to_le_bytes());
        entries.extend(name);
        entries.extend(value);
        entries.resize(entries.len().next_multiple_of(4), 0);
    }
    if entries.is_empty() {
        return Ok(entries);
    }
    if entries.len() > XATTRS_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "extended attributes are too many"));
    }
    let mut out = vec![0; XATTR_HEADER_BYTES];
    out.append(&mut entries);
    Ok(out)
}

/// The prefix's number, and the name behind it.
fn prefixed(key: &[u8]) -> Option<(u8, &[u8])> {
    match key {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => [(&b"user."[..], 1), (b"trusted.", 4), (b"security.", 6)]
            .iter()
            .find_map(|(prefix, index)| key.strip_prefix(*prefix).map(|name| (*index, name)))
            .filter(|(_, name)| !name.is_empty()),
    }
}

/// Writes the superblock into the first block.
pub(super) fn superblock(first: &mut [u8; BLOCK], blocks: u32, inodes: u64) {
    let mut out = Vec::with_capacity(SUPER_BYTES);
    out.extend(MAGIC.to_le_bytes());
    out.extend([0; 4]);
    out.extend(COMPAT_MTIME.to_le_bytes());
    out.push(12);
    out.push(0);
    out.extend(u16::try_from(number(ROOT_AT as u64)).unwrap_or(0).to_le_bytes());
    out.extend(inodes.to_le_bytes());
    // No build time: the same layer always becomes the same image.
    out.extend([0; 12]);
    out.extend(blocks.to_le_bytes());
    out.resize(SUPER_BYTES, 0);
    if let Some(place) = first.get_mut(SUPER_AT..ROOT_AT) {
        place.copy_from_slice(&out);
    }
}
