//! Header blocks of SPDY/3 (draft-mbelshe-httpbis-spdy-00, 2.6.10): name and value pairs, compressed by zlib with a fixed dictionary and one
//! context for all blocks of a direction.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Most bytes of a block when it is decompressed.
const BLOCK_LIMIT_BYTES: usize = 64 << 10;
/// Most pairs of a block.
const PAIRS_MAX: usize = 256;

/// Names and values, names in small letters.
pub(in crate::streaming) type Headers = Vec<(String, String)>;

/// The value of a header.
pub(in crate::streaming) fn value<'a>(headers: &'a Headers, name: &str) -> Option<&'a str> {
    headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
}

/// Reads the blocks of the peer.
pub(super) struct Reader(Decompress);

impl Reader {
    pub(super) fn new() -> Reader {
        Reader(Decompress::new(true))
    }

    /// Decompresses and reads the next block.
    pub(super) fn read(&mut self, block: &[u8]) -> Result<Headers, String> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, mut block: &[u8]) -> Result<Vec<u8>, String> {
        let mut plain = Vec::with_capacity(4096);
        loop {
            let (read, made) = (self.0.total_in(), plain.len());
            let status = match self.0.decompress_vec(block, &mut plain, FlushDecompress::Sync) {
                Err(error) if error.needs_dictionary().is_some() => {
                    block = block.get((self.0.total_in() - read) as usize..).unwrap_or_default();
                    self.0.set_dictionary(DICTIONARY).map_err(|error| format!("header block: {error}"))?;
                    continue;
                }
                other => other.map_err(|error| format!("header block: {error}"))?,
            };
            let taken = (self.0.total_in() - read) as usize;
            block = block.get(taken..).unwrap_or_default();
            if plain.len() > BLOCK_LIMIT_BYTES {
                return Err(format!("header block over {BLOCK_LIMIT_BYTES} bytes"));
            }
            let full = plain.len() == plain.capacity();
            if full {
                plain.reserve(4096);
            }
            if status == Status::StreamEnd || (!full && (block.is_empty() || (taken == 0 && made == plain.len()))) {
                return Ok(plain);
            }
        }
    }
}

/// Writes blocks for the peer.
pub(super) struct Writer(Compress);

impl Writer {
    pub(super) fn new() -> Writer {
        let mut compress = Compress::new(Compression::fast(), true);
        // Fails for a stream that has begun only.
        let _ = compress.set_dictionary(DICTIONARY);
        Writer(compress)
    }

    /// The next block, whole.
    pub(super) fn write(&mut self, headers: &[(&str, &str)]) -> Vec<u8> {
        let mut plain = Vec::new();
        put(&mut plain, headers.len());
        for (name, value) in headers {
            for text in [name, value] {
                put(&mut plain, text.len());
                plain.extend_from_slice(text.as_bytes());
            }
        }
        let mut block = Vec::with_capacity(plain.len() + 128);
        let mut rest = plain.as_slice();
        loop {
            let read = self.0.total_in();
            // Into memory that grows, with a sync flush: this cannot fail.
            let _ = self.0.compress_vec(rest, &mut block, FlushCompress::Sync);
            rest = rest.get((self.0.total_in() - read) as usize..).unwrap_or_default();
            if rest.is_empty() && block.len() < block.capacity() {
                return block;
            }
            block.reserve(128);
        }
    }
}

fn put(into: &mut Vec<u8>, number: usize) {
    into.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes());
}

fn parse(mut plain: &[u8]) -> Result<Headers, String> {
    let count = number(&mut plain)?;
    if count > PAIRS_MAX {
        return Err(format!("header block with {count} pairs"));
    }
    let mut headers = Headers::with_capacity(count);
    for _ in 0..count {
        let (name, value) = (text(&mut plain)?, text(&mut plain)?);
        headers.push((name.to_ascii_lowercase(), value));
    }
    Ok(headers)
}

fn number(plain: &mut &[u8]) -> Result<usize, String> {
    let (bytes, rest) = plain.split_first_chunk::<4>().ok_or("header block ends early")?;
    *plain = rest;
    Ok(u32::from_be_bytes(*bytes) as usize)
}

fn text(plain: &mut &[u8]) -> Result<String, String> {
    let length = number(plain)?;
    let (bytes, rest) = plain.split_at_checked(length).ok_or("header block ends early")?;
    *plain = rest;
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// The dictionary of SPDY/3, which both ends begin with.
const DICTIONARY: &[u8] = include_bytes!("dictionary.bin");

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_dictionary_is_that_of_the_draft() {
        // zlib names a dictionary by its Adler-32.
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY {
            a = (a + u32::from(*byte)) % 65_521;
            b = (b + a) % 65_521;
        }
        assert_eq!((DICTIONARY.len(), b << 16 | a), (1423, 0xe3c6_a7c2));
    }

    #[test]
    fn garbage_is_an_error_and_a_bomb_is_bounded() {
        assert!(Reader::new().read(b"\x78\xbb\xe3\xc6\xa7\xc2\xff\xff\xff\xff").is_err());
        assert!(Reader::new().read(b"not zlib").is_err());
        let zeros = "0".repeat(1 << 20);
        let bomb = Writer::new().write(&[("a", &zeros)]);
        assert!(bomb.len() < 20_000 && Reader::new().read(&bomb).is_err());
    }

    proptest! {
        #[test]
        fn blocks_survive_in_their_order(blocks in prop::collection::vec(prop::collection::vec(("[a-z]{0,20}", ".{0,200}"), 0..8), 1..6)) {
            let (mut writer, mut reader) = (Writer::new(), Reader::new());
            for block in &blocks {
                let pairs: Vec<(&str, &str)> = block.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
                let wire = writer.write(&pairs);
                prop_assert_eq!(&reader.read(&wire).expect("a block"), block);
            }
        }
    }
}
