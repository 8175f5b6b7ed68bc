//! What a layer's archive has beside the content of its files: headers, padding, end, in the order they came, and between them where the
//! image keeps each piece of content. Together they give the archive back byte by byte, so that a layer can be checked against its diff
//! id, and exported, though no archive is kept.
//!
//! The file is one zstd stream of records: a number as LEB128 whose lowest bit is the kind and whose rest a length, then for kind 0 so
//! many bytes, for kind 1 the place of so many bytes in the image, again as LEB128.

use super::error::ImageError;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use zstd::stream::{read::Decoder, write::Encoder};

/// Raw bytes that become one record.
const RAW_BYTES: usize = 64 << 10;
/// Fast: headers repeat themselves.
const LEVEL: i32 = 1;

/// Writes the records while the archive is read.
pub(super) struct Recorder {
    encoder: Encoder<'static, File>,
    raw: Vec<u8>,
}

impl Recorder {
    pub(super) fn new(file: File) -> io::Result<Recorder> {
        Ok(Recorder { encoder: Encoder::new(file, LEVEL)?, raw: Vec::new() })
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

    /// Bytes of the archive that the image has at this place.
    pub(super) fn content(&mut self, at: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        self.end_raw()?;
        number(&mut self.encoder, length << 1 | 1)?;
        number(&mut self.encoder, at)
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
        self.encoder.finish().map(drop)
    }
}

/// The archive, read again.
pub(super) struct Joined {
    records: BufReader<Decoder<'static, BufReader<File>>>,
    image: File,
    /// Bytes left of the current record, and where they are if not in `records`.
    left: u64,
    at: Option<u64>,
}

impl Joined {
    pub(super) fn new(split: File, image: File) -> io::Result<Joined> {
        Ok(Joined { records: BufReader::new(Decoder::new(split)?), image, left: 0, at: None })
    }

    /// Bytes of the archive that the records tell.
    pub(super) fn length(split: File) -> io::Result<u64> {
        let mut records = BufReader::new(Decoder::new(split)?);
        let mut length = 0;
        while let Some(head) = read_number(&mut records)? {
            length += head >> 1;
            if head & 1 == 1 {
                read_number(&mut records)?.ok_or(io::ErrorKind::UnexpectedEof)?;
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
        self.at = if head & 1 == 1 { Some(read_number(&mut self.records)?.ok_or(io::ErrorKind::UnexpectedEof)?) } else { None };
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
            Some(at) => {
                let got = self.image.read_at(place, *at)?;
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

/// A failure to write the record of a layer.
pub(super) fn failed(error: io::Error) -> ImageError {
    ImageError::io("unpack: record the archive", error)
}
