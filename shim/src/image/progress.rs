//! How far a pull is, for people to watch.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What becomes of a layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LayerState {
    /// For its turn.
    #[default]
    Waiting,
    /// Bytes come.
    Fetching,
    /// It is on disk.
    Done,
    /// It was there before.
    Exists,
}

/// A layer of a pull.
#[derive(Debug)]
pub struct LayerProgress {
    /// As the registry has it.
    pub digest: String,
    /// Of that.
    pub size_bytes: u64,
    fetched: AtomicU64,
    state: Mutex<LayerState>,
}

impl LayerProgress {
    pub(super) fn add(&self, bytes: u64) {
        self.fetched.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn restart(&self) {
        self.fetched.store(0, Ordering::Relaxed);
    }

    pub(super) fn set(&self, state: LayerState) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Bytes that came.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched.load(Ordering::Relaxed)
    }

    /// What becomes of it.
    pub fn state(&self) -> LayerState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All layers of a pull, lowest first; none before the manifest is known.
#[derive(Debug, Default)]
pub struct Progress(Mutex<Vec<Arc<LayerProgress>>>);

impl Progress {
    pub(super) fn layer(&self, digest: &str, size_bytes: u64) -> Arc<LayerProgress> {
        let state = Mutex::default();
        let layer = Arc::new(LayerProgress { digest: digest.to_owned(), size_bytes, fetched: AtomicU64::new(0), state });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&layer));
        layer
    }

    /// How it stands.
    pub fn layers(&self) -> Vec<Arc<LayerProgress>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
