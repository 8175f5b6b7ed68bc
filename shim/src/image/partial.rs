//! What came of large layers that are not finished, so that a pull after a cut, or after the daemon's end, asks only for the rest. One
//! file for each blob, by its digest, which goes with the layer's end.
//!
//! Nothing is synced, so a short pull writes nothing of it to the disk. Nothing in it is trusted: the blob's digest is checked over all
//! bytes, and what turns out wrong is fetched anew. It is bounded in size and age, and never takes the last of a disk.

use super::digest::hex_of;
use super::error::ImageError;
use bytes::Bytes;
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::task::spawn_blocking;

/// A smaller layer is fetched again.
const MIN_LAYER_BYTES: u64 = 8 << 20;
/// Bytes that are written or read at once.
const BATCH_BYTES: usize = 1 << 20;
/// Most bytes of all that no pull is busy with, and of one.
const MAX_BYTES: u64 = 4 << 30;
/// Longest time that nobody takes one up.
const MAX_AGE: Duration = Duration::from_secs(60 * 60);
/// Between two looks at the age.
const LOOK: Duration = Duration::from_secs(10 * 60);
/// Of a disk, a tenth is left alone, at most and at least so much. The least is more than what is on its way to an unpacker, which will
/// want room for it after this has looked.
const MAX_RESERVE_BYTES: u64 = 4 << 30;
const MIN_RESERVE_BYTES: u64 = 10 << 20;

/// All of them.
pub(super) struct Partials {
    dir: PathBuf,
    claimed: Mutex<HashSet<String>>,
}

impl Partials {
    /// Those of an earlier daemon stay for a while.
    pub(super) fn open(dir: PathBuf) -> Result<Arc<Partials>, ImageError> {
        fs::create_dir_all(&dir).map_err(|e| ImageError::io(format!("create {}", dir.display()), e))?;
        let partials = Arc::new(Partials { dir, claimed: Mutex::default() });
        partials.prune(MAX_BYTES);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let kept = Arc::downgrade(&partials);
            runtime.spawn(async move {
                loop {
                    tokio::time::sleep(LOOK).await;
                    let Some(partials) = kept.upgrade() else { return };
                    let _ = spawn_blocking(move || partials.prune(MAX_BYTES)).await;
                }
            });
        }
        Ok(partials)
    }

    /// The blob's, empty or not. `None` for a small blob, one that another pull is busy with, and where no file can be made.
    pub(super) fn claim(self: &Arc<Self>, digest: &str, size_bytes: u64) -> Option<Partial> {
        let hex = hex_of(digest).to_owned();
        if size_bytes < MIN_LAYER_BYTES || !self.claimed.lock().unwrap_or_else(PoisonError::into_inner).insert(hex.clone()) {
            return None;
        }
        let path = self.dir.join(&hex);
        let opened = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let claim = Claim { partials: Arc::clone(self), hex, file: opened.ok()? };
        let found_bytes = claim.file.metadata().ok()?.len();
        let length_bytes = if found_bytes > size_bytes { 0 } else { found_bytes };
        Some(Partial { claim: Arc::new(claim), path, length_bytes, batch: Vec::new(), batch_bytes: 0, stopped: false })
    }

    /// What they take on disk: bytes and inodes.
    pub(super) fn usage(&self) -> (u64, u64) {
        let found = fs::read_dir(&self.dir).into_iter().flatten().flatten().filter_map(|entry| entry.metadata().ok());
        found.fold((0, 0), |(bytes, inodes), metadata| (bytes + metadata.blocks() * 512, inodes + 1))
    }

    /// Gives back what no pull is busy with.
    pub(super) fn clear(&self) {
        self.prune(0);
    }

    /// Removes what is too old, and the oldest above the limit.
    fn prune(&self, limit_bytes: u64) {
        let claimed = self.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if !claimed.contains(&*entry.file_name().to_string_lossy()) {
                found.push((metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), metadata.len(), entry.path()));
            }
        }
        found.sort();
        let mut kept_bytes = 0u64;
        for (modified, length_bytes, path) in found.into_iter().rev() {
            kept_bytes = kept_bytes.saturating_add(length_bytes);
            let old = modified.elapsed().is_ok_and(|age| age > MAX_AGE);
            if (old || length_bytes == 0 || kept_bytes > limit_bytes)
                && let Err(error) = fs::remove_file(&path)
            {
                tracing::warn!(path = %path.display(), %error, "removing a part of a layer");
            }
        }
    }
}

/// The right to a file, as long as anybody reads or writes it.
struct Claim {
    partials: Arc<Partials>,
    hex: String,
    file: File,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.partials.claimed.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.hex);
    }
}

/// What came of one blob. Dropped, it stays for the next pull.
pub(super) struct Partial {
    claim: Arc<Claim>,
    path: PathBuf,
    /// Bytes in the file.
    length_bytes: u64,
    batch: Vec<Bytes>,
    batch_bytes: usize,
    /// Nothing is added any more.
    stopped: bool,
}

impl Partial {
    /// Bytes that are there.
    pub(super) fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Some bytes from a place on; `None` at the end, or where they cannot be read.
    pub(super) async fn read(&self, at: u64) -> Option<Bytes> {
        let want = usize::try_from(self.length_bytes.checked_sub(at)?).unwrap_or(BATCH_BYTES).min(BATCH_BYTES);
        let claim = Arc::clone(&self.claim);
        let read = spawn_blocking(move || {
            let mut bytes = vec![0; want];
            claim.file.read_exact_at(&mut bytes, at).map(|()| Bytes::from(bytes))
        });
        read.await.ok()?.ok().filter(|bytes| !bytes.is_empty())
    }

    /// Adds bytes that came behind those that are there. What fails ends the adding, not the pull.
    pub(super) async fn add(&mut self, chunk: &Bytes) {
        if self.stopped {
            return;
        }
        self.batch.push(chunk.clone());
        self.batch_bytes += chunk.len();
        if self.batch_bytes < BATCH_BYTES {
            return;
        }
        let (claim, batch, at) = (Arc::clone(&self.claim), std::mem::take(&mut self.batch), self.length_bytes);
        let added = std::mem::take(&mut self.batch_bytes) as u64;
        if at.saturating_add(added) > MAX_BYTES {
            self.stopped = true;
            return;
        }
        let written = spawn_blocking(move || {
            let room = room(&claim.file)?;
            let mut at = at;
            for chunk in if room { batch } else { Vec::new() } {
                claim.file.write_all_at(&chunk, at)?;
                at += chunk.len() as u64;
            }
            std::io::Result::Ok(room)
        });
        match written.await {
            Ok(Ok(true)) => self.length_bytes += added,
            // The layer itself needs the room.
            _ => {
                self.discard();
                self.stopped = true;
            }
        }
    }

    /// What is there was wrong: from the beginning again.
    pub(super) fn restart(&mut self) {
        (self.length_bytes, self.batch_bytes) = (0, 0);
        self.batch.clear();
        self.stopped = self.claim.file.set_len(0).is_err();
    }

    /// The blob is here as a layer, or never will be.
    pub(super) fn discard(&self) {
        let _ = self.claim.file.set_len(0);
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether the disk has more than what is left alone.
fn room(file: &File) -> std::io::Result<bool> {
    let disk = rustix::fs::fstatvfs(file)?;
    let reserve_bytes = (disk.f_blocks.saturating_mul(disk.f_frsize) / 10).clamp(MIN_RESERVE_BYTES, MAX_RESERVE_BYTES);
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize) > reserve_bytes)
}
