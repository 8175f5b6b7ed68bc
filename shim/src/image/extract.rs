//! Writes a tar stream into a layer's directory: owners, modes, times, xattrs, hard links, devices, holes; whiteouts become
//! overlayfs's. Every path is resolved by the kernel with the layer's directory as its root (`openat2`, `RESOLVE_IN_ROOT`), so
//! that no entry and no symlink leads outside.
//!
//! A layer is written without its parents: an entry below a symlink that only a lower layer has becomes a directory here.

use super::archive::{Archive, Entry};
use super::error::ImageError;
use super::layers::LayerFormat;
use super::replaced::Replaced;
use super::split::Recorder;
use super::store::Store;
use rustix::fs::{self, AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tar::EntryType;

pub(super) const WHITEOUT: &[u8] = b".wh.";
pub(super) const OPAQUE: &[u8] = b".wh..wh..opq";
/// Longest name of an entry, and longest path and target (NAME_MAX and PATH_MAX of Linux).
const NAME_MAX: usize = 255;
pub(super) const PATH_MAX: usize = 4095;
const COPY_BYTES: usize = 64 << 10;
const FS_BLOCK: u64 = 4096;

/// Bounds of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Sum of all file sizes, holes included.
    pub(super) bytes: u64,
    pub(super) entries: u64,
}

/// What was written: bytes on disk (whole blocks), inodes, and in which form.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Written {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
    pub(super) format: LayerFormat,
}

/// Unpacks the archive into the existing directory `dir`; gives back the reader behind the archive's end. The recorder gets what the
/// directory has not of the archive so far.
pub(super) fn extract<R: Read>(
    reader: R,
    dir: &Path,
    limits: Limits,
    recorder: Option<Recorder>,
) -> Result<(Written, R, Option<Recorder>), ImageError> {
    let failed = |e: Errno| ImageError::io(format!("unpack: open {}", dir.display()), e);
    let root = fs::openat(CWD, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
    let copy = || rustix::io::fcntl_dupfd_cloexec(&root, 0).map_err(failed);
    let replaced = recorder.is_some().then(|| copy().map(Replaced::new)).transpose()?;
    let mut archive = Archive::recorded(reader, recorder);
    let mut extractor = Extractor {
        root,
        parent: None,
        replaced,
        dir_times: vec![(PathBuf::from("."), NEVER)],
        written: Written::default(),
        logical_bytes: 0,
        limits,
        buffer: vec![0; COPY_BYTES],
    };
    let mut entries = 0;
    while let Some(entry) = archive.next_entry().map_err(|e| ImageError::io("unpack", e))? {
        entries += 1;
        if entries > limits.entries {
            return Err(ImageError::TooMany(format!("unpack: more than {} entries", limits.entries)));
        }
        let name = String::from_utf8_lossy(&entry.path).into_owned();
        extractor.entry(&mut archive, &entry).map_err(|e| ImageError::io(format!("unpack {name:?}"), e))?;
    }
    extractor.set_dir_times();
    let (reader, mut recorder) = archive.into_inner();
    if let (Some(recorder), Some(replaced)) = (&mut recorder, extractor.replaced) {
        recorder.set_replaced(replaced);
    }
    Ok((extractor.written, reader, recorder))
}

/// Unpacks an archive in a layer's form, uncompressed, into an existing directory, within the bounds of a layer.
///
/// # Errors
/// `Io`, `TooMany`, `NoSpace`.
pub fn unpack_archive(store: &Store, reader: impl Read, dir: &Path) -> Result<(), ImageError> {
    extract(reader, dir, store.limits(), None).map(drop)
}

/// The time of what no entry describes, as in an image: the same archive always becomes the same directory.
const NEVER: Timestamps =
    Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: 0 }, last_modification: Timespec { tv_sec: 0, tv_nsec: 0 } };

struct Extractor {
    root: OwnedFd,
    /// The last entry's directory: most entries share it with the one before.
    parent: Option<(PathBuf, Parent)>,
    /// While the archive is recorded.
    replaced: Option<Replaced>,
    /// Set last, since each child's creation changes its directory's time; of two for one directory the later one holds.
    dir_times: Vec<(PathBuf, Timestamps)>,
    written: Written,
    logical_bytes: u64,
    limits: Limits,
    buffer: Vec<u8>,
}

/// A directory that was opened.
struct Parent {
    fd: OwnedFd,
    /// No symlink was on the way: its files are found by the same path when the layer is done.
    real: bool,
}

