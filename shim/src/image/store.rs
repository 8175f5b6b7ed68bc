//! The index of images and the operations on it. Pulls and imports prepare layers beside it; only the last step, the
//! commit, changes it, one at a time: sync, layer records, image record, then the view that readers see.

use super::auth::RegistryAuth;
use super::digest::{self, chain_ids, hex_of, is_hex};
use super::error::ImageError;
use super::extract::Limits;
use super::hosts::RegistryFiles;
use super::import;
use super::layers::{FsUsage, LayerFormat, Layers, Lease};
use super::manifest::{self, Descriptor, Document, Manifest, Platform};
use super::object::{Image, Layer};
use super::partial::Partials;
use super::progress::Progress;
use super::record::{self, ImageRecord, LayerRecord};
use super::reference::Reference;
use super::registry::Session;
use super::tls::Clients;
use super::transfer::{self, Source, Want};
use super::trust::TrustFiles;
use crate::telemetry::trace::TARGET;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared, WeakShared};
use oci_spec::image::ImageConfiguration;
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};
use tracing::Instrument;

const MAX_INDEX_DEPTH: u32 = 3;
const MIN_SHORT_ID: usize = 3;
/// Between two times that cached pages are given back which hold a layer's bytes twice. A call takes microseconds where there are none.
const LET_GO_INTERVAL: Duration = Duration::from_secs(60);

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Everything the store has lies below it.
    pub root: PathBuf,
    /// How registries are reached.
    pub registries: RegistryFiles,
    /// Which images may be pulled and imported.
    pub trust: TrustFiles,
    /// Images that kubelet's garbage collection and `prune` leave alone: names, or beginnings of names that end with `*`.
    pub pinned: Vec<String>,
    /// What is chosen from an index.
    pub platform: Platform,
    /// Layers fetched and unpacked at the same time, over all pulls.
    pub parallel_layers: usize,
    /// Longest wait for the next bytes of a registry's answer.
    pub progress_timeout: Duration,
    /// Most bytes of files in one layer, holes included.
    pub layer_limit_bytes: u64,
    /// Most entries in one layer.
    pub layer_limit_entries: u64,
    /// How new layers are kept; `None` for EROFS images where this host can mount them.
    pub layer_format: Option<LayerFormat>,
}

impl StoreConfig {
    /// Defaults for this machine.
    pub fn new(root: PathBuf, registries: RegistryFiles) -> StoreConfig {
        StoreConfig {
            root,
            registries,
            trust: TrustFiles::default(),
            pinned: Vec::new(),
            platform: Platform::default(),
            parallel_layers: 4,
            progress_timeout: Duration::from_secs(30),
            layer_limit_bytes: 256 << 30,
            layer_limit_entries: 10_000_000,
            layer_format: None,
        }
    }
}

/// Reference, credentials, and the namespace whose policy holds.
type PullKey = (Reference, Option<RegistryAuth>, String);
/// A pull under way, and how far it is.
type Running = (WeakShared<PullFuture>, Arc<Progress>);
type PullFuture = BoxFuture<'static, Result<Arc<Image>, ImageError>>;

/// The image store; clones are the same store.
#[derive(Clone)]
pub struct Store(pub(super) Arc<Inner>);

pub(super) struct Inner {
    config: StoreConfig,
    pub(super) layers: Arc<Layers>,
    index: RwLock<BTreeMap<String, Indexed>>,
    /// Held while the index and its records change.
    commit: Mutex<()>,
    pulls: Mutex<HashMap<PullKey, Running>>,
    clients: Arc<Clients>,
    slots: Arc<Semaphore>,
    partials: Arc<Partials>,
}

struct Indexed {
    image: Arc<Image>,
    record: ImageRecord,
    _lease: Lease,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.layers.close();
    }
}

/// An image that is being made: its config, its names and where its layers come from.
pub(super) struct Plan {
    id: String,
    config_text: String,
    config: ImageConfiguration,
    tags: Vec<String>,
    digests: Vec<String>,
    wants: Vec<Want>,
}

