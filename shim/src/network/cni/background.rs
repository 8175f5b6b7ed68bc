//! What goes on beside the requests: STATUS, GC, CHECK after a start, and owed DELs. It sleeps until one of them is due.

use std::collections::HashSet;
use std::fs;
use std::sync::{Arc, atomic::Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::time::Instant;

use super::Inner;
use super::cache::{Cache, Entry};
use super::config::{NetworkList, Version};

/// Shortest pause between two looks at what is due: of what is under way the end is not waited for.
const PAUSE: Duration = Duration::from_millis(500);
/// Pauses between STATUS calls, with as much again by chance: nodes that started together do not ask together.
const STATUS_PAUSE_MS: u64 = 10_000;
/// The same while the answer is bad.
const STATUS_BAD_PAUSE_MS: u64 = 1_500;
/// Longest wait for the end of plugins that were left by an earlier daemon.
const ORPHAN_LIMIT: Duration = Duration::from_secs(5);

/// The last answer to STATUS.
#[derive(Debug)]
pub(super) struct Status {
    pub(super) answer: Result<(), String>,
    pub(super) asked: Option<Instant>,
    /// When to ask again; `None` for a network whose version has no STATUS.
    next: Option<Instant>,
}

impl Default for Status {
    fn default() -> Status {
        Status { answer: Ok(()), asked: None, next: None }
    }
}

impl Status {
    /// Of a network that has just been read.
    pub(super) fn of(network: Option<&NetworkList>) -> Status {
        match network {
            Some(network) if network.version >= Version::STATUS => {
                Status { answer: Err("no answer yet".to_owned()), asked: None, next: Some(Instant::now()) }
            }
            _ => Status::default(),
        }
    }
}

/// Runs until the daemon ends. With `serves` pods may come to this network, and STATUS, GC and a CHECK of the living are asked.
pub(super) async fn run(inner: Arc<Inner>, serves: bool) {
    if serves {
        let checking = inner.clone();
        tokio::spawn(async move { check_all(&checking).await });
    }
    let mut collect = serves;
    loop {
        if serves {
            ask_status(&inner);
            collect |= inner.changed.swap(false, Ordering::Relaxed);
            if collect && let Some(network) = inner.network() {
                collect = !start_gc(&inner, network);
            }
        }
        for (pod, entry) in inner.cache.all() {
            retry(&inner, pod, entry);
        }
        let waits_for_adds = collect && inner.network().is_some();
        let due = if waits_for_adds { Some(Instant::now()) } else { due(&inner, serves) };
        let earlier = inner.due.notified();
        match due {
            Some(due) => drop(tokio::time::timeout_at(due.max(Instant::now() + PAUSE), earlier).await),
            None => earlier.await,
        }
    }
}

/// When the next thing is to be done; none if nothing is known now.
fn due(inner: &Inner, serves: bool) -> Option<Instant> {
    let status = inner.status().next.filter(|_| serves);
    let owed = inner.cache.all().into_iter().filter_map(|(_, entry)| {
        let state = entry.state();
        (state.owed && !state.removed).then(|| state.next.unwrap_or_else(Instant::now))
    });
    owed.chain(status).min()
}

/// Begins an owed DEL if its time has come and nobody is at it.
fn retry(inner: &Arc<Inner>, pod: String, entry: Arc<Entry>) {
    {
        let state = entry.state();
        if !state.owed || state.removed || state.next.is_some_and(|next| next > Instant::now()) {
            return;
        }
    }
    let inner = inner.clone();
    tokio::spawn(async move {
        let Ok(mut attached) = entry.attached.try_lock() else { return };
        if entry.state().removed {
            return;
        }
        match inner.take_back(&entry, &mut attached).await {
            Ok(()) => {
                crate::telemetry::repaired(crate::telemetry::Repair::OwedDetach);
                tracing::info!(pod, network = %attached.network.name, "an owed CNI DEL has succeeded");
            }
            Err(why) => tracing::warn!(pod, network = %attached.network.name, why, "an owed CNI DEL failed; it is tried again"),
        }
    });
}

fn ask_status(inner: &Arc<Inner>) {
    let Some(network) = inner.network() else { return };
    {
        let mut status = inner.status();
        if status.next.is_none_or(|next| next > Instant::now()) {
            return;
        }
        // Until the answer comes; it sets the next time.
        status.next = Some(Instant::now() + 2 * inner.limit);
    }
    let inner = inner.clone();
    tokio::spawn(async move {
        let mut answer = Ok(());
        for plugin in &network.plugins {
            answer = inner.execute_for_all("STATUS", &network, plugin, &[]).await;
            if answer.is_err() {
                break;
            }
        }
        if inner.network().as_ref() != Some(&network) {
            return;
        }
        let mut status = inner.status();
        match (&answer, &status.answer) {
            (Err(why), old) if old.as_ref().err() != Some(why) => {
                tracing::warn!(network = %network.name, why, "CNI STATUS: not ready");
            }
            (Ok(()), Err(_)) => tracing::info!(network = %network.name, "CNI STATUS: ready"),
            _ => {}
        }
        let pause = jittered(if answer.is_ok() { STATUS_PAUSE_MS } else { STATUS_BAD_PAUSE_MS });
        *status = Status { answer, asked: Some(Instant::now()), next: Some(Instant::now() + pause) };
        drop(status);
        inner.due.notify_one();
    });
}

/// Between once and twice as long.
fn jittered(pause_ms: u64) -> Duration {
    let mut byte = [0; 1];
    // Without chance the pause is the shortest.
    let _ = getrandom::fill(&mut byte);
    Duration::from_millis(pause_ms + pause_ms * u64::from(byte[0]) / 256)
}

/// Begins GC of the network, which tells plugins the attachments that count. `false`: an ADD is under way, try again later.
fn start_gc(inner: &Arc<Inner>, network: Arc<NetworkList>) -> bool {
    if network.version < Version::STATUS || network.disable_gc {
        return true;
    }
    if inner.gate.try_write().is_err() {
        return false;
    }
    let inner = inner.clone();
    tokio::spawn(async move {
        let _alone = inner.gate.write().await;
        let all = inner.cache.all();
        let valid: Vec<_> = all
            .iter()
            .filter(|(_, entry)| !entry.state().owed)
            .map(|(pod, _)| json!({ "containerID": pod, "ifname": super::POD_INTERFACE }))
            .collect();
        // The second name is what the first plugins with GC read.
        let extra = [("cni.dev/valid-attachments", json!(valid)), ("cni.dev/attachments", json!(valid))];
        for plugin in &network.plugins {
            match inner.execute_for_all("GC", &network, plugin, &extra).await {
                Ok(()) => tracing::debug!(network = %network.name, plugin = %plugin.program, valid = valid.len(), "CNI GC"),
                Err(why) => tracing::warn!(network = %network.name, why, "CNI GC failed"),
            }
        }
    });
    true
}

/// One after the other: nobody waits for it.
async fn check_all(inner: &Inner) {
    for (pod, entry) in inner.cache.all() {
        let attached = entry.attached.lock().await;
        if entry.state().owed || entry.state().removed {
            continue;
        }
        if let Err(why) = inner.check(&attached).await {
            tracing::warn!(pod, network = %attached.network.name, why, "CNI CHECK: the pod's network is not as it was made");
        }
    }
}

/// Kills plugins that still run for a pod whose ADD was not finished. They are known by their environment: pods' ids are used once.
pub(super) fn end_orphans(cache: &Cache) {
    let unfinished = |entry: &Entry| entry.attached.try_lock().is_ok_and(|attached| attached.owed || attached.result.is_none());
    let pods: HashSet<String> = cache.all().into_iter().filter(|(_, entry)| unfinished(entry)).map(|(pod, _)| pod).collect();
    let deadline = std::time::Instant::now() + ORPHAN_LIMIT;
    while !pods.is_empty() {
        let orphans = processes_for(&pods);
        if orphans.is_empty() {
            return;
        }
        for pid in orphans {
            tracing::info!(pid = pid.as_raw_nonzero(), "ending a CNI plugin of an earlier daemon");
            // It may have ended by itself since.
            let _ = kill_process(pid, Signal::KILL);
        }
        if std::time::Instant::now() > deadline {
            tracing::error!("CNI plugins of an earlier daemon do not end");
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn processes_for(pods: &HashSet<String>) -> Vec<Pid> {
    let listing = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = listing.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let id = environment.split(|byte| *byte == 0).find_map(|line| line.strip_prefix(b"CNI_CONTAINERID="));
        id.and_then(|id| std::str::from_utf8(id).ok()).is_some_and(|id| pods.contains(id))
    })
    .filter_map(Pid::from_raw)
    .collect()
}
