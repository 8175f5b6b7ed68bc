//! Every hostile archive, unpacked to both forms of layers, and by GNU tar; and the corpus of the fuzzer, replayed.

use super::erofs::tests::{same_as_a_directory, same_trees};
use super::hostile_archives::{LIMIT_BYTES, Outcome, all};
use super::unpack::{Place, decompress, unpack};
use super::{digest, extract, fuzz_layer};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

const LIMITS: extract::Limits = extract::Limits { bytes: LIMIT_BYTES, entries: 2000 };

fn plain(stored: &[u8]) -> Vec<u8> {
    let (mut raw, mut plain) = (stored, Vec::new());
    // What of a broken stream can be read.
    if let Ok(mut reader) = decompress(&mut raw) {
        let _ = reader.read_to_end(&mut plain);
    }
    plain
}

/// Everything beside the layer, to be the same afterwards.
fn outside(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// GNU tar with the directory as its root.
fn tar_in_a_chroot(archive: &[u8], root: &Path) {
    let tools = root.join(".tools");
    fs::create_dir(&tools).unwrap();
    let tar = ["/usr/bin/tar", "/bin/tar"].into_iter().find(|path| Path::new(path).exists()).unwrap();
    fs::copy(tar, tools.join("tar")).unwrap();
    let linked = Command::new("ldd").arg(tar).output().unwrap();
    let mut loader = String::new();
    for word in String::from_utf8_lossy(&linked.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
        let name = Path::new(word).file_name().unwrap().to_string_lossy().into_owned();
        fs::copy(word, tools.join(&name)).unwrap();
        if name.starts_with("ld-") {
            loader = name;
        }
    }
    fs::write(tools.join("archive"), archive).unwrap();
    let words = ["--library-path", "/.tools", "/.tools/tar", "-xPpf", "/.tools/archive"];
    let keep = ["--numeric-owner", "--same-owner", "--xattrs", "--xattrs-include=*"];
    let output = Command::new("chroot").arg(root).arg(format!("/.tools/{loader}")).args(words).args(keep).output().unwrap();
    // Garbage, or a missing end, makes it complain after it is done.
    assert!(output.status.code().is_some_and(|code| code <= 2), "{output:?}");
    fs::remove_dir_all(tools).unwrap();
}

fn layer_directory(above: &Path) -> PathBuf {
    let layer = above.join("layer");
    fs::create_dir(&layer).unwrap();
    fs::set_permissions(&layer, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    layer
}

fn check(stored: &[u8], outcome: Outcome) {
    check_within(stored, outcome, LIMITS);
}

fn check_within(stored: &[u8], outcome: Outcome, limits: extract::Limits) {
    let above = tempfile::tempdir().unwrap();
    let layer = layer_directory(above.path());
    let (hosts, passwd) = (outside(Path::new("/etc")), fs::read("/etc/passwd").unwrap());
    let plain = plain(stored);
    let diff_id = digest::of(&plain);
    let by_directory = unpack(stored, &diff_id, Place::Directory(&layer, None), limits).map(drop).map_err(|e| e.to_string());
    let (image, split) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let by_image = unpack(stored, &diff_id, Place::Erofs(&image, &split), limits).map(drop).map_err(|e| e.to_string());
    assert_eq!(by_directory, by_image, "a directory and an image differ");
    assert_eq!(outside(above.path()), ["layer"]);
    assert_eq!((outside(Path::new("/etc")), fs::read("/etc/passwd").unwrap()), (hosts, passwd));
    match (outcome, by_image) {
        (Outcome::Refused(words), Err(error)) => assert!(error.contains(words), "{words:?} is not in: {error}"),
        (Outcome::Safe, Ok(())) => same_as_a_directory(&plain),
        (Outcome::LikeTar, Ok(())) => {
            same_as_a_directory(&plain);
            let other = tempfile::tempdir().unwrap();
            let root = layer_directory(other.path());
            tar_in_a_chroot(&plain, &root);
            same_trees(&root, &layer);
        }
        (expected, found) => panic!("{expected:?}, but {found:?}"),
    }
    // The fuzzer's own limits may be other ones; what it checks must hold.
    let _ = fuzz_layer(stored);
}

#[test]
fn hostile_archives_are_harmless_in_both_forms() {
    let mut failed = Vec::new();
    for (name, stored, outcome) in all() {
        if let Err(panic) = std::panic::catch_unwind(|| check(&stored, outcome)) {
            let text = panic.downcast_ref::<String>().cloned();
            failed.push(format!("{name}: {}", text.or(panic.downcast_ref::<&str>().map(|s| (*s).into())).unwrap_or_default()));
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}

/// In each form that GNU tar writes, with a map that is longer than a block.
#[test]
fn sparse_files_of_gnu_tar() {
    let from = tempfile::tempdir().unwrap();
    let file = fs::File::create(from.path().join("holes")).unwrap();
    for piece in 0..200u64 {
        let content = super::test_images::noise(piece + 1, 5000 + piece as usize);
        std::os::unix::fs::FileExt::write_all_at(&file, &content, piece * 300_000 + 70_000).unwrap();
    }
    file.set_len(70_000_000).unwrap();
    fs::write(from.path().join("whole"), b"no holes").unwrap();
    fs::File::create(from.path().join("empty")).unwrap().set_len(1 << 20).unwrap();
    for words in [
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
        ["--format=gnu", "--sparse"],
    ] {
        let mut tar = Command::new("tar");
        let output = tar.arg("-C").arg(from.path()).args(["--sparse", "--hole-detection=raw", "-cf", "-"]);
        let output = output.args(words).args(["holes", "whole", "empty"]).output().unwrap();
        assert!(output.status.success() && output.stdout.len() < 5_000_000, "{words:?}: {output:?}");
        check_within(&output.stdout, Outcome::LikeTar, extract::Limits { bytes: 100 << 20, entries: 10 });
    }
}

#[test]
fn the_fuzzers_corpus_is_replayed() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/layer");
    if std::env::var_os("WINDLASS_WRITE_CORPUS").is_some() {
        fs::create_dir_all(&corpus).unwrap();
        for (name, stored, _) in all().into_iter().filter(|(_, stored, _)| stored.len() < 64 << 10) {
            fs::write(corpus.join(name), gzip_unless(&stored)).unwrap();
        }
    }
    let rounds = std::env::var("WINDLASS_FUZZ_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    let mut count = 0;
    for entry in fs::read_dir(&corpus).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        assert!(std::panic::catch_unwind(|| fuzz_layer(&bytes)).is_ok(), "{}", path.display());
        for round in 0..rounds {
            let changed = changed(&bytes, round + 1);
            if std::panic::catch_unwind(|| fuzz_layer(&changed)).is_err() {
                let kept = std::env::temp_dir().join("windlass-layer-crash");
                fs::write(&kept, changed).unwrap();
                panic!("{} in round {round}, kept in {}", path.display(), kept.display());
            }
        }
        count += 1;
    }
    assert!(count >= 50, "{count} files in {}", corpus.display());
}

/// Changed forms of each seed that are tried, always the same ones; `WINDLASS_FUZZ_ROUNDS` makes them more.
const ROUNDS: u64 = 20;

/// The seed with some bytes changed, blocks doubled, or its end lost. Headers get a right checksum again, so that what is behind it is met.
fn changed(seed: &[u8], round: u64) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    let dice: Vec<usize> = super::test_images::noise(round.wrapping_mul(0x9e37_79b9_7f4a_7c15), 80)
        .chunks_exact(4)
        .map(|four| four.iter().fold(0, |all, byte| all << 8 | usize::from(*byte)))
        .collect();
    for pair in dice[4..].chunks_exact(2).take(1 + dice[0] % 6) {
        let at = pair[0] % bytes.len().max(1);
        match bytes.get_mut(at) {
            Some(byte) if pair[1].is_multiple_of(3) => *byte ^= 1 << (pair[1] / 3 % 8),
            Some(byte) => *byte = b"0179/.\0 \xff\x80=x"[pair[1] / 3 % 12],
            None => {}
        }
    }
    if dice[1].is_multiple_of(4) && bytes.len() >= 1024 {
        let block = dice[2] % (bytes.len() / 512) * 512;
        let double = bytes[block..block + 512].to_vec();
        bytes.splice(block..block, double);
    }
    if dice[3].is_multiple_of(8) {
        bytes.truncate(dice[2] % (bytes.len() + 1));
    }
    for header in bytes.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    bytes
}

/// Seeds are kept as they are where they are small: the fuzzer learns more from plain bytes.
fn gzip_unless(stored: &[u8]) -> Vec<u8> {
    if stored.len() <= 4096 { stored.to_vec() } else { super::test_images::gzip(stored) }
}

/// Names, links, attributes and devices in number.
#[test]
fn a_hundred_thousand_files_in_both_forms() {
    let mut tar = super::test_images::Tar::new();
    for index in 0..100_000u32 {
        let name = format!("d{}/{index}-{}", index % 300, "n".repeat(index as usize % 60));
        tar = match index % 50 {
            0 => tar.device(&name, ::tar::EntryType::Char, 1, index % 256),
            1 => tar.symlink(&name, "/somewhere"),
            2 => tar.pax(&[("SCHILY.xattr.user.n", name.as_bytes())]).file(&name, 0o640, name.as_bytes()),
            3 => tar.pax(&[("path", format!("d0/{index}{}", "l".repeat(240)).as_bytes())]).file("x", 0o600, b"long"),
            4 => tar.file(&name, 0o644, b"x").hard_link(&format!("hard-{index}"), &name),
            _ => tar.file(&name, 0o644, &index.to_le_bytes()),
        };
    }
    same_as_a_directory(&tar.finish());
}
