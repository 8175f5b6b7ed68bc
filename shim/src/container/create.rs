//! CreateContainer: image, configuration and pod become a bundle and a process that waits at its gate.

use super::{
    Container, Exit, Record, State, declared, identity, image_volume, image_volume::ImageVolume, lookup::Looking, spec, text,
};
use crate::{
    cgroup,
    checkpoint::{Loaded, Source},
    config::ImageVolumes,
    error::{Error, Kind, Result},
    events::EventKind,
    image::{Image, Reference},
    node::{Node, new_id, now_ns},
    nri,
    pod::{self, Phase, Pod},
    selinux, store,
    telemetry::{Clock, Phase as Timed},
};
use sha2::{Digest, Sha256};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::RwLockReadGuard;
use tracing::Instrument;
use windlass_proto::{
    cri::{ContainerConfig, Mount, MountPropagation, NamespaceMode, PodSandboxConfig},
    monitor::{CreateRequest, DeleteRequest, Restore, create_request::PidMode, frame::Body},
    nri::Container as Shown,
};

/// Longest wait for the processes of a container whose monitor is gone.
const FORSAKEN_LIMIT: Duration = Duration::from_secs(30);

/// Creates a container; returns its id. A call with the metadata of a creation under way, or of a created container, gets that one.
/// `declared`: the pod as the request describes it, if it does. `limit`: how long the caller waits for the file systems of its volumes,
/// if it says so.
pub async fn create(
    node: Arc<Node>,
    pod: Arc<Pod>,
    config: ContainerConfig,
    declared: Option<&PodSandboxConfig>,
    limit: Option<Duration>,
) -> Result<String> {
    check_privileged(&pod, declared, &config)?;
    let looking = node.lookups.begin(limit);
    create_of(node, pod, config, None, looking).await
}

/// Creates a container of a pod's checkpoint, whose process the configuration describes.
pub(crate) async fn restore(node: Arc<Node>, pod: Arc<Pod>, config: ContainerConfig, from: Source) -> Result<String> {
    check_privileged(&pod, None, &config)?;
    let looking = node.lookups.begin(None);
    create_of(node, pod, config, Some(from), looking).await
}

/// Refuses a privileged container in a pod that was not declared to have any. A container that is added to a pod for debugging comes with
/// another description of the pod than it was run with.
fn check_privileged(pod: &Pod, declared: Option<&PodSandboxConfig>, config: &ContainerConfig) -> Result<()> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let declared = || declared.map_or_else(|| pod.look(|record| pod::is_privileged(&record.config)), pod::is_privileged);
    if security.is_some_and(|security| security.privileged) && !declared() {
        return Err(Error::invalid(
            "config.linux.security_context.privileged is true, and that of the pod (sandbox_config) is false: a pod with a privileged \
             container must be declared so",
        ));
    }
    Ok(())
}

async fn create_of(
    node: Arc<Node>,
    pod: Arc<Pod>,
    config: ContainerConfig,
    from: Option<Source>,
    looking: Looking,
) -> Result<String> {
    let meta = config.metadata.clone().ok_or_else(|| Error::invalid("config.metadata is missing"))?;
    if meta.name.is_empty() {
        return Err(Error::invalid("config.metadata.name is empty"));
    }
    let key = format!("container/{}/{}/{}", pod.id, meta.name, meta.attempt);
    let operation_node = node.clone();
    node.joined(key, move || async move {
        let node = operation_node;
        let same = |record: &Record| record.config.metadata.as_ref() == Some(&meta);
        if let Some(existing) = node.containers_of(&pod.id).into_iter().find(|container| container.look(same)) {
            if existing.look(|record| matches!(record.state, State::Created { .. })) {
                return Ok(existing.id.clone());
            }
            return Err(Error::new(
                Kind::AlreadyExists,
                format!(
                    "create container {}: container {} of this pod has the same name and attempt; remove it first",
                    meta.name, existing.id
                ),
            ));
        }
        let id = new_id()?;
        let span = tracing::info_span!("create", pod = %pod.id, container = %id, name = %meta.name);
        let name = meta.name.clone();
        build(node, pod, id, config, from, looking).instrument(span).await.map_err(|error| match error.kind {
            Kind::Prefixed => error,
            _ => error.during(format_args!("create container {name}")),
        })
    })
    .await
}

