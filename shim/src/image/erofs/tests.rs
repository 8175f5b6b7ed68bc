//! Images that are written here, read by the kernel.

use super::super::extract::{self, Limits};
use super::super::split::{Joined, Kept, Recorder};
use super::super::test_images::{Tar, noise};
use super::build;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

const LIMITS: Limits = Limits { bytes: 1 << 40, entries: 1 << 20 };

/// A detached mount of the image of an archive; ends with its descriptor.
struct Mounted {
    root: OwnedFd,
    _directory: tempfile::TempDir,
}

impl Mounted {
    fn of(archive: &[u8]) -> Mounted {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let file = fs::File::create_new(&path).unwrap();
        let split = fs::File::create_new(directory.path().join("split")).unwrap();
        let recorder = Recorder::new(split.try_clone().unwrap()).unwrap();
        let (_, mut rest, recorder) = build(archive, &file, LIMITS, Some(recorder)).unwrap();
        let mut recorder = recorder.unwrap();
        let mut trailer = Vec::new();
        rest.read_to_end(&mut trailer).unwrap();
        recorder.raw(&trailer).unwrap();
        recorder.finish().unwrap();
        let open = |name: &str| fs::File::open(directory.path().join(name)).unwrap();
        let mut again = Vec::new();
        Joined::new(open("split"), Kept::Image(open("image"))).unwrap().read_to_end(&mut again).unwrap();
        assert!(again == archive, "the archive comes back: {} of {} bytes", again.len(), archive.len());
        let context = rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        rustix::mount::fsconfig_set_string(&context, "source", &path).unwrap();
        rustix::mount::fsconfig_create(&context).unwrap();
        let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY).unwrap();
        let root = rustix::fs::openat(mount, ".", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        Mounted { root, _directory: directory }
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.root.as_fd().as_raw_fd()))
    }
}

/// All that can be seen of a file.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    size: u64,
    device: u64,
    links: u64,
    mtime: (i64, i64),
    xattrs: Vec<(String, Vec<u8>)>,
    content: Vec<u8>,
}

fn xattrs(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0u8; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    let mut found: Vec<_> = names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty() && *name != b"security.selinux")
        .map(|name| {
            let mut value = vec![0u8; 1 << 16];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).unwrap();
            value.truncate(length);
            (String::from_utf8_lossy(name).into_owned(), value)
        })
        .collect();
    found.sort();
    found
}

/// Everything below a directory, by its path.
fn walk(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut found = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(at) = pending.pop() {
        let path = root.join(&at);
        // The root is reached through a magic link.
        let data = if at.as_os_str().is_empty() { fs::metadata(&path) } else { path.symlink_metadata() }.unwrap();
        let content = if data.is_file() {
            fs::read(&path).unwrap()
        } else if data.is_symlink() {
            fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        if data.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| at.join(entry.unwrap().file_name())));
        }
        let seen = Seen {
            mode: data.mode(),
            owner: (data.uid(), data.gid()),
            size: if data.is_dir() { 0 } else { data.size() },
            device: if data.file_type().is_char_device() || data.file_type().is_block_device() { data.rdev() } else { 0 },
            // File systems differ in how they count those of directories.
            links: if data.is_dir() { 0 } else { data.nlink() },
            mtime: (data.mtime(), data.mtime_nsec()),
            xattrs: if at.as_os_str().is_empty() { Vec::new() } else { xattrs(&path) },
            content,
        };
        found.insert(at, seen);
    }
    found
}

/// The image of an archive shows what the directory that is unpacked from it shows.
pub(in super::super) fn same_as_a_directory(archive: &[u8]) {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    comes_back_of_a_directory(archive, directory.path());
    let image = Mounted::of(archive);
    same_trees(directory.path(), &image.path());
}

/// Unpacks the archive into the directory, of which it can be put together again.
fn comes_back_of_a_directory(archive: &[u8], directory: &Path) {
    let mut split = tempfile::tempfile().unwrap();
    let recorder = Recorder::new(split.try_clone().unwrap()).unwrap();
    let (_, mut rest, recorder) = extract::extract(archive, directory, LIMITS, Some(recorder)).unwrap();
    let mut recorder = recorder.unwrap();
    let mut trailer = Vec::new();
    rest.read_to_end(&mut trailer).unwrap();
    recorder.raw(&trailer).unwrap();
    recorder.finish().unwrap();
    std::io::Seek::rewind(&mut split).unwrap();
    let mut again = Vec::new();
    let root = Kept::Directory(fs::File::open(directory).unwrap().into());
    Joined::new(split, root).unwrap().read_to_end(&mut again).unwrap();
    assert!(again == archive, "the archive comes back of a directory: {} of {} bytes", again.len(), archive.len());
}

