//! The daemon as the other commands ask it: over its CRI socket, as kubelet does.

use super::{
    Place,
    output::{safe, short},
};
use crate::{
    config::Config,
    error::{Error, Kind, Result},
};
use std::{collections::HashMap, fmt, future::Future, path::Path, time::Duration};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};
use windlass_proto::cri::{self, runtime_service_client::RuntimeServiceClient};

/// Longest wait for an answer: a daemon that is stuck shall not look like one that thinks.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Largest message of the daemon, as in `cri`.
const MESSAGE_LIMIT_BYTES: usize = 16 << 20;

/// A connection to a running daemon.
pub(super) struct Client {
    pub(super) runtime: RuntimeServiceClient<Channel>,
    pub(super) channel: Channel,
}

/// A pod or a container, as a person named it.
#[derive(Debug, Clone)]
pub(super) enum Object {
    Pod(cri::PodSandbox),
    Container(cri::Container),
}

/// The answer to a call, or why there is none.
pub(super) async fn answer<T>(call: impl Future<Output = std::result::Result<Response<T>, Status>>) -> Result<T> {
    match tokio::time::timeout(ANSWER_LIMIT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(told(&status)),
        Err(_) => Err(Error::new(
            Kind::Deadline,
            format!("the daemon gave no answer in {} s; its log says more: journalctl -u windlass", ANSWER_LIMIT.as_secs()),
        )),
    }
}

/// A call's failure in the words of the daemon.
pub(super) fn told(status: &Status) -> Error {
    let kind = match status.code() {
        tonic::Code::NotFound => Kind::NotFound,
        tonic::Code::InvalidArgument => Kind::Invalid,
        _ => Kind::Internal,
    };
    Error::new(kind, status.message())
}

/// One answer of a verbose reply.
pub(super) fn parsed(info: &HashMap<String, String>, key: &str) -> serde_json::Value {
    info.get(key).and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

impl Client {
    /// Connects to the daemon of this configuration.
    pub(super) async fn connect(config: &Config) -> Result<Client> {
        let socket = config.socket.display();
        let failed = |why: String| {
            let next = match std::os::unix::net::UnixStream::connect(&config.socket) {
                Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => "the socket is root's: use sudo",
                _ => {
                    "start it (systemctl start windlass), or name its socket by --socket or --state; `windlass doctor` looks further"
                }
            };
            Error::new(Kind::Unavailable, format!("no daemon answers at {socket} ({why}): {next}"))
        };
        let endpoint = Endpoint::try_from(format!("unix:{socket}")).map_err(|error| failed(error.to_string()))?;
        let connected = tokio::time::timeout(ANSWER_LIMIT, endpoint.connect()).await;
        let channel = connected.map_err(|_| failed("timeout".into()))?.map_err(|error| failed(cause(&error)))?;
        let runtime = RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MESSAGE_LIMIT_BYTES);
        Ok(Client { runtime, channel })
    }

    /// Connects to the daemon of this place, with its configuration. A root that is said must be that daemon's: it leads to no socket.
    pub(super) async fn of(place: Place) -> Result<(Config, Client)> {
        let named = place.root.clone();
        let config = place.load()?;
        let mut client = Client::connect(&config).await?;
        if let Some(named) = named {
            let status = answer(client.runtime.status(cri::StatusRequest { verbose: true })).await?;
            let running = parsed(&status.info, "config");
            let running = running["root"].as_str().unwrap_or_default();
            if Path::new(running) != named {
                return Err(Error::precondition(format!(
                    "the daemon at {} has root {running:?}, not {:?}; name its socket by --socket or --state",
                    config.socket.display(),
                    named.display()
                )));
            }
        }
        Ok((config, client))
    }

    /// All pods.
    pub(super) async fn pods(&mut self) -> Result<Vec<cri::PodSandbox>> {
        Ok(answer(self.runtime.list_pod_sandbox(cri::ListPodSandboxRequest::default())).await?.items)
    }

    /// All containers.
    pub(super) async fn containers(&mut self) -> Result<Vec<cri::Container>> {
        Ok(answer(self.runtime.list_containers(cri::ListContainersRequest::default())).await?.containers)
    }

    /// A pod with its containers and what the daemon keeps of it.
    pub(super) async fn pod(&mut self, id: &str) -> Result<cri::PodSandboxStatusResponse> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: true };
        answer(self.runtime.pod_sandbox_status(request)).await
    }

    /// The same; nothing where the pod has gone.
    pub(super) async fn pod_if_there(&mut self, id: &str) -> Result<Option<cri::PodSandboxStatusResponse>> {
        match self.pod(id).await {
            Err(error) if error.kind == Kind::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    /// A container and what the daemon keeps of it.
    pub(super) async fn container(&mut self, id: &str) -> Result<(cri::ContainerStatus, serde_json::Value)> {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: true };
        let reply = answer(self.runtime.container_status(request)).await?;
        let info = parsed(&reply.info, "info");
        Ok((reply.status.unwrap_or_default(), info))
    }

    /// What is meant by a beginning of an id, by `NAMESPACE/POD`, `NAMESPACE/POD/CONTAINER`, or by the name of a pod. Of several pods or
    /// containers with that name it is the latest.
    pub(super) async fn find(&mut self, word: &str) -> Result<Object> {
        let (pods, containers) = (self.pods().await?, self.containers().await?);
        choose(word, &pods, &containers)
    }

    /// The container that is meant: a pod stands for its only one.
    pub(super) async fn find_container(&mut self, word: &str) -> Result<cri::Container> {
        let (pods, containers) = (self.pods().await?, self.containers().await?);
        let pod = match choose(word, &pods, &containers)? {
            Object::Container(container) => return Ok(container),
            Object::Pod(pod) => pod,
        };
        let own = containers.into_iter().filter(|container| container.pod_sandbox_id == pod.id);
        let mut latest: HashMap<String, cri::Container> = HashMap::new();
        for container in own {
            let name = container.metadata.clone().unwrap_or_default().name;
            match latest.get(&name) {
                Some(other) if other.created_at >= container.created_at => {}
                _ => drop(latest.insert(name, container)),
            }
        }
        let full = pod_name(&pod);
        let mut names: Vec<String> = latest.keys().map(|name| format!("{full}/{name}")).collect();
        names.sort();
        match (latest.len(), latest.into_values().next()) {
            (1, Some(container)) => Ok(container),
            (0, _) => Err(Error::not_found(format!("pod {full} has no container"))),
            _ => Err(Error::invalid(format!("pod {full} has several containers; name one of {}", names.join(", ")))),
        }
    }
}

