//! From the entries of a layer's archive to the image. The rules are those of unpacking into a directory: nothing leads outside, later
//! entries replace earlier ones, whiteouts become overlayfs'.

use super::super::archive::{Archive, Entry};
use super::super::error::ImageError;
use super::super::extract::{Limits, OPAQUE, PATH_MAX, WHITEOUT, Written, confine, keeps_xattr};
use super::super::layers::LayerFormat;
use super::super::split::Recorder;
use super::format::{Attributes, Content, INODE_BYTES, LINKS_AT, inode, kind, number, place, superblock, xattrs};
use super::output::Output;
use super::tree::{Child, Tree, invalid};
use super::{BLOCK, directory};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tar::EntryType;

/// Read from the archive at once; zeros of this length become a hole.
const COPY_BYTES: usize = 64 << 10;

/// Makes the image of the archive in an empty file; gives back the reader behind the archive's end. The recorder gets what the image
/// has not of the archive so far.
pub(in super::super) fn build<R: Read>(
    reader: R,
    file: &File,
    limits: Limits,
    recorder: Option<Recorder>,
) -> Result<(Written, R, Option<Recorder>), ImageError> {
    let mut archive = Archive::recorded(reader, recorder);
    let made = Attributes { mode: kind::DIRECTORY | 0o755, ..Attributes::default() };
    let mut builder = Builder {
        tree: Tree::new(made),
        output: Output::new(file),
        inodes: 0,
        logical_bytes: 0,
        limits,
        buffer: vec![0; COPY_BYTES],
    };
    let mut entries = 0;
    while let Some(entry) = archive.next_entry().map_err(|e| ImageError::io("unpack", e))? {
        entries += 1;
        if entries > limits.entries || builder.tree.names > limits.entries {
            return Err(ImageError::TooMany(format!("unpack: more than {} entries", limits.entries)));
        }
        let name = String::from_utf8_lossy(&entry.path).into_owned();
        builder.entry(&mut archive, &entry).map_err(|e| ImageError::io(format!("unpack {name:?}"), e))?;
    }
    builder.finish(file).map_err(|e| ImageError::io("unpack", e))?;
    let blocks = file.metadata().map_err(|e| ImageError::io("unpack", e))?.blocks();
    let (reader, recorder) = archive.into_inner();
    Ok((Written { bytes: blocks * 512, inodes: 1, format: LayerFormat::Erofs }, reader, recorder))
}

struct Builder<'a> {
    tree: Tree,
    output: Output<'a>,
    /// Written so far, directories apart.
    inodes: u32,
    logical_bytes: u64,
    limits: Limits,
    buffer: Vec<u8>,
}

