//! NRI, the Node Resource Interface: plugins are told what happens to pods and containers, and change what containers get.
//!
//! `mux` and `ttrpc` are the wire; `plugin` is one plugin, `launch` those that the daemon starts itself; here is who has joined.
//! `lifecycle` has one function for each thing that happens; `collect` and `owners` make one answer of several; `view` shows records,
//! `validate` is the validator that is built in. What an answer asks for is put into effect by `container`, and never here.
//!
//! A plugin that joins is told of all pods and containers that there are, and then of everything that happens to them: while one is on
//! its way to the lists ([`Nri::hold`]), nobody joins, and what ends, changes or is removed meanwhile waits for the plugin's turn. Without
//! plugins nothing is copied and nobody waits.

mod collect;
mod event;
mod launch;
mod lifecycle;
mod mux;
mod owners;
mod plugin;
mod ttrpc;
mod validate;
mod view;

pub use lifecycle::*;
pub use validate::ValidatorConfig;
pub(crate) use view::{image, of_spec};

use crate::{
    config::NriConfig,
    container::State,
    error::{Error, Result},
    node::Node,
    pod::Phase,
    service,
};
use launch::Launched;
use plugin::{Limits, Plugin, Registering};
use prost::Message;
use std::{
    path::{Path, PathBuf},
    sync::{Arc, OnceLock, RwLock, Weak},
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{RwLockReadGuard, RwLockWriteGuard, Semaphore, mpsc},
    task::JoinHandle,
    time::{sleep, timeout},
};
use windlass_proto::{
    nri::{UpdateContainersRequest, UpdateContainersResponse},
    ttrpc::Status,
};

/// Plugins at a time, those that are about to join among them.
const PLUGINS_MAX: usize = 64;
/// How long a plugin that joins waits at a time for pods and containers that are being made; meanwhile no others begin. Then they do for as
/// long, and it waits again.
const JOIN_PAUSE: Duration = Duration::from_secs(1);
/// How long the daemon waits after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const POISON: &str = "never poisoned: no panic while held";

/// The plugins of this node.
pub struct Nri {
    limits: Limits,
    validator: Option<ValidatorConfig>,
    /// In the order in which they are asked.
    plugins: RwLock<Arc<[Arc<Plugin>]>>,
    /// Held for reading while something is on its way to the node's lists, for writing while a plugin is told of these.
    joining: tokio::sync::RwLock<()>,
    /// Held by the one that joins: each comes after the one before has been told of everything.
    joiner: tokio::sync::Mutex<()>,
    room: Arc<Semaphore>,
    /// Set when it starts: whom it tells may change any container.
    node: OnceLock<Weak<Node>>,
}

impl Nri {
    pub fn new(config: &NriConfig) -> Nri {
        Nri {
            limits: Limits {
                registration: Duration::from_millis(config.plugin_registration_timeout_ms),
                request: Duration::from_millis(config.plugin_request_timeout_ms),
            },
            validator: (config.enable && config.validator.enable).then(|| config.validator.clone()),
            plugins: RwLock::new(Arc::new([])),
            joining: tokio::sync::RwLock::default(),
            joiner: tokio::sync::Mutex::default(),
            room: Arc::new(Semaphore::new(PLUGINS_MAX)),
            node: OnceLock::new(),
        }
    }

    /// True while no plugin has joined.
    pub fn is_idle(&self) -> bool {
        self.plugins.read().expect(POISON).is_empty()
    }

    fn plugins(&self) -> Arc<[Arc<Plugin>]> {
        self.plugins.read().expect(POISON).clone()
    }

