//! The pod network by CNI plugins, executed as libcni does: ADD and DEL of a chain, CHECK, GC and STATUS.
//!
//! Owns the choice of the network in the configuration directory, the attachments' files and every execution. Never enters a network
//! namespace and never sets up loopback: the monitor has raised it.
//!
//! An attachment is recorded before ADD and forgotten after DEL has succeeded; in between, whatever happens, its DEL is owed. A DEL
//! that fails is tried again here with growing pauses, also when nobody asks for it any more, and at the next start. ADDs share
//! a gate that GC takes alone: otherwise it would take back what is just being given.

mod background;
mod cache;
mod config;
mod plugin;
mod request;
mod result;

use std::collections::HashMap;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock,
    atomic::{AtomicBool, Ordering},
};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

use super::{Attachment, Detachment, Kind, NetworkError, PodNetwork, Subnet};
use crate::config::{Family, NetworkConfig};
use background::Status;
use cache::{Attached, Cache, Entry};
use config::{Fingerprint, NetworkList, Plugin, Version};

/// The interface's name inside every pod; kubelet's network statistics expect it.
const POD_INTERFACE: &str = "eth0";
/// Pauses between attempts of an owed DEL: doubled up to the last.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// A handle on the CNI network; clones share it.
#[derive(Debug, Clone)]
pub struct Cni {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    programs: Vec<PathBuf>,
    limit: Duration,
    preferred: Family,
    /// One for each chain under way, and so for each plugin.
    permits: Semaphore,
    /// ADDs share it, GC has it alone.
    gate: tokio::sync::RwLock<()>,
    cache: Cache,
    loaded: RwLock<Loaded>,
    /// Held while the directory is looked at.
    looking: Mutex<()>,
    /// The network is another one since its attachments were last told to it.
    changed: AtomicBool,
    /// Something in the background is due earlier than it was.
    due: Notify,
    status: Mutex<Status>,
    pod_cidrs: Mutex<Vec<String>>,
}

/// What the configuration directory gave.
#[derive(Debug, Default)]
struct Loaded {
    files: Fingerprint,
    network: Option<Arc<NetworkList>>,
    /// Files that are wrong, and why.
    problems: Vec<String>,
    /// There has been a network since this daemon started.
    seen: bool,
}

/// What each configuration file of a directory says, in their order; nothing is executed.
pub(super) fn check(directory: &Path, programs: &[PathBuf]) -> std::io::Result<Vec<super::look::CniFile>> {
    let files = config::files(directory)?.into_keys();
    let checked = files.map(|path| {
        let network = config::load(&path).map(|network| {
            let wanted = network.plugins.into_iter().map(|plugin| plugin.program);
            (network.name, wanted.filter(|program| plugin::find(program, programs).is_none()).collect())
        });
        super::look::CniFile { path, network }
    });
    Ok(checked.collect())
}

impl Cni {
    /// Reads the attachments and the configuration directory; `state` is the folder of the attachments' files. Ends plugins that a
    /// daemon before this one left running for pods whose ADD was not finished: they would make what the DEL has just taken back.
    /// Nothing is executed before [`Cni::start`]. Blocks.
    pub fn open(config: &NetworkConfig, state: PathBuf) -> Result<Cni, NetworkError> {
        let opened = Cache::open(state.clone());
        let failed = |error| NetworkError::State { operation: "open", path: state, source: std::io::Error::other(error) };
        let cache = opened.map_err(failed)?;
        background::end_orphans(&cache);
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let permits = if config.cni_max_plugins == 0 { 2 * cores } else { config.cni_max_plugins };
        let inner = Inner {
            directory: config.cni_conf_dir.clone(),
            programs: std::env::split_paths(&config.cni_bin_dir).collect(),
            limit: Duration::from_secs(config.cni_timeout_seconds),
            preferred: config.preferred_family,
            permits: Semaphore::new(permits.min(Semaphore::MAX_PERMITS)),
            gate: tokio::sync::RwLock::default(),
            cache,
            loaded: RwLock::default(),
            looking: Mutex::default(),
            changed: AtomicBool::default(),
            due: Notify::new(),
            status: Mutex::default(),
            pod_cidrs: Mutex::default(),
        };
        inner.reload();
        Ok(Cni { inner: Arc::new(inner) })
    }

