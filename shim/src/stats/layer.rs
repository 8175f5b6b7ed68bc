//! Bytes and inodes of writable layers. A small layer is counted within the request; a large one by one background walk at a time,
//! and the request gets what the last walk found, with its time. Never follows a link out of the layer: its owner changes it meanwhile.

use crate::node::now_ns;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use std::{
    collections::HashSet,
    ffi::{CStr, OsStr},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;

/// Age up to which a size is given again.
const FRESH: Duration = Duration::from_secs(10);
/// Folders that wait to be looked at, at most.
const WAITING_MAX: usize = 1 << 20;

const POISON: &str = "never poisoned: no panic while held";

/// One large layer is walked at a time.
static WALK: Semaphore = Semaphore::const_new(1);

/// What a tree of files takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    pub bytes: u64,
    pub inodes: u64,
}

#[derive(Default)]
pub(super) struct Layer(Mutex<State>);

#[derive(Default)]
struct State {
    known: Option<(Size, i64, Instant)>,
    walking: bool,
}

impl Layer {
    /// Of two directories together, of which the second need not be there.
    pub(super) fn size(self: &Arc<Layer>, paths: &[PathBuf; 2], budget: &mut usize) -> Option<(Size, i64)> {
        let mut state = self.0.lock().expect(POISON);
        let known = state.known.map(|(size, at_ns, _)| (size, at_ns));
        if state.walking || state.known.is_some_and(|(_, _, taken)| taken.elapsed() < FRESH) {
            return known;
        }
        match walk_both(paths, budget) {
            Ok(Some(size)) => {
                let at_ns = now_ns();
                state.known = Some((size, at_ns, Instant::now()));
                Some((size, at_ns))
            }
            Ok(None) => {
                state.walking = true;
                drop(state);
                tokio::spawn(self.clone().walk_aside(paths.clone()));
                known
            }
            Err(_) => known,
        }
    }

    async fn walk_aside(self: Arc<Layer>, paths: [PathBuf; 2]) {
        let walked = match WALK.acquire().await {
            Ok(_one) => tokio::task::spawn_blocking(move || walk_both(&paths, &mut usize::MAX.clone())).await,
            Err(_) => return,
        };
        let mut state = self.0.lock().expect(POISON);
        state.walking = false;
        if let Ok(Ok(Some(size))) = walked {
            state.known = Some((size, now_ns(), Instant::now()));
        }
    }
}

/// Adds up two trees; `None` when they have more files than the budget.
fn walk_both([first, second]: &[PathBuf; 2], budget: &mut usize) -> io::Result<Option<Size>> {
    let Some(mut size) = walk(first, budget)? else { return Ok(None) };
    match walk(second, budget) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Ok(None) => return Ok(None),
        other => {
            let more = other?.unwrap_or_default();
            size.bytes += more.bytes;
            size.inodes += more.inodes;
        }
    }
    Ok(Some(size))
}

/// Adds up a tree; `None` when it has more files than the budget.
fn walk(root: &Path, budget: &mut usize) -> io::Result<Option<Size>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = rustix::fs::open(root, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&top)?;
    let mut size = Size { bytes: blocks(stat.st_blocks), inodes: 1 };
    let mut linked = HashSet::new();
    let mut waiting: Vec<PathBuf> = Vec::new();
    // Most layers are nearly empty: a few system calls for each.
    if !add(rustix::io::fcntl_dupfd_cloexec(&top, 0)?, Path::new("."), budget, &mut size, &mut linked, &mut waiting)? {
        return Ok(None);
    }
    while let Some(folder) = waiting.pop() {
        // One that was moved away or replaced since is no longer part of it.
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let Ok(directory) = rustix::fs::openat2(&top, &folder, flags, Mode::empty(), beneath) else { continue };
        if !add(directory, &folder, budget, &mut size, &mut linked, &mut waiting)? {
            return Ok(None);
        }
    }
    Ok(Some(size))
}

fn add(
    directory: OwnedFd,
    folder: &Path,
    budget: &mut usize,
    size: &mut Size,
    linked: &mut HashSet<u64>,
    waiting: &mut Vec<PathBuf>,
) -> io::Result<bool> {
    let mut listing = Dir::new(directory)?;
    while let Some(entry) = listing.read() {
        let Ok(entry) = entry else { continue };
        let name: &CStr = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let Some(left) = budget.checked_sub(1) else { return Ok(false) };
        *budget = left;
        let Ok(stat) = rustix::fs::statat(listing.fd()?, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if !is_folder && stat.st_nlink > 1 && !linked.insert(stat.st_ino) {
            continue;
        }
        size.bytes += blocks(stat.st_blocks);
        size.inodes += 1;
        if is_folder && waiting.len() < WAITING_MAX {
            waiting.push(folder.join(OsStr::from_bytes(name.to_bytes())));
        }
    }
    Ok(true)
}

/// stat(2): blocks of 512 bytes.
fn blocks(count: i64) -> u64 {
    u64::try_from(count).unwrap_or(0) * 512
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn files_count_once_and_links_lead_nowhere() {
        let folder = tempfile::tempdir().expect("a folder");
        let outside = tempfile::tempdir().expect("a folder");
        fs::write(outside.path().join("big"), vec![1; 1 << 20]).expect("write");
        let root = folder.path();
        fs::create_dir(root.join("a")).expect("make");
        fs::write(root.join("a/one"), vec![1; 100_000]).expect("write");
        fs::hard_link(root.join("a/one"), root.join("two")).expect("link");
        std::os::unix::fs::symlink(outside.path(), root.join("out")).expect("link");
        let mut budget = 100;
        let size = walk(root, &mut budget).expect("walk").expect("within the budget");
        assert_eq!((size.inodes, budget), (4, 96));
        assert!((100_000..200_000).contains(&size.bytes), "{size:?}");
        assert_eq!(walk(root, &mut 3).expect("walk"), None);
    }
}
