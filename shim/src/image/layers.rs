//! Layers on disk, one EROFS image or directory each by chain id, and who uses them. A layer that no image and no lease uses is
//! renamed away at once and deleted in the background.

use super::digest::{hex_of, is_hex};
use super::error::ImageError;
use super::extract::Written;
use super::mounts::Mounts;
use super::record::{self, LayerRecord};
use super::split::Kept;
use super::unpack::Place;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::time::Duration;

/// Disk used by images: of whole layers from their records, and of unfinished ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsUsage {
    /// The directory the layers are in.
    pub mountpoint: PathBuf,
    /// Whole blocks of all layers, in bytes.
    pub used_bytes: u64,
    /// Inodes of all layers.
    pub inodes_used: u64,
    /// Of the bytes, what is kept of layers whose pull did not end.
    pub partial_bytes: u64,
}

/// How a layer is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerFormat {
    /// `<hex>`, a directory of the layer's files.
    #[default]
    Directory,
    /// `<hex>.erofs`, one file.
    Erofs,
}

impl std::fmt::Display for LayerFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LayerFormat::Directory => "directory",
            LayerFormat::Erofs => "erofs",
        })
    }
}

impl LayerFormat {
    /// The name below the layers' directory.
    fn name(self, hex: &str) -> String {
        match self {
            LayerFormat::Directory => hex.to_owned(),
            LayerFormat::Erofs => format!("{hex}.erofs"),
        }
    }

    /// The form and the layer that a name stands for.
    fn of(name: &str) -> Option<(LayerFormat, &str)> {
        let found = match name.strip_suffix(".erofs") {
            Some(hex) => (LayerFormat::Erofs, hex),
            None => (LayerFormat::Directory, name),
        };
        is_hex(found.1).then_some(found)
    }
}

pub(super) struct Layers {
    dir: PathBuf,
    /// Of the layers that are made from now on.
    format: LayerFormat,
    pub(super) mounts: Mounts,
    held: Mutex<HashMap<String, Held>>,
    building: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
    trash: mpsc::Sender<PathBuf>,
    /// The store is gone: leases that end now end with the daemon, and keep their layers.
    closed: AtomicBool,
}

#[derive(Default)]
struct Held {
    uses: usize,
    on_disk: Option<Written>,
    /// Its record is written: the data was synced before.
    durable: bool,
}