    /// Begins what goes on in the background: owed DELs of pods that are not in `live`, and if it `serves` STATUS, GC and a CHECK of the
    /// living. Called once, when the daemon has read its records.
    pub fn start(&self, live: &HashMap<String, Kind>, serves: bool) {
        for (pod, entry) in self.inner.cache.all() {
            let lives = live.get(&pod) == Some(&Kind::Cni);
            let netns = entry.attached.try_lock().map(|attached| attached.netns.clone()).unwrap_or_default();
            if !(lives && pinned(&netns)) {
                tracing::info!(pod, "the CNI attachment of a pod that is gone is taken back");
                entry.state().owed = true;
            }
        }
        tokio::spawn(background::run(self.inner.clone(), serves));
    }

    /// Looks whether the configuration directory has another network than it had, for the request that asks next. It is not watched:
    /// inotify would need it to exist, and would miss what is mounted over it, and between two requests nobody wants to know.
    pub fn refresh(&self) {
        if self.inner.reload() {
            self.inner.changed.store(true, Ordering::Relaxed);
            self.inner.due.notify_one();
        }
    }

    /// Whether the directory has had a network since the daemon started.
    pub fn seen(&self) -> bool {
        self.inner.loaded().seen
    }

    /// The node's pod networks, for plugins with the capability `ipRanges`.
    pub fn set_pod_cidrs(&self, subnets: Vec<Subnet>) {
        let cidrs = subnets.iter().map(ToString::to_string).collect();
        *self.inner.pod_cidrs.lock().unwrap_or_else(PoisonError::into_inner) = cidrs;
    }

    /// ADD of every plugin in order. On failure everything is taken back, or its DEL is owed.
    pub async fn attach(&self, pod: Attachment) -> Result<PodNetwork, NetworkError> {
        let inner = &self.inner;
        let network = inner
            .network()
            .ok_or_else(|| NetworkError::Cni { network: inner.directory.display().to_string(), reason: inner.problem() })?;
        let failed = |reason: String| NetworkError::Cni { network: network.name.clone(), reason };
        let attached = inner.intent(&network, &pod).map_err(failed)?;
        for capability in request::ungranted(&network, &attached.runtime) {
            tracing::warn!(pod = %pod.pod_id, network = %network.name, file = %network.file.display(), capability,
                "the pod asks for what no plugin of its network has the capability for: unless an agent of the network sees to it, nobody does");
        }
        let _shared = inner.gate.read().await;
        let entry = inner.cache.insert(attached).map_err(|error| failed(error.to_string()))?;
        let mut attached = entry.attached.lock().await;
        let synced = {
            let (inner, pod_id) = (inner.clone(), pod.pod_id.clone());
            // Beside the first plugin: its own files are not on the disk before ours either.
            tokio::task::spawn_blocking(move || inner.cache.sync(&pod_id))
        };
        let mut outcome = inner.add(&mut attached).await;
        let _ = synced.await;
        if outcome.is_ok() {
            attached.result = attached.so_far.clone();
            if let Err(error) = inner.cache.write(&attached) {
                attached.result = None;
                outcome = Err(error.to_string());
            }
        }
        if let Err(reason) = &outcome {
            tracing::warn!(pod = %pod.pod_id, network = %network.name, reason, "CNI ADD failed; taking it back");
            if let Err(why) = inner.take_back(&entry, &mut attached).await {
                tracing::error!(pod = %pod.pod_id, network = %network.name, why, "CNI DEL after a failed ADD failed; it is tried again");
            }
        }
        outcome.map_err(failed)
    }

