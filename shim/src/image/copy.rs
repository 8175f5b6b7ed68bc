//! Copies directories of an image out of it: owners, modes, times, xattrs, hard links, devices, holes. The layers are joined by an overlay that
//! nobody else sees. No symlink is ever followed, so that the image leads nowhere else, and nothing is copied twice, so that the copies are no
//! larger than the image.

use super::error::ImageError;
use super::extract::keeps_xattr;
use super::object::Layer;
use super::tree::{ATTRIBUTE_BYTES, names, open};
use rustix::fs::{self, AtFlags, CWD, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_string, fsmount,
    fsopen, open_tree,
};
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const COPY_BYTES: usize = 64 << 10;

/// The layers, lowest first, as one read-only directory.
pub(super) fn joined(layers: &[Layer]) -> Result<OwnedFd, ImageError> {
    let failed = |e: Errno| ImageError::io("join the image's layers", e);
    if let [only] = layers {
        return only.root();
    }
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
    fsconfig_set_string(&context, "source", "windlass").map_err(failed)?;
    // Held until the overlay has clones of its own. It takes no mount from inside the tree of layers, but a clone of one.
    let mut held = Vec::new();
    for layer in layers.iter().rev() {
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let root = open_tree(layer.root()?, "", clone).map_err(failed)?;
        fsconfig_set_fd(&context, "lowerdir+", &root).map_err(failed)?;
        held.push(root);
    }
    fsconfig_create(&context).map_err(failed)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed)
}

/// Copies directories of `image`, by paths without links in them, into existing ones that nobody else changes. One that lies in another is
/// copied alone, and the other has an empty directory in its place.
pub(super) fn copy(image: &OwnedFd, directories: &[(PathBuf, PathBuf)]) -> Result<(), ImageError> {
    let apart: HashSet<&Path> = directories.iter().map(|(from, _)| from.as_path()).collect();
    for (path, to) in directories {
        let failed = |e: io::Error| ImageError::io(format!("copy {} of the image", Path::new("/").join(path).display()), e);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let from = open(image, path, OFlags::DIRECTORY).map_err(|e| failed(e.into()))?;
        let to = fs::openat(CWD, to, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
        Copy { from, to, path, apart: &apart, links: HashMap::new(), buffer: vec![0; COPY_BYTES] }.run().map_err(failed)?;
    }
    Ok(())
}

struct Copy<'a> {
    from: OwnedFd,
    to: OwnedFd,
    /// Where it is in the image.
    path: &'a Path,
    /// Directories of the image that are copied by themselves.
    apart: &'a HashSet<&'a Path>,
    /// Where a file with several names is in the copy, by its device and inode.
    links: HashMap<(u64, u64), PathBuf>,
    buffer: Vec<u8>,
}