    /// Keeps plugins from joining for as long as it is held: from before plugins are told of a new pod or container, or of its change, until the
    /// node's lists have it.
    pub async fn hold(&self) -> RwLockReadGuard<'_, ()> {
        self.joining.read().await
    }

    /// Names of those that have joined, for a person.
    pub fn describe(&self) -> serde_json::Value {
        self.plugins().iter().map(ToString::to_string).collect()
    }

    fn node(&self) -> Option<Arc<Node>> {
        self.node.get().and_then(Weak::upgrade)
    }

    /// Waits until nothing is on its way to the lists, and keeps it so.
    async fn alone(&self) -> Result<RwLockWriteGuard<'_, ()>, String> {
        let limit = self.limits.registration;
        let waiting = async {
            loop {
                if let Ok(alone) = timeout(JOIN_PAUSE, self.joining.write()).await {
                    return alone;
                }
                // What takes longer is stuck in one pod, and must not keep everybody else.
                sleep(JOIN_PAUSE).await;
            }
        };
        timeout(limit, waiting).await.map_err(|_| {
            format!(
                "pods or containers have been on their way for {limit:?} (nri.plugin_registration_timeout_ms), and it would not be told of them; \
                 let it come again"
            )
        })
    }

    /// Takes it into the list, unless it has gone already.
    fn enter(&self, plugin: &Arc<Plugin>) {
        let mut plugins = self.plugins.write().expect(POISON);
        if plugin.is_closed() {
            return;
        }
        let mut next = plugins.to_vec();
        next.push(plugin.clone());
        // Stable: those of one index are asked in the order in which they came.
        next.sort_by(|a, b| a.index.cmp(&b.index));
        *plugins = next.into();
    }

    fn leave(&self, plugin: &Arc<Plugin>) {
        let mut plugins = self.plugins.write().expect(POISON);
        *plugins = plugins.iter().filter(|one| !Arc::ptr_eq(one, plugin)).cloned().collect();
    }
}

/// Accepts plugins, until it is stopped.
pub struct Listening {
    accepting: Option<JoinHandle<()>>,
    socket: PathBuf,
    /// The socket's directory was not there before.
    made_directory: bool,
}

/// Starts the plugins that are installed, and listens for others. Nothing where it is off.
///
/// # Errors
/// A file among the plugins that cannot be one, or a socket that cannot be made. A plugin that does not start is logged and left out.
pub async fn start(node: &Arc<Node>) -> Result<Option<Listening>> {
    let config = &node.config.nri;
    if !config.enable {
        return Ok(None);
    }
    let _ = node.nri.node.set(Arc::downgrade(node));
    let found = launch::find(&config.plugin_path, &config.plugin_config_path)?;
    let mut joining = Vec::new();
    for one in found {
        match one.launch() {
            Ok((socket, process)) => joining.push(tokio::spawn(join(node.clone(), socket, Some(process)))),
            Err(error) => tracing::error!(%error, "NRI plugin not launched"),
        }
    }
    // Each is bounded by its own limits.
    futures_util::future::join_all(joining).await;
    let made_directory = config.socket_path.parent().is_some_and(|parent| !parent.exists());
    let mut listening = Listening { accepting: None, socket: config.socket_path.clone(), made_directory };
    if !config.disable_connections {
        listening.accepting = listen(&config.socket_path).await?.map(|listener| tokio::spawn(accept(node.clone(), listener)));
    }
    Ok(Some(listening))
}

/// A socket at `path`, unless somebody serves there: then that one keeps it.
async fn listen(path: &Path) -> Result<Option<UnixListener>> {
    if UnixStream::connect(path).await.is_ok() {
        tracing::warn!(
            socket = %path.display(),
            "another program serves NRI there, so that no plugin can connect to this one; set nri.socket_path"
        );
        return Ok(None);
    }
    let failed = |error| Error::io(format_args!("listen on nri.socket_path {}", path.display()), error);
    if let Some(parent) = path.parent() {
        use std::os::unix::fs::DirBuilderExt;
        // A plugin rules over every container.
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    }
    service::bind(path).map(Some).map_err(failed)
}