async fn build(
    node: Arc<Node>,
    pod: Arc<Pod>,
    id: String,
    config: ContainerConfig,
    from: Option<Source>,
    looking: Looking,
) -> Result<String> {
    if pod.phase() != Phase::Ready {
        return Err(Error::precondition(format!("pod {} is not ready", pod.id)));
    }
    let image_name = config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
    if image_name.is_empty() {
        return Err(Error::invalid("config.image.image is empty"));
    }
    spec::check_numbers(&config)?;
    let directory = node.container_directory(&id);
    match of_origin(&node, &pod, &id, config, from, looking, &directory).await {
        Ok((container, hold)) => {
            let container = Arc::new(container);
            node.insert_container(container.clone());
            drop(hold);
            node.tell(&pod, &id, EventKind::ContainerCreatedEvent);
            nri::container_created(&node, &container).await;
            if let Err(error) = missed(&node, &pod, &container).await {
                tracing::error!(%error, "not all of the pod is gone; its stop does the rest");
            }
            Ok(id)
        }
        Err(error) => {
            match pod.monitor() {
                // A creation that timed out may still be under way there.
                Ok(monitor) => drop(monitor.call(Body::Delete(DeleteRequest { container_id: id.clone() })).await),
                Err(_) => forsaken(&node, &pod, &id)
                    .await
                    .unwrap_or_else(|undo| tracing::error!(error = %undo, "container not taken back")),
            }
            if let Err(undo) = store::remove_tree(&directory) {
                tracing::error!(error = %undo, "container directory not removed");
            }
            Err(error)
        }
    }
}

/// What has happened to a container while it was in no list: its end, or its pod's, which found nothing to end.
async fn missed(node: &Node, pod: &Pod, container: &Container) -> Result<()> {
    let recorded = super::recorded_exit(node, &pod.id, &container.id);
    let exit = match recorded {
        None if pod.monitor().is_ok() => return Ok(()),
        None => {
            forsaken(node, pod, &container.id).await?;
            Exit::unknown(now_ns())
        }
        Some(exit) => exit,
    };
    container.exited(node, exit);
    Ok(())
}

/// Ends what a monitor that is gone may have made of a container that was in no list when its pod was ended.
async fn forsaken(node: &Node, pod: &Pod, id: &str) -> Result<()> {
    let cgroup = pod.look(|record| record.container_cgroup(node, id));
    let failed = |what: &'static str| move |error| Error::io(format_args!("{what} a container's cgroup"), error);
    cgroup::kill(&cgroup, FORSAKEN_LIMIT).await.map_err(failed("kill"))?;
    cgroup::remove(&cgroup).map_err(failed("remove"))
}

/// A container that is in no list yet, and what keeps plugins of NRI from joining until it is.
type Made<'a> = (Container, RwLockReadGuard<'a, ()>);

/// A container of an image, or of the checkpoint that is given or named in its place.
async fn of_origin<'a>(
    node: &'a Arc<Node>,
    pod: &Pod,
    id: &str,
    config: ContainerConfig,
    from: Option<Source>,
    looking: Looking,
    directory: &Path,
) -> Result<Made<'a>> {
    let strict = from.is_some();
    let source = match from {
        Some(source) => Some(source),
        None => named_source(node, &config, &looking).await?,
    };
    let Some(source) = source else {
        let image_name = config.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
        let missing = || Error::not_found(format!("image {image_name:?} is not on this node; pull it first"));
        let image = node.images.get(image_name).ok_or_else(missing)?;
        return assemble(&Making { node, pod, id, image: &image, directory, looking, checkpoint: None }, config).await;
    };
    let (own, place) = (node.clone(), directory.to_owned());
    let loaded = tokio::task::spawn_blocking(move || source.load(&own, &place)).await;
    let loaded = loaded.map_err(|error| Error::internal(format!("load the checkpoint: {error}")))??;
    let image = loaded.image.clone();
    let asked = config.image.as_ref().and_then(|image| node.images.get(&image.image));
    if strict && asked.is_some_and(|asked| asked.id != image.id) {
        return Err(Error::invalid(format!("image: the checkpoint has {}, the configuration another", image.id)));
    }
    assemble(&Making { node, pod, id, image: &image, directory, looking, checkpoint: Some((loaded, strict)) }, config).await
}

