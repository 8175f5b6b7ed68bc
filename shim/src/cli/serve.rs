//! `windlass serve`: what the daemon does from its start to its end, in order.

use crate::{
    apparmor::AppArmor,
    cgroup::{self, Driver, Tree},
    config::{Config, LayerChoice},
    container::stream::Sessions,
    cri,
    error::{Error, Result},
    image::{LayerFormat, RegistryFiles, Store, StoreConfig, TrustFiles},
    monitor::Program,
    network::{Network, bridge::BridgeConfig, subnet::parse_subnets},
    node::Node,
    nri, pod,
    service::{self, Socket},
    streaming::Server,
    telemetry::{self, trace::Exporter},
};
use std::{
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
    sync::Arc,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// What a pod is made of, only root may make.
pub(super) fn is_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::precondition(
        "windlass serve makes namespaces, mounts and cgroups, and needs root: `systemctl start windlass`, or sudo",
    ))
}

/// The image store of this configuration.
pub(super) fn open_store(config: &Config) -> Result<Store> {
    let registries = RegistryFiles {
        hosts: config.images.registry_config_dir.clone(),
        registries_conf: config.images.registries_conf.clone(),
        auth_file: config.images.auth_file.clone(),
    };
    let mut store = StoreConfig::new(config.root.join("images"), registries);
    store.trust = TrustFiles { policy: config.images.policy.clone(), by_namespace: config.images.policy_dir.clone() };
    store.pinned = config.images.pinned.clone();
    store.parallel_layers = config.images.max_parallel_layers;
    store.progress_timeout = std::time::Duration::from_secs(config.images.progress_timeout_seconds);
    store.layer_format = match config.images.layers {
        LayerChoice::Auto => None,
        LayerChoice::Erofs => Some(LayerFormat::Erofs),
        LayerChoice::Directory => Some(LayerFormat::Directory),
    };
    Store::open(store).map_err(|error| Error::internal(format!("open image store: {error}")))
}

/// A directory of the configuration in which nothing can be made.
fn unwritable(field: &str, path: &Path, error: std::io::Error) -> Error {
    let next = match error.kind() {
        std::io::ErrorKind::PermissionDenied => "root may write there: use sudo",
        _ => "give it a directory on a disk of this node that can be written, by the configuration or by a flag",
    };
    Error::io(format_args!("write {} ({field} of the configuration; {next})", path.display()), error)
}

/// One daemon for each root: a second one would take the first one's unfinished work for its own.
pub(super) fn lock(config: &Config) -> Result<fs::File> {
    let path = config.root.join("lock");
    let made = fs::create_dir_all(&config.root).and_then(|()| fs::File::create(&path));
    let file = made.map_err(|error| unwritable("root", &path, error))?;
    // A record lock (fcntl(2)), not flock(2): a child on its way to exec does not hold it, so that the daemon after a killed one finds it
    // free. It goes with any descriptor of the file: this is the only place that opens it.
    rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::ACCESS => Error::precondition(format!(
            "{} is in use by another windlass; stop it (systemctl stop windlass) or give another --root",
            config.root.display()
        )),
        error => Error::io(format_args!("lock {}", path.display()), error),
    })?;
    Ok(file)
}

/// Serves until SIGTERM or SIGINT.
pub(super) async fn run(config: Config, exporter: Option<Exporter>) -> Result<()> {
    let _lock = lock(&config)?;
    service::is_free(&config.socket)?;
    for directory in [config.state.clone(), config.root.join("pods"), config.root.join("containers")] {
        fs::create_dir_all(&directory).map_err(|error| unwritable("root and state", &directory, error))?;
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o711))
            .map_err(|error| Error::io(format_args!("set mode of {}", directory.display()), error))?;
    }
    let tree = Tree::find().map_err(|error| Error::io("find the cgroup v2 tree", error))?;
    if !tree.missing().is_empty() {
        tracing::warn!(missing = %tree.missing().join(", "), tree = %tree.root.display(), "limits of these controllers are not enforced on this host");
    }
    let driver = Driver::start(&config.cgroup, config.monitor.account).await?;
    let program = Program::open(&config.monitor_path())?;
    let images = open_store(&config)?;
    let network = start_network(&config)?;
    let node = Arc::new(Node::new(config, (tree, driver), images, network, program, AppArmor::start().await));
    keep_seccomp_programs(&node.seccomp_directory())?;
    pod::recover(&node).await?;
    let (ended, end) = oneshot::channel::<()>();
    let exporting = exporter.map(|exporter| tokio::spawn(exporter.run(async move { drop(end.await) })));
    let served = listen(&node).await;
    // Also after a start that came to nothing.
    leave_nothing_unused(&node).await;
    drop(ended);
    if let Some(exporting) = exporting {
        let _ = exporting.await;
    }
    served?;
    tracing::info!(pods = node.pods().len(), "stopped; pods go on running");
    Ok(())
}

