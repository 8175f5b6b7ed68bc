//! The files of one cgroup, kept open: a read is one system call at offset 0. The number of kept descriptors of the whole daemon is
//! bounded; beyond it, files are opened for each read.

use rustix::fs::{Mode, OFlags};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
};

/// Most descriptors that are kept, whatever the limit of open files.
const KEPT_MAX: usize = 16 * 1024;
/// Longest file of a cgroup that is read.
const FILE_LIMIT_BYTES: usize = 256 * 1024;

static KEPT: AtomicUsize = AtomicUsize::new(0);

/// Half of what this process may open leaves the rest for requests.
static LIMIT: LazyLock<usize> = LazyLock::new(|| {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.and_then(|limit| usize::try_from(limit / 2).ok()).unwrap_or(KEPT_MAX).min(KEPT_MAX)
});

/// A descriptor that counts.
struct Kept(File);

impl Kept {
    fn new(file: File) -> Result<Kept, File> {
        let taken = KEPT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |kept| (kept < *LIMIT).then_some(kept + 1));
        if taken.is_ok() { Ok(Kept(file)) } else { Err(file) }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        KEPT.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) struct Files {
    path: PathBuf,
    directory: OwnedFd,
    open: HashMap<&'static str, Option<Kept>>,
    buffer: Vec<u8>,
}

impl Files {
    pub(super) fn open(path: PathBuf) -> io::Result<Files> {
        let directory = rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Files { path, directory, open: HashMap::new(), buffer: vec![0; 1024] })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The text of a file; nothing when the cgroup has no such file or is gone.
    pub(super) fn read(&mut self, name: &'static str) -> Option<&str> {
        self.read_by(name, read_all)
    }

    /// The text of a file that the kernel gives in parts, such as the list of processes.
    pub(super) fn read_list(&mut self, name: &'static str) -> Option<&str> {
        self.read_by(name, read_parts)
    }

    fn read_by(&mut self, name: &'static str, all: fn(&File, &mut Vec<u8>) -> Option<usize>) -> Option<&str> {
        let length = match self.open.get(name) {
            Some(Some(kept)) => all(&kept.0, &mut self.buffer),
            // A controller that the group was made without does not come later.
            Some(None) => return None,
            None => match rustix::fs::openat(&self.directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
                Ok(file) => {
                    let file = File::from(file);
                    let length = all(&file, &mut self.buffer);
                    if let Ok(kept) = Kept::new(file) {
                        self.open.insert(name, Some(kept));
                    }
                    length
                }
                Err(rustix::io::Errno::NOENT) => {
                    self.open.insert(name, None);
                    return None;
                }
                Err(_) => return None,
            },
        };
        std::str::from_utf8(self.buffer.get(..length?)?).ok()
    }

    /// The text of a file that is seldom asked for, and so not kept open.
    pub(super) fn glance(&self, name: &str) -> Option<String> {
        let file = rustix::fs::openat(&self.directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut text = String::new();
        File::from(file).take(FILE_LIMIT_BYTES as u64).read_to_string(&mut text).ok()?;
        Some(text)
    }
}

/// The kernel gives most of these files whole where there is room.
fn read_all(file: &File, buffer: &mut Vec<u8>) -> Option<usize> {
    read_until(file, buffer, |_, whole| whole)
}

/// Lists end where nothing more comes.
fn read_parts(file: &File, buffer: &mut Vec<u8>) -> Option<usize> {
    read_until(file, buffer, |read, _| read == 0)
}

/// Reads until the last read, of which `ended` is told its length and whether it left room.
fn read_until(file: &File, buffer: &mut Vec<u8>, ended: impl Fn(usize, bool) -> bool) -> Option<usize> {
    let mut length = 0;
    loop {
        let read = file.read_at(buffer.get_mut(length..)?, u64::try_from(length).ok()?).ok()?;
        length += read;
        let room = length < buffer.len();
        if ended(read, room) {
            return Some(length);
        }
        if room {
            continue;
        }
        if length >= FILE_LIMIT_BYTES {
            return None;
        }
        buffer.resize(length * 2, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_anew_and_an_absent_one_is_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("cpu.stat");
        std::fs::write(&path, "usage_usec 1\n").expect("write");
        let mut files = Files::open(folder.path().to_owned()).expect("open");
        assert_eq!(files.read("cpu.stat"), Some("usage_usec 1\n"));
        std::fs::write(&path, "x".repeat(20_000)).expect("write");
        assert_eq!(files.read("cpu.stat").map(str::len), Some(20_000));
        assert_eq!(files.read_list("cpu.stat").map(str::len), Some(20_000));
        assert_eq!(files.read("memory.stat"), None);
        assert_eq!(files.glance("memory.stat"), None);
        assert_eq!(files.glance("cpu.stat").map(|text| text.len()), Some(20_000));
    }
}
