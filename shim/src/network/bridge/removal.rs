//! Takes the links of stopped pods away behind the answer to StopPodSandbox.
//!
//! The kernel waits for some 20 ms in each removal until nobody can use the link any more, and holds the lock of all links
//! meanwhile. So one thread, which lives while there is work, takes all that wait into one group of links and removes that group: one wait
//! for all. A pod's addresses stay its own until its link is gone, in the file too: what a killed daemon left is found by them.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::super::NetworkError;
use super::super::netlink::{self, Socket, errno_of};
use super::links::{host_interface, intermediate, remove_link};
use super::{Inner, chain};

/// A group of links (`ip link show group`) that only has links about to go. Two daemons may share it.
const GROUP: u32 = 0x574c_474f; // "WLGO"
/// Longest wait for links to go.
const GONE_LIMIT: Duration = Duration::from_secs(30);

/// The pods whose links are to go.
#[derive(Debug, Default)]
pub(super) struct Removal {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: HashSet<String>,
    /// What the thread is at.
    working: HashSet<String>,
    running: bool,
    /// Pods whose links could not be removed, and why; tried again when one is asked for.
    failed: BTreeMap<String, String>,
}

impl State {
    fn has(&self, pod_id: &str) -> bool {
        self.waiting.contains(pod_id) || self.working.contains(pod_id)
    }
}

impl Removal {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the pod's link is on its way out.
    pub(super) fn has(&self, pod_id: &str) -> bool {
        self.state().has(pod_id)
    }

    /// Waits until `done`; false after [`GONE_LIMIT`].
    fn wait(&self, done: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + GONE_LIMIT;
        let mut state = self.state();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Waits until no link is on its way out. Blocks.
    pub(super) fn wait_for_all(&self) -> bool {
        self.wait(|state| state.waiting.is_empty() && state.working.is_empty())
    }

    /// Waits until the pod's link is gone. Blocks.
    pub(super) fn wait_for(&self, pod_id: &str) -> Result<(), NetworkError> {
        let ended = self.wait(|state| !state.has(pod_id));
        let failure = self.state().failed.get(pod_id).cloned();
        match failure {
            None if ended => Ok(()),
            reason => Err(NetworkError::Protocol {
                operation: "remove link",
                object: host_interface(pod_id),
                reason: reason.unwrap_or_else(|| format!("not gone after {} s", GONE_LIMIT.as_secs())),
            }),
        }
    }
}

/// Has the pod's link removed and then its addresses freed, by a thread; at once where none can be had.
pub(super) fn begin(inner: &Arc<Inner>, pod_id: &str) {
    {
        let mut state = inner.removal.state();
        if state.has(pod_id) {
            return;
        }
        state.failed.remove(pod_id);
        state.waiting.insert(pod_id.to_owned());
        if std::mem::replace(&mut state.running, true) {
            return;
        }
    }
    let own = Arc::clone(inner);
    if let Err(error) = std::thread::Builder::new().name("link-removal".into()).spawn(move || work(&own)) {
        tracing::warn!(%error, "no thread for the removal of links; removing them in place");
        work(inner);
    }
}

/// Until nothing waits.
fn work(inner: &Inner) {
    loop {
        let pods: Vec<String> = {
            let mut state = inner.removal.state();
            let pods = std::mem::take(&mut state.waiting);
            state.running = !pods.is_empty();
            state.working = pods.clone();
            pods.into_iter().collect()
        };
        if pods.is_empty() {
            return;
        }
        let failures = remove(&pods);
        inner.release(pods.iter().filter(|pod| !failures.contains_key(*pod)).map(String::as_str));
        for (pod, reason) in &failures {
            tracing::error!(pod, reason, "the pod's link is not removed; its address stays taken");
        }
        let mut state = inner.removal.state();
        state.working.clear();
        state.failed.extend(failures);
        drop(state);
        inner.removal.changed.notify_all();
    }
}

/// Removes the links of all these pods. Returns those that failed.
fn remove(pods: &[String]) -> BTreeMap<String, String> {
    let mut failures = BTreeMap::new();
    let mut host = match Socket::open() {
        Ok(host) => host,
        Err(error) => return pods.iter().map(|pod| (pod.clone(), chain(&error))).collect(),
    };
    if pods.len() > 1 {
        if let Err(error) = remove_together(&mut host, pods) {
            tracing::debug!(error = %chain(&error), "links are removed one by one");
        } else {
            return failures;
        }
    }
    for pod in pods {
        if let Err(error) = remove_links(&mut host, pod) {
            failures.insert(pod.clone(), chain(&error));
        }
    }
    failures
}

/// Removes both links of one pod; succeeds when there are none.
pub(super) fn remove_links(host: &mut Socket, pod_id: &str) -> Result<(), NetworkError> {
    let link = host_interface(pod_id);
    remove_link(host, &link)?;
    remove_link(host, &intermediate(&link))
}

fn remove_together(host: &mut Socket, pods: &[String]) -> Result<(), NetworkError> {
    let absent = |error: &NetworkError| errno_of(error) == Some(Errno::NODEV);
    let links = pods.iter().map(|pod| host_interface(pod));
    for link in links.flat_map(|link| [intermediate(&link), link]) {
        match host.execute(&[netlink::set_group(&link, GROUP)]) {
            Err(error) if !absent(&error) => return Err(error),
            _ => {}
        }
    }
    match host.execute(&[netlink::delete_group(GROUP)]) {
        Err(error) if !absent(&error) => Err(error),
        _ => Ok(()),
    }
}