impl Plan {
    pub(super) fn new(config: Vec<u8>, tags: Vec<String>, digests: Vec<String>) -> Result<Plan, ImageError> {
        let id = digest::of(&config);
        let corrupt = |cause: String| ImageError::Corrupt(format!("config {id}: {cause}"));
        let config_text = String::from_utf8(config).map_err(|e| corrupt(e.to_string()))?;
        let config: ImageConfiguration = serde_json::from_str(&config_text).map_err(|e| corrupt(e.to_string()))?;
        if let Some(bad) = config.rootfs().diff_ids().iter().find(|d| !digest::is_digest(d)) {
            return Err(corrupt(format!("{bad:?} is no sha256 digest")));
        }
        Ok(Plan { id, config_text, config, tags, digests, wants: Vec::new() })
    }

    /// Joins each layer's place to its diff id, lowest first.
    pub(super) fn set_sources(&mut self, sources: Vec<Source>) -> Result<(), ImageError> {
        let diff_ids = self.config.rootfs().diff_ids();
        if diff_ids.len() != sources.len() {
            let (config, manifest) = (diff_ids.len(), sources.len());
            return Err(ImageError::Corrupt(format!("config {}: has {config} layers, the manifest {manifest}", self.id)));
        }
        let joined = chain_ids(diff_ids).into_iter().zip(diff_ids.clone()).zip(sources);
        self.wants = joined.map(|((chain_id, diff_id), source)| Want { chain_id, diff_id, source }).collect();
        Ok(())
    }
}