impl Extractor {
    fn entry<R: Read>(&mut self, archive: &mut Archive<R>, entry: &Entry) -> io::Result<()> {
        let path = confine(&entry.path)?;
        let Some(name) = path.file_name().map(OsStr::to_os_string) else {
            return self.root_entry(entry);
        };
        let parent_path = path.parent().unwrap_or(Path::new("")).to_path_buf();
        if parent_path.components().any(|c| c.as_os_str().as_bytes().starts_with(WHITEOUT)) {
            return Err(invalid("lies below a whiteout"));
        }
        let parent = self.open_parent(&parent_path)?;
        let result = if name.as_bytes() == OPAQUE {
            fs::setxattr(proc_path(&parent.fd, None), "trusted.overlay.opaque", b"y", XattrFlags::empty()).map_err(Into::into)
        } else if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            self.whiteout(&parent.fd, hidden)
        } else {
            self.object(archive, entry, &path, &parent, &name)
        };
        // Kept unless this entry may have changed what the path means.
        if self.parent.is_none() {
            self.parent = Some((parent_path, parent));
        }
        result
    }

    fn root_entry(&mut self, entry: &Entry) -> io::Result<()> {
        if entry.kind != EntryType::Directory {
            return Err(invalid("would replace the root"));
        }
        let root = fs::openat(&self.root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        self.dir_attributes(&root, entry, Path::new("."))
    }

    /// Opens the directory, making what is missing of it.
    fn open_parent(&mut self, path: &Path) -> io::Result<Parent> {
        if let Some((cached, parent)) = self.parent.take()
            && cached == path
        {
            return Ok(parent);
        }
        self.open_dir(path)
    }

    fn open_dir(&mut self, path: &Path) -> io::Result<Parent> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let direct = self.resolve_with(path, flags, ResolveFlags::NO_SYMLINKS);
        let (opened, real) = match direct {
            Err(Errno::LOOP) => (self.resolve(path, flags), false),
            other => (other, true),
        };
        match opened {
            Err(Errno::NOENT) => {}
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(invalid("its directory is no directory")),
            other => return Ok(Parent { fd: other?, real }),
        }
        let (Some(name), Some(above)) = (path.file_name(), path.parent()) else {
            return Err(invalid("has no directory"));
        };
        let above = self.open_dir(above)?;
        match fs::mkdirat(&above.fd, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => self.written.add(0),
            Err(Errno::EXIST) => return Err(invalid("its directory is a symlink to nowhere")),
            Err(e) => return Err(e.into()),
        }
        let made =
            fs::openat(&above.fd, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        fs::chmod(proc_path(&made, None), Mode::from_raw_mode(0o755))?;
        self.dir_times.push((path.to_path_buf(), NEVER));
        Ok(Parent { fd: made, real: above.real })
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        self.resolve_with(path, flags, ResolveFlags::empty())
    }

    fn resolve_with(&self, path: &Path, flags: OFlags, more: ResolveFlags) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
        fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    fn whiteout(&mut self, parent: &OwnedFd, hidden: &[u8]) -> io::Result<()> {
        // `.wh..wh.*` are the bookkeeping names of aufs.
        if hidden.starts_with(WHITEOUT) {
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(invalid("a whiteout without a name"));
        }
        let hidden = OsStr::from_bytes(hidden);
        self.make(parent, hidden, || fs::mknodat(parent, hidden, FileType::CharacterDevice, Mode::empty(), 0))?;
        self.written.add(0);
        Ok(fs::utimensat(parent, hidden, &NEVER, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    fn object<R: Read>(
        &mut self,
        archive: &mut Archive<R>,
        entry: &Entry,
        path: &Path,
        parent: &Parent,
        name: &OsStr,
    ) -> io::Result<()> {
        let mode = Mode::from_raw_mode(0o600);
        let Parent { fd: parent, real } = parent;
        match entry.kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                return self.file(archive, entry, Some(path).filter(|_| *real), parent, name);
            }
            EntryType::Directory => return self.directory(entry, path, parent, name),
            EntryType::Link => return self.hard_link(entry, parent, name),
            EntryType::Symlink => {
                if entry.link.is_empty() || entry.link.contains(&0) {
                    return Err(invalid("a symlink without a target"));
                }
                if entry.link.len() > PATH_MAX {
                    return Err(invalid("a symlink's target of more than 4095 bytes"));
                }
                self.make(parent, name, || fs::symlinkat(OsStr::from_bytes(&entry.link), parent, name))?;
            }
            EntryType::Char | EntryType::Block => {
                let kind = if entry.kind == EntryType::Char { FileType::CharacterDevice } else { FileType::BlockDevice };
                let device = fs::makedev(entry.device.0, entry.device.1);
                self.make(parent, name, || fs::mknodat(parent, name, kind, mode, device))?;
            }
            EntryType::Fifo => self.make(parent, name, || fs::mknodat(parent, name, FileType::Fifo, mode, 0))?,
            other => return Err(invalid(&format!("an entry of unknown type {:?}", other.as_byte() as char))),
        }
        self.written.add(0);
        fs::chownat(parent, name, owner(entry).0, owner(entry).1, AtFlags::SYMLINK_NOFOLLOW)?;
        set_xattrs(entry, |key, value| fs::lsetxattr(proc_path(parent, Some(name)), key, value, XattrFlags::empty()))?;
        if entry.kind != EntryType::Symlink {
            // Just made as a device or fifo, so this follows nothing.
            fs::chmodat(parent, name, Mode::from_raw_mode(entry.mode), AtFlags::empty())?;
        }
        fs::utimensat(parent, name, &times(entry), AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    fn directory(&mut self, entry: &Entry, path: &Path, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        let exists = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Directory);
        if !exists {
            self.make(parent, name, || fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)))?;
            self.written.add(0);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = fs::openat(parent, name, flags, Mode::empty())?;
        self.dir_attributes(&dir, entry, path)
    }

    fn dir_attributes(&mut self, dir: &OwnedFd, entry: &Entry, path: &Path) -> io::Result<()> {
        set_attributes(dir, entry)?;
        self.dir_times.push((path.to_path_buf(), times(entry)));
        Ok(())
    }

    fn hard_link(&mut self, entry: &Entry, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        let target = confine(&entry.link)?;
        let Some(target_name) = target.file_name() else {
            return Err(invalid("a hard link to a directory"));
        };
        let lost = |e: Errno| match e {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => invalid("a hard link to what the layer does not have"),
            e => e.into(),
        };
        let target_dir =
            self.resolve(target.parent().unwrap_or(Path::new("")), OFlags::PATH | OFlags::DIRECTORY).map_err(lost)?;
        let found = fs::statat(&target_dir, target_name, AtFlags::SYMLINK_NOFOLLOW).map_err(lost)?;
        if FileType::from_raw_mode(found.st_mode) == FileType::Directory {
            return Err(invalid("a hard link to a directory"));
        }
        // The file itself, once more.
        if let Ok(old) = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            && (old.st_dev, old.st_ino) == (found.st_dev, found.st_ino)
        {
            return Ok(());
        }
        self.make(parent, name, || fs::linkat(&target_dir, target_name, parent, name, AtFlags::empty()))
    }

    /// `path` is where the file is found again; without one, the record of the archive has its content.
    fn file<R: Read>(
        &mut self,
        archive: &mut Archive<R>,
        entry: &Entry,
        path: Option<&Path>,
        parent: &OwnedFd,
        name: &OsStr,
    ) -> io::Result<()> {
        self.logical_bytes = self.logical_bytes.saturating_add(entry.size);
        if self.logical_bytes > self.limits.bytes {
            let message = format!("unpack: more than the limit of {} bytes", self.limits.bytes);
            return Err(ImageError::TooMany(message).into_io());
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut made = None;
        self.make(parent, name, || {
            made = Some(fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))?);
            Ok(())
        })?;
        let fd = made.ok_or_else(|| invalid("was not made"))?;
        let mut file = std::fs::File::from(fd);
        let whole = [(0, entry.size)];
        let mut stored = 0;
        let first = archive.contents();
        for (offset, length) in entry.sparse.as_deref().unwrap_or(&whole) {
            stored += self.copy(archive, &mut file, *offset, *length, path.is_none())?;
            if path.is_some() {
                archive.kept(path, *offset, *length)?;
            }
        }
        if let (Some(first), Some(behind), Some(replaced)) = (first, archive.contents(), &mut self.replaced) {
            replaced.note(file.metadata()?.ino(), first, behind);
        }
        if stored < entry.size {
            fs::ftruncate(&file, entry.size)?;
        }
        self.written.add(stored);
        let fd = OwnedFd::from(file);
        set_attributes(&fd, entry)?;
        fs::futimens(&fd, &times(entry))?;
        Ok(())
    }

    /// Copies `length` bytes to `offset`; blocks of zeros stay holes. Returns the bytes written. With `record` the record of the archive
    /// gets them too.
    fn copy<R: Read>(
        &mut self,
        archive: &mut Archive<R>,
        file: &mut std::fs::File,
        offset: u64,
        length: u64,
        record: bool,
    ) -> io::Result<u64> {
        let mut position = offset;
        let end = offset + length;
        let mut stored = 0;
        if offset > 0 {
            fs::seek(&*file, fs::SeekFrom::Start(offset))?;
        }
        while position < end {
            let want = usize::try_from(end - position).unwrap_or(usize::MAX).min(self.buffer.len());
            let mut got = 0;
            while got < want {
                match archive.read_data(&mut self.buffer[got..want])? {
                    0 => return Err(invalid("is cut short")),
                    n => got += n,
                }
            }
            let block = &self.buffer[..want];
            position += want as u64;
            if record {
                archive.record(block)?;
            }
            if want == COPY_BYTES && block.iter().all(|b| *b == 0) {
                fs::seek(&*file, fs::SeekFrom::Start(position))?;
            } else {
                file.write_all(block)?;
                stored += want as u64;
            }
        }
        Ok(stored)
    }

    fn set_dir_times(&mut self) {
        for (path, times) in std::mem::take(&mut self.dir_times).into_iter() {
            // Replaced by a later entry: its time went with it.
            let Ok(dir) = self.resolve(&path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW) else {
                continue;
            };
            let _ = fs::futimens(&dir, &times);
        }
    }

    /// Runs `create`; if the name is taken, removes what has it and runs it again.
    fn make(&mut self, parent: &OwnedFd, name: &OsStr, mut create: impl FnMut() -> Result<(), Errno>) -> io::Result<()> {
        match create() {
            Err(Errno::EXIST) => {
                self.replaced.as_mut().map_or(Ok(()), |replaced| replaced.goes(parent, name))?;
                remove_tree(parent, name)?;
                Ok(create()?)
            }
            other => Ok(other?),
        }
    }
}

