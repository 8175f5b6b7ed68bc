//! The file of a container's log: appends whole entries, and swaps to a new file between two of them.

use super::line::{Splitter, Stream};
use super::time::now_ns;
use crate::process::{Context, StepError};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// Entries are written when this much is gathered, so that a chunk of empty lines does not grow forty-fold in memory.
const FLUSH_BYTES: usize = 64 * 1024;

/// Most input that is split at once: with [`FLUSH_BYTES`] it bounds what is gathered.
const SLICE_BYTES: usize = 2048;

/// The log of one container.
#[derive(Debug)]
pub struct ContainerLog {
    path: PathBuf,
    file: OwnedFd,
    stdout: Splitter,
    stderr: Splitter,
    dropped_bytes: u64,
}

impl ContainerLog {
    /// Opens the log, or makes it (mode 0640). Its directory must exist.
    pub fn open(path: &Path) -> Result<ContainerLog, StepError> {
        let (stdout, stderr) = (Splitter::new(Stream::Stdout), Splitter::new(Stream::Stderr));
        Ok(ContainerLog { path: path.into(), file: open(path)?, stdout, stderr, dropped_bytes: 0 })
    }

    /// Splits, stamps and writes what a stream wrote. An unfinished line is kept.
    pub fn push(&mut self, stream: Stream, bytes: &[u8]) {
        let now = now_ns();
        let mut out = Vec::with_capacity(bytes.len() + 256);
        for slice in bytes.chunks(SLICE_BYTES) {
            match stream {
                Stream::Stdout => self.stdout.push(slice, now, &mut out),
                Stream::Stderr => self.stderr.push(slice, now, &mut out),
            }
            if out.len() >= FLUSH_BYTES {
                self.write(&out);
                out.clear();
            }
        }
        self.write(&out);
    }

    /// Writes the unterminated last lines. The container has ended.
    pub fn end(&mut self) {
        let mut out = Vec::new();
        let now = now_ns();
        self.stdout.end(now, &mut out);
        self.stderr.end(now, &mut out);
        self.write(&out);
    }

    /// Opens the path again, after it was renamed. On failure the old file stays in use.
    pub fn reopen(&mut self) -> Result<(), StepError> {
        self.file = open(&self.path)?;
        Ok(())
    }

    /// Bytes of entries that the file system did not take.
    pub fn dropped_bytes(&self) -> u64 {
        self.dropped_bytes
    }

    /// Appends whole entries. What cannot be written is dropped, and a torn entry is cut off again.
    fn write(&mut self, entries: &[u8]) {
        let mut done = 0;
        while done < entries.len() {
            match rustix::io::write(&self.file, &entries[done..]) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(_) => break,
            }
        }
        if done == entries.len() {
            return;
        }
        let whole = entries[..done].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        self.dropped_bytes += (entries.len() - whole) as u64;
        if whole < done
            && let Ok(stat) = rustix::fs::fstat(&self.file)
        {
            let size = (stat.st_size as u64).saturating_sub((done - whole) as u64);
            let _ = rustix::fs::ftruncate(&self.file, size);
        }
    }
}

fn open(path: &Path) -> Result<OwnedFd, StepError> {
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY;
    rustix::fs::open(path, flags, Mode::from_raw_mode(0o640)).context("open log", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Contents of all files' entries, in order.
    fn contents(paths: &[&Path]) -> Vec<String> {
        let text: String = paths.iter().map(|path| std::fs::read_to_string(path).expect("readable")).collect();
        text.lines().map(|line| line.splitn(4, ' ').nth(3).expect("four fields").to_owned()).collect()
    }

    #[test]
    fn a_reopen_loses_and_doubles_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) = (directory.path().join("0.log"), directory.path().join("0.log.1"));
        let mut log = ContainerLog::open(&path).unwrap();
        log.push(Stream::Stdout, b"one\ntw");
        std::fs::rename(&path, &old).unwrap();
        log.push(Stream::Stderr, b"err\n");
        log.reopen().unwrap();
        log.push(Stream::Stdout, b"o\nthree\nend");
        log.end();
        assert_eq!(contents(&[&old]), ["one", "err"]);
        assert_eq!(contents(&[&path]), ["two", "three", "end"]);
        assert_eq!(log.dropped_bytes(), 0);
    }

    #[test]
    fn a_full_device_drops_and_counts() {
        let mut log = ContainerLog::open(Path::new("/dev/full")).unwrap();
        log.push(Stream::Stdout, b"lost\n");
        assert_eq!(log.dropped_bytes(), 30 + 1 + 6 + 1 + 1 + 1 + 5);
    }

    #[test]
    fn a_symbolic_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("0.log");
        std::os::unix::fs::symlink("/nowhere", &link).unwrap();
        assert_eq!(ContainerLog::open(&link).unwrap_err().errno, libc::ELOOP);
    }

    #[test]
    fn many_empty_lines_come_out_one_by_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let mut log = ContainerLog::open(&path).unwrap();
        log.push(Stream::Stdout, &vec![b'\n'; 16 * 1024]);
        assert_eq!(contents(&[&path]).len(), 16 * 1024);
    }
}