impl Store {
    /// Opens the store and removes unfinished work. A record whose content cannot be read is set aside with a warning.
    ///
    /// # Errors
    /// If the root cannot be made, or the system does not give what is in it.
    pub fn open(config: StoreConfig) -> Result<Store, ImageError> {
        let failed = |e| ImageError::io(format!("open image store {}", config.root.display()), e);
        std::fs::create_dir_all(&config.root).map_err(failed)?;
        let mut records = Vec::new();
        for entry in std::fs::read_dir(&config.root).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("json") => records.extend(load_record(&path)?),
                Some("tmp") => drop(std::fs::remove_file(&path)),
                _ => {}
            }
        }
        let imaged: HashMap<String, LayerRecord> =
            records.iter().flat_map(|(r, _): &(ImageRecord, _)| &r.layers).map(|l| (l.chain_id.clone(), l.clone())).collect();
        let layers = Arc::new(Layers::open(config.root.join("layers"), &imaged, config.layer_format)?);
        let_go_now_and_then(&layers);
        let mut index = BTreeMap::new();
        for (record, parsed) in records {
            if let Some(lost) = record.layers.iter().find(|l| layers.written(&l.chain_id).is_none()) {
                tracing::warn!(image = record.id, layer = lost.chain_id, "setting an image aside: a layer is missing");
                set_aside(&record_path(&config.root, &record.id));
                continue;
            }
            index.insert(record.id.clone(), indexed(&layers, record, parsed));
        }
        let partials = Partials::open(config.root.join("partial"))?;
        let clients = Arc::new(Clients::new(config.progress_timeout));
        let slots = Arc::new(Semaphore::new(config.parallel_layers.max(1)));
        Ok(Store(Arc::new(Inner {
            config,
            layers,
            index: RwLock::new(index),
            commit: Mutex::default(),
            pulls: Mutex::default(),
            clients,
            slots,
            partials,
        })))
    }

    /// Pulls an image. The same pull by several callers is done once; it is canceled when the last of them goes.
    ///
    /// # Errors
    /// Every kind but `TooMany` has the reason in the registry's answer or the disk; nothing is left of a failed pull.
    pub async fn pull(&self, reference: &str, auth: Option<RegistryAuth>) -> Result<Arc<Image>, ImageError> {
        self.pull_for(reference, auth, "").await
    }

    /// As [`Store::pull`], under the policy of a namespace of Kubernetes if it has one of its own.
    ///
    /// # Errors
    /// As [`Store::pull`].
    pub async fn pull_for(&self, reference: &str, auth: Option<RegistryAuth>, namespace: &str) -> Result<Arc<Image>, ImageError> {
        self.pull_watched(reference, auth, namespace, |_| ()).await
    }

    /// As [`Store::pull_for`]; `watch` gets how far the pull is, once for each registry that is tried.
    ///
    /// # Errors
    /// As [`Store::pull`].
    pub async fn pull_watched(
        &self,
        reference: &str,
        auth: Option<RegistryAuth>,
        namespace: &str,
        watch: impl Fn(Arc<Progress>) + Send,
    ) -> Result<Arc<Image>, ImageError> {
        let meanings = self.0.config.registries.conf()?.meanings(reference)?;
        let mut last = ImageError::NotFound(format!("image {reference}: no registry is configured for it"));
        for meaning in meanings {
            let (pull, progress) = self.join_pull((meaning, auth.clone(), namespace.to_owned()));
            watch(progress);
            match pull.await {
                // The next registry that a short name may mean.
                Err(error @ (ImageError::NotFound(_) | ImageError::Unauthorized(_))) => last = error,
                other => return other,
            }
        }
        Err(last)
    }

    fn join_pull(&self, key: PullKey) -> (Shared<PullFuture>, Arc<Progress>) {
        let mut pulls = self.0.pulls.lock().unwrap_or_else(PoisonError::into_inner);
        pulls.retain(|_, (pull, _)| pull.upgrade().is_some_and(|p| p.peek().is_none()));
        if let Some((pull, progress)) = pulls.get(&key).and_then(|(pull, progress)| Some((pull.upgrade()?, progress))) {
            return (pull, Arc::clone(progress));
        }
        let progress = Arc::new(Progress::default());
        let told = Arc::clone(&progress);
        let (store, (reference, auth, namespace)) = (self.clone(), key.clone());
        let span = tracing::info_span!(target: TARGET, "pull", image = %reference);
        let pull = async move {
            let context = format!("pull {reference}");
            store.pull_alone(&reference, auth, &namespace, &told).await.map_err(|e| e.within(context))
        };
        let pull = pull.instrument(span).boxed().shared();
        if let Some(weak) = pull.downgrade() {
            pulls.insert(key, (weak, Arc::clone(&progress)));
        }
        (pull, progress)
    }

    async fn pull_alone(
        &self,
        reference: &Reference,
        auth: Option<RegistryAuth>,
        namespace: &str,
        progress: &Progress,
    ) -> Result<Arc<Image>, ImageError> {
        let inner = &self.0;
        let demand = inner.config.trust.demand(reference, namespace)?;
        let clients = Arc::clone(&inner.clients);
        let session = Arc::new(Session::new(clients, &inner.config.registries, reference, auth)?);
        let wanted = reference.digest().or(reference.tag()).unwrap_or("latest");
        let (manifest, digest, chosen) =
            self.resolve(&session, wanted).instrument(tracing::info_span!(target: TARGET, "resolve")).await?;
        let mut digests = vec![digest.as_str()];
        digests.extend(Some(chosen.as_str()).filter(|chosen| *chosen != digest));
        demand.check(&session, reference, &digests).instrument(tracing::info_span!(target: TARGET, "check signatures")).await?;
        let config = session.small_blob(&manifest.config).await?;
        if chosen == digest {
            manifest::check_config(&config, &inner.config.platform, &format!("manifest {digest}"))?;
        }
        // A reference with a digest says which image it is; its tag may say another by now.
        let tag = reference.digest().is_none().then(|| reference.tagged()).flatten();
        let mut plan = Plan::new(config, tag.into_iter().collect(), vec![reference.with_digest(&digest)])?;
        let source = |layer: Descriptor| {
            let progress = progress.layer(&layer.digest, layer.size);
            Source::Registry(Arc::clone(&session), layer, progress)
        };
        plan.set_sources(manifest.layers.into_iter().map(source).collect())?;
        self.make(plan).await
    }

    /// The manifest for this platform, the digest of what the name itself points to, and the manifest's own.
    async fn resolve(&self, session: &Session, wanted: &str) -> Result<(Manifest, String, String), ImageError> {
        let (mut bytes, top) = session.manifest(wanted).await?;
        let mut own = top.clone();
        let mut object = format!("manifest {top}");
        for _ in 0..=MAX_INDEX_DEPTH {
            match manifest::parse(&bytes, &object)? {
                Document::Manifest(manifest) => return Ok((manifest, top, own)),
                Document::Index(index) => {
                    let chosen = manifest::select(&index, &self.0.config.platform, &object)?.digest.clone();
                    bytes = session.manifest(&chosen).await?.0;
                    object = format!("manifest {chosen}");
                    own = chosen;
                }
            }
        }
        Err(ImageError::TooMany(format!("{object}: indexes nest too deep")))
    }

    /// Imports every image of an OCI layout or a `docker save` archive.
    ///
    /// # Errors
    /// `Corrupt` if it is neither, `Untrusted` if the policy refuses one of its images, and then none is imported; `NoSpace`, `Io`;
    /// images imported before the failing one stay.
    pub async fn import(&self, path: &Path) -> Result<Vec<Arc<Image>>, ImageError> {
        let (inner, path) = (Arc::clone(&self.0), path.to_path_buf());
        let found = spawn_blocking(move || import::scan(&path, &inner.layers, &inner.config.platform, inner.limits()));
        let found = found.await.map_err(|e| ImageError::Io(format!("import: {e}")))??;
        for (_, origin) in &found.plans {
            self.0.config.trust.check_import(origin).map_err(|e| e.within("import"))?;
        }
        let mut images = Vec::new();
        for (plan, _) in found.plans {
            images.push(self.make(plan).await.map_err(|e| e.within("import"))?);
        }
        Ok(images)
    }

    /// Layers, all at once as far as slots allow, then the commit.
    async fn make(&self, mut plan: Plan) -> Result<Arc<Image>, ImageError> {
        let inner = &self.0;
        let wants = std::mem::take(&mut plan.wants);
        let chain: Vec<String> = wants.iter().map(|w| w.chain_id.clone()).collect();
        let lease = inner.layers.lease(&chain);
        let mut tasks = JoinSet::new();
        for want in wants {
            let object = format!("layer {}", want.diff_id);
            let span = tracing::info_span!(target: TARGET, "layer", diff_id = want.diff_id);
            let (layers, partials) = (Arc::clone(&inner.layers), Arc::clone(&inner.partials));
            let made = transfer::ensure(layers, partials, Arc::clone(&inner.slots), want, inner.limits());
            tasks.spawn(async move { made.await.map_err(|e| e.within(object)) }.instrument(span));
        }
        let mut result = Ok(());
        while let Some(joined) = tasks.join_next().await {
            let one =
                joined.unwrap_or_else(|e| if e.is_cancelled() { Ok(()) } else { Err(ImageError::Io(format!("layer: {e}"))) });
            // The first failure ends the others, and is the one to tell.
            if result.is_ok() && one.is_err() {
                result = one;
                tasks.abort_all();
            }
        }
        result?;
        let inner = Arc::clone(inner);
        let commit = spawn_blocking(move || inner.commit(plan, &chain, lease));
        let commit = commit.instrument(tracing::info_span!(target: TARGET, "commit"));
        commit.await.map_err(|e| ImageError::Io(format!("record image: {e}")))?
    }

    /// All images, by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.0.read_index().values().map(|i| Arc::clone(&i.image)).collect()
    }

    /// An image by tag, digest reference, `name:tag@digest`, id with or without `sha256:`, or a unique start of the id.
    pub fn get(&self, name: &str) -> Option<Arc<Image>> {
        let index = self.0.read_index();
        if let Some(indexed) = index.get(&format!("sha256:{}", hex_of(name))) {
            return Some(Arc::clone(&indexed.image));
        }
        for reference in self.meanings(name) {
            let named = index.values().find(|i| is_named(&i.image, &reference));
            if let Some(indexed) = named {
                return Some(Arc::clone(&indexed.image));
            }
        }
        let short = hex_of(name);
        if short.len() < MIN_SHORT_ID || !short.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut starting = index.values().filter(|i| hex_of(&i.image.id).starts_with(short));
        match (starting.next(), starting.next()) {
            (Some(only), None) => Some(Arc::clone(&only.image)),
            _ => None,
        }
    }

    /// What a name may mean. While the configuration cannot be read, what it says itself.
    fn meanings(&self, name: &str) -> Vec<Reference> {
        let meant = self.0.config.registries.conf().and_then(|conf| conf.meanings(name));
        meant.unwrap_or_else(|_| name.parse().into_iter().collect())
    }

    /// Removes the image that `name` means, with all its names; its disk is given back in the background as far as nobody else
    /// uses the layers. An absent image is fine.
    ///
    /// # Errors
    /// `Io` if the record cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        let _commit = self.0.commit.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(image) = self.get(name) else {
            return Ok(());
        };
        record::remove(&record_path(&self.0.config.root, &image.id)).map_err(|e| e.within(format!("remove image {name}")))?;
        let removed = self.0.index.write().unwrap_or_else(PoisonError::into_inner).remove(&image.id);
        drop(removed);
        Ok(())
    }

    /// Gives the image that `name` means the name `tag` too; an image that had it loses it.
    ///
    /// # Errors
    /// `NotFound`, `InvalidReference` if `tag` is no name or has a digest, `NoSpace` and `Io` if the record cannot be written.
    pub fn tag(&self, name: &str, tag: &str) -> Result<Arc<Image>, ImageError> {
        let reference: Reference = tag.parse()?;
        // An id reads as the tag of an image called sha256.
        let is_name = reference.digest().is_none() && !digest::is_digest(tag);
        let tagged = reference.tagged().filter(|_| is_name).ok_or_else(|| ImageError::InvalidReference {
            reference: tag.to_owned(),
            cause: "a digest cannot be given to an image".to_owned(),
        })?;
        let _commit = self.0.commit.lock().unwrap_or_else(PoisonError::into_inner);
        let image = self.get(name).ok_or_else(|| ImageError::NotFound(format!("image {name}")))?;
        let mut record = self.0.record_of(&image.id).ok_or_else(|| ImageError::NotFound(format!("image {name}")))?;
        record.repo_tags.push(tagged.clone());
        let published = self.0.publish(record, &[tagged], image.config.clone());
        published.map_err(|e| e.within(format!("tag image {name}")))
    }

    /// Whether the configuration says that this image stays.
    pub fn is_pinned(&self, image: &Image) -> bool {
        let named = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => image.repo_tags.iter().chain(&image.repo_digests).any(|name| name.starts_with(beginning)),
            None if *pattern == image.id => true,
            None => pattern.parse().is_ok_and(|reference| is_named(image, &reference)),
        };
        self.0.config.pinned.iter().any(named)
    }

    /// A container's hold on the layers of its image, over the image's removal.
    pub fn lease(&self, image: &Image) -> Lease {
        self.0.layers.lease(&image.chain_ids())
    }

    /// Takes a lease again after a restart.
    pub fn lease_layers(&self, chain_ids: &[String]) -> Lease {
        self.0.layers.lease(chain_ids)
    }

    /// Removes layers that neither an image nor a lease uses: to be called once all leases of an earlier run are taken again.
    pub fn collect_unused(&self) {
        self.0.layers.collect();
    }

    /// The tree in which EROFS layers are mounted, for monitors to keep and to take layers from.
    ///
    /// # Errors
    /// `Io`.
    pub fn layer_tree(&self) -> Result<BorrowedFd<'_>, ImageError> {
        self.0.layers.mounts.tree().map(AsFd::as_fd)
    }

    /// Takes over the tree of an earlier daemon, as one of its monitors kept it. To be called before layers are used.
    pub fn adopt_layer_tree(&self, tree: OwnedFd) {
        self.0.layers.mounts.adopt(tree);
    }

    /// What the layers take on disk, and what is kept of unfinished ones.
    pub fn usage(&self) -> FsUsage {
        let mut usage = self.0.layers.usage();
        let (bytes, inodes) = self.0.partials.usage();
        usage.used_bytes += bytes;
        usage.inodes_used += inodes;
        usage.partial_bytes = bytes;
        usage
    }

    /// Gives back what is kept of layers whose pull did not end, but for pulls that go on.
    pub fn clear_partial(&self) {
        self.0.partials.clear();
    }
}