/// The innermost cause of a failed connection.
fn cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// `NAMESPACE/NAME`.
pub(super) fn pod_name(pod: &cri::PodSandbox) -> String {
    let meta = pod.metadata.clone().unwrap_or_default();
    format!("{}/{}", meta.namespace, meta.name)
}

fn choose(word: &str, pods: &[cri::PodSandbox], containers: &[cri::Container]) -> Result<Object> {
    if word.is_empty() {
        return Err(Error::invalid("an empty word names nothing: give the beginning of an id, or NAMESPACE/POD"));
    }
    let names: HashMap<&str, String> = pods.iter().map(|pod| (pod.id.as_str(), pod_name(pod))).collect();
    let container_name = |container: &cri::Container| {
        let pod = names.get(container.pod_sandbox_id.as_str()).cloned().unwrap_or_default();
        format!("{pod}/{}", container.metadata.clone().unwrap_or_default().name)
    };
    let named_pod = pods.iter().filter(|pod| {
        let full = pod_name(pod);
        full == word || full.rsplit_once('/').is_some_and(|(_, name)| name == word)
    });
    // Who names pods may name one as another's id begins: only a whole id is beyond doubt.
    if let Some(pod) = pods.iter().find(|pod| pod.id == word) {
        return Ok(Object::Pod(pod.clone()));
    }
    if let Some(container) = containers.iter().find(|container| container.id == word) {
        return Ok(Object::Container(container.clone()));
    }
    let named_pod = unique_name(named_pod.map(|pod| (pod_name(pod), pod.created_at, pod)), word)?;
    let named = containers.iter().filter(|container| container_name(container) == word);
    if let Some(container) = named.max_by_key(|container| container.created_at) {
        return Ok(Object::Container(container.clone()));
    }
    let by_id = pods
        .iter()
        .filter(|pod| pod.id.starts_with(word))
        .map(|pod| (format!("pod {} {}", short(&pod.id), pod_name(pod)), Object::Pod(pod.clone())));
    let also = containers.iter().filter(|container| container.id.starts_with(word)).map(|container| {
        (format!("container {} {}", short(&container.id), container_name(container)), Object::Container(container.clone()))
    });
    let mut found: Vec<(String, Object)> = by_id.chain(also).collect();
    if let Some(pod) = named_pod {
        found.retain(|(_, object)| !matches!(object, Object::Pod(other) if other.id == pod.id));
        found.push((format!("pod {} {}", short(&pod.id), pod_name(pod)), Object::Pod(pod.clone())));
    }
    match found.len() {
        0 => Err(Error::not_found(format!("there is no pod or container {word:?}; `windlass ps` shows what there is"))),
        1 => Ok(found.remove(0).1),
        _ => Err(ambiguous(word, found.iter().map(|(text, _)| text.as_str()))),
    }
}

