//! What this daemon counts about itself, for Prometheus: latencies of RPCs and of the phases of a start, pulls, exits, memory kills and
//! repairs. Counters are the process's, and so static: whoever counts needs nothing at hand. What is a state and not a count (pods, queues,
//! the process) is read when it is asked for. Serves nothing unless `metrics.address` is set.
//!
//! The text format is written by our own few lines: the crate for it brings seven more and a derive macro.

mod histogram;
mod process;
mod server;
mod text;
pub mod trace;

pub use server::Endpoint;

use histogram::Histogram;
use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tracing::Span;

const POISON: &str = "never poisoned: no panic while held";

/// Methods that are told apart, at most; gRPC has 17 codes for each.
const METHODS_MAX: usize = 64;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Steps of making a pod or a container run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The monitor starts and makes the pod's namespaces.
    PodMonitor,
    /// systemd starts the pod's scope; a part of the former.
    PodScope,
    /// The network is attached.
    PodNetwork,
    /// All of it.
    Pod,
    /// Configuration, image and pod become a bundle.
    ContainerBundle,
    /// The monitor builds the container up to its gate.
    ContainerBuild,
    /// The gate opens and the program is executed.
    ContainerStart,
}

const PHASES: [(Phase, &str); 7] = [
    (Phase::PodMonitor, "pod_monitor"),
    (Phase::PodScope, "pod_scope"),
    (Phase::PodNetwork, "pod_network"),
    (Phase::Pod, "pod"),
    (Phase::ContainerBundle, "container_bundle"),
    (Phase::ContainerBuild, "container_build"),
    (Phase::ContainerStart, "container_start"),
];

static PHASE_TIMES: [Histogram; PHASES.len()] = [const { Histogram::new() }; PHASES.len()];

/// Measures a phase from now on. Only a phase that succeeds is counted: [`Clock::done`]. A trace has those that fail, too.
pub struct Clock {
    phase: Phase,
    began: Instant,
    span: Option<Span>,
}

impl Clock {
    pub fn start(phase: Phase) -> Clock {
        let name = PHASES.iter().find(|(known, _)| *known == phase).map_or("phase", |(_, name)| name);
        let span = tracing::info_span!(target: trace::TARGET, "phase", otel.name = name, error = tracing::field::Empty);
        Clock { phase, began: Instant::now(), span: Some(span) }
    }

    pub fn done(mut self) {
        self.span = None;
        let index = PHASES.iter().position(|(phase, _)| *phase == self.phase);
        if let Some(histogram) = index.and_then(|index| PHASE_TIMES.get(index)) {
            histogram.add(self.began.elapsed());
        }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        if let Some(span) = &self.span {
            span.record("error", "not done");
        }
    }
}

/// Something that was left by a crash, a lost process or a failed step, and that the daemon put in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// A pod that was not finished was taken back at the start.
    UnfinishedPod,
    /// A container that was not finished was taken back at the start.
    UnfinishedContainer,
    /// A monitor was gone, and its pod's processes were ended.
    LostMonitor,
    /// A network was detached after a detach that had failed.
    OwedDetach,
}

const REPAIRS: [(Repair, &str); 4] = [
    (Repair::UnfinishedPod, "unfinished_pod"),
    (Repair::UnfinishedContainer, "unfinished_container"),
    (Repair::LostMonitor, "lost_monitor"),
    (Repair::OwedDetach, "owed_network_detach"),
];

static REPAIRED: [Counter; REPAIRS.len()] = [const { Counter::new() }; REPAIRS.len()];

/// Counts a repair.
pub fn repaired(what: Repair) {
    if let Some(counter) = REPAIRS.iter().position(|(repair, _)| *repair == what).and_then(|index| REPAIRED.get(index)) {
        counter.add(1);
    }
}

/// Pulls that ended well and otherwise, and how long the former took.
static PULLS: Counter = Counter::new();
static PULLS_FAILED: Counter = Counter::new();
static PULL_TIMES: Histogram = Histogram::new();

/// Bytes of images that came from registries.
pub static PULLED_BYTES: Counter = Counter::new();
/// Processes that the kernel killed for memory in containers that went on, and containers that ended so.
pub static OOM_KILLS: Counter = Counter::new();
/// Containers that have ended.
pub static EXITS: Counter = Counter::new();
/// Entries of the log that systemd's journal had no room for.
pub static LOG_ENTRIES_DROPPED: Counter = Counter::new();

/// Spans that a collector of traces took, and those that it did not.
static SPANS_EXPORTED: Counter = Counter::new();
static SPANS_DROPPED: Counter = Counter::new();

/// Counts a pull that a client asked for.
pub fn pulled(well: bool, took: Duration) {
    if well {
        PULLS.add(1);
        PULL_TIMES.add(took);
    } else {
        PULLS_FAILED.add(1);
    }
}

type Calls = BTreeMap<(String, i32), Histogram>;

static CALLS: Mutex<Calls> = Mutex::new(Calls::new());

/// Counts an RPC by its path and code.
pub fn called(path: &str, code: i32, took: Duration) {
    let method = path.rsplit('/').next().unwrap_or_default();
    let mut calls = CALLS.lock().expect(POISON);
    let known = calls.contains_key(&(method.to_owned(), code));
    // Anybody may ask for any path: those that there are not share a name.
    let known = known || (calls.len() < METHODS_MAX * 17 && code != tonic::Code::Unimplemented as i32);
    let method = if known { method } else { "other" };
    calls.entry((method.to_owned(), code)).or_default().add(took);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_and_repair_has_its_name_and_place() {
        for (phase, _) in PHASES {
            Clock::start(phase).done();
        }
        let mut text = String::new();
        PHASE_TIMES.iter().for_each(|histogram| histogram.write(&mut text, "x", ""));
        assert_eq!(text.matches("x_bucket{le=\"+Inf\"} 0").count(), 0, "{text}");
        let before: Vec<u64> = REPAIRED.iter().map(Counter::value).collect();
        REPAIRS.iter().for_each(|(repair, _)| repaired(*repair));
        assert!(REPAIRED.iter().zip(before).all(|(counter, before)| counter.value() > before));
    }

    #[test]
    fn paths_that_there_are_not_share_a_name() {
        for number in 0..5 {
            called(&format!("/no.such.Service/Made{number}"), tonic::Code::Unimplemented as i32, Duration::ZERO);
        }
        let calls = CALLS.lock().expect(POISON);
        assert!(!calls.keys().any(|(method, _)| method.starts_with("Made")));
        assert!(calls.contains_key(&("other".to_owned(), tonic::Code::Unimplemented as i32)));
    }
}
