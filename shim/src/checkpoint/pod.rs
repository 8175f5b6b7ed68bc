//! CheckpointPod and RestorePod: all running containers that were chosen, of one moment, and a new pod with all of them.

use super::{
    bounds::{Bounds, to_its_end},
    capture::{Wanted, capture as capture_all},
    files,
    source::{Source, parse},
};
use crate::{
    container::{self, Container},
    error::{Error, Kind, Result},
    node::Node,
    pod::{self, Pod},
    store,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use windlass_proto::cri::{ContainerConfig, PodSandboxConfig, RestoredContainer};

/// Names the containers of a pod's checkpoint.
const POD: &str = "pod.json";

/// Version of the directory's layout.
const VERSION: u32 = 1;

/// `pod.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Layout {
    version: u32,
    /// Of the pod.
    runtime_handler: String,
    /// Directory of each container, by its name.
    containers: BTreeMap<String, String>,
}

/// Writes the checkpoint of a pod's containers to the empty directory `output`. After an error the directory is empty again.
pub async fn capture(
    node: Arc<Node>,
    pod: Arc<Pod>,
    output: PathBuf,
    ids: Vec<String>,
    options: HashMap<String, String>,
    limit: Option<Duration>,
) -> Result<()> {
    let id = pod.id.clone();
    to_its_end(limit, move |bounds| async move {
        check_options(&options)?;
        let containers = chosen(&node, &pod, &ids)?;
        check_output(&output)?;
        let written = write(&node, &pod, &containers, &output, &bounds).await;
        if written.is_err() {
            empty(&output);
        }
        written
    })
    .await
    .map_err(|error| error.during(format_args!("checkpoint pod {id}")))
}

fn check_options(options: &HashMap<String, String>) -> Result<()> {
    match options.keys().min() {
        Some(key) => Err(Error::invalid(format!("options: {key:?} is not known; there are none"))),
        None => Ok(()),
    }
}

fn chosen(node: &Node, pod: &Pod, ids: &[String]) -> Result<Vec<Arc<Container>>> {
    if ids.is_empty() {
        return Err(Error::invalid("container_ids is empty"));
    }
    let mut seen = BTreeSet::new();
    let one = |id: &String| {
        let container = node.container(id)?;
        if container.pod_id != pod.id {
            return Err(Error::invalid(format!("container_ids: container {id} is none of pod {}", pod.id)));
        }
        if !seen.insert(container.id.clone()) {
            return Err(Error::invalid(format!("container_ids: {id} is there twice")));
        }
        Ok(container)
    };
    ids.iter().map(one).collect()
}

fn check_output(output: &Path) -> Result<()> {
    let invalid = |why: &str| Err(Error::invalid(format!("output_path {:?} {why}", output.display().to_string())));
    if !output.is_absolute() {
        return invalid("is not absolute");
    }
    match fs::read_dir(output).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => invalid("is not empty"),
        Err(error) => invalid(&format!("is no directory that can be read: {error}")),
    }
}

async fn write(node: &Node, pod: &Pod, containers: &[Arc<Container>], output: &Path, bounds: &Bounds) -> Result<()> {
    let mut layout = Layout {
        version: VERSION,
        runtime_handler: pod.look(|record| record.runtime_handler.clone()),
        containers: BTreeMap::new(),
    };
    let mut wanted = Vec::new();
    for container in containers {
        let name = container.look(|record| record.name().to_owned());
        if layout.containers.insert(name.clone(), container.id.clone()).is_some() {
            return Err(Error::precondition(format!("container_ids: two of them are called {name:?}")));
        }
        let directory = output.join(&container.id);
        let made = fs::DirBuilder::new().mode(0o700).create(&directory);
        made.map_err(|error| Error::io(format_args!("create {}", directory.display()), error))?;
        wanted.push(Wanted { container: container.clone(), directory });
    }
    capture_all(node, pod, &wanted, bounds).await?;
    // The last file: with it the checkpoint is whole.
    files::write(&output.join(POD), serde_json::json!(layout).to_string().as_bytes())
}

/// Removes what is in the directory, which is the caller's and stays.
fn empty(output: &Path) {
    let names = store::entries(output).unwrap_or_else(|error| {
        tracing::error!(%error, "parts of a failed checkpoint not removed");
        Vec::new()
    });
    for name in names {
        let path = output.join(name);
        let removed = if path.is_dir() { store::remove_tree(&path).is_ok() } else { fs::remove_file(&path).is_ok() };
        if !removed {
            tracing::error!(path = %path.display(), "part of a failed checkpoint not removed");
        }
    }
}

