//! What happens to pods and containers, as plugins are told and asked. What a plugin refuses fails, as long as it can: what ends or is
//! removed does so whatever plugins say. Nothing is shown, copied or waited for while no plugin has joined.

use super::{
    Nri,
    collect::{Creation, Updates},
    event::Relayed,
    plugin::Plugin,
    validate, view,
};
use crate::{
    container::{self, Container},
    error::{Error, Kind, Result},
    node::Node,
    pod::{self, Pod},
};
use std::{sync::Arc, time::Duration};
use windlass_proto::{
    cri::LinuxContainerResources,
    nri::{
        self, ContainerAdjustment, ContainerEviction, ContainerUpdate, CreateContainerRequest, Event, LinuxResources,
        PluginInstance, PodSandbox, PostCreateContainerRequest, PostStartContainerRequest, PostUpdateContainerRequest,
        PostUpdatePodSandboxRequest, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
        StartContainerRequest, StopContainerRequest, StopPodSandboxRequest, UpdateContainerRequest, UpdatePodSandboxRequest,
        ValidateContainerAdjustmentRequest,
    },
};

/// How long an evicted container has after its stop signal.
const EVICTION_GRACE: Duration = Duration::from_secs(10);

/// That a pod's or container's end is told once. Held while it is told, so that its removal comes after.
#[derive(Default)]
pub struct Told(tokio::sync::Mutex<bool>);

impl Told {
    /// `ended`: nobody has to be told any more.
    pub fn new(ended: bool) -> Told {
        Told(tokio::sync::Mutex::new(ended))
    }

    /// Nobody is there to be told.
    fn skip(&self) {
        // Held only by somebody who tells.
        if let Ok(mut told) = self.0.try_lock() {
            *told = true;
        }
    }
}

impl Nri {
    /// Asks one after the other; the first that refuses ends it.
    async fn ask<Q: Relayed>(&self, request: &Q) -> Result<()> {
        for plugin in self.plugins().iter() {
            plugin.tell(request).await?;
        }
        Ok(())
    }

    /// Tells all, whatever one of them says.
    async fn tell<Q: Relayed>(&self, request: &Q) {
        for plugin in self.plugins().iter() {
            if let Err(error) = plugin.tell(request).await {
                tracing::warn!(%error, "NRI plugin refuses what has happened");
            }
        }
    }

    /// Whether anybody wants to know.
    fn wanted(&self, event: Event) -> bool {
        self.plugins.read().expect(super::POISON).iter().any(|plugin| plugin.wants(event))
    }
}

/// The pod of a container as plugins are shown it.
fn pod_of(node: &Node, container: &Container) -> Option<PodSandbox> {
    node.pod(&container.pod_id).ok().map(|pod| pod.look(view::pod))
}

fn shown(node: &Node, container: &Container) -> Option<nri::Container> {
    Some(view::container(node, &container.record()))
}

/// A pod is about to be ready.
pub async fn run_pod(node: &Node, record: &pod::Record) -> Result<()> {
    if !node.nri.wanted(Event::RunPodSandbox) {
        return Ok(());
    }
    node.nri.ask(&RunPodSandboxRequest { pod: Some(view::pod(record)) }).await
}

/// Its processes have ended. Told once.
pub async fn pod_stopped(node: &Node, pod: &Pod) {
    let mut told = pod.end_told.0.lock().await;
    if std::mem::replace(&mut *told, true) || !node.nri.wanted(Event::StopPodSandbox) {
        return;
    }
    node.nri.tell(&StopPodSandboxRequest { pod: Some(pod.look(view::pod)) }).await;
}

/// Nothing is left of it, or of one that could not be run.
pub async fn pod_removed(node: &Node, record: &pod::Record) {
    if node.nri.wanted(Event::RemovePodSandbox) {
        node.nri.tell(&RemovePodSandboxRequest { pod: Some(view::pod(record)) }).await;
    }
}

/// Its limits are about to change.
pub async fn update_pod(
    node: &Node,
    pod: &Pod,
    overhead: Option<&LinuxContainerResources>,
    resources: Option<&LinuxContainerResources>,
) -> Result<()> {
    if !node.nri.wanted(Event::UpdatePodSandbox) {
        return Ok(());
    }
    let request = UpdatePodSandboxRequest {
        pod: Some(pod.look(view::pod)),
        overhead_linux_resources: overhead.map(view::resources),
        linux_resources: resources.map(view::resources),
    };
    node.nri.ask(&request).await
}