/// The checkpoint that a configuration names in place of an image.
async fn named_source(node: &Arc<Node>, config: &ContainerConfig, looking: &Looking) -> Result<Option<Source>> {
    let name = config.image.as_ref().map(|image| image.image.clone()).unwrap_or_default();
    if !name.starts_with('/') {
        return Source::of(node, &name);
    }
    let (node, own) = (node.clone(), looking.clone());
    let find = move || {
        own.at(format_args!("config.image.image {name:?}"), Path::new(&name))?;
        Source::of(&node, &name)
    };
    looking.run(find).await
}

/// What a container is made of, beside its configuration.
struct Making<'a, 'n> {
    node: &'n Arc<Node>,
    pod: &'a Pod,
    id: &'a str,
    image: &'a Arc<Image>,
    /// The bundle.
    directory: &'a Path,
    looking: Looking,
    /// With whether all of it must be as the configuration says.
    checkpoint: Option<(Loaded, bool)>,
}

async fn assemble<'n>(making: &Making<'_, 'n>, config: ContainerConfig) -> Result<Made<'n>> {
    let (node, mut told) = (making.node, None);
    let hold = node.nri.hold().await;
    match make(making, config, &mut told).await {
        Ok(container) => Ok((container, hold)),
        Err(error) => {
            if let Some(shown) = told {
                nri::container_undone(node, &making.pod.record(), shown).await;
            }
            Err(error)
        }
    }
}

