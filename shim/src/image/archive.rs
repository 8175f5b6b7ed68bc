//! Walks a tar stream entry by entry: ustar, GNU long names and sparse files in all forms, PAX records. Header fields are decoded by the
//! `tar` crate; the walk is ours because headers must be bounded and PAX values may hold any byte.

use super::error::ImageError;
use super::sparse::{self, Map, Place, Records};
use super::split::Recorder;
use std::io::{self, Read};
use std::path::Path;
use tar::{EntryType, Header};

const BLOCK: usize = 512;
/// Longest PAX record set, long name or sparse map that is read into memory.
const MAX_HEADER_BYTES: u64 = 1 << 20;

/// Mode, owner, group, size and time of a header. Some writers leave one blank, and every reader takes that for zero.
const NUMBERS: [std::ops::Range<usize>; 5] = [100..108, 108..116, 116..124, 124..136, 136..148];

/// One entry; its data follows in the stream and is read through [`Archive::read_data`].
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) kind: EntryType,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since the epoch.
    pub(super) mtime: (i64, u32),
    pub(super) device: (u32, u32),
    /// Length of the file, holes included.
    pub(super) size: u64,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the stored bytes go, if the file has holes: offset and length.
    pub(super) sparse: Option<Map>,
}

/// A tar stream being read.
pub(super) struct Archive<R> {
    inner: R,
    /// Bytes of the current entry's data not read yet.
    left: u64,
    /// Bytes after the data up to the next block.
    padding: u64,
    /// Takes all that is no content of a file.
    recorder: Option<Recorder>,
}