impl Layers {
    /// Takes up the layers in `dir` that have a record or are named in `imaged`; removes everything else.
    pub(super) fn open(
        dir: PathBuf,
        imaged: &HashMap<String, LayerRecord>,
        format: Option<LayerFormat>,
    ) -> Result<Layers, ImageError> {
        let failed = |e| ImageError::io(format!("open layers in {}", dir.display()), e);
        fs::create_dir_all(&dir).map_err(failed)?;
        let trash = start_trash_thread().map_err(failed)?;
        let mut held = HashMap::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            let Some((found, hex)) = LayerFormat::of(&name) else {
                discard_stray(&dir, &path, &name, &trash);
                continue;
            };
            let chain_id = format!("sha256:{hex}");
            let record_path = record_path(&dir, &chain_id);
            let record = match imaged.get(&chain_id) {
                Some(record) => {
                    if !record_path.exists() {
                        record::write(&record_path, record, false)?;
                    }
                    Some(record.clone())
                }
                None if record_path.try_exists().map_err(failed)? => match record::read::<LayerRecord>(&record_path) {
                    // Who uses it is not known yet: what cannot be read now is not taken for unfinished.
                    Err(error @ ImageError::Io(_)) => return Err(error),
                    record => record.ok(),
                },
                None => None,
            };
            match record {
                Some(r) if r.format != found => discard(&dir, &path, &trash),
                Some(r) => {
                    let written = Written { bytes: r.bytes, inodes: r.inodes, format: r.format };
                    held.insert(chain_id, Held { uses: 0, on_disk: Some(written), durable: true });
                }
                None => {
                    tracing::warn!(layer = chain_id, "removing a layer without a record: it was never finished");
                    let _ = record::remove(&record_path);
                    let _ = fs::remove_file(split_path(&path));
                    discard(&dir, &path, &trash);
                }
            }
        }
        let format = match format {
            Some(LayerFormat::Erofs) => super::mounts::probe(&dir).map(|()| LayerFormat::Erofs)?,
            Some(LayerFormat::Directory) => LayerFormat::Directory,
            None => super::mounts::probe(&dir).map(|()| LayerFormat::Erofs).unwrap_or_else(|error| {
                tracing::info!(%error, "new layers are kept as directories: this host cannot mount EROFS images there");
                LayerFormat::Directory
            }),
        };
        let (held, closed) = (Mutex::new(held), AtomicBool::new(false));
        Ok(Layers { dir, format, mounts: Mounts::default(), held, building: Mutex::default(), trash, closed })
    }

    fn path(&self, chain_id: &str, format: LayerFormat) -> PathBuf {
        self.dir.join(format.name(hex_of(chain_id)))
    }

    /// Where a layer that is on disk lies, and its form.
    pub(super) fn place(&self, chain_id: &str) -> (PathBuf, LayerFormat) {
        let format = self.written(chain_id).unwrap_or_default().format;
        (self.path(chain_id, format), format)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn written(&self, chain_id: &str) -> Option<Written> {
        self.lock().get(chain_id).and_then(|h| h.on_disk)
    }

    pub(super) fn usage(&self) -> FsUsage {
        let mut usage = FsUsage { mountpoint: self.dir.clone(), used_bytes: 0, inodes_used: 0, partial_bytes: 0 };
        for written in self.lock().values().filter_map(|h| h.on_disk) {
            usage.used_bytes += written.bytes;
            usage.inodes_used += written.inodes;
        }
        usage
    }

    /// The right to make this layer: others who want it wait until the guard is dropped.
    pub(super) async fn building(&self, chain_id: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut building = self.building.lock().unwrap_or_else(PoisonError::into_inner);
            building.retain(|_, lock| lock.strong_count() > 0);
            match building.get(chain_id).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(tokio::sync::Mutex::new(()));
                    building.insert(chain_id.to_owned(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }

    /// What is kept of a layer's archive, and what has the content of its files; `None` for a directory that was made before archives
    /// of directories were recorded.
    pub(super) fn files(&self, chain_id: &str) -> Result<Option<(fs::File, Kept)>, ImageError> {
        let (path, format) = self.place(chain_id);
        let open = |path: &Path| fs::File::open(path).map_err(|e| ImageError::io(format!("open {}", path.display()), e));
        let split = split_path(&path);
        if format == LayerFormat::Directory && !split.exists() {
            return Ok(None);
        }
        let kept = open(&path)?;
        let kept = if format == LayerFormat::Directory { Kept::Directory(kept.into()) } else { Kept::Image(kept) };
        Ok(Some((open(&split)?, kept)))
    }

    /// An empty file without a name, beside the layers.
    pub(super) fn scratch(&self) -> Result<fs::File, ImageError> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&self.dir, flags, Mode::RUSR | Mode::WUSR);
        opened.map(fs::File::from).map_err(|e| ImageError::io(format!("make a file in {}", self.dir.display()), e))
    }

    /// Gives a damaged layer up: who uses it keeps what it has, the next pull makes it anew.
    pub(super) fn lose(&self, chain_id: &str) {
        let mut held = self.lock();
        let uses = held.get(chain_id).map_or(0, |h| h.uses);
        self.discard_layer(&mut held, chain_id);
        if uses > 0 {
            held.insert(chain_id.to_owned(), Held { uses, ..Held::default() });
        }
    }

    /// What to unpack into, in the form of new layers; gone when dropped unless published.
    pub(super) fn temp(&self) -> Result<TempLayer, ImageError> {
        let mut temp = match self.format {
            LayerFormat::Directory => self.temp_dir()?,
            LayerFormat::Erofs => TempLayer::new(&self.dir),
        };
        let failed = |path: &Path, e| ImageError::io(format!("make layer {}", path.display()), e);
        let open = |path: &Path| {
            let opened = fs::OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
            opened.map_err(|e| failed(path, e))
        };
        if self.format == LayerFormat::Erofs {
            temp.image = Some(open(&temp.path)?);
        }
        temp.split = Some(open(&split_path(&temp.path))?);
        Ok(temp)
    }

    /// A directory to unpack into, gone when dropped unless published.
    pub(super) fn temp_dir(&self) -> Result<TempLayer, ImageError> {
        let temp = TempLayer::new(&self.dir);
        let failed = |e| ImageError::io(format!("make layer directory {}", temp.path.display()), e);
        fs::create_dir(&temp.path).map_err(failed)?;
        // A layer without an entry for its root has the usual one, whatever the umask.
        fs::set_permissions(&temp.path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).map_err(failed)?;
        Ok(temp)
    }

    /// Gives the unpacked directory its name. The caller holds a lease on it and the right to build it.
    pub(super) fn publish(&self, chain_id: &str, mut temp: TempLayer, written: Written) -> Result<(), ImageError> {
        let path = self.path(chain_id, written.format);
        let mut held = self.lock();
        let named = |e| ImageError::io(format!("name layer {chain_id}"), e);
        if temp.split.is_some() {
            fs::rename(split_path(&temp.path), split_path(&path)).map_err(named)?;
        }
        if let Err(error) = fs::rename(&temp.path, &path) {
            let _ = persistently(|| fs::remove_file(split_path(&path)));
            return Err(named(error));
        }
        temp.published = true;
        let layer = held.entry(chain_id.to_owned()).or_default();
        layer.on_disk = Some(written);
        layer.durable = false;
        Ok(())
    }

    /// Writes the records of layers that have none. To be called after a `syncfs`.
    pub(super) fn record(&self, chain_ids: &[String]) -> Result<Vec<LayerRecord>, ImageError> {
        let mut held = self.lock();
        let mut records = Vec::new();
        for chain_id in chain_ids {
            let Some((layer, written)) = held.get_mut(chain_id).and_then(|h| h.on_disk.map(|w| (h, w))) else {
                return Err(ImageError::Io(format!("record layer {chain_id}: it is not on disk")));
            };
            let record = LayerRecord {
                version: record::VERSION,
                chain_id: chain_id.clone(),
                bytes: written.bytes,
                inodes: written.inodes,
                format: written.format,
            };
            if !layer.durable {
                record::write(&record_path(&self.dir, chain_id), &record, false)?;
                layer.durable = true;
            }
            records.push(record);
        }
        Ok(records)
    }

    /// Lets the kernel drop what it caches of mounted images' own files: containers read the files inside, whose cache is another one.
    pub(super) fn let_go_of_copies(&self) {
        for hex in self.mounts.names() {
            let opened = fs::File::open(self.dir.join(LayerFormat::Erofs.name(&hex)));
            if let Err(error) = opened.and_then(|file| Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)) {
                tracing::debug!(layer = hex, %error, "letting go of cached pages");
            }
        }
    }

    /// Holds the layers until the lease is dropped.
    pub(super) fn lease(self: &Arc<Self>, chain_ids: &[String]) -> Lease {
        let mut held = self.lock();
        for chain_id in chain_ids {
            held.entry(chain_id.clone()).or_default().uses += 1;
        }
        Lease { layers: Arc::clone(self), chain_ids: chain_ids.to_vec() }
    }

    /// Removes layers that nobody uses.
    pub(super) fn collect(&self) {
        let mut held = self.lock();
        let unused: Vec<String> = held.iter().filter(|(_, h)| h.uses == 0).map(|(id, _)| id.clone()).collect();
        for chain_id in unused {
            self.discard_layer(&mut held, &chain_id);
        }
    }

    /// From here on no lease's end removes anything.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    fn release(&self, chain_ids: &[String]) {
        if self.closed.load(Ordering::SeqCst) {
            return;
        }
        let mut held = self.lock();
        // The uppermost first: what is left after a crash in between is a whole lower part.
        for chain_id in chain_ids.iter().rev() {
            let Some(layer) = held.get_mut(chain_id) else { continue };
            layer.uses = layer.uses.saturating_sub(1);
            if layer.uses == 0 {
                self.discard_layer(&mut held, chain_id);
            }
        }
    }

    fn discard_layer(&self, held: &mut HashMap<String, Held>, chain_id: &str) {
        if let Some(written) = held.remove(chain_id).and_then(|h| h.on_disk) {
            if written.format == LayerFormat::Erofs {
                self.mounts.forget(hex_of(chain_id));
            }
            for path in [split_path(&self.path(chain_id, written.format)), record_path(&self.dir, chain_id)] {
                if let Err(error) = persistently(|| fs::remove_file(&path)) {
                    tracing::warn!(path = %path.display(), %error, "removing a layer");
                }
            }
            discard(&self.dir, &self.path(chain_id, written.format), &self.trash);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A hold on layers; they stay on disk until it is dropped.
#[must_use = "dropping a lease releases its layers"]
pub struct Lease {
    layers: Arc<Layers>,
    chain_ids: Vec<String>,
}

impl Lease {
    /// The layers held, lowest first: what [`super::Store::lease_layers`] takes after a restart.
    pub fn chain_ids(&self) -> &[String] {
        &self.chain_ids
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.layers.release(&self.chain_ids);
    }
}

/// A layer being unpacked.
pub(super) struct TempLayer {
    path: PathBuf,
    /// The image, if it is to be one.
    image: Option<fs::File>,
    /// For what the layer has not of its archive.
    split: Option<fs::File>,
    published: bool,
}

impl TempLayer {
    fn new(dir: &Path) -> TempLayer {
        TempLayer { path: random_name(dir, "tmp"), image: None, split: None, published: false }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn place(&self) -> Place<'_> {
        match (&self.image, &self.split) {
            (Some(image), Some(split)) => Place::Erofs(image, split),
            (_, split) => Place::Directory(&self.path, split.as_ref()),
        }
    }
}

impl Drop for TempLayer {
    fn drop(&mut self) {
        if self.published {
            return;
        }
        let split = split_path(&self.path);
        if let Err(error) = persistently(|| remove(&self.path)).and(persistently(|| fs::remove_file(&split))) {
            tracing::warn!(path = %self.path.display(), %error, "removing an unfinished layer");
        }
    }
}

/// Beside a layer, what it has not of its archive.
fn split_path(layer: &Path) -> PathBuf {
    layer.with_extension("split")
}

/// Pauses between tries to remove something.
const REMOVE_PAUSES: [Duration; 3] = [Duration::from_millis(1), Duration::from_millis(10), Duration::from_millis(100)];

/// Removes something, and tries again if that fails: nobody asks a second time, and what is left stays until the next start. What is absent
/// is removed.
fn persistently(mut remove: impl FnMut() -> std::io::Result<()>) -> std::io::Result<()> {
    let mut pauses = REMOVE_PAUSES.into_iter();
    loop {
        match remove() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => match pauses.next() {
                Some(pause) => std::thread::sleep(pause),
                None => return Err(error),
            },
            Ok(()) => return Ok(()),
        }
    }
}

/// Removes a layer of either form.
fn remove(path: &Path) -> std::io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

fn record_path(dir: &Path, chain_id: &str) -> PathBuf {
    dir.join(format!("{}.json", hex_of(chain_id)))
}

fn random_name(dir: &Path, prefix: &str) -> PathBuf {
    let number = getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id()));
    dir.join(format!("{prefix}-{number:016x}"))
}

