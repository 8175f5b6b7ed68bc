//! Archives made to do harm, and what must become of each. They are seeds of the fuzzer's corpus, too.

use super::test_images::{Tar, gzip, noise, zstd};
use tar::EntryType;

/// What must become of an archive, whatever the form of layers.
#[derive(Debug, Clone, Copy)]
pub(super) enum Outcome {
    /// An error that has these words.
    Refused(&'static str),
    /// Unpacked, nothing outside.
    Safe,
    /// Unpacked to what GNU tar makes of it with the layer as its root.
    LikeTar,
}

use Outcome::{LikeTar, Refused, Safe};

/// Most bytes of files in a layer in these tests.
pub(super) const LIMIT_BYTES: u64 = 8 << 20;

/// Name, bytes as a registry sends them, outcome.
pub(super) fn all() -> Vec<(&'static str, Vec<u8>, Outcome)> {
    [paths(), links(), replaced(), whiteouts(), pax(), bombs(), broken()].concat()
}

type Cases = Vec<(&'static str, Vec<u8>, Outcome)>;

const UP: &str = "../../../../../../../../etc";

fn paths() -> Cases {
    let long = |length: usize| Tar::new().pax(&[("path", "n".repeat(length).as_bytes())]).file("f", 0o644, b"x").finish();
    let deep = |parts: usize| Tar::new().pax(&[("path", "d/".repeat(parts).as_bytes())]).dir("d", 0o755).finish();
    let bytes = |name: &[u8]| Tar::new().pax(&[("path", name)]).file("f", 0o644, b"x").finish();
    vec![
        ("absolute", Tar::new().file("/abs/file", 0o644, b"x").finish(), LikeTar),
        ("many-slashes", Tar::new().file("//a///b//./c", 0o644, b"x").finish(), LikeTar),
        ("dot-dot", Tar::new().file("../x", 0o644, b"x").finish(), Refused("leads outside")),
        ("dot-dot-within", Tar::new().file("a/../../x", 0o644, b"x").finish(), Refused("leads outside")),
        ("dot-dot-absolute", Tar::new().file("/../x", 0o644, b"x").finish(), Refused("leads outside")),
        ("dot-dot-inside", Tar::new().file("a/b/../c", 0o644, b"x").finish(), Safe),
        ("dot-dot-directory", Tar::new().dir("..", 0o777).finish(), Refused("leads outside")),
        ("root-as-file", Tar::new().file("/", 0o644, b"").symlink(".", "/etc").finish(), Refused("replace the root")),
        ("root-as-symlink", Tar::new().symlink("./", "/etc").finish(), Refused("replace the root")),
        ("name-of-255", long(255), LikeTar),
        ("name-of-256", long(256), Refused("a name of more than 255 bytes")),
        ("path-of-1000", deep(500), LikeTar),
        ("path-over-4096", deep(2049), Refused("a path of more than 4095 bytes")),
        ("bad-utf8", bytes(b"\xff\xfe/\xc3\x28/\x80"), LikeTar),
        ("control-characters", bytes(b"a\n\x1b[2J\r"), LikeTar),
        ("path-nul", bytes(b"a\0b"), Refused("NUL")),
        ("path-empty", bytes(b""), Refused("replace the root")),
        ("file-as-directory", Tar::new().file("f", 0o644, b"").file("f/x", 0o644, b"").finish(), Refused("no directory")),
    ]
}

fn links() -> Cases {
    let t = Tar::new;
    vec![
        ("symlink-then-write", t().symlink("s", "/etc").file("s/x", 0o644, b"x").finish(), Refused("symlink to nowhere")),
        ("relative-symlink-then-write", t().symlink("s", UP).file("s/x", 0o644, b"x").finish(), Refused("symlink to nowhere")),
        ("symlink-chain", t().symlink("a", "b").symlink("b", "/c").dir("c", 0o755).file("a/x", 0o644, b"x").finish(), LikeTar),
        ("symlink-inside", t().dir("in", 0o755).symlink("s", "/in").file("s/x", 0o644, b"x").finish(), LikeTar),
        ("symlink-over-itself", t().symlink("s", "s").file("s/x", 0o644, b"x").finish(), Refused("no directory")),
        ("symlink-replaced", t().symlink("s", "/etc/passwd").file("s", 0o644, b"mine").finish(), LikeTar),
        ("symlink-empty", t().symlink("s", "").finish(), Refused("without a target")),
        (
            "symlink-target-over-4096",
            t().pax(&[("linkpath", "t/".repeat(2100).as_bytes())]).symlink("s", "x").finish(),
            Refused("target of more than 4095"),
        ),
        ("magic-link", t().symlink("s", "/proc/self/root").file("s/x", 0o644, b"x").finish(), Refused("symlink to nowhere")),
        ("hard-link-up", t().hard_link("h", "../x").finish(), Refused("leads outside")),
        ("hard-link-outside", t().hard_link("h", "/etc/passwd").finish(), Refused("does not have")),
        ("hard-link-through-symlink", t().symlink("s", "/etc").hard_link("h", "s/passwd").finish(), Refused("does not have")),
        ("hard-link-to-symlink", t().symlink("s", "/etc/passwd").hard_link("h", "s").finish(), LikeTar),
        (
            "hard-link-to-symlink-then-write",
            t().symlink("s", "/etc/passwd").hard_link("h", "s").file("h", 0o644, b"x").finish(),
            LikeTar,
        ),
        ("hard-link-to-directory", t().dir("d", 0o755).hard_link("h", "d").finish(), Refused("link to a directory")),
        ("hard-link-to-later", t().hard_link("h", "f").file("f", 0o644, b"x").finish(), Refused("does not have")),
        ("hard-link-to-itself", t().file("f", 0o644, b"x").hard_link("f", "f").finish(), Safe),
        ("hard-link-to-root", t().hard_link("h", "/").finish(), Refused("link to")),
        ("hard-link-chain", t().file("a", 0o644, b"x").hard_link("b", "a").hard_link("c", "b").finish(), LikeTar),
        ("device-nodes", t().device("null", EntryType::Char, 1, 3).device("sda", EntryType::Block, 8, 0).finish(), LikeTar),
        ("device-of-huge-number", t().device("dev", EntryType::Block, 4095, 1_000_000).finish(), Safe),
        ("fifo", t().raw("fifo", EntryType::Fifo, 0o644, "", b"").finish(), LikeTar),
        ("unknown-type", t().raw("x", EntryType::new(b'Z'), 0o644, "", b"").finish(), Refused("unknown type")),
    ]
}

fn replaced() -> Cases {
    let t = Tar::new;
    let full = || t().dir("d", 0o755).file("d/in", 0o644, b"in");
    vec![
        ("file-to-file", t().file("f", 0o644, b"one").file("f", 0o600, b"second").finish(), LikeTar),
        ("file-to-directory", t().file("f", 0o644, b"one").dir("f", 0o711).file("f/in", 0o644, b"x").finish(), LikeTar),
        ("directory-to-file", full().file("d", 0o644, b"file").finish(), Safe),
        ("directory-to-symlink", full().symlink("d", "/etc").finish(), Safe),
        ("directory-to-symlink-then-write", full().symlink("d", "/etc").file("d/x", 0o644, b"x").finish(), Refused("nowhere")),
        ("directory-twice", full().dir("d", 0o700).finish(), LikeTar),
        ("linked-file-replaced", t().file("a", 0o644, b"a").hard_link("b", "a").file("a", 0o644, b"new").finish(), LikeTar),
        ("device-to-file", t().device("n", EntryType::Char, 1, 3).file("n", 0o644, b"x").finish(), LikeTar),
        ("setuid-through-chown", t().file("s", 0o6755, b"x").finish(), LikeTar),
    ]
}

fn whiteouts() -> Cases {
    let one = |path: &str| Tar::new().file(path, 0o644, b"").finish();
    vec![
        ("whiteout", one("d/.wh.gone"), Safe),
        ("whiteout-of-root", one(".wh."), Refused("whiteout without a name")),
        ("whiteout-of-slash", one(".wh./"), Refused("whiteout without a name")),
        ("whiteout-of-dot", one("a/.wh.."), Refused("whiteout without a name")),
        ("whiteout-of-dot-dot", one("a/.wh..."), Refused("whiteout without a name")),
        ("whiteout-with-slash", one(".wh.a/b"), Refused("below a whiteout")),
        ("whiteout-of-what-is-here", Tar::new().dir("d", 0o755).file("d/x", 0o644, b"").file(".wh.d", 0o644, b"").finish(), Safe),
        ("whiteout-then-file", Tar::new().file(".wh.f", 0o644, b"").file("f", 0o644, b"x").finish(), Safe),
        ("opaque-root", one(".wh..wh..opq"), Safe),
        ("opaque-below-opaque", one("a/.wh..wh..opq/x"), Refused("below a whiteout")),
        (
            "opaque-of-a-file",
            Tar::new().file("f", 0o644, b"").file("f/.wh..wh..opq", 0o644, b"").finish(),
            Refused("no directory"),
        ),
        ("opaque-as-directory", Tar::new().dir("a/.wh..wh..opq", 0o755).finish(), Safe),
        ("opaque-with-content", Tar::new().file("a/.wh..wh..opq", 0o644, &noise(3, 3000)).file("b", 0o644, b"b").finish(), Safe),
        ("aufs-bookkeeping", Tar::new().file(".wh..wh.plnk", 0o644, b"").file(".wh..wh.aufs", 0o644, b"").finish(), Safe),
        ("a-whiteout-by-hand", Tar::new().device("gone", EntryType::Char, 0, 0).finish(), Safe),
    ]
}

fn pax() -> Cases {
    let with = |records: &[(&str, &[u8])]| Tar::new().pax(records).file("f", 0o644, b"text").finish();
    let raw = |records: &[u8]| Tar::new().raw("p", EntryType::XHeader, 0o644, "", records).file("f", 0o644, b"text").finish();
    vec![
        ("pax-size", with(&[("size", b"4")]), LikeTar),
        ("pax-size-smaller", with(&[("size", b"0")]), Refused("checksum")),
        ("pax-size-larger", with(&[("size", b"99999")]), Refused("ends inside")),
        ("pax-size-huge", with(&[("size", b"18446744073709551615")]), Refused("out of range")),
        ("pax-size-negative", with(&[("size", b"-1")]), Refused("PAX number")),
        ("pax-path", with(&[("path", b"other/name")]), LikeTar),
        ("pax-path-outside", with(&[("path", b"../../x")]), Refused("leads outside")),
        ("pax-path-twice", with(&[("path", b"one"), ("path", b"two")]), LikeTar),
        ("pax-owner-negative", with(&[("uid", b"-5")]), Refused("PAX number")),
        ("pax-owner-huge", with(&[("gid", b"4294967295")]), Refused("owner is out of range")),
        ("pax-time-negative", with(&[("mtime", b"-5.5")]), Safe),
        ("pax-time-nonsense", with(&[("mtime", b"99999999999999999999999.x")]), Safe),
        ("pax-xattr", with(&[("SCHILY.xattr.user.a", b"1")]), LikeTar),
        (
            "pax-xattr-forbidden",
            with(&[("SCHILY.xattr.trusted.overlay.opaque", b"y"), ("SCHILY.xattr.security.selinux", b"x")]),
            Safe,
        ),
        ("pax-xattr-of-overlay", with(&[("SCHILY.xattr.trusted.overlay.redirect", b"/etc")]), Safe),
        ("pax-xattr-of-no-namespace", with(&[("SCHILY.xattr.nonsense", b"1"), ("SCHILY.xattr.system.x", b"1")]), Safe),
        ("pax-length-wrong", raw(b"99 path=x\n"), Refused("PAX record is malformed")),
        ("pax-length-zero", raw(b"0 path=x\n"), Refused("PAX record is malformed")),
        ("pax-no-equals", raw(b"8 pathx\n"), Refused("PAX record is malformed")),
        ("pax-alone", Tar::new().pax(&[("path", b"x")]).finish(), Safe),
        ("pax-sparse", with(&[("GNU.sparse.major", b"1")]), Refused("sparse file in PAX form")),
        ("pax-sparse-0.1", with(&[("GNU.sparse.size", b"9000"), ("GNU.sparse.map", b"5000,4")]), Safe),
        ("pax-sparse-no-size", with(&[("GNU.sparse.map", b"5000,4")]), Refused("without its size")),
        ("pax-sparse-no-map", with(&[("GNU.sparse.size", b"9000")]), Refused("does not fit")),
        ("pax-sparse-no-pair", with(&[("GNU.sparse.size", b"9000"), ("GNU.sparse.map", b"5000")]), Refused("no pairs")),
        ("pax-sparse-text", with(&[("GNU.sparse.size", b"9000"), ("GNU.sparse.map", b"a,4")]), Refused("malformed")),
        ("pax-sparse-negative", with(&[("GNU.sparse.size", b"-9"), ("GNU.sparse.map", b"0,4")]), Refused("malformed")),
        ("pax-sparse-out-of-range", with(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"99,4")]), Refused("out of range")),
        (
            "pax-sparse-overflow",
            with(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"9223372036854775807,9223372036854775807")]),
            Refused("out of range"),
        ),
        ("pax-sparse-overlap", with(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,2,1,2")]), Refused("out of order")),
        ("pax-sparse-bomb", with(&[("GNU.sparse.size", b"9000000000000000000"), ("GNU.sparse.map", b"0,4")]), Refused("limit")),
        (
            "pax-sparse-0.0",
            with(&[
                ("GNU.sparse.size", b"9000"),
                ("GNU.sparse.offset", b"7"),
                ("GNU.sparse.numbytes", b"1"),
                ("GNU.sparse.offset", b"70"),
                ("GNU.sparse.numbytes", b"3"),
            ]),
            Safe,
        ),
        ("pax-sparse-0.0-order", with(&[("GNU.sparse.numbytes", b"1"), ("GNU.sparse.offset", b"7")]), Refused("no pairs")),
        (
            "pax-sparse-name-outside",
            with(&[("GNU.sparse.size", b"4"), ("GNU.sparse.map", b"0,4"), ("GNU.sparse.name", b"../x")]),
            Refused("leads outside"),
        ),
        ("pax-sparse-1.0-short", with(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0")]), Refused("does not fit")),
        ("pax-sparse-1.0", sparse_1(b"1\n5000\n4\n", b"text", EntryType::Regular), Safe),
        ("pax-sparse-1.0-empty", sparse_1(b"0\n", b"", EntryType::Regular), Safe),
        ("pax-sparse-1.0-more", sparse_1(b"1\n5000\n4\n", b"text and more", EntryType::Regular), Refused("does not fit")),
        ("pax-sparse-1.0-count", sparse_1(b"99999999999\n5000\n4\n", b"text", EntryType::Regular), Refused("over the limit")),
        ("pax-sparse-1.0-endless", sparse_1(&[b'7'; 600], b"text", EntryType::Regular), Refused("malformed")),
        ("pax-sparse-1.0-never", sparse_1(b"2\n5000\n4\n", b"", EntryType::Regular), Refused("malformed")),
        ("pax-sparse-directory", sparse_1(b"0\n", b"", EntryType::Directory), Refused("no file")),
    ]
}

fn bombs() -> Cases {
    let zeros = || Tar::new().file("zeros", 0o644, &vec![0; 9 << 20]).finish();
    let many = || (0..2100).fold(Tar::new(), |tar, i| tar.dir(&format!("{i}"), 0o755)).finish();
    let header = |kind| Tar::new().raw("h", kind, 0o644, "", &vec![b'a'; 4 << 20]).file("f", 0o644, b"").finish();
    vec![
        ("bomb-gzip", gzip(&zeros()), Refused("more than the limit")),
        ("bomb-zstd", zstd(&zeros()), Refused("more than the limit")),
        ("bomb-sparse", sparse(1 << 50, 0, 512), Refused("more than the limit")),
        ("bomb-entries", gzip(&many()), Refused("entries")),
        ("huge-long-name", gzip(&header(EntryType::GNULongName)), Refused("over the limit")),
        ("huge-long-link", gzip(&header(EntryType::GNULongLink)), Refused("over the limit")),
        ("huge-pax", gzip(&header(EntryType::XHeader)), Refused("over the limit")),
        ("huge-global-pax", gzip(&header(EntryType::XGlobalHeader)), Refused("over the limit")),
        ("sparse", sparse(1 << 20, 5000, 512), LikeTar),
        ("sparse-out-of-range", sparse(1000, 5000, 512), Refused("out of range")),
        ("sparse-map-of-other-size", sparse(1 << 20, 5000, 400), Refused("does not fit")),
        (
            "after-the-end",
            gzip(&[Tar::new().file("f", 0o644, b"x").finish(), vec![0; 65 << 20]].concat()),
            Refused("follow the archive's end"),
        ),
    ]
}

/// A file of 9000 bytes with holes in the newest form: the map stands before the content.
fn sparse_1(map: &[u8], content: &[u8], kind: EntryType) -> Vec<u8> {
    let mut data = map.to_vec();
    data.resize(map.len().next_multiple_of(512), 0);
    data.extend(content);
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"sparse"),
        ("GNU.sparse.realsize", b"9000"),
    ];
    Tar::new().pax(&records).raw("GNUSparseFile.0/sparse", kind, 0o644, "", &data).finish()
}