/// Makes a pod with the containers of a checkpoint, all created and none started. After an error there is nothing of it.
pub async fn restore(
    node: Arc<Node>,
    from: PathBuf,
    config: PodSandboxConfig,
    runtime_handler: String,
    configs: Vec<ContainerConfig>,
    options: HashMap<String, String>,
    limit: Option<Duration>,
) -> Result<(String, Vec<RestoredContainer>)> {
    let name = config.metadata.as_ref().map(|meta| format!("{}/{}", meta.namespace, meta.name)).unwrap_or_default();
    to_its_end(limit, move |bounds| async move {
        check_options(&options)?;
        let layout = read(&from)?;
        check_handler(&node, &layout, &runtime_handler)?;
        check_names(&layout, &configs)?;
        check_new(&node, &config)?;
        let id = pod::run(node.clone(), config, runtime_handler).await?;
        let restored = containers(&node, &id, &from, &layout, configs, &bounds).await;
        match restored {
            Ok(restored) => Ok((id, restored)),
            Err(error) => {
                take_back(&node, &id).await;
                Err(error)
            }
        }
    })
    .await
    .map_err(|error| error.during(format_args!("restore pod {name}")))
}

fn read(from: &Path) -> Result<Layout> {
    if !from.is_absolute() || !from.is_dir() {
        return Err(Error::invalid(format!(
            "checkpoint_path {:?} is no absolute path of a directory",
            from.display().to_string()
        )));
    }
    let layout: Layout = parse(&from.join(POD)).map_err(|error| error.during("checkpoint_path"))?;
    if layout.version != VERSION {
        return Err(Error::invalid(format!("checkpoint_path: {POD} has version {}, this build reads {VERSION}", layout.version)));
    }
    let plain = |directory: &String| !directory.is_empty() && directory.bytes().all(|byte| byte.is_ascii_alphanumeric());
    match layout.containers.values().find(|directory| !plain(directory)) {
        Some(directory) => Err(Error::invalid(format!("checkpoint_path: {POD}: {directory:?} is no directory of it"))),
        None => Ok(layout),
    }
}

fn check_handler(node: &Node, layout: &Layout, handler: &str) -> Result<()> {
    let native = |handler: &str| node.config.handler(handler).map(|program| program.as_os_str().is_empty());
    match native(handler) {
        Some(true) => Ok(()),
        Some(false) => Err(Error::precondition(format!(
            "runtime_handler {handler:?} does not restore checkpoints, the native one does (the checkpoint's was {:?})",
            layout.runtime_handler
        ))),
        None => Err(Error::invalid(format!("runtime_handler {handler:?} is not configured"))),
    }
}

fn check_names(layout: &Layout, configs: &[ContainerConfig]) -> Result<()> {
    if configs.is_empty() {
        return Err(Error::invalid("container_configs is empty"));
    }
    let mut names = BTreeSet::new();
    for config in configs {
        let name = name_of(config);
        if name.is_empty() {
            return Err(Error::invalid("container_configs: metadata.name of one is empty"));
        }
        if !names.insert(name.clone()) {
            return Err(Error::invalid(format!("container_configs: {name:?} is there twice")));
        }
    }
    let there: BTreeSet<String> = layout.containers.keys().cloned().collect();
    if names != there {
        return Err(Error::invalid(format!("container_configs are {names:?}, the checkpoint has {there:?}")));
    }
    Ok(())
}

fn name_of(config: &ContainerConfig) -> String {
    config.metadata.as_ref().map(|meta| meta.name.clone()).unwrap_or_default()
}

/// A pod that is there already is not this call's to make, and not to take back.
fn check_new(node: &Node, config: &PodSandboxConfig) -> Result<()> {
    let same = |pod: &Arc<Pod>| pod.look(|record| record.config.metadata == config.metadata);
    match node.pods().into_iter().find(same) {
        Some(pod) => Err(Error::new(Kind::AlreadyExists, format!("pod {} has the same metadata; remove it first", pod.id))),
        None => Ok(()),
    }
}

async fn containers(
    node: &Arc<Node>,
    pod_id: &str,
    from: &Path,
    layout: &Layout,
    configs: Vec<ContainerConfig>,
    bounds: &Bounds,
) -> Result<Vec<RestoredContainer>> {
    let pod = node.pod(pod_id)?;
    let mut restored = Vec::new();
    for config in configs {
        // A creation that has begun is never left: it would make its container when the pod has gone.
        bounds.check()?;
        let name = name_of(&config);
        let directory = layout.containers.get(&name).ok_or_else(|| Error::internal("a name was lost"))?;
        let source = Source::Directory(from.join(directory));
        let container_id = container::restore(node.clone(), pod.clone(), config, source).await?;
        restored.push(RestoredContainer { name, container_id });
    }
    bounds.check()?;
    Ok(restored)
}

async fn take_back(node: &Arc<Node>, id: &str) {
    let Ok(pod) = node.pod(id) else { return };
    if let Err(error) = pod::remove(node, &pod).await {
        tracing::error!(pod = %id, %error, "pod of a failed restore not removed");
    }
}
