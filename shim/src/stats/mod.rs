//! What containers and pods use: processor time, memory, swap, pressure, processes, interfaces and the writable layer.
//!
//! Owns the open cgroup files of everything that was asked about, the window that a rate is taken over, and the sizes of writable
//! layers. A sample younger than [`FRESH`] is given again instead of a new one. What the kernel does not tell is absent, never zero.

mod detail;
mod ended;
mod families;
mod files;
mod layer;
pub mod network;
mod parse;
mod sample;

pub use detail::{Detail, Disk};
pub use ended::Ended;
pub use families::{FAMILIES, Family, Figures};
pub use layer::Size;
pub use sample::{Cpu, Memory, Sample, Swap, sum};

use crate::{
    container::{self, Container},
    node::Node,
    pod::Pod,
};
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
    last_detail: Option<(Instant, Arc<Detail>)>,
}

impl Reading {
    fn sample(&mut self) -> Option<Sample> {
        if let Some((taken, sample)) = &self.last
            && taken.elapsed() < FRESH
        {
            return Some(sample.clone());
        }
        let sample = sample::take(&mut self.files, &mut self.window)?;
        self.last = Some((Instant::now(), sample.clone()));
        Some(sample)
    }

    fn detail(&mut self, init: Option<i32>) -> Arc<Detail> {
        if let Some((taken, detail)) = &self.last_detail
            && taken.elapsed() < FRESH
        {
            return detail.clone();
        }
        let detail = Arc::new(detail::take(&mut self.files, init));
        self.last_detail = Some((Instant::now(), detail.clone()));
        detail
    }
}

impl Stats {
    /// What is read of the cgroup whose life began at `since_ns`; nothing when it is gone.
    fn read<T>(&self, key: &str, directory: PathBuf, since_ns: i64, read: impl FnOnce(&mut Reading) -> Option<T>) -> Option<T> {
        let known = self.gauges.lock().expect(POISON).get(key).cloned();
        let gauge = match known {
            Some(gauge) => gauge,
            None => {
                let files = Files::open(directory).ok()?;
                let reading = Reading { files, window: Window::since(since_ns), last: None, last_detail: None };
                let gauge = Arc::new(Gauge { reading: Mutex::new(reading) });
                self.gauges.lock().expect(POISON).entry(key.to_owned()).or_insert(gauge).clone()
            }
        };
        let mut reading = gauge.reading.lock().expect(POISON);
        read(&mut reading)
    }

    /// What a running container uses.
    pub fn container(&self, node: &Node, pod: &Pod, container: &Container, started_at_ns: i64) -> Option<Sample> {
        let directory = pod.look(|record| record.container_cgroup(node, &container.id));
        self.read(&container.id, directory, started_at_ns, Reading::sample)
    }

    /// The same with what only metrics tell. `init` is the container's first process.
    pub fn container_in_detail(
        &self,
        node: &Node,
        pod: &Pod,
        container: &Container,
        (init, started_at_ns): (i32, i64),
    ) -> Option<(Sample, Arc<Detail>)> {
        let directory = pod.look(|record| record.container_cgroup(node, &container.id));
        self.read(&container.id, directory, started_at_ns, |reading| Some((reading.sample()?, reading.detail(Some(init)))))
    }

    /// What a pod's own cgroup uses; nothing where the pod shares its parent with others.
    pub fn pod(&self, node: &Node, pod: &Pod) -> Option<Sample> {
        let (directory, since_ns) = own_cgroup(node, pod)?;
        self.read(&pod.id, directory, since_ns, Reading::sample)
    }

    /// The same with what only metrics tell.
    pub fn pod_in_detail(&self, node: &Node, pod: &Pod) -> Option<(Sample, Arc<Detail>)> {
        let (directory, since_ns) = own_cgroup(node, pod)?;
        self.read(&pod.id, directory, since_ns, |reading| Some((reading.sample()?, reading.detail(None))))
    }

    /// What the init of a shared pid namespace uses, where there is one.
    pub fn init(&self, node: &Node, pod: &Pod) -> Option<Sample> {
        let (directory, since_ns) = pod.look(|record| (record.init_cgroup(node), record.created_at_ns));
        self.read(&format!("{}-init", pod.id), directory, since_ns, Reading::sample)
    }

    /// Keeps the processor time of a container that has ended, where its pod's use is a sum.
    pub fn note_ended(&self, node: &Node, pod: &Pod, container_id: &str, ended: &mut Ended) {
        let (own, directory) = pod.look(|record| (record.own_cgroup().is_some(), record.container_cgroup(node, container_id)));
        if !own {
            ended.note(container_id, || sample::usage_ns(&Files::open(directory).ok()?.glance("cpu.stat")?));
        }
    }

    /// Size of a container's writable layer and when it was taken, in nanoseconds since the epoch. `budget` is how many files this
    /// request may still look at; a larger layer is counted in the background and told by a later request.
    pub fn layer(&self, node: &Node, container_id: &str, budget: &mut usize) -> Option<(Size, i64)> {
        let layer = {
            let mut layers = self.layers.lock().expect(POISON);
            layers.entry(container_id.to_owned()).or_default().clone()
        };
        let own = node.container_directory(container_id);
        layer.size(&[own.join("upper"), container::declared_volumes(&own)], budget)
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

/// A pod's own cgroup and when its life began.
fn own_cgroup(node: &Node, pod: &Pod) -> Option<(PathBuf, i64)> {
    pod.look(|record| record.own_cgroup().map(|path| (node.tree.directory(&path), record.created_at_ns)))
}
