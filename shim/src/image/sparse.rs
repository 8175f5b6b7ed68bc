//! Files with holes as PAX records tell them, in the three versions that GNU tar has written (0.0, 0.1, 1.0): the records here, and the
//! map that lies before the content in 1.0.

use std::io;

/// Where stored bytes go: offset and length, in order.
pub(super) type Map = Vec<(u64, u64)>;

/// What the records of one entry say.
#[derive(Default)]
pub(super) struct Records {
    major: Option<Vec<u8>>,
    minor: Option<Vec<u8>>,
    /// The file's name; the header has another one, for programs that know no sparse files.
    pub(super) name: Option<Vec<u8>>,
    /// Length of the file, holes included.
    pub(super) size: Option<u64>,
    numbers: Vec<u64>,
    any: bool,
}

/// Where the map of a file is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There is none: it is no sparse file.
    None,
    Records(Map),
    /// Before the content.
    Content,
}

impl Records {
    /// Takes a record whose key begins with `GNU.sparse.`.
    pub(super) fn take(&mut self, key: &[u8], value: Vec<u8>) -> io::Result<()> {
        self.any = true;
        match key {
            b"major" => self.major = Some(value),
            b"minor" => self.minor = Some(value),
            b"name" => self.name = Some(value),
            b"size" | b"realsize" => self.size = Some(number(&value)?),
            // In 0.0 each piece has two records, of the same keys.
            b"offset" if self.numbers.len().is_multiple_of(2) => self.numbers.push(number(&value)?),
            b"numbytes" if !self.numbers.len().is_multiple_of(2) => self.numbers.push(number(&value)?),
            b"offset" | b"numbytes" => return Err(bad("a sparse map has no pairs")),
            b"map" => {
                let parts = value.split(|byte| *byte == b',').filter(|_| !value.is_empty());
                self.numbers = parts.map(number).collect::<io::Result<_>>()?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Which version it is, and so where the map is.
    pub(super) fn place(&self) -> io::Result<Place> {
        match (self.major.as_deref(), self.minor.as_deref()) {
            (Some(b"1"), Some(b"0")) => Ok(Place::Content),
            (None, None) | (Some(b"0"), Some(b"0" | b"1")) if !self.any => Ok(Place::None),
            (None, None) | (Some(b"0"), Some(b"0" | b"1")) => Ok(Place::Records(pairs(&self.numbers)?)),
            _ => Err(bad("holds a sparse file in PAX form of an unknown version")),
        }
    }
}

/// The map from its numbers.
pub(super) fn pairs(numbers: &[u64]) -> io::Result<Map> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    if !rest.is_empty() {
        return Err(bad("a sparse map has no pairs"));
    }
    Ok(pairs.iter().map(|[offset, length]| (*offset, *length)).collect())
}

/// Checks that pieces are in order, inside the file, and as long together as what is stored.
pub(super) fn check(map: &Map, size: u64, stored: u64) -> io::Result<()> {
    let (mut end, mut total) = (0u64, 0u64);
    for (offset, length) in map {
        let next = offset.checked_add(*length).filter(|e| *offset >= end && *e <= size);
        end = next.ok_or_else(|| bad("a sparse map is out of order or out of range"))?;
        total += length;
    }
    if total == stored { Ok(()) } else { Err(bad("a sparse map does not fit the entry's size")) }
}

/// The map that lies before the content, read piece by piece.
#[derive(Default)]
pub(super) struct Reader {
    text: Vec<u8>,
    /// Numbers that are wanted, the first of them included; known once that is read.
    wanted: Option<usize>,
    numbers: Vec<u64>,
}

impl Reader {
    /// Takes a block; the map, if it is whole.
    pub(super) fn take(&mut self, block: &[u8], most: u64) -> io::Result<Option<Map>> {
        for byte in block {
            if *byte != b'\n' {
                if self.text.len() >= 20 {
                    return Err(bad("a number of a sparse map is malformed"));
                }
                self.text.push(*byte);
                continue;
            }
            let found = number(&std::mem::take(&mut self.text))?;
            let Some(wanted) = self.wanted else {
                let pieces = Some(found).filter(|found| *found <= most).and_then(|found| usize::try_from(found).ok());
                self.wanted = Some(pieces.ok_or_else(|| bad("a sparse map is over the limit"))? * 2);
                if self.wanted == Some(0) {
                    return Ok(Some(Map::new()));
                }
                continue;
            };
            self.numbers.push(found);
            if self.numbers.len() == wanted {
                return pairs(&self.numbers).map(Some);
            }
        }
        Ok(None)
    }
}

fn number(text: &[u8]) -> io::Result<u64> {
    let text = std::str::from_utf8(text).ok().filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
    let number = text.and_then(|text| text.parse().ok()).filter(|number| *number <= i64::MAX as u64);
    number.ok_or_else(|| bad("a number of a sparse map is malformed"))
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("archive {what}"))
}
