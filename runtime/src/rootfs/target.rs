//! Paths inside a container's root. They are resolved by the kernel with the root as `/` (openat2 RESOLVE_IN_ROOT), whatever
//! links the image holds; what is missing is made one component at a time below descriptors.

use crate::process::{Context, Kind, StepError};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, mkdirat, mknodat, openat2, readlinkat, statat};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

/// As many links as the kernel follows.
const LINKS_MAX: usize = 40;

/// What to make of a missing last component.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// A directory, 0755.
    Directory,
    /// An empty regular file, 0644.
    File,
}

/// Opens `path`, absolute inside `root`.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    loop {
        match openat2(root, relative, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // A rename elsewhere in the system can make the kernel give up on `..`; it asks to try again.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Opens `path` inside `root` as an O_PATH descriptor, making what is missing.
pub(super) fn open_or_make(root: BorrowedFd<'_>, path: &Path, made: Made) -> Result<OwnedFd, StepError> {
    match open_in_root(root, path, OFlags::PATH) {
        Err(Errno::NOENT) => make(root, path, made).context("make mount point", path.display()),
        other => other.context("open mount point", path.display()),
    }
}

/// Makes the directory of `path` and opens it; returns the last component with it.
pub(super) fn open_parent<'p>(root: BorrowedFd<'_>, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), StepError> {
    let invalid = || StepError::because(Kind::Invalid, "resolve", path.display(), "must name something below the root");
    let name = path.file_name().ok_or_else(invalid)?;
    let parent = path.parent().ok_or_else(invalid)?;
    Ok((open_or_make(root, parent, Made::Directory)?, name))
}

/// Walks `path` lexically inside the root, following links by hand where the kernel found nothing, and makes the rest.
fn make(root: BorrowedFd<'_>, path: &Path, made: Made) -> Result<OwnedFd, Errno> {
    let mut rest: VecDeque<OsString> = components(path);
    let mut done = PathBuf::new();
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            done.pop();
            continue;
        }
        let parent = open_in_root(root, &done, OFlags::PATH | OFlags::DIRECTORY)?;
        match statat(&parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Symlink => {
                links += 1;
                if links > LINKS_MAX {
                    return Err(Errno::LOOP);
                }
                let to = PathBuf::from(OsString::from_vec(readlinkat(&parent, &name, Vec::new())?.into_bytes()));
                if to.is_absolute() {
                    done.clear();
                }
                for part in components(&to).into_iter().rev() {
                    rest.push_front(part);
                }
                continue;
            }
            Ok(_) => {}
            Err(Errno::NOENT) if rest.is_empty() && made == Made::File => {
                mknodat(&parent, &name, rustix::fs::FileType::RegularFile, Mode::from_raw_mode(0o644), 0)?;
            }
            Err(Errno::NOENT) => mkdirat(&parent, &name, Mode::from_raw_mode(0o755))?,
            Err(errno) => return Err(errno),
        }
        done.push(name);
    }
    open_in_root(root, &done, OFlags::PATH)
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

/// Whether an O_PATH descriptor is of a directory.
pub(super) fn is_directory(fd: impl AsFd) -> Result<bool, Errno> {
    let stat = rustix::fs::fstat(fd)?;
    Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory)
}

/// Opens a path of the host.
pub(super) fn open_host(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, path, flags | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_is_missing_is_made_below_the_root_whatever_links_say() {
        let host = tempfile::tempdir().expect("temporary directory");
        let outside = host.path().join("outside");
        let root = host.path().join("root");
        std::fs::create_dir_all(&outside).expect("outside");
        std::fs::create_dir_all(&root).expect("root");
        symlink(&outside, root.join("absolute")).expect("link");
        symlink("../../outside", root.join("relative")).expect("link");
        symlink("loop", root.join("loop")).expect("link");
        let fd = open_host(&root, OFlags::PATH).expect("root");
        open_or_make(fd.as_fd(), Path::new("/absolute/file"), Made::File).expect("made");
        open_or_make(fd.as_fd(), Path::new("/relative/a/b"), Made::Directory).expect("made");
        open_or_make(fd.as_fd(), Path::new("/../../x"), Made::Directory).expect("made");
        assert_eq!(std::fs::read_dir(&outside).expect("readable").count(), 0, "something was made outside the root");
        assert!(root.join("outside/a/b").is_dir());
        assert!(root.join("x").is_dir());
        let error = open_or_make(fd.as_fd(), Path::new("/loop/x"), Made::File).expect_err("a loop");
        assert_eq!(error.errno, libc::ELOOP);
    }
}