#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Vec<(Vec<u8>, Vec<u8>)>,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(inner: R) -> Self {
        Archive { inner, left: 0, padding: 0, recorder: None }
    }

    /// As [`Archive::new`], recording what is no content of a file.
    pub(super) fn recorded(inner: R, recorder: Option<Recorder>) -> Self {
        Archive { recorder, ..Archive::new(inner) }
    }

    /// The reader, for whatever follows the archive's end, and the recorder.
    pub(super) fn into_inner(self) -> (R, Option<Recorder>) {
        (self.inner, self.recorder)
    }

    /// Where the image, or the file of this path, keeps the content that was read last; to be told piece by piece, all of it.
    pub(super) fn kept(&mut self, path: Option<&Path>, at: u64, length: u64) -> io::Result<()> {
        self.recorder.as_mut().map_or(Ok(()), |recorder| recorder.content(path, at, length))
    }

    /// How many times content was told; `None` if nothing is recorded.
    pub(super) fn contents(&self) -> Option<u64> {
        self.recorder.as_ref().map(Recorder::contents)
    }

    /// Bytes that were read and are kept nowhere.
    pub(super) fn record(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.recorder.as_mut().map_or(Ok(()), |recorder| recorder.raw(bytes))
    }

    /// Reads data of the current entry; 0 at its end.
    pub(super) fn read_data(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        if want == 0 {
            return Ok(0);
        }
        let n = self.inner.read(&mut buf[..want])?;
        if n == 0 {
            return Err(bad("ends inside an entry"));
        }
        self.left -= n as u64;
        Ok(n)
    }

    /// The next entry; what is left of the one before is passed over. `None` at the archive's end.
    pub(super) fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let mut ext = Extensions::default();
        loop {
            let Some(header) = self.next_header()? else {
                return Ok(None);
            };
            match header.entry_type() {
                EntryType::XHeader => ext.pax = parse_pax(&self.small_data()?)?,
                EntryType::XGlobalHeader => drop(self.small_data()?),
                EntryType::GNULongName => ext.path = Some(until_nul(self.small_data()?)),
                EntryType::GNULongLink => ext.link = Some(until_nul(self.small_data()?)),
                _ => return self.finish_entry(&header, ext).map(Some),
            }
        }
    }

    fn next_header(&mut self) -> io::Result<Option<Header>> {
        let mut skip = self.left + self.padding;
        let mut block = [0u8; BLOCK];
        while skip > 0 {
            let want = usize::try_from(skip).unwrap_or(BLOCK).min(BLOCK);
            let piece = block.get_mut(..want).unwrap_or_default();
            match self.inner.read(piece)? {
                0 => return Err(bad("ends inside an entry")),
                n => {
                    skip -= n as u64;
                    self.record(block.get(..n).unwrap_or_default())?;
                }
            }
        }
        (self.left, self.padding) = (0, 0);
        if !self.read_block(&mut block)? {
            return Ok(None);
        }
        if block.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let sum: u32 = block[..148].iter().chain(&block[156..]).map(|b| u32::from(*b)).sum::<u32>() + 8 * 32;
        if Header::from_byte_slice(&block).cksum().ok() != Some(sum) {
            return Err(bad("an entry's header has a wrong checksum"));
        }
        for field in NUMBERS {
            if let Some(bytes) = block.get_mut(field)
                && bytes.iter().all(|byte| matches!(byte, 0 | b' '))
            {
                bytes.fill(b'0');
            }
        }
        let header = Header::from_byte_slice(&block).clone();
        self.set_size(header.entry_size()?)?;
        Ok(Some(header))
    }

    fn set_size(&mut self, size: u64) -> io::Result<()> {
        if size > i64::MAX as u64 {
            return Err(bad("an entry's size is out of range"));
        }
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64) - size;
        Ok(())
    }

    /// Fills the block; false if the stream ends before its first byte.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> io::Result<bool> {
        let mut got = 0;
        while got < BLOCK {
            match self.inner.read(&mut block[got..])? {
                0 if got == 0 => return Ok(false),
                0 => return Err(bad("ends inside a header")),
                n => got += n,
            }
        }
        self.record(block)?;
        Ok(true)
    }

    /// All data of a header-like entry, bounded.
    fn small_data(&mut self) -> io::Result<Vec<u8>> {
        if self.left > MAX_HEADER_BYTES {
            let message = format!("archive: a header of {} bytes is over the limit of {MAX_HEADER_BYTES}", self.left);
            return Err(ImageError::TooMany(message).into_io());
        }
        let mut data = vec![0; usize::try_from(self.left).unwrap_or(0)];
        let mut got = 0;
        while got < data.len() {
            got += self.read_data(&mut data[got..])?;
        }
        self.record(&data)?;
        Ok(data)
    }

    fn finish_entry(&mut self, header: &Header, ext: Extensions) -> io::Result<Entry> {
        let mut entry = Entry {
            path: ext.path.unwrap_or_else(|| header.path_bytes().into_owned()),
            link: ext.link.unwrap_or_else(|| header.link_name_bytes().map(|l| l.into_owned()).unwrap_or_default()),
            kind: header.entry_type(),
            mode: header.mode()? & 0o7777,
            uid: id(header.uid()?)?,
            gid: id(header.gid()?)?,
            mtime: (i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0), 0),
            device: (header.device_major().unwrap_or(None).unwrap_or(0), header.device_minor().unwrap_or(None).unwrap_or(0)),
            size: self.left,
            xattrs: Vec::new(),
            sparse: None,
        };
        let mut records = Records::default();
        for (key, value) in ext.pax {
            match key.as_slice() {
                b"path" => entry.path = value,
                b"linkpath" => entry.link = value,
                b"size" => {
                    self.set_size(number(&value)?)?;
                    entry.size = self.left;
                }
                b"uid" => entry.uid = id(number(&value)?)?,
                b"gid" => entry.gid = id(number(&value)?)?,
                b"mtime" => entry.mtime = pax_time(&value),

                k if k.starts_with(b"SCHILY.xattr.") => entry.xattrs.push((k[13..].to_vec(), value)),
                k if k.starts_with(b"GNU.sparse.") => records.take(&k[11..], value)?,
                _ => {}
            }
        }
        self.read_pax_sparse(records, &mut entry)?;
        if entry.kind == EntryType::GNUSparse {
            self.read_gnu_sparse(header, &mut entry)?;
        }
        // Old archives mark a directory by its trailing slash alone.
        if entry.kind == EntryType::Regular && entry.path.ends_with(b"/") {
            entry.kind = EntryType::Directory;
        }
        Ok(entry)
    }

    fn read_pax_sparse(&mut self, records: Records, entry: &mut Entry) -> io::Result<()> {
        let map = match records.place()? {
            Place::None => return Ok(()),
            Place::Records(map) => map,
            Place::Content => self.read_sparse_map()?,
        };
        if !matches!(entry.kind, EntryType::Regular | EntryType::Continuous) {
            return Err(bad("a sparse map of what is no file"));
        }
        entry.path = records.name.unwrap_or(std::mem::take(&mut entry.path));
        entry.size = records.size.ok_or_else(|| bad("a sparse file without its size"))?;
        sparse::check(&map, entry.size, self.left)?;
        entry.sparse = Some(map);
        Ok(())
    }

    /// The map that lies before the content, in whole blocks.
    fn read_sparse_map(&mut self) -> io::Result<Map> {
        let mut reader = sparse::Reader::default();
        for _ in 0..MAX_HEADER_BYTES / BLOCK as u64 {
            let mut block = [0u8; BLOCK];
            let mut got = 0;
            while got < BLOCK {
                match self.read_data(block.get_mut(got..).unwrap_or_default())? {
                    0 => return Err(bad("a sparse map does not fit the entry's size")),
                    n => got += n,
                }
            }
            self.record(&block)?;
            if let Some(map) = reader.take(&block, MAX_HEADER_BYTES)? {
                return Ok(map);
            }
        }
        Err(ImageError::TooMany("archive: a sparse map is over the limit".into()).into_io())
    }

    fn read_gnu_sparse(&mut self, header: &Header, entry: &mut Entry) -> io::Result<()> {
        let gnu = header.as_gnu().ok_or_else(|| bad("a sparse entry without a GNU header"))?;
        let mut map = Vec::new();
        let mut add = |h: &tar::GnuSparseHeader| -> io::Result<()> {
            if !h.is_empty() {
                map.push((h.offset()?, h.length()?));
            }
            Ok(())
        };
        gnu.sparse.iter().try_for_each(&mut add)?;
        let mut more = gnu.is_extended();
        let mut blocks = 0;
        while more {
            let mut ext = tar::GnuExtSparseHeader::new();
            blocks += 1;
            if blocks > MAX_HEADER_BYTES / BLOCK as u64 {
                return Err(ImageError::TooMany("archive: a sparse map is over the limit".into()).into_io());
            }
            if !self.read_block(ext.as_mut_bytes())? {
                return Err(bad("ends inside a sparse map"));
            }
            ext.sparse().iter().try_for_each(&mut add)?;
            more = ext.is_extended();
        }
        entry.size = gnu.real_size()?;
        sparse::check(&map, entry.size, self.left)?;
        entry.kind = EntryType::Regular;
        entry.sparse = Some(map);
        Ok(())
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("archive {what}"))
}

