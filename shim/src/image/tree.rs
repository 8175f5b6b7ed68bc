//! Compares two directories, all that an archive can say of a file: names, kinds, modes, owners, times, devices, attributes, targets, content,
//! and which names are one file.

use super::extract::keeps_xattr;
use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const COMPARE_BYTES: usize = 64 << 10;
/// What the kernel keeps at most of names of attributes, and of one's value.
pub(super) const ATTRIBUTE_BYTES: usize = 64 << 10;

/// The first path found at which the trees differ, and how. Errors: those of the disk.
pub(super) fn difference(one: &OwnedFd, other: &OwnedFd) -> io::Result<Option<(PathBuf, &'static str)>> {
    let mut inodes = HashMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let (left, right) = (open(one, &path, OFlags::DIRECTORY)?, open(other, &path, OFlags::DIRECTORY)?);
        if path.as_os_str().is_empty()
            && let Some(how) = differ(&left, &right, OsStr::new("."), &mut inodes)?
        {
            return Ok(Some((PathBuf::from("/"), how)));
        }
        let names = names(&left)?;
        if names != self::names(&right)? {
            return Ok(Some((path, "names")));
        }
        for name in names {
            if let Some(how) = differ(&left, &right, &name, &mut inodes)? {
                return Ok(Some((path.join(name), how)));
            }
            let found = fs::statat(&left, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
                pending.push(path.join(name));
            }
        }
    }
    Ok(None)
}

pub(super) fn names(directory: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let name = entry?.file_name().to_bytes().to_vec();
        if !matches!(name.as_slice(), b"." | b"..") {
            names.push(OsString::from_vec(name));
        }
    }
    names.sort();
    Ok(names)
}

/// How the two of this name differ. `inodes` has files of several names, this side's and the other's.
fn differ(left: &OwnedFd, right: &OwnedFd, name: &OsStr, inodes: &mut HashMap<u64, u64>) -> io::Result<Option<&'static str>> {
    let stat = |directory| fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
    let (one, other) = (stat(left)?, stat(right)?);
    if (one.st_mode, one.st_uid, one.st_gid) != (other.st_mode, other.st_uid, other.st_gid) {
        return Ok(Some("kind, mode or owner"));
    }
    let time = |stat: &Stat| (stat.st_mtime, stat.st_mtime_nsec);
    if time(&one) != time(&other) {
        return Ok(Some("time"));
    }
    let kind = FileType::from_raw_mode(one.st_mode);
    if kind != FileType::Directory && (one.st_nlink != other.st_nlink || one.st_size != other.st_size) {
        return Ok(Some("size or number of names"));
    }
    if matches!(kind, FileType::CharacterDevice | FileType::BlockDevice) && one.st_rdev != other.st_rdev {
        return Ok(Some("device"));
    }
    if attributes(left, name)? != attributes(right, name)? {
        return Ok(Some("attributes"));
    }
    if kind != FileType::Directory && one.st_nlink > 1 {
        match inodes.insert(one.st_ino, other.st_ino) {
            Some(before) if before != other.st_ino => return Ok(Some("names of one file")),
            Some(_) => return Ok(None),
            None => {}
        }
    }
    let same = match kind {
        FileType::Symlink => fs::readlinkat(left, name, Vec::new())? == fs::readlinkat(right, name, Vec::new())?,
        FileType::RegularFile => same_content(&file(left, name)?, &file(right, name)?)?,
        _ => true,
    };
    Ok(Some("content").filter(|_| !same))
}

fn file(directory: &OwnedFd, name: &OsStr) -> io::Result<File> {
    Ok(open(directory, Path::new(name), OFlags::NONBLOCK)?.into())
}

/// Opens what `path` is below `root`, without a link or another mount on the way; `root` itself for none.
pub(super) fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    fs::openat2(root, path, flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// Those that a layer keeps: not what the host adds.
fn attributes(directory: &OwnedFd, name: &OsStr) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    path.push(name);
    let mut buffer = vec![0; ATTRIBUTE_BYTES];
    let length = match fs::llistxattr(&path, &mut buffer) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    let names = buffer.get(..length).unwrap_or_default().to_vec();
    let kept = |key: &&[u8]| !key.is_empty() && (keeps_xattr(key) || *key == b"trusted.overlay.opaque");
    for key in names.split(|byte| *byte == 0).filter(kept) {
        let length = fs::lgetxattr(&path, OsStr::from_bytes(key), &mut buffer)?;
        found.insert(key.to_vec(), buffer.get(..length).unwrap_or_default().to_vec());
    }
    Ok(found)
}

fn same_content(one: &File, other: &File) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; COMPARE_BYTES], vec![0; COMPARE_BYTES]);
    let mut at = 0;
    loop {
        let got = one.read_at(&mut left, at)?;
        if got == 0 {
            return Ok(other.read_at(&mut right, at)? == 0);
        }
        let (left, right) = (left.get(..got).unwrap_or_default(), right.get_mut(..got).unwrap_or_default());
        match other.read_exact_at(right, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            other => other?,
        }
        if left != right {
            return Ok(false);
        }
        at += got as u64;
    }
}