/// What is no layer: unfinished and half deleted directories go, a record whose layer is gone goes.
fn discard_stray(dir: &Path, path: &Path, name: &str, trash: &mpsc::Sender<PathBuf>) {
    if name.starts_with("tmp-") {
        discard(dir, path, trash);
    } else if name.starts_with("trash-") {
        let _ = trash.send(path.to_path_buf());
    } else if name.ends_with(".json.tmp") || [".json", ".split"].iter().any(|end| belongs_to_none(dir, name, end)) {
        let _ = fs::remove_file(path);
    }
}

/// Whether the name is that of a layer with this ending, and the layer is gone.
fn belongs_to_none(dir: &Path, name: &str, ending: &str) -> bool {
    let gone = |hex: &str| ![LayerFormat::Directory, LayerFormat::Erofs].iter().any(|form| dir.join(form.name(hex)).exists());
    name.strip_suffix(ending).is_some_and(|hex| is_hex(hex) && gone(hex))
}

fn discard(dir: &Path, path: &Path, trash: &mpsc::Sender<PathBuf>) {
    let away = random_name(dir, "trash");
    match persistently(|| fs::rename(path, &away)) {
        Ok(()) => drop(trash.send(away)),
        Err(error) => tracing::warn!(path = %path.display(), %error, "removing a layer"),
    }
}

/// Deletes what it is sent; ends with the last sender.
fn start_trash_thread() -> std::io::Result<mpsc::Sender<PathBuf>> {
    let (sender, paths) = mpsc::channel::<PathBuf>();
    std::thread::Builder::new().name("layer-trash".into()).spawn(move || {
        for path in paths {
            if let Err(error) = persistently(|| remove(&path)) {
                tracing::warn!(path = %path.display(), %error, "deleting a removed layer");
            }
        }
    })?;
    Ok(sender)
}