    /// DEL of every plugin in reverse order. Fails only if ADD had succeeded; whatever fails is tried again in the background.
    pub async fn detach(&self, pod: &Detachment) -> Result<(), NetworkError> {
        let Some(entry) = self.inner.cache.get(&pod.pod_id) else {
            self.detach_unknown(pod).await;
            return Ok(());
        };
        let mut attached = entry.attached.lock().await;
        if entry.state().removed {
            return Ok(());
        }
        match self.inner.take_back(&entry, &mut attached).await {
            Err(reason) if attached.result.is_some() => Err(NetworkError::Cni { network: attached.network.name.clone(), reason }),
            Err(reason) => {
                tracing::warn!(pod = %pod.pod_id, reason, "CNI DEL failed for a pod whose ADD had not succeeded; it is tried again");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// The pod had a network and its file is lost, or a DEL that was owed has succeeded already. The network of now is the best guess.
    async fn detach_unknown(&self, pod: &Detachment) {
        let (Some(network), Some(_)) = (self.inner.network(), &pod.network) else { return };
        let attached = Attached {
            pod_id: pod.pod_id.clone(),
            netns: pod.netns.clone(),
            interface: POD_INTERFACE.to_owned(),
            arguments: request::arguments(&pod.pod_id, &pod.name, &pod.namespace, &pod.uid),
            network: NetworkList::clone(&network),
            runtime: Map::new(),
            so_far: None,
            result: None,
            owed: true,
        };
        if let Err(why) = self.inner.delete(&attached).await {
            tracing::warn!(pod = %pod.pod_id, network = %network.name, why, "CNI DEL without a known attachment failed");
        }
    }

    /// `Err` says why pods cannot be attached, from what is known: nothing is executed.
    pub fn ready(&self) -> Result<(), String> {
        let network = self.inner.network().ok_or_else(|| self.inner.problem())?;
        for plugin in &network.plugins {
            if plugin::find(&plugin.program, &self.inner.programs).is_none() {
                let searched = std::env::join_paths(&self.inner.programs).unwrap_or_default();
                return Err(format!(
                    "CNI network {}: plugin {:?} is not in {}",
                    network.name,
                    plugin.program,
                    searched.display()
                ));
            }
        }
        self.inner.status().answer.clone().map_err(|why| format!("CNI network {}: STATUS: {why}", network.name))
    }

    /// For a person.
    pub fn describe(&self) -> Value {
        let loaded = self.inner.loaded();
        let status = self.inner.status();
        let owed = self.inner.cache.all().iter().filter(|(_, entry)| entry.state().owed).count();
        let network = loaded.network.as_ref().map(|network| {
            let programs: Vec<&String> = network.plugins.iter().map(|plugin| &plugin.program).collect();
            json!({ "name": network.name, "file": network.file, "cniVersion": network.version, "plugins": programs })
        });
        json!({
            "directory": self.inner.directory, "network": network, "problems": loaded.problems, "owedDetachments": owed,
            "lastStatus": { "secondsAgo": status.asked.map(|asked| asked.elapsed().as_secs()), "error": status.answer.as_ref().err() },
        })
    }
}

impl Inner {
    /// What is recorded before the first plugin runs.
    fn intent(&self, network: &NetworkList, pod: &Attachment) -> Result<Attached, String> {
        if let Some(bad) = [&pod.name, &pod.namespace, &pod.uid].into_iter().find(|text| text.contains([';', '='])) {
            return Err(format!("metadata {bad:?} cannot be told to plugins: ';' and '=' divide their arguments"));
        }
        let cidrs = self.pod_cidrs.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Attached {
            pod_id: pod.pod_id.clone(),
            netns: pod.netns.clone(),
            interface: POD_INTERFACE.to_owned(),
            arguments: request::arguments(&pod.pod_id, &pod.name, &pod.namespace, &pod.uid),
            network: network.clone(),
            runtime: request::runtime(pod, &cidrs)?,
            so_far: None,
            result: None,
            owed: false,
        })
    }

    /// The result of the last plugin that succeeded is in `so_far`, and in the file before the next one begins.
    async fn add(&self, attached: &mut Attached) -> Result<PodNetwork, String> {
        let _permit = self.permits.acquire().await.map_err(|error| error.to_string())?;
        let deadline = Instant::now() + self.limit;
        let netns = attached.netns.to_string_lossy().into_owned();
        for (index, plugin) in attached.network.plugins.clone().iter().enumerate() {
            if index > 0 {
                self.cache.write(attached).map_err(|error| error.to_string())?;
            }
            let output = self.execute("ADD", attached, plugin, &netns, attached.so_far.as_ref(), deadline).await?;
            let read = result::read(&output, attached.network.version);
            attached.so_far = Some(read.map_err(|why| format!("ADD: plugin {:?}: {why}", plugin.program))?);
        }
        let last = attached.so_far.as_ref().ok_or("ADD: there is no plugin")?;
        result::pod_network(last, &attached.interface, self.preferred).map_err(|why| format!("ADD: {why}"))
    }

    /// DEL, then the attachment is forgotten; if it fails it is owed. The caller holds the entry's lock.
    async fn take_back(&self, entry: &Entry, attached: &mut Attached) -> Result<(), String> {
        let deleted = self.delete(attached).await;
        if deleted.is_ok() {
            self.cache.remove(&attached.pod_id, entry);
            return deleted;
        }
        {
            let mut state = entry.state();
            state.owed = true;
            let pause = RETRY_FIRST.saturating_mul(1 << state.failures.min(6)).min(RETRY_LAST);
            state.failures += 1;
            state.next = Some(Instant::now() + pause);
        }
        self.due.notify_one();
        if !attached.owed {
            attached.owed = true;
            if let Err(error) = self.cache.write(attached) {
                tracing::warn!(pod = %attached.pod_id, %error, "CNI attachment not marked");
            }
        }
        deleted
    }

    async fn delete(&self, attached: &Attached) -> Result<(), String> {
        let _permit = self.permits.acquire().await.map_err(|error| error.to_string())?;
        let deadline = Instant::now() + self.limit;
        let netns = if pinned(&attached.netns) { attached.netns.to_string_lossy() } else { "".into() };
        let previous = attached.known().filter(|_| attached.network.version >= Version::CHECK);
        for plugin in attached.network.plugins.iter().rev() {
            self.execute("DEL", attached, plugin, &netns, previous, deadline).await?;
        }
        Ok(())
    }

    async fn check(&self, attached: &Attached) -> Result<(), String> {
        let network = &attached.network;
        if network.version < Version::CHECK || network.disable_check || attached.result.is_none() {
            return Ok(());
        }
        let _permit = self.permits.acquire().await.map_err(|error| error.to_string())?;
        let deadline = Instant::now() + self.limit;
        let netns = attached.netns.to_string_lossy();
        for plugin in &network.plugins {
            self.execute("CHECK", attached, plugin, &netns, attached.result.as_ref(), deadline).await?;
        }
        Ok(())
    }

    async fn execute(
        &self,
        command: &str,
        attached: &Attached,
        plugin: &Plugin,
        netns: &str,
        previous: Option<&Value>,
        deadline: Instant,
    ) -> Result<Vec<u8>, String> {
        let call = plugin::Call {
            command,
            program: &plugin.program,
            container_id: &attached.pod_id,
            netns,
            interface: &attached.interface,
            arguments: &attached.arguments,
            directories: &self.programs,
            stdin: &request::input(&attached.network, plugin, &attached.runtime, previous, &[]),
        };
        let ended = plugin::run(call, deadline).await;
        ended.map_err(|why| format!("{command}: plugin {:?}: {why}", plugin.program))
    }

    /// GC or STATUS of one plugin: of the network, not of a pod.
    async fn execute_for_all(
        &self,
        command: &str,
        network: &NetworkList,
        plugin: &Plugin,
        extra: &[(&str, Value)],
    ) -> Result<(), String> {
        let call = plugin::Call {
            command,
            program: &plugin.program,
            container_id: "",
            netns: "",
            interface: "",
            arguments: "",
            directories: &self.programs,
            stdin: &request::input(network, plugin, &Map::new(), None, extra),
        };
        let _permit = self.permits.acquire().await.map_err(|error| error.to_string())?;
        let ended = plugin::run(call, Instant::now() + self.limit).await;
        ended.map(drop).map_err(|why| format!("plugin {:?}: {why}", plugin.program))
    }

    /// Looks at the configuration directory; says whether the network is another one now. A broken file keeps the network that was
    /// read from it, or passes the choice on to the next file. Blocks.
    fn reload(&self) -> bool {
        let _one = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        let files = match config::files(&self.directory) {
            Ok(files) => files,
            Err(error) => {
                self.loaded.write().unwrap_or_else(PoisonError::into_inner).problems =
                    vec![format!("read {}: {error}", self.directory.display())];
                return false;
            }
        };
        let (known, old) = {
            let loaded = self.loaded();
            (loaded.files == files, loaded.network.clone())
        };
        if known {
            return false;
        }
        let mut problems = Vec::new();
        let mut chosen = None;
        for path in files.keys() {
            match config::load(path) {
                Ok(network) => chosen = chosen.or(Some(Arc::new(network))),
                Err(why) => {
                    tracing::error!(file = %path.display(), why, "CNI configuration is wrong");
                    problems.push(format!("{}: {why}", path.display()));
                    chosen = chosen.or_else(|| old.clone().filter(|old| old.file == *path));
                }
            }
        }
        let changed = chosen != old;
        if changed {
            match &chosen {
                Some(network) => tracing::info!(network = %network.name, file = %network.file.display(), "pod network by CNI"),
                None => tracing::warn!(directory = %self.directory.display(), "the CNI network is gone"),
            }
            *self.status() = Status::of(chosen.as_deref());
        }
        let mut loaded = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        *loaded = Loaded { seen: loaded.seen || chosen.is_some(), files, network: chosen, problems };
        changed
    }

    fn network(&self) -> Option<Arc<NetworkList>> {
        self.loaded().network.clone()
    }

    /// Why there is no network.
    fn problem(&self) -> String {
        let loaded = self.loaded();
        if loaded.problems.is_empty() {
            return format!("no CNI network: {} has no configuration file", self.directory.display());
        }
        format!("no CNI network: {}", loaded.problems.join("; "))
    }

    fn loaded(&self) -> std::sync::RwLockReadGuard<'_, Loaded> {
        self.loaded.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a network namespace is mounted there; after a reboot, or when somebody unmounted it, none is.
fn pinned(path: &Path) -> bool {
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|about| u64::try_from(about.f_type) == Ok(NSFS_MAGIC))
}
