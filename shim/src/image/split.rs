//! What a layer's archive has beside the content of its files: headers, padding, end, in the order they came, and between them where the
//! image or directory keeps each piece of content. Together they give the archive back byte by byte, so that a layer can be checked
//! against its diff id, and exported, though no archive is kept.
//!
//! The file is one zstd stream of records: a number as LEB128 whose lowest bit is the kind and whose rest a length, then for kind 0 so
//! many bytes, for kind 1 the place of so many bytes in the image, again as LEB128. Where the layer is a directory, that place is the
//! length of a path, the path, and the place in that file; content that the directory lost again, since a later entry replaced
//! the file, is of kind 0 (`replaced`).

use super::error::ImageError;
use super::extract::PATH_MAX;
use super::replaced::Replaced;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use zstd::stream::{read::Decoder, write::Encoder};

/// Raw bytes that become one record.
const RAW_BYTES: usize = 64 << 10;
/// Fast: headers repeat themselves.
const LEVEL: i32 = 1;

/// Writes the records while the archive is read.
pub(super) struct Recorder {
    encoder: Encoder<'static, File>,
    raw: Vec<u8>,
    /// Records of content so far.
    contents: u64,
    replaced: Option<Replaced>,
}

impl Recorder {
    pub(super) fn new(file: File) -> io::Result<Recorder> {
        Ok(Recorder { encoder: Encoder::new(file, LEVEL)?, raw: Vec::new(), contents: 0, replaced: None })
    }

    /// Bytes of the archive that are kept nowhere else.
    pub(super) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(RAW_BYTES) {
            self.raw.extend_from_slice(piece);
            if self.raw.len() >= RAW_BYTES {
                self.end_raw()?;
            }
        }
        Ok(())
    }

    /// Bytes of the archive that the image, or the file of this path in the directory, has at this place.
    pub(super) fn content(&mut self, path: Option<&Path>, at: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        self.end_raw()?;
        self.contents += 1;
        number(&mut self.encoder, length << 1 | 1)?;
        if let Some(path) = path {
            let path = path.as_os_str().as_bytes();
            number(&mut self.encoder, path.len() as u64)?;
            self.encoder.write_all(path)?;
        }
        number(&mut self.encoder, at)
    }

    /// How many times content was told.
    pub(super) fn contents(&self) -> u64 {
        self.contents
    }

    /// What the directory has lost again, for the end.
    pub(super) fn set_replaced(&mut self, replaced: Replaced) {
        self.replaced = Some(replaced).filter(|replaced| !replaced.is_empty());
    }

    fn end_raw(&mut self) -> io::Result<()> {
        if !self.raw.is_empty() {
            number(&mut self.encoder, (self.raw.len() as u64) << 1)?;
            self.encoder.write_all(&self.raw)?;
            self.raw.clear();
        }
        Ok(())
    }

    /// Ends the file.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.end_raw()?;
        let file = self.encoder.finish()?;
        self.replaced.map_or(Ok(()), |replaced| rewrite(file, &replaced))
    }
}

/// Puts content that is no longer in the directory into the records themselves.
fn rewrite(mut file: File, replaced: &Replaced) -> io::Result<()> {
    file.rewind()?;
    let mut records = BufReader::new(Decoder::new(file.try_clone()?)?);
    let mut whole = replaced.scratch()?;
    let mut recorder = Recorder::new(whole.try_clone()?)?;
    let mut index = 0;
    while let Some(head) = read_number(&mut records)? {
        let length = head >> 1;
        if head & 1 == 0 {
            copy(&mut (&mut records).take(length), length, &mut recorder)?;
            continue;
        }
        let path = read_path(&mut records)?;
        let at = read_number(&mut records)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match replaced.find(index) {
            None => recorder.content(Some(Path::new(OsStr::from_bytes(&path))), at, length)?,
            Some((kept, from)) => copy(&mut At { file: kept, at: from + at }, length, &mut recorder)?,
        }
        index += 1;
    }
    recorder.finish()?;
    file.set_len(0)?;
    file.rewind()?;
    whole.rewind()?;
    io::copy(&mut whole, &mut file).map(drop)
}

/// A file from some place on.
struct At<'a> {
    file: &'a File,
    at: u64,
}