/// The trees show the same.
pub(in super::super) fn same_trees(expected: &Path, found: &Path) {
    let (mut expected, mut found) = (walk(expected), walk(found));
    let made_now: Vec<PathBuf> =
        expected.iter().filter(|(_, seen)| seen.mtime.0 > 1_700_000_000).map(|(path, _)| path.clone()).collect();
    // What no entry describes was made just now by other programs, and never, here.
    for path in made_now {
        for all in [&mut expected, &mut found] {
            if let Some(seen) = all.get_mut(&path) {
                seen.mtime = (0, 0);
            }
        }
    }
    let names = |all: &BTreeMap<PathBuf, Seen>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&expected), names(&found));
    for (path, seen) in &expected {
        assert!(*seen == found[path], "{}: {:?}, not {:?}", path.display(), short(&found[path]), short(seen));
    }
}

fn short(seen: &Seen) -> String {
    let text = format!("{seen:?}");
    text.chars().take(500).collect()
}

#[test]
fn all_that_an_archive_can_hold() {
    let long = "n".repeat(95);
    let mut tar = Tar::new()
        .dir("etc", 0o755)
        .file("etc/passwd", 0o644, b"root:x:0:0::/root:/bin/sh\n")
        .file("etc/empty", 0o600, b"")
        .pax(&[
            ("SCHILY.xattr.user.note", b"of a file"),
            (
                "SCHILY.xattr.security.capability",
                b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
            ),
            ("mtime", b"1234567890.123456789"),
        ])
        .file("bin/ping", 0o4755, &noise(1, 5000))
        .pax(&[("SCHILY.xattr.user.big", &noise(2, 1500)), ("SCHILY.xattr.trusted.overlay.opaque", b"y")])
        .file("bin/attributes", 0o755, &noise(4, 9000))
        .symlink("lib", "usr/lib")
        .dir("usr/lib", 0o2750)
        .file("lib/through-the-link", 0o640, b"x")
        .hard_link("usr/hard", "lib/through-the-link")
        .hard_link("usr/harder", "usr/hard")
        .symlink("long-link", &"t/".repeat(45))
        .hard_link("other-link", "long-link")
        .device("dev-null", tar::EntryType::Char, 1, 3)
        .device("dev-big", tar::EntryType::Block, 259, 70_000)
        .raw("fifo", tar::EntryType::Fifo, 0o644, "", b"")
        .file("etc/.wh.gone", 0o600, b"")
        .file("opaque/.wh..wh..opq", 0o600, b"")
        .file("opaque/below", 0o600, b"y")
        .file(&long, 0o600, b"long")
        .file("replaced", 0o600, b"first")
        .file("replaced", 0o640, b"second, longer")
        .dir("dir-to-file", 0o755)
        .file("dir-to-file/inside", 0o600, b"lost")
        .hard_link("kept-link", "dir-to-file/inside")
        .file("dir-to-file", 0o600, b"file")
        .file("file-to-dir", 0o600, b"file")
        .dir("file-to-dir", 0o711)
        .dir("etc", 0o700)
        .dir("./", 0o751);
    for size in [1, 2047, 2048, 3900, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 12_345, 1 << 20, (1 << 20) + 1, 3_000_000] {
        tar = tar.file(&format!("sizes/{size}"), 0o644, &noise(size as u64, size));
    }
    let zeros = vec![0u8; 300_000];
    tar = tar.file("zeros", 0o644, &zeros).file("after", 0o644, &noise(9, 100));
    same_as_a_directory(&tar.finish());
}

#[test]
fn large_directories_and_deep_ones() {
    let mut tar = Tar::new();
    for index in 0..20_000u32 {
        tar = tar.file(&format!("many/{:x}-{index}", index.wrapping_mul(2_654_435_761)), 0o644, &index.to_le_bytes());
    }
    for index in 0..400 {
        tar = tar.dir(&format!("dirs/{index}"), 0o755).file(&format!("dirs/{index}/f"), 0o600, &noise(index, 3000));
    }
    tar = tar.file(&"d/".repeat(40), 0o600, b"").file(&(["e"; 45].join("/") + "/f"), 0o600, b"deep");
    same_as_a_directory(&tar.finish());
}