/// The latest of those that have one name; an error if they have several.
fn unique_name<'a, T>(named: impl Iterator<Item = (String, i64, &'a T)>, word: &str) -> Result<Option<&'a T>> {
    let named: Vec<_> = named.collect();
    if let Some((first, ..)) = named.first()
        && named.iter().any(|(name, ..)| name != first)
    {
        return Err(ambiguous(word, named.iter().map(|(name, ..)| name.as_str())));
    }
    Ok(named.into_iter().max_by_key(|(_, created_at, _)| *created_at).map(|(.., found)| found))
}

fn ambiguous<'a>(word: &str, candidates: impl Iterator<Item = impl fmt::Display + 'a>) -> Error {
    let list: String = candidates.map(|candidate| format!("\n  {}", safe(&candidate.to_string(), &[]))).collect();
    Error::invalid(format!("{word:?} may mean any of these; give more of it:{list}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, namespace: &str, name: &str, created_at: i64) -> cri::PodSandbox {
        let metadata = cri::PodSandboxMetadata { name: name.into(), namespace: namespace.into(), ..Default::default() };
        cri::PodSandbox { id: id.into(), metadata: Some(metadata), created_at, ..Default::default() }
    }

    fn container(id: &str, pod: &str, name: &str, created_at: i64) -> cri::Container {
        let metadata = Some(cri::ContainerMetadata { name: name.into(), attempt: 0 });
        cri::Container { id: id.into(), pod_sandbox_id: pod.into(), metadata, created_at, ..Default::default() }
    }

    #[test]
    fn one_object_is_meant_or_the_candidates_are_told() {
        let pods = [
            pod("aa1", "default", "web", 1),
            pod("aa2", "default", "web", 2),
            pod("b1", "other", "db", 3),
            pod("b2", "x", "db", 4),
            pod("d1", "x", "c", 5),
            pod("d2", "x", "c1", 5),
            pod("d3", "x", "d3", 5),
        ];
        let containers = [container("c1", "aa2", "main", 1), container("c2", "aa2", "main", 2), container("b9", "b1", "main", 2)];
        for (word, expected) in [
            ("aa1", Ok("aa1")),
            ("default/web", Ok("aa2")),
            ("web", Ok("aa2")),
            ("default/web/main", Ok("c2")),
            ("c1", Ok("c1")),
            ("x/db", Ok("b2")),
            ("db", Err("other/db\n  x/db")),
            ("aa", Err("pod aa1 default/web\n  pod aa2 default/web")),
            ("b", Err("container b9 other/db/main")),
            ("c", Err("container c2 default/web/main\n  pod d1 x/c")),
            ("d3", Ok("d3")),
            ("x/c1", Ok("d2")),
            ("zz", Err("windlass ps")),
            ("", Err("NAMESPACE/POD")),
        ] {
            let found = choose(word, &pods, &containers).map(|object| match object {
                Object::Pod(pod) => pod.id,
                Object::Container(container) => container.id,
            });
            match (found, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{word:?}"),
                (Err(error), Err(part)) => assert!(error.message.contains(part), "{word:?}: {error}"),
                (found, _) => panic!("{word:?}: {found:?}"),
            }
        }
    }
}