/// Listens everywhere, and serves until the end is asked for.
async fn listen(node: &Arc<Node>) -> Result<()> {
    let terminated = terminated()?;
    let streaming = Arc::new(Server::start(&node.config.streaming, Arc::new(Sessions(node.clone()))).await?);
    let _metrics = telemetry::Endpoint::start(node).await?;
    let _cadvisor = cri::cadvisor::start(node)?;
    // Before the first request: a plugin that is installed sees every pod.
    let plugins = nri::start(node).await?;
    let (socket, listener) = Socket::listen(&node.config.socket)?;
    tracing::info!(
        socket = %node.config.socket.display(), root = %node.config.root.display(), version = env!("CARGO_PKG_VERSION"),
        cgroup_driver = %node.driver.describe(), pods = node.pods().len(), containers = node.containers().len(), "serving"
    );
    let watchdog = service::ready(&socket);
    let terminated = async move {
        terminated.await;
        drop(watchdog);
    };
    let served = cri::serve(node.clone(), streaming, listener, terminated).await;
    drop(socket);
    if let Some(plugins) = plugins {
        plugins.stop(node).await;
    }
    served.map_err(|error| Error::internal(format!("serve: {error}")))
}

/// Makes the directory of compiled seccomp profiles anew: another build's programs may differ.
fn keep_seccomp_programs(directory: &Path) -> Result<()> {
    let made = match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => fs::DirBuilder::new().mode(0o700).create(directory),
    };
    made.map_err(|error| Error::io(format_args!("make {} anew", directory.display()), error))
}

/// What only the daemon itself needed goes when no pod is left: bridge, rules and the default cgroup.
async fn leave_nothing_unused(node: &Node) {
    if !node.pods().is_empty() {
        return;
    }
    if let Err(error) = node.network.teardown_if_unused().await {
        tracing::warn!(error = %Error::from(error), "pod network not removed");
    }
    let Ok(parent) = node.driver.place("", &node.config.cgroup.parent, "").map(|place| place.parent) else { return };
    let removed = match &node.driver {
        // Fails while somebody else's group is below it, which is right.
        Driver::Cgroupfs => fs::remove_dir(node.tree.directory(&parent)).or(Ok(())),
        Driver::Systemd(_) => cgroup::stop_slice(&node.driver, &node.tree, &parent).await,
    };
    if let Err(error) = removed {
        tracing::warn!(%error, "default cgroup parent not removed");
    }
}

fn start_network(config: &Config) -> Result<Network> {
    let network = &config.network;
    let subnets = parse_subnets(network.subnets.iter().map(String::as_str))
        .map_err(|reason| Error::invalid(format!("network.subnets: {reason}")))?;
    let state = config.root.join("network");
    let bridge = BridgeConfig {
        preferred: network.preferred_family,
        name: network.bridge.clone(),
        // One table for each bridge, so that two daemons keep apart.
        table: format!("windlass-{}", network.bridge),
        ..BridgeConfig::new(state.clone(), subnets)
    };
    Network::start(network, bridge, &state).map_err(|error| Error::from(error).during("start the pod network"))
}

/// Ends with SIGTERM or SIGINT, which are the daemon's from this call on, not only once the future is waited for.
fn terminated() -> Result<impl Future<Output = ()>> {
    let failed = |error| Error::io("wait for signals", error);
    let mut term = signal(SignalKind::terminate()).map_err(failed)?;
    let mut int = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    })
}