/// `told`: what plugins of NRI have been told of it.
async fn make(making: &Making<'_, '_>, mut config: ContainerConfig, told: &mut Option<Shown>) -> Result<Container> {
    let Making { node, pod, id, image, directory, looking, checkpoint } = making;
    let (node, id, image) = (*node, *id, *image);
    let monitor = pod.monitor()?;
    let bundling = Clock::start(Timed::ContainerBundle);
    let volumes = image_volume::find(node, &config)?;
    image_volume::tell(&mut config, &volumes);
    let images = std::iter::once(image).chain(volumes.iter().map(|volume| &volume.image));
    let chain_ids: Vec<String> = images.flat_map(|image| &image.layers).map(|layer| layer.chain_id.clone()).collect();
    let lease = node.images.lease_layers(&chain_ids);
    let identity = identity::resolve(&config, image)?;
    let how = node.config.containers.image_volumes;
    let own_volumes = declared::find(how, &config, image)?;
    let user = identity.status();
    let input = Arc::new(spec::Input {
        node: node.clone(),
        pod: pod.record(),
        id: id.to_owned(),
        config: config.clone(),
        image: image.clone(),
        identity,
        declared: if how == ImageVolumes::Bind { own_volumes.clone() } else { Vec::new() },
        directory: directory.to_path_buf(),
        looking: looking.clone(),
    });
    let own = input.clone();
    let (mut oci, mut not_enforced) = looking.run(move || spec::build(&own)).await?;
    let mut adjusted = spec::Outcome::default();
    if nri::adjusts(node) {
        (oci, adjusted) = ask_plugins(&input, node, oci, told).await?;
        not_enforced
            .extend(adjusted.not_enforced.iter().filter(|name| !not_enforced.contains(name)).cloned().collect::<Vec<_>>());
    }
    if !not_enforced.is_empty() {
        spec::refuse_missing(node.config.cgroup.strict, &not_enforced)?;
        tracing::info!(limits = %not_enforced.join(", "), "limits not enforced: this host's cgroup v2 tree lacks the controllers");
    }
    if let Some((loaded, strict)) = checkpoint {
        loaded.check(&oci, *strict)?;
    }
    let (own, mut more) = (input.clone(), std::mem::take(&mut adjusted.relabel));
    more.extend((!input.declared.is_empty()).then(|| declared::directory(directory)));
    // What a checkpoint has made in its writable layer has come with it.
    if how == ImageVolumes::Bind || checkpoint.is_none() {
        declared::make(how, image, own_volumes, directory, input.users()?).await?;
    }
    let log_path = looking.run(move || relabel(&own, more).and_then(|()| log_path(&own))).await?;
    if let Some(limits) = adjusted.limits {
        config.linux.get_or_insert_default().resources = Some(limits);
    }
    let program = seccomp_program(node, &oci)?;
    write_bundle(directory, &oci, image, &volumes, program.as_deref())?;
    bundling.done();
    let building = Clock::start(Timed::ContainerBuild);
    let mut request = request(node, &input.pod, id, &config, directory, &log_path)?;
    request.restore = checkpoint.as_ref().map(|(loaded, _)| Restore { criu: text(&loaded.criu) });
    if request.restore.is_some() && !request.runtime.is_empty() {
        return Err(Error::precondition(format!("runtime_handler {:?} restores no checkpoint", input.pod.runtime_handler)));
    }
    let reply = monitor.call(Body::Create(request)).await?;
    let (pid, not_enforced) = match reply.0 {
        Body::CreateReply(reply) if checkpoint.is_some() && !reply.restores => {
            return Err(Error::precondition("the pod's monitor is of a build that restores nothing; restore into a new pod"));
        }
        Body::CreateReply(reply) => (reply.pid, reply.not_enforced),
        other => return Err(Error::internal(format!("unexpected reply of the monitor: {other:?}"))),
    };
    building.done();
    let record = Record {
        id: id.to_owned(),
        pod_id: pod.id.clone(),
        image_id: image.id.clone(),
        image_ref: image_ref(&config, image),
        image_name: image_name(&config, image),
        chain_ids,
        log_path,
        user,
        stop_signal: spec::stop_signal(&config, image)?,
        stop_signal_sent: false,
        not_enforced,
        more_limits: serde_json::Value::Null,
        created_at_ns: now_ns(),
        from_checkpoint: checkpoint.is_some(),
        state: State::Created { pid },
        config,
    };
    let container = Container::new(node, record, lease);
    container.change(|_| {})?;
    tracing::info!(image = %image.id, "container created");
    Ok(container)
}

/// Asks plugins of NRI what they change of it: the configuration with that, and what else it comes to.
async fn ask_plugins(
    input: &Arc<spec::Input>,
    node: &Arc<Node>,
    oci: oci_spec::runtime::Spec,
    told: &mut Option<Shown>,
) -> Result<(oci_spec::runtime::Spec, spec::Outcome)> {
    let mut spec = serde_json::to_value(&oci).map_err(|error| Error::internal(format!("encode config.json: {error}")))?;
    let shown = Shown {
        image: Some(nri::image(
            &image_name(&input.config, &input.image),
            &image_ref(&input.config, &input.image),
            &input.image.id,
        )),
        ..nri::of_spec(&input.id, &input.pod.id, &input.config, &spec)
    };
    *told = Some(shown.clone());
    let adjustment = nri::create_container(node, &input.pod, shown).await?;
    let own = input.clone();
    let work = move || spec::adjust(&mut spec, &adjustment, &own).map(|adjusted| (spec, adjusted));
    let (spec, adjusted) = input.looking.run(work).await.map_err(|error| error.during("adjustment by NRI plugins"))?;
    let oci = serde_json::from_value(spec).map_err(|error| Error::invalid(format!("adjustment by NRI plugins: {error}")))?;
    Ok((oci, adjusted))
}