impl Builder<'_> {
    fn entry<R: Read>(&mut self, archive: &mut Archive<R>, entry: &Entry) -> io::Result<()> {
        let path = confine(&entry.path)?;
        let Some(name) = path.file_name().map(OsStrExt::as_bytes) else {
            if entry.kind != EntryType::Directory {
                return Err(invalid("would replace the root"));
            }
            return self.describe(super::tree::ROOT, entry);
        };
        let above = path.parent().unwrap_or(Path::new(""));
        if above.components().any(|part| part.as_os_str().as_bytes().starts_with(WHITEOUT)) {
            return Err(invalid("lies below a whiteout"));
        }
        let parent = self.tree.find(above.as_os_str().as_bytes(), true)?.ok_or_else(|| invalid("has no directory"))?;
        if name == OPAQUE {
            let marked = self.tree.directory(parent)?;
            marked.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
            return Ok(());
        }
        match name.strip_prefix(WHITEOUT) {
            Some(hidden) => self.whiteout(parent, hidden),
            None => self.object(archive, entry, parent, name),
        }
    }

    /// What the entry says of a directory; its children stay.
    fn describe(&mut self, at: usize, entry: &Entry) -> io::Result<()> {
        let attributes = attributes(entry, kind::DIRECTORY, false)?;
        let directory = self.tree.directory(at)?;
        directory.attributes = attributes;
        directory.xattrs.extend(kept_xattrs(entry, kind::DIRECTORY).map(|(key, value)| (key.to_vec(), value.to_vec())));
        Ok(())
    }

    fn whiteout(&mut self, parent: usize, hidden: &[u8]) -> io::Result<()> {
        // `.wh..wh.*` are the bookkeeping names of aufs.
        if hidden.starts_with(WHITEOUT) {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(invalid("a whiteout without a name"));
        }
        let attributes = Attributes { mode: kind::CHARACTER, ..Attributes::default() };
        let made = self.inode(&attributes, 0, Content::Device(0, 0), &[])?;
        self.tree.put(parent, hidden, Child::Other(made, entry_type(kind::CHARACTER)))
    }

    fn object<R: Read>(&mut self, archive: &mut Archive<R>, entry: &Entry, parent: usize, name: &[u8]) -> io::Result<()> {
        let special = |kind: u16| attributes(entry, kind, true).map(|attributes| (kind, attributes));
        let ((kind, attributes), content) = match entry.kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let made = self.file(archive, entry)?;
                return self.tree.put(parent, name, Child::Other(made, entry_type(kind::REGULAR)));
            }
            EntryType::Directory => {
                let made = self.tree.make_directory(parent, name)?;
                return self.describe(made, entry);
            }
            EntryType::Link => return self.hard_link(entry, parent, name),
            EntryType::Symlink => {
                let made = self.symlink(entry)?;
                return self.tree.put(parent, name, Child::Symlink(made, entry.link.as_slice().into()));
            }
            EntryType::Char => (special(kind::CHARACTER)?, Content::Device(entry.device.0, entry.device.1)),
            EntryType::Block => (special(kind::BLOCK)?, Content::Device(entry.device.0, entry.device.1)),
            EntryType::Fifo => (special(kind::FIFO)?, Content::Empty),
            other => return Err(invalid(&format!("an entry of unknown type {:?}", other.as_byte() as char))),
        };
        let made = self.inode(&attributes, 0, content, &[])?;
        self.tree.put(parent, name, Child::Other(made, entry_type(kind)))
    }

    fn hard_link(&mut self, entry: &Entry, parent: usize, name: &[u8]) -> io::Result<()> {
        let target = confine(&entry.link)?;
        let lost = || invalid("a hard link to what the layer does not have");
        let Some(target_name) = target.file_name().map(OsStrExt::as_bytes) else {
            return Err(invalid("a hard link to a directory"));
        };
        let above = target.parent().unwrap_or(Path::new("")).as_os_str().as_bytes();
        let directory = self.tree.find(above, false).map_err(|_| lost())?.ok_or_else(lost)?;
        let child = self.tree.child(directory, target_name).cloned().ok_or_else(lost)?;
        if matches!(child, Child::Directory(_)) {
            return Err(invalid("a hard link to a directory"));
        }
        if self.tree.child(parent, name) == Some(&child) {
            return Ok(());
        }
        self.tree.link(parent, name, child)
    }

    fn symlink(&mut self, entry: &Entry) -> io::Result<u64> {
        if entry.link.is_empty() || entry.link.contains(&0) {
            return Err(invalid("a symlink without a target"));
        }
        if entry.link.len() > PATH_MAX {
            return Err(invalid("a symlink's target of more than 4095 bytes"));
        }
        let attributes = Attributes { mode: kind::SYMLINK | 0o777, ..attributes(entry, kind::SYMLINK, true)? };
        Ok(self.content(&attributes, entry.link.len() as u64, None, &entry.link)?.0)
    }

    fn file<R: Read>(&mut self, archive: &mut Archive<R>, entry: &Entry) -> io::Result<u64> {
        self.logical_bytes = self.logical_bytes.saturating_add(entry.size);
        if self.logical_bytes > self.limits.bytes {
            let message = format!("unpack: more than the limit of {} bytes", self.limits.bytes);
            return Err(ImageError::TooMany(message).into_io());
        }
        let attributes = attributes(entry, kind::REGULAR, true)?;
        let block = if entry.size >= BLOCK as u64 { Some(self.output.next_block()?) } else { None };
        let whole = [(0, entry.size)];
        let mut content = Reader { archive: &mut *archive, pieces: entry.sparse.as_deref().unwrap_or(&whole), at: 0 };
        let mut left = entry.size;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut read = || -> io::Result<usize> {
            while left >= BLOCK as u64 {
                if let Some(zeros) = content.hole().map(|bytes| bytes.min(left) / BLOCK as u64).filter(|blocks| *blocks > 0) {
                    self.output.skip(zeros)?;
                    content.at += zeros * BLOCK as u64;
                    left -= zeros * BLOCK as u64;
                    continue;
                }
                let whole = left / BLOCK as u64 * BLOCK as u64;
                let want = usize::try_from(whole).unwrap_or(usize::MAX).min(buffer.len());
                let piece = buffer.get_mut(..want).unwrap_or_default();
                content.fill(piece)?;
                left -= want as u64;
                if want == COPY_BYTES && piece.iter().all(|byte| *byte == 0) {
                    self.output.skip((COPY_BYTES / BLOCK) as u64)?;
                } else {
                    self.output.append(piece)?;
                }
            }
            let rest = usize::try_from(left).unwrap_or(0);
            content.fill(buffer.get_mut(..rest).unwrap_or_default())?;
            Ok(rest)
        };
        let result = read();
        self.buffer = buffer;
        let rest = result?;
        let tail = self.buffer.get(..rest).unwrap_or_default().to_vec();
        let (made, tail_at) = self.content(&attributes, entry.size, block, &tail)?;
        let whole_end = entry.size - tail.len() as u64;
        let block_at = u64::from(block.unwrap_or(0)) * BLOCK as u64;
        for (offset, length) in entry.sparse.as_deref().unwrap_or(&whole) {
            let end = offset + length;
            let split = end.min(whole_end).max(*offset);
            archive.kept(None, block_at + offset, split - offset)?;
            archive.kept(None, tail_at + split.saturating_sub(whole_end), end - split)?;
        }
        Ok(made)
    }

    /// The inode of a file or symlink whose whole blocks were written from `block` on, and the place of `tail`, which follows them.
    fn content(&mut self, attributes: &Attributes, size: u64, block: Option<u32>, tail: &[u8]) -> io::Result<(u64, u64)> {
        let fixed = INODE_BYTES + attributes.xattrs.len();
        if tail.is_empty() {
            return Ok((self.inode(attributes, size, block.map_or(Content::Empty, Content::Blocks), &[])?, 0));
        }
        if fixed + tail.len() <= BLOCK && self.output.takes(fixed + tail.len()) {
            let made = self.inode(attributes, size, Content::Tail(block), tail)?;
            return Ok((made, place(made) + fixed as u64));
        }
        let last = self.output.next_block()?;
        self.output.append(tail)?;
        self.output.fill_block();
        let made = self.inode(attributes, size, Content::Blocks(block.unwrap_or(last)), &[])?;
        Ok((made, u64::from(last) * BLOCK as u64))
    }

    fn inode(&mut self, attributes: &Attributes, size: u64, content: Content, tail: &[u8]) -> io::Result<u64> {
        self.inodes += 1;
        let mut item = inode(attributes, self.inodes, 1, size, content);
        item.extend(tail);
        Ok(number(self.output.place(&item)?))
    }

    fn finish(mut self, file: &File) -> io::Result<()> {
        for (inode, links) in std::mem::take(&mut self.tree.links) {
            self.output.rewrite(place(inode) + LINKS_AT, &links.to_le_bytes())?;
        }
        let mut first = [0; BLOCK];
        let directories = directory::write(&mut self.tree, &mut self.output, &mut first, self.inodes + 1)?;
        let blocks = self.output.next_block()?;
        self.output.flush()?;
        superblock(&mut first, blocks, u64::from(self.inodes) + directories);
        std::os::unix::fs::FileExt::write_all_at(file, &first, 0)?;
        // A hole at the end belongs to the file as well.
        file.set_len(u64::from(blocks) * BLOCK as u64)
    }
}

