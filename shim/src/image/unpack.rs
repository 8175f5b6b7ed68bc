//! One layer's bytes on their way to disk: an async producer verifies the compressed digest and feeds a bounded channel; a blocking
//! thread decompresses, hashes the plain bytes (the diff id) and extracts. The whole layer is in memory at no time.

use super::digest::HashingReader;
use super::erofs;
use super::error::ImageError;
use super::extract::{self, Limits, Written};
use super::split::{self, Recorder};
use bytes::{Buf, Bytes};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use tokio::sync::mpsc;

/// Chunks in flight between network and extractor, each at most a network read.
pub(super) const CHANNEL_CHUNKS: usize = 32;
/// Bytes that may follow the archive's end marker (padding of the record size).
const MAX_TRAILER_BYTES: u64 = 64 << 20;
const BUFFER_BYTES: usize = 128 << 10;
/// zstd's window, as a power of two: what `zstd --long` needs at most by default.
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

/// What the producer sends.
#[derive(Debug)]
pub(super) enum Chunk {
    Data(Bytes),
    /// All bytes were sent and their digest is right.
    End,
    Failed(ImageError),
}

/// The blocking end of the channel. A producer that vanishes is an error, not an end.
pub(super) struct ChannelReader {
    chunks: mpsc::Receiver<Chunk>,
    current: Bytes,
    ended: bool,
}

impl ChannelReader {
    pub(super) fn new(chunks: mpsc::Receiver<Chunk>) -> Self {
        ChannelReader { chunks, current: Bytes::new(), ended: false }
    }
}

impl Read for ChannelReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.ended {
            match self.chunks.blocking_recv() {
                Some(Chunk::Data(bytes)) => self.current = bytes,
                Some(Chunk::End) => self.ended = true,
                Some(Chunk::Failed(error)) => return Err(error.into_io()),
                None => return Err(ImageError::Io("unpack: canceled".into()).into_io()),
            }
        }
        let n = buf.len().min(self.current.len());
        self.current.copy_to_slice(&mut buf[..n]);
        Ok(n)
    }
}

/// What a layer is unpacked into.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    /// A directory that is there, and an empty file for what it has not of the archive.
    Directory(&'a Path, Option<&'a File>),
    /// Two empty files: for the image, and for what it has not of the archive.
    Erofs(&'a File, &'a File),
}

/// Unpacks the (compressed) layer and checks that its plain bytes have `diff_id`.
pub(super) fn unpack(reader: impl Read, diff_id: &str, place: Place<'_>, limits: Limits) -> Result<Written, ImageError> {
    let mut raw = BufReader::with_capacity(BUFFER_BYTES, reader);
    let plain = decompress(&mut raw).map_err(|e| ImageError::io("unpack", e))?;
    let plain = HashingReader::new(BufReader::with_capacity(BUFFER_BYTES, plain));
    let split = match place {
        Place::Directory(_, split) => split,
        Place::Erofs(_, split) => Some(split),
    };
    let recorder = split.map(|split| split.try_clone().and_then(Recorder::new)).transpose().map_err(split::failed)?;
    let (mut written, rest, mut recorder) = match place {
        Place::Directory(dir, _) => extract::extract(plain, dir, limits, recorder)?,
        Place::Erofs(image, _) => erofs::build(plain, image, limits, recorder)?,
    };
    let mut rest = rest.take(MAX_TRAILER_BYTES);
    let mut trailer = vec![0; BUFFER_BYTES];
    loop {
        match rest.read(&mut trailer).map_err(|e| ImageError::io("unpack", e))? {
            0 => break,
            n => recorder.as_mut().map_or(Ok(()), |r| r.raw(trailer.get(..n).unwrap_or_default())).map_err(split::failed)?,
        }
    }
    if rest.limit() == 0 {
        return Err(ImageError::TooMany(format!("unpack: more than {MAX_TRAILER_BYTES} bytes follow the archive's end")));
    }
    let found = rest.into_inner().finish();
    // Only at the raw stream's end is the compressed digest known to be right.
    io::copy(&mut raw, &mut io::sink()).map_err(|e| ImageError::io("unpack", e))?;
    if found != diff_id {
        return Err(ImageError::Corrupt(format!("unpack: the layer's diff id is {found}, the image's config says {diff_id}")));
    }
    if let (Some(recorder), Some(split)) = (recorder, split) {
        recorder.finish().map_err(split::failed)?;
        written.bytes += split.metadata().map_err(split::failed)?.blocks() * 512;
        written.inodes += 1;
    }
    Ok(written)
}

/// Chooses by the first bytes, since media types are often wrong: gzip, zstd, else plain.
pub(super) fn decompress<'a, R: BufRead + 'a>(raw: &'a mut R) -> io::Result<Box<dyn Read + 'a>> {
    let magic = raw.fill_buf()?;
    Ok(if magic.starts_with(&[0x1f, 0x8b]) {
        Box::new(flate2::bufread::MultiGzDecoder::new(raw))
    } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || magic.get(1..4) == Some(&[0x2a, 0x4d, 0x18]) {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(raw)?;
        decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
        Box::new(decoder)
    } else {
        Box::new(raw)
    })
}

#[cfg(test)]
mod tests {
    use super::super::test_images::{Tar, gzip, noise, zstd};
    use super::super::{digest, extract};
    use super::unpack;
    use std::{fs, os::unix::fs::PermissionsExt, time::Instant};

    /// Prints the speed of one layer of about 100 MB: run in release with `--nocapture`.
    #[test]
    fn unpack_speed() {
        let mut plain = Tar::new();
        let megabytes = if cfg!(debug_assertions) { 4 } else { 100 };
        for i in 0..megabytes * 10 {
            let text: Vec<u8> = noise(i + 1, 50_000).iter().flat_map(|b| [b % 64, 10 + b % 16]).collect();
            plain = plain.file(&format!("dir{}/file{i}", i % 50), 0o644, &text);
        }
        let plain = plain.finish();
        let (id, limits) = (digest::of(&plain), extract::Limits { bytes: 1 << 30, entries: 1 << 20 });
        for (what, stored) in [("plain", plain.clone()), ("gzip", gzip(&plain)), ("zstd", zstd(&plain))] {
            let dir = tempfile::tempdir().unwrap();
            let started = Instant::now();
            let written = unpack(&stored[..], &id, super::Place::Directory(dir.path(), None), limits).unwrap();
            let rate = plain.len() as f64 / 1e6 / started.elapsed().as_secs_f64();
            println!("{what}: {} MB stored, {} MB on disk, {rate:.0} MB/s", stored.len() / 1_000_000, written.bytes / 1_000_000);
            assert_eq!(fs::metadata(dir.path().join("dir0/file0")).unwrap().permissions().mode() & 0o7777, 0o644);
        }
    }
}