async fn accept(node: Arc<Node>, listener: UnixListener) {
    loop {
        match listener.accept().await {
            Ok((socket, _)) => {
                tokio::spawn(join(node.clone(), socket, None));
            }
            Err(error) => {
                tracing::warn!(%error, "accept an NRI plugin");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Lets a plugin join; it is served until its connection ends.
async fn join(node: Arc<Node>, socket: UnixStream, process: Option<Launched>) {
    let name = process.as_ref().map(|process| format!("{}-{}", process.index, process.name)).unwrap_or_default();
    if let Err(why) = try_join(node, socket, process).await {
        tracing::error!(plugin = %name, %why, "NRI plugin not joined");
    }
}

async fn try_join(node: Arc<Node>, socket: UnixStream, process: Option<Launched>) -> Result<(), String> {
    let nri = &node.nri;
    let room = nri.room.clone().try_acquire_owned().map_err(|_| format!("there are {PLUGINS_MAX} plugins already"))?;
    let (plugin, requests) = Registering::over(socket, process).done(nri.limits).await?;
    let plugin = Arc::new(plugin);
    let (served, server) = (plugin.clone(), node.clone());
    tokio::spawn(async move {
        serve(&server, &served, requests).await;
        // First: who is about to join stays out.
        served.close();
        server.nri.leave(&served);
        tracing::info!(plugin = %served, "NRI plugin gone");
        drop(room);
    });
    let updates = synchronize(&node, &plugin).await.map_err(|why| {
        plugin.close();
        nri.leave(&plugin);
        format!("{plugin}: {why}")
    })?;
    tracing::info!(%plugin, "NRI plugin joined");
    // Each waits for a monitor, a starting daemon for none.
    tokio::spawn(async move { apply(&node, updates).await });
    Ok(())
}

/// Takes it into the list, and tells it of what there is.
async fn synchronize(node: &Arc<Node>, plugin: &Arc<Plugin>) -> Result<Vec<windlass_proto::nri::ContainerUpdate>, String> {
    // What happens from now on is told after this.
    let _turn = plugin.turn().await;
    let _joiner = node.nri.joiner.lock().await;
    let _alone = node.nri.alone().await?;
    node.nri.enter(plugin);
    let looked = node.clone();
    // Reads the bundle of every container.
    let (pods, containers) = tokio::task::spawn_blocking(move || all(&looked)).await.map_err(|error| error.to_string())?;
    // One that fails is asked nothing by those that wait for its turn.
    plugin.synchronize(pods, containers).await.inspect_err(|_| plugin.close())
}

/// Pods that are ready, and their containers that have not ended.
fn all(node: &Node) -> (Vec<windlass_proto::nri::PodSandbox>, Vec<windlass_proto::nri::Container>) {
    let pods: Vec<_> = node.pods().into_iter().filter(|pod| pod.phase() == Phase::Ready).collect();
    let shown = pods.iter().map(|pod| pod.look(view::pod)).collect();
    let containers = pods.iter().flat_map(|pod| node.containers_of(&pod.id)).map(|container| container.record());
    let lives = containers.filter(|record| !matches!(record.state, State::Exited { .. }));
    (shown, lives.map(|record| view::container(node, &record)).collect())
}

/// Deals with what a plugin asks, one after the other.
async fn serve(node: &Arc<Node>, plugin: &Plugin, mut requests: mpsc::Receiver<ttrpc::Incoming>) {
    while let Some(incoming) = requests.recv().await {
        let outcome = if incoming.request.method == "UpdateContainers" {
            update_containers(node, plugin, &incoming.request.payload).await
        } else {
            Err(Status { code: ttrpc::UNIMPLEMENTED, message: format!("{} is not served", incoming.request.method) })
        };
        plugin.answer(&incoming, outcome).await;
    }
}

async fn update_containers(node: &Arc<Node>, plugin: &Plugin, payload: &[u8]) -> Result<Vec<u8>, Status> {
    let request = UpdateContainersRequest::decode(payload)
        .map_err(|error| Status { code: ttrpc::INVALID_ARGUMENT, message: format!("UpdateContainers: {error}") })?;
    tracing::info!(%plugin, updates = request.update.len(), evictions = request.evict.len(), "NRI plugin updates containers");
    evict(node, request.evict, plugin);
    let failed = apply(node, request.update).await;
    Ok(UpdateContainersResponse { failed }.encode_to_vec())
}

impl Listening {
    /// Tells plugins that the daemon ends, and ends their connections.
    pub async fn stop(self, node: &Node) {
        let plugins = node.nri.plugins();
        futures_util::future::join_all(plugins.iter().map(|plugin| plugin.shut_down())).await;
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(task) = self.accepting.take() {
            task.abort();
            let _ = std::fs::remove_file(&self.socket);
            if let Some(directory) = self.socket.parent().filter(|_| self.made_directory) {
                let _ = std::fs::remove_dir(directory);
            }
        }
    }
}