impl Store {
    pub(super) fn limits(&self) -> Limits {
        self.0.limits()
    }
}

impl Inner {
    pub(super) fn limits(&self) -> Limits {
        Limits { bytes: self.config.layer_limit_bytes, entries: self.config.layer_limit_entries }
    }

    pub(super) fn record_of(&self, id: &str) -> Option<ImageRecord> {
        self.read_index().get(id).map(|indexed| indexed.record.clone())
    }

    fn read_index(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Indexed>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the image durable, then visible. The lease covers its layers until the index has its own.
    fn commit(&self, plan: Plan, chain: &[String], lease: Lease) -> Result<Arc<Image>, ImageError> {
        let context = format!("record image {}", plan.id);
        let dir = std::fs::File::open(self.layers.dir()).map_err(|e| ImageError::io(&context, e))?;
        rustix::fs::syncfs(&dir).map_err(|e| ImageError::io(&context, e))?;
        let _commit = self.commit.lock().unwrap_or_else(PoisonError::into_inner);
        let layers = self.layers.record(chain).map_err(|e| e.within(&context))?;
        let old = self.record_of(&plan.id);
        let mut record = ImageRecord {
            version: record::VERSION,
            id: plan.id,
            config: plan.config_text,
            repo_tags: plan.tags.clone(),
            repo_digests: plan.digests,
            layers,
        };
        if let Some(old) = old {
            record.repo_tags.extend(old.repo_tags);
            record.repo_digests.extend(old.repo_digests);
        }
        let image = self.publish(record, &plan.tags, plan.config).map_err(|e| e.within(&context));
        drop(lease);
        image
    }

    /// Writes the record, takes its new tags from the images that had them, and shows the image. Under the lock of commits.
    fn publish(&self, mut record: ImageRecord, tags: &[String], config: ImageConfiguration) -> Result<Arc<Image>, ImageError> {
        for names in [&mut record.repo_tags, &mut record.repo_digests] {
            names.sort();
            names.dedup();
        }
        record::write(&record_path(&self.config.root, &record.id), &record, true)?;
        self.untag_others(&record.id, tags)?;
        let indexed = indexed(&self.layers, record, config);
        let image = Arc::clone(&indexed.image);
        let replaced = self.index.write().unwrap_or_else(PoisonError::into_inner).insert(image.id.clone(), indexed);
        drop(replaced);
        Ok(image)
    }

    /// A tag that moved leaves the image that had it.
    fn untag_others(&self, id: &str, tags: &[String]) -> Result<(), ImageError> {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        for other in index.values_mut().filter(|i| i.image.id != id && i.record.repo_tags.iter().any(|t| tags.contains(t))) {
            other.record.repo_tags.retain(|t| !tags.contains(t));
            record::write(&record_path(&self.config.root, &other.image.id), &other.record, true)?;
            other.image = Arc::new(image_of(&self.layers, &other.record, other.image.config.clone()));
        }
        Ok(())
    }
}

/// Until the store is gone, where there is a runtime: a command ends before the first time.
fn let_go_now_and_then(layers: &Arc<Layers>) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
    let layers = Arc::downgrade(layers);
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(LET_GO_INTERVAL).await;
            let Some(layers) = layers.upgrade() else { return };
            let _ = spawn_blocking(move || layers.let_go_of_copies()).await;
        }
    });
}

