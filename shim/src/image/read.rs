//! Reads one file of an image through its layers' roots, uppermost first, as overlayfs would show it, with no overlay mounted.

use super::error::ImageError;
use rustix::fs::{self, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

const MAX_SYMLINKS: u32 = 40;

/// The regular file at `path`, symlinks followed inside the image; `None` if there is none.
pub(super) fn read_file(roots: &[OwnedFd], path: &str, limit_bytes: u64) -> Result<Option<Vec<u8>>, ImageError> {
    let what = || format!("read {path:?} of image");
    let found = resolve(roots, Path::new(path)).map_err(|e| ImageError::io(what(), e))?;
    let Some((root, real, FileType::RegularFile)) = found else {
        return Ok(None);
    };
    let fd = open(root, &real, OFlags::RDONLY | OFlags::NONBLOCK).map_err(|e| ImageError::io(what(), e))?;
    let mut bytes = Vec::new();
    std::fs::File::from(fd).take(limit_bytes.saturating_add(1)).read_to_end(&mut bytes).map_err(|e| ImageError::io(what(), e))?;
    if bytes.len() as u64 > limit_bytes {
        return Err(ImageError::TooMany(format!("{}: is over the limit of {limit_bytes} bytes", what())));
    }
    Ok(Some(bytes))
}

/// Whether the image has a file or directory at `path`, symlinks followed inside the image.
pub(super) fn has_path(roots: &[OwnedFd], path: &str) -> Result<bool, ImageError> {
    resolve(roots, Path::new(path)).map(|found| found.is_some()).map_err(|e| ImageError::io(format!("find {path:?} in image"), e))
}

/// Where the path leads in the merged view, below the root and with no links in it, and what is there; what is missing of it comes last.
pub(super) fn real_path(roots: &[OwnedFd], path: &str) -> Result<(PathBuf, Option<FileType>), ImageError> {
    let found = follow(roots, Path::new(path)).map_err(|e| ImageError::io(format!("find {path:?} in image"), e))?;
    Ok((found.0, found.1.map(|(_, kind)| kind)))
}

/// What the directory at `path`, which has no links in it, is; `None` if there is none.
pub(super) fn directory(roots: &[OwnedFd], path: &Path) -> Result<Option<Stat>, ImageError> {
    let found = lookup(roots, path).and_then(|found| match found {
        Some((root, FileType::Directory)) => fs::fstat(open(root, path, OFlags::PATH)?).map(Some),
        _ => Ok(None),
    });
    found.map_err(|e| ImageError::io(format!("find {} in image", path.display()), e))
}

/// A layer's root and what a path is there.
type Object<'a> = (&'a OwnedFd, FileType);

fn resolve<'a>(roots: &'a [OwnedFd], path: &Path) -> Result<Option<(&'a OwnedFd, PathBuf, FileType)>, Errno> {
    let (real, found) = follow(roots, path)?;
    Ok(found.map(|(root, kind)| (root, real, kind)))
}

/// Walks the path through the merged view; `roots` are uppermost first. Below what is missing, or is no directory, there are no links.
fn follow<'a>(roots: &'a [OwnedFd], path: &Path) -> Result<(PathBuf, Option<Object<'a>>), Errno> {
    let mut pending: VecDeque<OsString> = names(path).into();
    let mut real = PathBuf::new();
    let mut links = 0;
    let mut found = None;
    while let Some(name) = pending.pop_front() {
        if name == ".." {
            real.pop();
            found = None;
            continue;
        }
        real.push(&name);
        found = lookup(roots, &real)?;
        let Some((root, FileType::Symlink)) = found else { continue };
        links += 1;
        if links > MAX_SYMLINKS {
            return Err(Errno::LOOP);
        }
        let link = open(root, &real, OFlags::PATH | OFlags::NOFOLLOW)?;
        let target = PathBuf::from(OsString::from_vec(fs::readlinkat(&link, "", Vec::new())?.into_bytes()));
        real.pop();
        if target.is_absolute() {
            real.clear();
        }
        names(&target).into_iter().rev().for_each(|n| pending.push_front(n));
        found = None;
    }
    if found.is_none() && !real.as_os_str().is_empty() {
        found = lookup(roots, &real)?;
    }
    Ok((real, found))
}

fn names(path: &Path) -> Vec<OsString> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name.to_os_string()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

/// The uppermost layer that shows the path (without symlinks on the way), and what it is there.
fn lookup<'a>(roots: &'a [OwnedFd], path: &Path) -> Result<Option<(&'a OwnedFd, FileType)>, Errno> {
    let prefixes: Vec<&Path> = path.ancestors().filter(|p| !p.as_os_str().is_empty()).collect();
    for root in roots {
        let mut opaque = false;
        for (i, prefix) in prefixes.iter().rev().enumerate() {
            let fd = match open(root, prefix, OFlags::PATH | OFlags::NOFOLLOW) {
                Err(Errno::NOENT) => break,
                other => other?,
            };
            let stat = fs::fstat(&fd)?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            if kind == FileType::CharacterDevice && stat.st_rdev == 0 {
                return Ok(None);
            }
            if i + 1 == prefixes.len() {
                return Ok(Some((root, kind)));
            }
            if kind != FileType::Directory {
                return Ok(None);
            }
            opaque |= is_opaque(root, prefix)?;
        }
        if opaque {
            return Ok(None);
        }
    }
    Ok(None)
}

fn is_opaque(root: &OwnedFd, path: &Path) -> Result<bool, Errno> {
    let dir = open(root, path, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let mut value = [0u8; 1];
    match fs::fgetxattr(&dir, "trusted.overlay.opaque", &mut value) {
        Ok(n) => Ok(n == 1 && value == *b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(false),
        Err(e) => Err(e),
    }
}

fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    // O_PATH with O_NOFOLLOW opens a symlink itself even where none may be followed.
    fs::openat2(
        root,
        Path::new(std::ffi::OsStr::from_bytes(path.as_os_str().as_bytes())),
        flags | OFlags::CLOEXEC,
        Mode::empty(),
        resolve,
    )
}