/// Its limits have changed.
pub async fn pod_updated(node: &Node, pod: &Pod) {
    if node.nri.wanted(Event::PostUpdatePodSandbox) {
        node.nri.tell(&PostUpdatePodSandboxRequest { pod: Some(pod.look(view::pod)) }).await;
    }
}

/// Whether CreateContainer has anybody to ask.
pub fn adjusts(node: &Node) -> bool {
    node.nri.validator.is_some() || node.nri.wanted(Event::CreateContainer) || node.nri.wanted(Event::ValidateContainerAdjustment)
}

/// A container is about to be made: what plugins change of it. What they change of others is in effect when this returns.
pub async fn create_container(node: &Arc<Node>, pod: &pod::Record, container: nri::Container) -> Result<ContainerAdjustment> {
    let plugins = node.nri.plugins();
    let request = CreateContainerRequest { pod: Some(view::pod(pod)), container: Some(container) };
    let pristine = request.clone();
    let (mut creation, mut evictions) = (Creation::new(request), Vec::new());
    for plugin in plugins.iter() {
        if let Some(reply) = plugin.tell(&creation.request).await? {
            creation.take(reply.adjust, reply.update, &plugin.to_string())?;
            evictions.extend(reply.evict.into_iter().map(|evicted| (plugin.clone(), evicted)));
        }
    }
    // One that has gone while it was asked is not there.
    let there = plugins.iter().filter(|plugin| !plugin.is_closed());
    let request = ValidateContainerAdjustmentRequest {
        pod: pristine.pod,
        container: pristine.container,
        adjust: Some(creation.adjust.clone()),
        update: creation.updates.list.clone(),
        owners: Some(creation.updates.owners.message()),
        plugins: there.map(|one| PluginInstance { name: one.name.clone(), index: one.index.clone() }).collect(),
    };
    if let Some(config) = &node.nri.validator {
        validate::check(config, &request).map_err(|why| Error::new(Kind::Precondition, format!("NRI validation: {why}")))?;
    }
    for plugin in plugins.iter() {
        if let Some(reply) = plugin.tell(&request).await?.filter(|reply| reply.reject) {
            return Err(Error::new(Kind::Precondition, format!("NRI plugin {plugin} rejects the adjustment: {}", reply.reason)));
        }
    }
    for (plugin, evicted) in evictions {
        evict(node, vec![evicted], &plugin);
    }
    needed(apply(node, creation.updates.list).await)?;
    Ok(creation.adjust)
}

/// It is made, and listed.
pub async fn container_created(node: &Node, container: &Container) {
    if node.nri.wanted(Event::PostCreateContainer) {
        let (pod, container) = (pod_of(node, container), shown(node, container));
        node.nri.tell(&PostCreateContainerRequest { pod, container }).await;
    }
}

/// It could not be made after all.
pub async fn container_undone(node: &Node, pod: &pod::Record, container: nri::Container) {
    if node.nri.wanted(Event::RemoveContainer) {
        let request = RemoveContainerRequest { pod: Some(view::pod(pod)), container: Some(container) };
        node.nri.tell(&request).await;
    }
}

/// Its gate is about to open.
pub async fn start_container(node: &Node, container: &Container) -> Result<()> {
    if !node.nri.wanted(Event::StartContainer) {
        return Ok(());
    }
    let (pod, container) = (pod_of(node, container), shown(node, container));
    node.nri.ask(&StartContainerRequest { pod, container }).await
}

/// Its program runs.
pub async fn container_started(node: &Node, container: &Container) {
    if node.nri.wanted(Event::PostStartContainer) {
        // Before its end, which is told by another task.
        let told = container.end_told.0.lock().await;
        if !*told {
            let (pod, container) = (pod_of(node, container), shown(node, container));
            node.nri.tell(&PostStartContainerRequest { pod, container }).await;
        }
    }
}

/// Its limits are about to change to these: to which, if plugins have any say.
pub async fn update_container(
    node: &Arc<Node>,
    container: &Container,
    asked: &LinuxContainerResources,
) -> Result<Option<LinuxResources>> {
    if !node.nri.wanted(Event::UpdateContainer) {
        return Ok(None);
    }
    let mut updates = Updates::of(&container.id, view::resources(asked));
    let (pod, shown) = (pod_of(node, container), shown(node, container));
    let mut request = UpdateContainerRequest { pod, container: shown, linux_resources: Some(view::resources(asked)) };
    for plugin in node.nri.plugins().iter() {
        if let Some(reply) = plugin.tell(&request).await? {
            updates.take(reply.update, &plugin.to_string())?;
            evict(node, reply.evict, plugin);
            request.linux_resources = own(&updates, &container.id);
        }
    }
    let resources = own(&updates, &container.id);
    updates.list.retain(|update| update.container_id != container.id);
    needed(apply(node, updates.list).await)?;
    Ok(resources)
}