/// Gives the pod's files, and the volumes that ask for it, the SELinux label that the container may use. `more`: volumes that plugins want
/// relabelled. Blocks.
fn relabel(input: &spec::Input, more: Vec<PathBuf>) -> Result<()> {
    let label = spec::labels(input)?.file;
    if label.is_empty() {
        return Ok(());
    }
    let looking = &input.looking;
    let look = |path: &Path| looking.at(format_args!("relabel {}", path.display()), path);
    let mut paths = Vec::new();
    for mount in input.config.mounts.iter().filter(|mount| mount.selinux_relabel && !mount.host_path.is_empty()) {
        let path = Path::new(&mount.host_path);
        look(path)?;
        paths.push(fs::canonicalize(path).map_err(|error| Error::io("find a volume to relabel", error))?);
    }
    let own = input.node.pod_directory(&input.pod.id);
    paths.extend(more);
    paths.extend(["hosts", "hostname", "resolv.conf"].map(|name| own.join(name)));
    paths.iter().try_for_each(|path| look(path).and_then(|()| selinux::relabel(path, &label, &|| looking.goes_on())))
}

/// The image as the pod names it, or as the request does.
fn asked(config: &ContainerConfig) -> Option<&String> {
    let spec = config.image.as_ref()?;
    Some(if spec.user_specified_image.is_empty() { &spec.image } else { &spec.user_specified_image })
}

/// Of an image that several repositories have, the digest in the one that was asked for.
fn image_ref(config: &ContainerConfig, image: &Image) -> String {
    let repository = asked(config).and_then(|name| name.parse::<Reference>().ok()).map(|reference| reference.name() + "@");
    let own = repository.and_then(|repository| image.repo_digests.iter().find(|digest| digest.starts_with(&repository)));
    own.or(image.repo_digests.first()).unwrap_or(&image.id).clone()
}

/// What a person calls the image.
pub(super) fn image_name(config: &ContainerConfig, image: &Image) -> String {
    match asked(config) {
        Some(name) if !name.trim_start_matches("sha256:").chars().all(|c| c.is_ascii_hexdigit()) => name.clone(),
        _ => image.repo_tags.first().or(image.repo_digests.first()).unwrap_or(&image.id).clone(),
    }
}

/// Compiled seccomp profiles that are kept.
const PROGRAMS_MAX: usize = 64;

/// The file that all containers with this seccomp profile share; the first of them writes it.
fn seccomp_program(node: &Node, oci: &oci_spec::runtime::Spec) -> Result<Option<PathBuf>> {
    let Some(profile) = oci.linux().as_ref().and_then(|linux| linux.seccomp().as_ref()) else { return Ok(None) };
    let profile = serde_json::to_vec(profile).map_err(|error| Error::internal(format!("encode linux.seccomp: {error}")))?;
    let directory = node.seccomp_directory();
    let path = directory.join(hex::encode(Sha256::digest(profile)));
    if !path.exists() {
        let kept = fs::read_dir(&directory).into_iter().flatten().flatten().map(|entry| entry.path());
        for one in kept.skip(PROGRAMS_MAX - 1) {
            let _ = fs::remove_file(one);
        }
    }
    Ok(Some(path))
}