/// GNU's form of a file with holes; 512 bytes are stored.
fn sparse(size: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_mode(0o644);
    header.set_mtime(1_000_000_000);
    header.set_uid(0);
    header.set_gid(0);
    header.set_entry_type(EntryType::GNUSparse);
    header.set_size(512);
    let gnu = header.as_gnu_mut().unwrap();
    // Its last piece ends where the file ends, as GNU tar wants it.
    for (slot, (offset, length)) in gnu.sparse.iter_mut().zip([(offset, length), (size, 0)]) {
        slot.offset.copy_from_slice(&number(offset));
        slot.numbytes.copy_from_slice(&number(length));
    }
    gnu.realsize.copy_from_slice(&number(size));
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header, noise(9, 512).as_slice()).unwrap();
    builder.into_inner().unwrap()
}

/// Octal while it fits, else base 256.
fn number(value: u64) -> [u8; 12] {
    let mut field = [0; 12];
    if value < 1 << 33 {
        field.copy_from_slice(format!("{value:011o}\0").as_bytes());
    } else {
        field[0] = 0x80;
        field[4..].copy_from_slice(&value.to_be_bytes());
    }
    field
}

fn broken() -> Cases {
    let whole = Tar::new().file("f", 0o644, &noise(1, 5000)).file("g", 0o644, b"g").finish();
    let mut checksum = whole.clone();
    checksum[0] ^= 1;
    let packed = gzip(&whole);
    let negative = {
        let mut bytes = whole.clone();
        bytes[124..136].fill(0xff);
        bytes[148..156].fill(b' ');
        let sum: u32 = bytes[..512].iter().map(|byte| u32::from(*byte)).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes
    };
    vec![
        ("cut-in-content", whole[..2000].to_vec(), Refused("ends inside an entry")),
        ("cut-in-header", whole[..100].to_vec(), Refused("ends inside a header")),
        ("cut-before-the-end", whole[..whole.len() - 1024].to_vec(), LikeTar),
        ("cut-gzip", packed[..packed.len() / 2].to_vec(), Refused("unpack")),
        ("garbage-behind-gzip", [packed.clone(), noise(2, 700)].concat(), Refused("gzip")),
        ("garbage-behind-the-end", [whole.clone(), noise(2, 700)].concat(), LikeTar),
        ("wrong-checksum", checksum, Refused("checksum")),
        ("negative-size", negative, Refused("size")),
        ("empty", Vec::new(), Safe),
        ("noise", noise(4, 4096), Refused("checksum")),
    ]
}