fn id(value: u64) -> io::Result<u32> {
    // The kernel reads u32::MAX as "leave as it is".
    u32::try_from(value).ok().filter(|v| *v != u32::MAX).ok_or_else(|| bad("an owner is out of range"))
}

fn number(value: &[u8]) -> io::Result<u64> {
    std::str::from_utf8(value).ok().and_then(|v| v.parse().ok()).ok_or_else(|| bad("a PAX number is malformed"))
}

fn until_nul(mut data: Vec<u8>) -> Vec<u8> {
    if let Some(i) = data.iter().position(|b| *b == 0) {
        data.truncate(i);
    }
    data
}

fn pax_time(value: &[u8]) -> (i64, u32) {
    let text = String::from_utf8_lossy(value);
    let (seconds, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let digits: String = fraction.chars().take_while(char::is_ascii_digit).chain("000000000".chars()).take(9).collect();
    (seconds.parse().unwrap_or(0), digits.parse().unwrap_or(0))
}

/// Records of the form `<length> <key>=<value>\n`, where the length covers the whole record.
fn parse_pax(mut data: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let malformed = || bad("a PAX record is malformed");
    let mut records = Vec::new();
    while !data.is_empty() {
        let space = data.iter().take(20).position(|b| *b == b' ').ok_or_else(malformed)?;
        let length = usize::try_from(number(&data[..space])?).map_err(|_| malformed())?;
        if length <= space + 1 || length > data.len() || data[length - 1] != b'\n' {
            return Err(malformed());
        }
        let record = &data[space + 1..length - 1];
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(malformed)?;
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        data = &data[length..];
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::super::test_images::Tar;
    use super::*;

    #[test]
    fn a_blank_number_is_zero_and_a_wrong_one_is_refused() {
        let archive = Tar::new().file("f", 0o644, b"text").finish();
        let with_uid = |field: &[u8; 8]| {
            let mut archive = archive.clone();
            archive[108..116].copy_from_slice(field);
            archive[148..156].fill(b' ');
            let sum: u32 = archive[..BLOCK].iter().map(|byte| u32::from(*byte)).sum();
            archive[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            Archive::new(io::Cursor::new(archive)).next_entry()
        };
        for blank in [b"        ", b"\0\0\0\0\0\0\0\0"] {
            let entry = with_uid(blank).unwrap().unwrap();
            assert_eq!((entry.uid, entry.mode, entry.size), (0, 0o644, 4));
        }
        assert_eq!(with_uid(b"0000017\0").unwrap().unwrap().uid, 15);
        assert!(with_uid(b"nonsense").is_err());
    }
}
