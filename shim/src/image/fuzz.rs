//! What the fuzzer of layers and the replay of its corpus call: one archive from anybody, through everything that reads or writes a layer
//! as an image, in memory. Needs no root and leaves nothing.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run layer -- -max_total_time=120` (cargo-fuzz, at the root of the checkout) is guided by coverage.
//! `WINDLASS_FUZZ_ROUNDS=5000 cargo test -p windlass --lib the_fuzzers_corpus` needs nothing but the tests: it changes each seed so often.

use super::digest;
use super::extract::Limits;
use super::unpack::{Place, decompress, unpack};
use super::verify::{self, Verdict};
use std::fs::File;
use std::io::{self, Read, Seek};

/// Small, so that a bomb meets them soon.
const LIMITS: Limits = Limits { bytes: 8 << 20, entries: 2000 };
/// Most plain bytes whose digest is taken.
const PLAIN_BYTES: u64 = 16 << 20;

/// Unpacks a layer as a registry would send it, compressed or not, into an image. One that is taken must give its archive back byte by
/// byte and become the same image again. Returns why it was refused.
///
/// # Panics
/// If that is not so: a bug.
pub fn fuzz_layer(stored: &[u8]) -> Result<(), String> {
    let mut raw = stored;
    let mut plain = Vec::new();
    let read = decompress(&mut raw).and_then(|plain_reader| plain_reader.take(PLAIN_BYTES).read_to_end(&mut plain));
    // Without the right digest the layer is refused at the end, which is fine.
    let diff_id = digest::of(if read.is_ok() { &plain } else { b"" });
    let memory = || memory().expect("files in memory");
    let (image, split, again) = (memory(), memory(), memory());
    unpack(stored, &diff_id, Place::Erofs(&image, &split), LIMITS).map_err(|error| error.to_string())?;
    let mut split_again = split;
    split_again.rewind().expect("a file in memory");
    let verdict = verify::image_layer(split_again, image, &diff_id, &again, LIMITS);
    assert!(matches!(verdict, Ok(Verdict::Sound)), "{verdict:?}");
    Ok(())
}

fn memory() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("layer", rustix::fs::MemfdFlags::CLOEXEC)?.into())
}