fn is_named(image: &Image, reference: &Reference) -> bool {
    match (reference.digest(), reference.tagged()) {
        (Some(digest), _) => image.repo_digests.contains(&reference.with_digest(digest)),
        (None, Some(tagged)) => image.repo_tags.contains(&tagged),
        (None, None) => false,
    }
}

fn record_path(root: &Path, id: &str) -> PathBuf {
    root.join(format!("{}.json", hex_of(id)))
}

/// None: it was set aside. That the system does not give it now is an error: it may be whole.
fn load_record(path: &Path) -> Result<Option<(ImageRecord, ImageConfiguration)>, ImageError> {
    let loaded = record::read::<ImageRecord>(path).and_then(|record| {
        let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default();
        if !is_hex(stem) || digest::of(record.config.as_bytes()) != record.id || hex_of(&record.id) != stem {
            return Err(ImageError::Corrupt(format!("record {}: its config has another digest", path.display())));
        }
        let config =
            serde_json::from_str(&record.config).map_err(|e| ImageError::Corrupt(format!("record {}: {e}", path.display())))?;
        Ok((record, config))
    });
    match loaded {
        Ok(loaded) => Ok(Some(loaded)),
        Err(error @ ImageError::Io(_)) => Err(error),
        Err(error) => {
            tracing::warn!(%error, "setting an image record aside");
            set_aside(path);
            Ok(None)
        }
    }
}

fn set_aside(path: &Path) {
    if let Err(error) = std::fs::rename(path, path.with_extension("bad")) {
        tracing::warn!(path = %path.display(), %error, "setting a record aside");
    }
}

fn indexed(layers: &Arc<Layers>, record: ImageRecord, config: ImageConfiguration) -> Indexed {
    let chain: Vec<String> = record.layers.iter().map(|l| l.chain_id.clone()).collect();
    Indexed { image: Arc::new(image_of(layers, &record, config)), record, _lease: layers.lease(&chain) }
}

pub(super) fn image_of(layers: &Arc<Layers>, record: &ImageRecord, config: ImageConfiguration) -> Image {
    let place = |record: &LayerRecord| Layer::new(layers, record);
    Image {
        id: record.id.clone(),
        repo_tags: record.repo_tags.clone(),
        repo_digests: record.repo_digests.clone(),
        size_bytes: record.config.len() as u64 + record.layers.iter().map(|l| l.bytes).sum::<u64>(),
        config,
        layers: record.layers.iter().map(place).collect(),
    }
}
