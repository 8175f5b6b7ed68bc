//! The node: everything that this daemon keeps, and the lookups that every operation begins with.

use crate::{
    apparmor::AppArmor,
    cgroup::{Driver, Tree},
    config::Config,
    container::{Container, Lookups},
    error::{Error, Kind, Result},
    events::{EventKind, Events},
    image::Store,
    monitor::Program,
    network::Network,
    nri::Nri,
    pod::{Phase, Pod},
    selinux::SeLinux,
    stats::Stats,
};
use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    path::PathBuf,
    sync::{Arc, Mutex, RwLock, Weak},
};
use tokio::sync::watch;
use tracing::Instrument;

/// Shared by every RPC.
pub struct Node {
    pub config: Config,
    pub tree: Tree,
    pub driver: Driver,
    pub images: Store,
    pub network: Network,
    pub program: Program,
    pub apparmor: AppArmor,
    pub selinux: SeLinux,
    pub events: Events,
    pub stats: Stats,
    pub nri: Nri,
    pub lookups: Lookups,
    pods: RwLock<BTreeMap<String, Arc<Pod>>>,
    containers: RwLock<BTreeMap<String, Arc<Container>>>,
    unfinished: Mutex<Vec<Weak<Pod>>>,
    running: Mutex<HashMap<String, watch::Receiver<Option<Result<String>>>>>,
}

const POISON: &str = "never poisoned: no panic while held";

impl Node {
    pub fn new(
        config: Config,
        (tree, driver): (Tree, Driver),
        images: Store,
        network: Network,
        program: Program,
        apparmor: AppArmor,
    ) -> Node {
        Node {
            nri: Nri::new(&config.nri),
            config,
            tree,
            driver,
            images,
            network,
            program,
            apparmor,
            selinux: SeLinux::find(),
            events: Events::default(),
            stats: Stats::default(),
            lookups: Lookups::default(),
            pods: RwLock::default(),
            containers: RwLock::default(),
            unfinished: Mutex::default(),
            running: Mutex::default(),
        }
    }

    /// Durable directory of a pod: its record and the files it gives to containers.
    pub fn pod_directory(&self, id: &str) -> PathBuf {
        self.config.root.join("pods").join(id)
    }

    /// Run directory of a pod: the monitor's socket and exit records.
    pub fn run_directory(&self, id: &str) -> PathBuf {
        self.config.state.join("pods").join(id)
    }

    /// Durable directory of a container: its record, bundle and writable layer.
    pub fn container_directory(&self, id: &str) -> PathBuf {
        self.config.root.join("containers").join(id)
    }