fn own(updates: &Updates, id: &str) -> Option<LinuxResources> {
    let own = updates.list.iter().find(|update| update.container_id == id)?;
    own.linux.as_ref()?.resources.clone()
}

/// Its limits have changed.
pub async fn container_updated(node: &Node, container: &Container) {
    if node.nri.wanted(Event::PostUpdateContainer) {
        let (pod, container) = (pod_of(node, container), shown(node, container));
        node.nri.tell(&PostUpdateContainerRequest { pod, container }).await;
    }
}

/// It has ended, and somebody is told of it beside whatever goes on.
pub fn container_ends(node: &Node, container: &Container) {
    if node.nri.is_idle() {
        return container.end_told.skip();
    }
    let (Some(node), id) = (node.nri.node(), container.id.clone()) else { return };
    tokio::spawn(async move {
        if let Ok(container) = node.container(&id) {
            container_stopped(&node, &container).await;
        }
    });
}

/// It has ended. Told once, and whoever comes second waits for that.
pub async fn container_stopped(node: &Arc<Node>, container: &Container) {
    let mut told = container.end_told.0.lock().await;
    if std::mem::replace(&mut *told, true) || !node.nri.wanted(Event::StopContainer) {
        return;
    }
    let (pod, shown) = (pod_of(node, container), shown(node, container));
    let request = StopContainerRequest { pod, container: shown };
    let mut updates = Updates::default();
    for plugin in node.nri.plugins().iter() {
        let taken = match plugin.tell(&request).await {
            Ok(Some(reply)) => updates.take(reply.update, &plugin.to_string()),
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            tracing::warn!(container = %container.id, %error, "NRI plugin refuses what has happened");
        }
    }
    apply(node, updates.list).await;
}

/// Nothing is left of it. `shown`: as it was.
pub async fn container_removed(node: &Node, pod: Option<PodSandbox>, container: nri::Container) {
    node.nri.tell(&RemoveContainerRequest { pod, container: Some(container) }).await;
}

/// A container and its pod for [`container_removed`], while they are there; nothing where nobody wants to know.
pub fn to_be_removed(node: &Node, container: &Container) -> Option<(Option<PodSandbox>, nri::Container)> {
    node.nri.wanted(Event::RemoveContainer).then(|| (pod_of(node, container), view::container(node, &container.record())))
}

/// The container that a plugin names: by its whole id, as a shortened one is another name of what other plugins own.
fn named(node: &Node, id: &str) -> Result<Arc<Container>> {
    let whole = |found: &Arc<Container>| found.id == id;
    node.container(id)
        .ok()
        .filter(whole)
        .ok_or_else(|| Error::not_found(format!("container {id:?} is not on this node; a plugin names it by its whole id")))
}

/// Puts updates of containers into effect; those that failed.
pub(super) async fn apply(node: &Arc<Node>, updates: Vec<ContainerUpdate>) -> Vec<ContainerUpdate> {
    let mut failed = Vec::new();
    for update in updates {
        let resources = update.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
        let done = match named(node, &update.container_id) {
            Ok(container) => container::update_to(node, &container, &resources).await,
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            tracing::warn!(container = %update.container_id, %error, ignored = update.ignore_failure, "NRI update failed");
            failed.push(update);
        }
    }
    failed
}

/// Fails unless all failures are to be ignored.
fn needed(failed: Vec<ContainerUpdate>) -> Result<()> {
    match failed.iter().find(|update| !update.ignore_failure) {
        None => Ok(()),
        Some(update) => Err(Error::new(
            Kind::Precondition,
            format!("NRI: the update of container {} that plugins ask for failed; the log has the reason", update.container_id),
        )),
    }
}

/// Stops containers as plugins ask, beside whatever goes on.
pub(super) fn evict(node: &Arc<Node>, evictions: Vec<ContainerEviction>, plugin: &Plugin) {
    for eviction in evictions {
        let container = match named(node, &eviction.container_id) {
            Ok(container) => container,
            Err(error) => {
                tracing::warn!(%plugin, %error, "NRI eviction");
                continue;
            }
        };
        tracing::info!(%plugin, container = %container.id, reason = %eviction.reason, "NRI plugin evicts a container");
        let node = node.clone();
        tokio::spawn(async move {
            if let Err(error) = container::stop(&node, &container, EVICTION_GRACE).await {
                tracing::warn!(container = %container.id, %error, "NRI eviction");
            }
        });
    }
}
