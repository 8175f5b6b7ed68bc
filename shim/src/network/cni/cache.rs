//! What was or may have been attached: one file for each pod, written before ADD and removed after DEL.
//!
//! It lies in the daemon's root and not in libcni's common directory, so that two daemons do not meet, and holds all that a DEL needs:
//! the network as it was configured then, and its result. A file that cannot be read is set aside.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::config::NetworkList;
use crate::{
    error::{Error, Result},
    store,
};

/// One pod's attachment, in its durable form.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Attached {
    pub(super) pod_id: String,
    pub(super) netns: PathBuf,
    pub(super) interface: String,
    /// `CNI_ARGS`.
    pub(super) arguments: String,
    pub(super) network: NetworkList,
    /// All of `runtimeConfig`; each plugin gets what it has the capability for.
    pub(super) runtime: Map<String, Value>,
    /// The result of the plugins that have succeeded so far, which a DEL wants to know when the next one does not.
    #[serde(default)]
    pub(super) so_far: Option<Value>,
    /// ADD's result in the network's version. `None`: ADD did not succeed, or its success is not known.
    pub(super) result: Option<Value>,
    /// The pod is gone, or its ADD failed: DEL is tried until it succeeds.
    pub(super) owed: bool,
}

/// An attachment in memory. The inner lock is held while plugins run for it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) attached: tokio::sync::Mutex<Attached>,
    /// What can be asked while plugins run.
    pub(super) state: Mutex<State>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct State {
    pub(super) owed: bool,
    pub(super) failures: u32,
    /// Before then the DEL is not tried again by itself.
    pub(super) next: Option<Instant>,
    pub(super) removed: bool,
}

#[derive(Debug)]
pub(super) struct Cache {
    directory: PathBuf,
    entries: Mutex<BTreeMap<String, Arc<Entry>>>,
}

impl Cache {
    /// Reads what an earlier daemon left.
    pub(super) fn open(directory: PathBuf) -> Result<Cache> {
        std::fs::create_dir_all(&directory).map_err(|error| Error::io(format_args!("create {}", directory.display()), error))?;
        let mut entries = BTreeMap::new();
        for name in store::entries(&directory)?.iter().filter(|name| name.ends_with(".json")) {
            if let Some(attached) = store::read::<Attached>(&directory.join(name))? {
                entries.insert(attached.pod_id.clone(), Entry::new(attached));
            }
        }
        Ok(Cache { directory, entries: Mutex::new(entries) })
    }

    pub(super) fn get(&self, pod_id: &str) -> Option<Arc<Entry>> {
        self.entries().get(pod_id).cloned()
    }

    pub(super) fn all(&self) -> Vec<(String, Arc<Entry>)> {
        self.entries().iter().map(|(id, entry)| (id.clone(), entry.clone())).collect()
    }

    /// Records the intent.
    pub(super) fn insert(&self, attached: Attached) -> Result<Arc<Entry>> {
        store::write(&self.path(&attached.pod_id), &attached)?;
        let pod_id = attached.pod_id.clone();
        let entry = Entry::new(attached);
        self.entries().insert(pod_id, entry.clone());
        Ok(entry)
    }

    /// Replaces the durable form.
    pub(super) fn write(&self, attached: &Attached) -> Result<()> {
        store::write(&self.path(&attached.pod_id), attached)
    }

    /// Brings the file of an attachment to the disk, so that its DEL is not forgotten when the power goes.
    pub(super) fn sync(&self, pod_id: &str) {
        let synced = std::fs::File::open(self.path(pod_id)).and_then(|file| file.sync_data());
        if let Err(error) = synced {
            tracing::warn!(pod = pod_id, %error, "CNI attachment not synced");
        }
    }

    /// Forgets an attachment whose DEL has succeeded.
    pub(super) fn remove(&self, pod_id: &str, entry: &Entry) {
        entry.state().removed = true;
        self.entries().remove(pod_id);
        match std::fs::remove_file(self.path(pod_id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(pod = pod_id, %error, "CNI attachment not removed; its DEL is repeated at the next start");
            }
            _ => {}
        }
    }

    fn path(&self, pod_id: &str) -> PathBuf {
        self.directory.join(format!("{pod_id}.json"))
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attached {
    /// What DEL is told as the result.
    pub(super) fn known(&self) -> Option<&Value> {
        self.result.as_ref().or(self.so_far.as_ref())
    }
}

impl Entry {
    fn new(attached: Attached) -> Arc<Entry> {
        let state = State { owed: attached.owed, ..State::default() };
        Arc::new(Entry { attached: tokio::sync::Mutex::new(attached), state: Mutex::new(state) })
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