    /// Directory of the compiled seccomp profiles.
    pub fn seccomp_directory(&self) -> PathBuf {
        self.config.state.join("seccomp")
    }

    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.read().expect(POISON).values().cloned().collect()
    }

    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.containers.read().expect(POISON).values().cloned().collect()
    }

    /// Containers of one pod.
    pub fn containers_of(&self, pod_id: &str) -> Vec<Arc<Container>> {
        self.containers.read().expect(POISON).values().filter(|c| c.pod_id == pod_id).cloned().collect()
    }

    /// A pod that is being made is in no list; [`Node::unfinished`] finds it.
    pub fn begin_pod(&self, pod: &Arc<Pod>) {
        let mut unfinished = self.unfinished.lock().expect(POISON);
        unfinished.retain(|pod| pod.upgrade().is_some_and(|pod| pod.phase() == Phase::Creating));
        unfinished.push(Arc::downgrade(pod));
    }

    /// The pod of this id, if it is being made.
    pub fn unfinished(&self, id: &str) -> Option<Arc<Pod>> {
        self.unfinished.lock().expect(POISON).iter().filter_map(Weak::upgrade).find(|pod| pod.id == id)
    }

    pub fn insert_pod(&self, pod: Arc<Pod>) {
        self.pods.write().expect(POISON).insert(pod.id.clone(), pod);
    }

    pub fn insert_container(&self, container: Arc<Container>) {
        self.containers.write().expect(POISON).insert(container.id.clone(), container);
    }

    pub fn forget_pod(&self, id: &str) {
        self.pods.write().expect(POISON).remove(id);
    }

    pub fn forget_container(&self, id: &str) {
        self.containers.write().expect(POISON).remove(id);
    }

    /// Tells what happened to a container of the pod, or to the pod itself when `id` is its id.
    pub fn tell(&self, pod: &Pod, id: &str, kind: EventKind) {
        let records = || (pod.record(), self.containers_of(&pod.id).iter().map(|container| container.record()).collect());
        self.events.tell(id, kind, records);
    }

    /// The pod with this id or unique prefix of an id.
    pub fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        by_prefix(&self.pods.read().expect(POISON), id, "pod")
    }

    /// The container with this id or unique prefix of an id.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        by_prefix(&self.containers.read().expect(POISON), id, "container")
    }

    /// How many joinable operations are under way.
    pub fn operations(&self) -> usize {
        let running = self.running.lock().expect(POISON);
        running.values().filter(|receiver| receiver.borrow().is_none() && receiver.has_changed().is_ok()).count()
    }

    /// Runs `operation` once for each `key` at a time: a caller that comes while it runs gets the same result. It goes on when every
    /// caller has gone, because kubelet retries after its own deadline and then finds it finished.
    pub async fn joined<F>(&self, key: String, operation: impl FnOnce() -> F) -> Result<String>
    where
        F: Future<Output = Result<String>> + Send + 'static,
    {
        let mut receiver = {
            let mut running = self.running.lock().expect(POISON);
            running.retain(|_, receiver| receiver.borrow().is_none() && receiver.has_changed().is_ok());
            match running.get(&key) {
                Some(receiver) => receiver.clone(),
                None => {
                    let (sender, receiver) = watch::channel(None);
                    running.insert(key, receiver.clone());
                    let operation = operation();
                    // The trace of the first caller has its steps.
                    let run = async move {
                        let result = operation.await;
                        sender.send_replace(Some(result));
                    };
                    tokio::spawn(run.in_current_span());
                    receiver
                }
            }
        };
        let finished = receiver.wait_for(Option::is_some).await;
        match finished {
            Ok(result) => result.clone().unwrap_or_else(|| Err(Error::internal("operation gave no result"))),
            Err(_) => Err(Error::internal("operation ended without a result")),
        }
    }

    /// The same for an operation whose success is all its result.
    pub async fn once<F>(&self, key: String, operation: F) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.joined(key, || async { operation.await.map(|()| String::new()) }).await.map(drop)
    }
}

fn by_prefix<T>(map: &BTreeMap<String, Arc<T>>, id: &str, what: &str) -> Result<Arc<T>> {
    if id.is_empty() {
        return Err(Error::not_found(format!("{what} \"\" not found: the id is empty")));
    }
    if let Some(found) = map.get(id) {
        return Ok(found.clone());
    }
    let mut matches = map.range(id.to_owned()..).take_while(|(key, _)| key.starts_with(id));
    match (matches.next(), matches.next()) {
        (Some((_, found)), None) => Ok(found.clone()),
        (Some(_), Some(_)) => Err(Error::new(Kind::Invalid, format!("{what} id prefix {id:?} is not unique"))),
        (None, _) => Err(Error::not_found(format!("{what} {id:?} not found"))),
    }
}

/// A new id: 64 lowercase hex digits.
pub fn new_id() -> Result<String> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|error| Error::internal(format!("random id: {error}")))?;
    Ok(hex::encode(bytes))
}

/// Nanoseconds since the epoch.
pub fn now_ns() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_finds_one_and_refuses_two() {
        let map: BTreeMap<String, Arc<u8>> = [("abc".to_owned(), Arc::new(1)), ("abd".to_owned(), Arc::new(2))].into();
        assert_eq!(by_prefix(&map, "abc", "pod").map(|found| *found), Ok(1));
        assert_eq!(by_prefix(&map, "abd", "pod").map(|found| *found), Ok(2));
        assert_eq!(by_prefix(&map, "ab", "pod").expect_err("two").kind, Kind::Invalid);
        assert_eq!(by_prefix(&map, "x", "pod").expect_err("none").kind, Kind::NotFound);
        assert_eq!(by_prefix(&map, "", "pod").expect_err("empty").kind, Kind::NotFound);
    }
}
