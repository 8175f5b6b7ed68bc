//! What containers and pods use: processor time, memory, swap, pressure, processes, interfaces and the writable layer.
//!
//! Owns the open cgroup files of everything that was asked about, the window that a rate is taken over, and the sizes of writable
//! layers. A sample younger than [`FRESH`] is given again instead of a new one. What the kernel does not tell is absent, never zero.

mod files;
mod layer;
pub mod network;
mod parse;
mod sample;

pub use layer::Size;
pub use sample::{Cpu, Memory, Sample, Swap, sum};

use crate::{container::Container, node::Node, pod::Pod};
use files::Files;
use layer::Layer;
use sample::Window;
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Age up to which a sample is given again.
const FRESH: Duration = Duration::from_millis(500);

const POISON: &str = "never poisoned: no panic while held";

/// Everything that is measured, by the id of its container or pod.
#[derive(Default)]
pub struct Stats {
    gauges: Mutex<HashMap<String, Arc<Gauge>>>,
    layers: Mutex<HashMap<String, Arc<Layer>>>,
}

struct Gauge {
    reading: Mutex<Reading>,
}

struct Reading {
    files: Files,
    window: Window,
    last: Option<(Instant, Sample)>,
}

impl Stats {
    /// What the cgroup uses, whose life began at `since_ns`; nothing when it is gone.
    fn cgroup(&self, key: &str, directory: PathBuf, since_ns: i64) -> Option<Sample> {
        let known = self.gauges.lock().expect(POISON).get(key).cloned();
        let gauge = match known {
            Some(gauge) => gauge,
            None => {
                let reading = Reading { files: Files::open(directory).ok()?, window: Window::since(since_ns), last: None };
                let gauge = Arc::new(Gauge { reading: Mutex::new(reading) });
                self.gauges.lock().expect(POISON).entry(key.to_owned()).or_insert(gauge).clone()
            }
        };
        let mut reading = gauge.reading.lock().expect(POISON);
        if let Some((taken, sample)) = &reading.last
            && taken.elapsed() < FRESH
        {
            return Some(sample.clone());
        }
        let Reading { files, window, .. } = &mut *reading;
        let sample = sample::take(files, window)?;
        reading.last = Some((Instant::now(), sample.clone()));
        Some(sample)
    }

    /// What a running container uses.
    pub fn container(&self, node: &Node, pod: &Pod, container: &Container, started_at_ns: i64) -> Option<Sample> {
        self.cgroup(&container.id, pod.look(|record| record.container_cgroup(node, &container.id)), started_at_ns)
    }

    /// What a pod's own cgroup uses; nothing where the pod shares its parent with others.
    pub fn pod(&self, node: &Node, pod: &Pod) -> Option<Sample> {
        let (own, directory, since_ns) =
            pod.look(|record| (record.owns_parent(), node.tree.directory(&record.cgroup_parent), record.created_at_ns));
        own.then(|| self.cgroup(&pod.id, directory, since_ns)).flatten()
    }

    /// What the init of a shared pid namespace uses, where there is one.
    pub fn init(&self, node: &Node, pod: &Pod) -> Option<Sample> {
        let (directory, since_ns) = pod.look(|record| (record.init_cgroup(node), record.created_at_ns));
        self.cgroup(&format!("{}-init", pod.id), directory, since_ns)
    }

    /// Size of a container's writable layer and when it was taken, in nanoseconds since the epoch. `budget` is how many files this
    /// request may still look at; a larger layer is counted in the background and told by a later request.
    pub fn layer(&self, node: &Node, container_id: &str, budget: &mut usize) -> Option<(Size, i64)> {
        let layer = {
            let mut layers = self.layers.lock().expect(POISON);
            layers.entry(container_id.to_owned()).or_default().clone()
        };
        layer.size(&node.container_directory(container_id).join("upper"), budget)
    }

    /// Closes what is open for a cgroup that has ended.
    pub fn ended(&self, id: &str) {
        let mut gauges = self.gauges.lock().expect(POISON);
        gauges.remove(id);
        gauges.remove(&format!("{id}-init"));
    }

    /// Forgets a container that is removed.
    pub fn forget(&self, id: &str) {
        self.ended(id);
        self.layers.lock().expect(POISON).remove(id);
    }
}
