//! The content of files that a later entry of the same archive replaces while a layer is unpacked into a directory: copied away before
//! it goes, so that the archive can still be put together.

use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const COPY_BYTES: usize = 64 << 10;

/// Which records of content are whose, and what was copied.
pub(super) struct Replaced {
    root: OwnedFd,
    /// The records of each file that is there, by inode.
    records: HashMap<u64, (u64, u64)>,
    copies: Option<File>,
    end: u64,
    /// From the first record on, to behind the last: where the file's copy begins.
    found: BTreeMap<u64, (u64, u64)>,
}

impl Replaced {
    /// Of a layer that is unpacked below `root`.
    pub(super) fn new(root: OwnedFd) -> Replaced {
        Replaced { root, records: HashMap::new(), copies: None, end: 0, found: BTreeMap::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// A file has the content of these records.
    pub(super) fn note(&mut self, inode: u64, first: u64, behind: u64) {
        if behind > first {
            self.records.insert(inode, (first, behind));
        }
    }

    /// A file without a name, on the layer's file system.
    pub(super) fn scratch(&self) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        Ok(fs::openat(&self.root, ".", flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// The copy that has a record's content, and where in it its file begins.
    pub(super) fn find(&self, record: u64) -> Option<(&File, u64)> {
        let (_, (behind, at)) = self.found.range(..=record).next_back()?;
        Some((self.copies.as_ref()?, *at)).filter(|_| record < *behind)
    }

    /// What has this name goes away: its content is copied, and that of all below it.
    pub(super) fn goes(&mut self, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        let found = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::RegularFile => self.copy(parent, Path::new(name), found.st_ino),
            FileType::Directory => self.all_below(parent, name),
            _ => Ok(()),
        }
    }

    fn all_below(&mut self, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        let mut pending = vec![PathBuf::from(name)];
        while let Some(path) = pending.pop() {
            let directory = open(parent, &path, OFlags::DIRECTORY)?;
            for entry in Dir::read_from(&directory)? {
                let entry = entry?;
                let name = OsStr::from_bytes(entry.file_name().to_bytes());
                if matches!(name.as_bytes(), b"." | b"..") {
                    continue;
                }
                let found = fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                match FileType::from_raw_mode(found.st_mode) {
                    FileType::RegularFile => self.copy(&directory, Path::new(name), found.st_ino)?,
                    FileType::Directory => pending.push(path.join(name)),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn copy(&mut self, parent: &OwnedFd, name: &Path, inode: u64) -> io::Result<()> {
        let Some((first, behind)) = self.records.remove(&inode) else { return Ok(()) };
        let from = File::from(open(parent, name, OFlags::empty())?);
        if self.copies.is_none() {
            self.copies = Some(self.scratch()?);
        }
        let Some(copies) = &self.copies else { return Ok(()) };
        let mut buffer = vec![0; COPY_BYTES];
        let mut at = 0;
        // Holes stay holes.
        while let Some(data) = seek(&from, SeekFrom::Data(at))? {
            at = data;
            let hole = seek(&from, SeekFrom::Hole(at))?.unwrap_or(at);
            while at < hole {
                let want = usize::try_from(hole - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
                let piece = buffer.get_mut(..want).unwrap_or_default();
                from.read_exact_at(piece, at)?;
                copies.write_all_at(piece, self.end + at)?;
                at += want as u64;
            }
        }
        let start = self.end;
        self.end += from.metadata()?.len();
        copies.set_len(self.end)?;
        self.found.insert(first, (behind, start));
        Ok(())
    }
}

fn seek(file: &File, to: SeekFrom) -> io::Result<Option<u64>> {
    match fs::seek(file, to) {
        Err(Errno::NXIO) => Ok(None),
        other => Ok(Some(other?)),
    }
}

fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    fs::openat2(root, path, flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve)
}