impl Written {
    fn add(&mut self, bytes: u64) {
        self.bytes += bytes.next_multiple_of(FS_BLOCK);
        self.inodes += 1;
    }
}

/// The path below the root as plain names: `/` and `.` dropped, `..` taken back as long as it stays inside.
pub(super) fn confine(raw: &[u8]) -> io::Result<PathBuf> {
    let mut path = PathBuf::new();
    if raw.contains(&0) {
        return Err(invalid("a path with a NUL byte"));
    }
    for part in raw.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if !path.pop() {
                    return Err(invalid("leads outside of the layer"));
                }
            }
            name if name.len() > NAME_MAX => return Err(invalid("a name of more than 255 bytes")),
            name => path.push(OsString::from_vec(name.to_vec())),
        }
    }
    if path.as_os_str().len() > PATH_MAX {
        return Err(invalid("a path of more than 4095 bytes"));
    }
    Ok(path)
}

fn remove_tree(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    match fs::unlinkat(parent, name, AtFlags::empty()) {
        // A directory: the standard library's removal follows no symlink below it.
        Err(Errno::ISDIR | Errno::PERM) => std::fs::remove_dir_all(proc_path(parent, Some(name))),
        other => Ok(other?),
    }
}

/// A name for system calls that only take a path: through the descriptor, so nothing on the way can be swapped.
fn proc_path(dir: &OwnedFd, name: Option<&OsStr>) -> PathBuf {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd()));
    path.extend(name);
    path
}