fn write_bundle(
    directory: &Path,
    oci: &oci_spec::runtime::Spec,
    image: &Image,
    volumes: &[ImageVolume],
    seccomp_program: Option<&Path>,
) -> Result<()> {
    let parts = ["upper", "work", "rootfs"].map(|part| directory.join(part));
    for path in parts.into_iter().chain(volumes.iter().map(|volume| volume.source(directory))) {
        fs::create_dir_all(&path).map_err(|error| Error::io(format_args!("create {}", path.display()), error))?;
    }
    let config = serde_json::to_vec(oci).map_err(|error| Error::internal(format!("encode config.json: {error}")))?;
    store::write_file(&directory.join("config.json"), &config)?;
    let lower = image_volume::layers(image)?;
    let plan = serde_json::json!({
        // The first version that has all of this, for monitors of earlier builds.
        "version": if lower.iter().any(|layer| layer.ends_with(".erofs")) { 3 } else { 2 },
        "lower": lower,
        "upper": text(&directory.join("upper")),
        "work": text(&directory.join("work")),
        "volatile": true,
        "image_volumes": volumes.iter().map(|volume| volume.plan(directory)).collect::<Result<Vec<_>>>()?,
        "sources_resolved": true,
        "seccomp_program": seccomp_program.map(text),
    });
    store::write_file(&directory.join("rootfs.json"), plan.to_string().as_bytes())
}

/// The absolute path of the log, in a directory that is there. Empty for none. Blocks.
fn log_path(input: &spec::Input) -> Result<String> {
    let (pod, config) = (&input.pod, &input.config);
    if config.log_path.is_empty() {
        return Ok(String::new());
    }
    if pod.log_directory().is_empty() {
        return Err(Error::invalid(format!(
            "config.log_path {:?} is below the pod's log_directory, and the pod has none",
            config.log_path
        )));
    }
    let relative = Path::new(&config.log_path);
    if relative.is_absolute() || relative.components().any(|part| matches!(part, std::path::Component::ParentDir)) {
        return Err(Error::invalid(format!("config.log_path {:?} leaves the pod's log directory", config.log_path)));
    }
    let path = Path::new(pod.log_directory()).join(relative);
    if let Some(parent) = path.parent() {
        input.looking.at(format_args!("log directory {}", parent.display()), parent)?;
        fs::create_dir_all(parent)
            .map_err(|error| Error::io(format_args!("create log directory {}", parent.display()), error))?;
    }
    Ok(text(&path))
}

fn request(
    node: &Node,
    pod: &pod::Record,
    id: &str,
    config: &ContainerConfig,
    bundle: &Path,
    log_path: &str,
) -> Result<CreateRequest> {
    let options =
        config.linux.as_ref().and_then(|linux| linux.security_context.as_ref()).and_then(|s| s.namespace_options.clone());
    let options = options.unwrap_or_else(|| pod::namespace_modes(&pod.config));
    let mut target_container_id = String::new();
    let pid_mode = match options.pid() {
        NamespaceMode::Container => PidMode::Container,
        NamespaceMode::Pod => PidMode::Pod,
        NamespaceMode::Node => PidMode::Node,
        NamespaceMode::Target => {
            let target = node.container(&options.target_id)?;
            if target.pod_id != pod.id {
                return Err(Error::invalid(format!(
                    "namespace_options.target_id {:?} is a container of another pod",
                    options.target_id
                )));
            }
            if target.is_exited() {
                return Err(Error::invalid(format!("namespace_options.target_id {:?} has exited", options.target_id)));
            }
            target_container_id = target.id.clone();
            PidMode::Target
        }
    };
    let handler = &pod.runtime_handler;
    let program = node.config.handler(handler);
    let program =
        program.ok_or_else(|| Error::precondition(format!("runtime_handler {handler:?} of the pod is no longer configured")))?;
    let shared = |mount: &Mount| mount.propagation() == MountPropagation::PropagationBidirectional;
    if !program.as_os_str().is_empty() && config.mounts.iter().any(shared) {
        return Err(Error::unimplemented(format!(
            "config.mounts: runtime_handler {handler:?} does not serve bidirectional propagation, the native one does"
        )));
    }
    Ok(CreateRequest {
        container_id: id.to_owned(),
        bundle: text(bundle),
        cgroup: text(&pod.container_cgroup(node, id)),
        pid_mode: pid_mode.into(),
        target_container_id,
        log_path: log_path.to_owned(),
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        terminal: config.tty,
        runtime: text(program),
        restore: None,
    })
}