/// A file's content, its holes included.
struct Reader<'a, 'p, R> {
    archive: &'a mut Archive<R>,
    /// What is stored: offset and length, in order.
    pieces: &'p [(u64, u64)],
    at: u64,
}

impl<R: Read> Reader<'_, '_, R> {
    /// The piece that is at or behind the position.
    fn piece(&mut self) -> Option<(u64, u64)> {
        while let [(offset, length), rest @ ..] = self.pieces {
            if self.at < offset + length {
                return Some((*offset, *length));
            }
            self.pieces = rest;
        }
        None
    }

    /// Bytes of zeros from the position on that are not stored.
    fn hole(&mut self) -> Option<u64> {
        match self.piece() {
            None => Some(u64::MAX),
            Some((offset, _)) if self.at < offset => Some(offset - self.at),
            Some(_) => None,
        }
    }

    fn fill(&mut self, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            let length = match self.piece() {
                None => u64::MAX,
                Some((offset, _)) if self.at < offset => offset - self.at,
                Some((offset, length)) => offset + length - self.at,
            };
            let stored = self.hole().is_none();
            let length = usize::try_from(length).unwrap_or(usize::MAX).min(out.len());
            let (now, later) = std::mem::take(&mut out).split_at_mut(length);
            let mut got = if stored { 0 } else { now.len() };
            if !stored {
                now.fill(0);
            }
            while got < length {
                match self.archive.read_data(now.get_mut(got..).unwrap_or_default())? {
                    0 => return Err(invalid("is cut short")),
                    n => got += n,
                }
            }
            self.at += length as u64;
            out = later;
        }
        Ok(())
    }
}

/// The type of a directory entry (`FT_*` of linux/fs_types.h).
fn entry_type(kind: u16) -> u8 {
    match kind {
        kind::REGULAR => 1,
        kind::CHARACTER => 3,
        kind::BLOCK => 4,
        kind::FIFO => 5,
        _ => 0,
    }
}

fn attributes(entry: &Entry, kind: u16, with_xattrs: bool) -> io::Result<Attributes> {
    let stored = if with_xattrs { xattrs(kept_xattrs(entry, kind))? } else { Vec::new() };
    let mode = kind | u16::try_from(entry.mode & 0o7777).unwrap_or(0);
    Ok(Attributes { mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, xattrs: stored })
}

/// Extended attributes that an image may set on such an inode: `user.*` only on files and directories, as every file system has it.
fn kept_xattrs(entry: &Entry, kind: u16) -> impl Iterator<Item = (&[u8], &[u8])> {
    let plain = matches!(kind, kind::REGULAR | kind::DIRECTORY);
    entry
        .xattrs
        .iter()
        .map(|(key, value)| (key.as_slice(), value.as_slice()))
        .filter(move |(key, _)| keeps_xattr(key) && (plain || !key.starts_with(b"user.")))
}