/// GNU's form of a file with holes, and pieces that begin and end anywhere.
#[test]
fn files_with_holes() {
    let pieces: [(u64, &[u8]); 4] =
        [(1000, &noise(1, 500)), (70_000, &noise(2, 9000)), (80_000, &noise(3, 1)), (5_000_000, &noise(4, 4097))];
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_mode(0o644);
    header.set_mtime(1_000_000_000);
    header.set_uid(0);
    header.set_gid(0);
    header.set_entry_type(tar::EntryType::GNUSparse);
    let stored: usize = pieces.iter().map(|(_, data)| data.len()).sum();
    header.set_size(stored as u64);
    let gnu = header.as_gnu_mut().unwrap();
    for ((offset, data), slot) in pieces.iter().zip(gnu.sparse.iter_mut()) {
        slot.offset.copy_from_slice(format!("{offset:011o}\0").as_bytes());
        slot.numbytes.copy_from_slice(format!("{:011o}\0", data.len()).as_bytes());
    }
    gnu.realsize.copy_from_slice(format!("{:011o}\0", 6_000_001).as_bytes());
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header, pieces.map(|(_, data)| data.to_vec()).concat().as_slice()).unwrap();
    same_as_a_directory(&builder.into_inner().unwrap());
}

/// More than most file systems keep, and more than a block.
#[test]
fn large_attributes() {
    let (big, huge) = (noise(2, 3000), noise(3, 60_000));
    let records = [("SCHILY.xattr.user.big", big.as_slice()), ("SCHILY.xattr.user.huge", huge.as_slice())];
    let tar = Tar::new().pax(&records).file("f", 0o755, &noise(4, 9000)).pax(&records).dir("d", 0o755).file("g", 0o600, b"g");
    let image = Mounted::of(&tar.finish());
    for name in ["f", "d"] {
        let expected = vec![("user.big".to_owned(), big.clone()), ("user.huge".to_owned(), huge.clone())];
        assert!(xattrs(&image.path().join(name)) == expected, "{name}");
    }
    assert!(fs::read(image.path().join("f")).unwrap() == noise(4, 9000));
    assert_eq!(fs::read(image.path().join("g")).unwrap(), b"g");
}

#[test]
fn the_same_archive_becomes_the_same_image() {
    let archive = Tar::new().dir("a", 0o755).file("a/b", 0o644, &noise(1, 10_000)).symlink("c", "a").finish();
    let image = || {
        let file = tempfile::tempfile().unwrap();
        build(archive.as_slice(), &file, LIMITS, None).unwrap();
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        bytes
    };
    assert!(image() == image());
}

#[test]
fn what_no_image_can_hold_is_refused() {
    let long = "x".repeat(70_000);
    let deep = "x/".repeat(2_100);
    for (tar, why) in [
        (Tar::new().file("../escape", 0o600, b""), "outside"),
        (Tar::new().symlink("s", "/nowhere").file("s/f", 0o600, b""), "nowhere"),
        (Tar::new().symlink("s", "s").file("s/f", 0o600, b""), "no directory"),
        (Tar::new().file("f", 0o600, b"").file("f/g", 0o600, b""), "no directory"),
        (Tar::new().hard_link("l", "missing"), "does not have"),
        (Tar::new().dir("d", 0o755).hard_link("l", "d"), "directory"),
        (Tar::new().file(".wh.d/f", 0o600, b""), "whiteout"),
        (Tar::new().file("a/.wh.", 0o600, b""), "whiteout"),
        (Tar::new().pax(&[("path", deep.as_bytes())]).dir("p", 0o700), "path of more than"),
        (Tar::new().pax(&[("path", &long.as_bytes()[..300])]).file("p", 0o600, b""), "more than 255"),
        (Tar::new().pax(&[("linkpath", long.as_bytes())]).symlink("p", "x"), "target of more than"),
        (Tar::new().pax(&[("SCHILY.xattr.user.x", long.as_bytes())]).file("p", 0o600, b""), "attribute"),
        (Tar::new().raw(".", tar::EntryType::Regular, 0o600, "", b""), "replace the root"),
    ] {
        let file = tempfile::tempfile().unwrap();
        let error = build(tar.finish().as_slice(), &file, LIMITS, None).err().unwrap_or_else(|| panic!("{why}"));
        assert!(error.to_string().contains(why), "{why}: {error}");
    }
}