fn owner(entry: &Entry) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec { tv_sec: entry.mtime.0, tv_nsec: i64::from(entry.mtime.1) };
    Timestamps { last_access: time, last_modification: time }
}

/// Owner first: chown drops setuid and file capabilities.
fn set_attributes(fd: &OwnedFd, entry: &Entry) -> io::Result<()> {
    fs::fchown(fd, owner(entry).0, owner(entry).1)?;
    set_xattrs(entry, |key, value| fs::fsetxattr(fd, key, value, XattrFlags::empty()))?;
    fs::fchmod(fd, Mode::from_raw_mode(entry.mode))?;
    Ok(())
}

/// All xattrs but overlayfs's own, which would let an image reach into how layers are joined, and SELinux labels, which are the host's.
pub(super) fn keeps_xattr(key: &[u8]) -> bool {
    !key.starts_with(b"trusted.overlay.") && !key.starts_with(b"user.overlay.") && key != b"security.selinux"
}

/// Sets the entry's xattrs. What the file system does not keep is left out.
fn set_xattrs(entry: &Entry, set: impl Fn(&OsStr, &[u8]) -> Result<(), Errno>) -> io::Result<()> {
    for (key, value) in &entry.xattrs {
        if !keeps_xattr(key) {
            continue;
        }
        match set(OsStr::from_bytes(key), value) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            // user.* is refused on symlinks and devices by every file system.
            Err(Errno::PERM) if key.starts_with(b"user.") => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