impl Copy<'_> {
    fn run(mut self) -> io::Result<()> {
        let mut pending = vec![PathBuf::new()];
        // Set last: each entry that is made changes its directory's time.
        let mut times = Vec::new();
        while let Some(path) = pending.pop() {
            let (from, to) = (open(&self.from, &path, OFlags::DIRECTORY)?, open(&self.to, &path, OFlags::DIRECTORY)?);
            let apart = !path.as_os_str().is_empty() && self.apart.contains(self.path.join(&path).as_path());
            for name in if apart { Vec::new() } else { names(&from)? } {
                if self.object(&from, &to, &name, &path)? {
                    pending.push(path.join(name));
                }
            }
            let stat = fs::fstat(&from)?;
            fs::fchown(&to, owner(&stat).0, owner(&stat).1)?;
            attributes(&proc_path(&from, None), &proc_path(&to, None))?;
            fs::fchmod(&to, Mode::from_raw_mode(stat.st_mode))?;
            times.push((path, time_of(&stat)));
        }
        for (path, time) in times {
            fs::futimens(open(&self.to, &path, OFlags::DIRECTORY)?, &time)?;
        }
        Ok(())
    }

    /// Makes the entry `name` of the directory `path`; whether it is a directory itself, which is empty yet.
    fn object(&mut self, from: &OwnedFd, to: &OwnedFd, name: &OsStr, path: &Path) -> io::Result<bool> {
        let stat = fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        // A socket that nobody listens on, and what overlayfs means as a deleted file.
        if kind == FileType::Socket || (kind == FileType::CharacterDevice && stat.st_rdev == 0) {
            return Ok(false);
        }
        let private = Mode::from_raw_mode(0o600);
        if kind == FileType::Directory {
            fs::mkdirat(to, name, Mode::from_raw_mode(0o700))?;
            return Ok(true);
        }
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&(stat.st_dev, stat.st_ino)) {
                fs::linkat(&self.to, first, to, name, AtFlags::empty())?;
                return Ok(false);
            }
            self.links.insert((stat.st_dev, stat.st_ino), path.join(name));
        }
        match kind {
            FileType::RegularFile => self.file(from, to, name, &stat)?,
            FileType::Symlink => fs::symlinkat(fs::readlinkat(from, name, Vec::new())?, to, name)?,
            other => fs::mknodat(to, name, other, private, stat.st_rdev)?,
        }
        fs::chownat(to, name, owner(&stat).0, owner(&stat).1, AtFlags::SYMLINK_NOFOLLOW)?;
        attributes(&proc_path(from, Some(name)), &proc_path(to, Some(name)))?;
        if kind != FileType::Symlink {
            // Just made, so this follows nothing. After the owner, whose change takes setuid away.
            fs::chmodat(to, name, Mode::from_raw_mode(stat.st_mode), AtFlags::empty())?;
        }
        Ok(fs::utimensat(to, name, &time_of(&stat), AtFlags::SYMLINK_NOFOLLOW).map(|()| false)?)
    }

    fn file(&mut self, from: &OwnedFd, to: &OwnedFd, name: &OsStr, stat: &Stat) -> io::Result<()> {
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let source = File::from(open(from, Path::new(name), OFlags::NONBLOCK)?);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let copy = File::from(fs::openat(to, name, flags, Mode::from_raw_mode(0o600))?);
        let mut at = 0;
        while at < size {
            // A file system that knows no holes has data everywhere.
            at = match fs::seek(&source, SeekFrom::Data(at)) {
                Err(Errno::NXIO) => break,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
                other => other?,
            };
            let end = fs::seek(&source, SeekFrom::Hole(at)).unwrap_or(size).min(size);
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(self.buffer.len());
                let part = self.buffer.get_mut(..want).unwrap_or_default();
                source.read_exact_at(part, at)?;
                // Not every form of a layer keeps all holes.
                if part.iter().any(|byte| *byte != 0) {
                    copy.write_all_at(part, at)?;
                }
                at += want as u64;
            }
        }
        Ok(fs::ftruncate(&copy, size)?)
    }
}

fn owner(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
}

fn time_of(stat: &Stat) -> Timestamps {
    let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or(0);
    let time = Timespec { tv_sec: stat.st_mtime, tv_nsec: nanoseconds };
    Timestamps { last_access: time, last_modification: time }
}

/// A name for system calls that only take a path, whose last part is not followed.
fn proc_path(directory: &OwnedFd, name: Option<&OsStr>) -> PathBuf {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    path.push(name.unwrap_or(OsStr::new(".")));
    path
}

/// Copies the xattrs that a layer keeps. What the file system does not take is left out.
fn attributes(from: &Path, to: &Path) -> io::Result<()> {
    let mut buffer = vec![0; ATTRIBUTE_BYTES];
    let length = match fs::llistxattr(from, &mut buffer) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(()),
        other => other?,
    };
    let names = buffer.get(..length).unwrap_or_default().to_vec();
    for key in names.split(|byte| *byte == 0).filter(|key| !key.is_empty() && keeps_xattr(key)) {
        let length = fs::lgetxattr(from, OsStr::from_bytes(key), &mut buffer)?;
        match fs::lsetxattr(to, OsStr::from_bytes(key), buffer.get(..length).unwrap_or_default(), XattrFlags::empty()) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(Errno::PERM) if key.starts_with(b"user.") => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