impl Read for At<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(buf, self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

fn copy(from: &mut impl Read, mut length: u64, to: &mut Recorder) -> io::Result<()> {
    let mut buffer = vec![0; RAW_BYTES];
    while length > 0 {
        let want = usize::try_from(length).unwrap_or(RAW_BYTES).min(RAW_BYTES);
        let piece = buffer.get_mut(..want).unwrap_or_default();
        from.read_exact(piece)?;
        to.raw(piece)?;
        length -= want as u64;
    }
    Ok(())
}

/// Where a layer has the content of its files.
#[derive(Debug)]
pub(super) enum Kept {
    Image(File),
    Directory(OwnedFd),
}

impl Kept {
    /// Reads where a piece of content is, and opens what has it.
    fn place(&self, records: &mut impl Read) -> io::Result<(File, u64)> {
        let file = match self {
            Kept::Image(image) => image.try_clone()?,
            Kept::Directory(root) => {
                let path = read_path(records)?;
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
                File::from(rustix::fs::openat2(root, OsStr::from_bytes(&path), flags, Mode::empty(), resolve)?)
            }
        };
        Ok((file, read_number(records)?.ok_or(io::ErrorKind::UnexpectedEof)?))
    }

    /// Passes over where a piece of content is.
    fn skip_place(&self, records: &mut impl Read) -> io::Result<()> {
        if let Kept::Directory(_) = self {
            read_path(records)?;
        }
        read_number(records)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(())
    }
}

/// The archive, read again.
pub(super) struct Joined {
    records: BufReader<Decoder<'static, BufReader<File>>>,
    kept: Kept,
    /// Bytes left of the current record, and where they are if not in `records`.
    left: u64,
    at: Option<(File, u64)>,
}

impl Joined {
    pub(super) fn new(split: File, kept: Kept) -> io::Result<Joined> {
        Ok(Joined { records: BufReader::new(Decoder::new(split)?), kept, left: 0, at: None })
    }

    /// Bytes of the archive that the records tell.
    pub(super) fn length(split: File, kept: &Kept) -> io::Result<u64> {
        let mut records = BufReader::new(Decoder::new(split)?);
        let mut length = 0;
        while let Some(head) = read_number(&mut records)? {
            length += head >> 1;
            if head & 1 == 1 {
                kept.skip_place(&mut records)?;
            } else if io::copy(&mut (&mut records).take(head >> 1), &mut io::sink())? < head >> 1 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(length)
    }

    /// False at the end.
    fn next(&mut self) -> io::Result<bool> {
        let Some(head) = read_number(&mut self.records)? else { return Ok(false) };
        self.left = head >> 1;
        self.at = if head & 1 == 1 { Some(self.kept.place(&mut self.records)?) } else { None };
        Ok(true)
    }
}

impl Read for Joined {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            if !self.next()? {
                return Ok(0);
            }
        }
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let place = buf.get_mut(..want).unwrap_or_default();
        let got = match &mut self.at {
            None => self.records.read(place)?,
            Some((file, at)) => {
                let got = file.read_at(place, *at)?;
                *at += got as u64;
                got
            }
        };
        if got == 0 && want > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= got as u64;
        Ok(got)
    }
}

fn number(to: &mut impl Write, mut value: u64) -> io::Result<()> {
    let mut bytes = [0u8; 10];
    let mut length = 0;
    for byte in &mut bytes {
        *byte = (value & 0x7f) as u8 | if value > 0x7f { 0x80 } else { 0 };
        length += 1;
        value >>= 7;
        if value == 0 {
            break;
        }
    }
    to.write_all(bytes.get(..length).unwrap_or_default())
}

/// `None` at the end of the file.
fn read_number(from: &mut impl Read) -> io::Result<Option<u64>> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let mut byte = [0u8];
        if let Err(error) = from.read_exact(&mut byte) {
            return if shift == 0 && error.kind() == io::ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
        }
        let [byte] = byte;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(Some(value));
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "a number that is too long"))
}

fn read_path(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let length = read_number(from)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    let length = usize::try_from(length).ok().filter(|length| *length <= PATH_MAX);
    let mut path = vec![0; length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a path that is too long"))?];
    from.read_exact(&mut path)?;
    Ok(path)
}

/// A failure to write the record of a layer.
pub(super) fn failed(error: io::Error) -> ImageError {
    ImageError::io("unpack: record the archive", error)
}
