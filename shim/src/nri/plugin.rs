//! One plugin: who it is, what it wants to be told, and how it is asked. It is asked one thing at a time, in the order in which things
//! happen, as plugins are used to. One that does not answer in time is let go, unless it has said that it is to be kept: then nobody waits
//! for it until its answer has come.

use super::{
    event::{self, Relayed},
    launch::Launched,
    ttrpc::{CallError, Connection, INVALID_ARGUMENT, Incoming, UNIMPLEMENTED},
};
use crate::error::{Error, Kind, Result};
use prost::Message;
use std::{collections::BTreeSet, fmt, sync::Mutex, time::Duration};
use tokio::{
    net::UnixStream,
    sync::{MutexGuard, mpsc},
    time::{Instant, timeout, timeout_at},
};
use windlass_proto::{
    nri::{
        ConfigureRequest, ConfigureResponse, Container, ContainerUpdate, Empty, Event, FailurePolicy, PodSandbox,
        RegisterPluginRequest, StateChangeEvent, SynchronizeRequest, SynchronizeResponse,
    },
    ttrpc::Status,
};

const SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
const RUNTIME_SERVICE: &str = "nri.pkg.api.v1alpha1.Runtime";

/// The version of the interface that is served.
const NRI_VERSION: &str = "v0.12.5";

/// Every event that there is.
const ALL_EVENTS: i32 = (1 << (Event::Last as i32 - 1)) - 1;

/// Requests before one that waits for its turn, each as long as it may be.
const TURNS_MAX: u32 = 10;

/// Pods and containers of one Synchronize that are not divided any further.
const OBJECTS_MIN: usize = 8;

/// Longest name of a plugin.
const NAME_MAX_BYTES: usize = 128;

const POISON: &str = "never poisoned: no panic while held";

/// How long a plugin may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// To register, and to take in what there is: more than an event is.
    pub(super) registration: Duration,
    pub(super) request: Duration,
}

impl Limits {
    /// Longest wait for a plugin's turn: it takes in what there is, then answers others.
    fn turn(&self) -> Duration {
        self.registration.saturating_add(self.request.saturating_mul(TURNS_MAX))
    }
}

/// A plugin that has registered.
pub(super) struct Plugin {
    /// Two digits: the order in which plugins are asked.
    pub(super) index: String,
    pub(super) name: String,
    connection: Connection,
    events: i32,
    policy: FailurePolicy,
    limits: Limits,
    /// Events whose own method it does not have: a plugin of an interface before 0.12, which is told of them by StateChange.
    without: Mutex<BTreeSet<Event>>,
    /// Held while it is asked.
    turn: tokio::sync::Mutex<()>,
    /// Kept: the process ends with the plugin.
    _process: Option<Launched>,
}

/// What a plugin must say before anything else, and what it is called then.
pub(super) struct Registering {
    connection: Connection,
    requests: mpsc::Receiver<Incoming>,
    process: Option<Launched>,
}

impl Registering {
    pub(super) fn over(socket: UnixStream, process: Option<Launched>) -> Registering {
        let (connection, requests) = Connection::over(socket);
        Registering { connection, requests, process }
    }

    /// Waits for RegisterPlugin, then configures the plugin. Also what it asks from now on.
    pub(super) async fn done(mut self, limits: Limits) -> Result<(Plugin, mpsc::Receiver<Incoming>), String> {
        let registered = timeout(limits.registration, self.registered()).await;
        let (index, name) = registered.map_err(|_| format!("it did not register in {:?}", limits.registration))??;
        let config = self.process.as_ref().map(|process| process.config.clone()).unwrap_or_default();
        let milliseconds = |limit: Duration| i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        let request = ConfigureRequest {
            config,
            runtime_name: "windlass".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            registration_timeout: milliseconds(limits.registration),
            request_timeout: milliseconds(limits.request),
            nri_version: NRI_VERSION.into(),
        };
        let configured = self.connection.call((SERVICE, "Configure"), &request, limits.request).await;
        let reply: ConfigureResponse = configured.map_err(|error| format!("{index}-{name}: Configure: {error}"))?;
        let events = if reply.events == 0 { ALL_EVENTS } else { reply.events };
        if events & !ALL_EVENTS != 0 {
            return Err(format!("{index}-{name}: it subscribes for events that there are not, {:#x}", events & !ALL_EVENTS));
        }
        let plugin = Plugin {
            index,
            name,
            connection: self.connection,
            events,
            policy: reply.failure_policy.unwrap_or_default(),
            limits,
            without: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
            _process: self.process,
        };
        Ok((plugin, self.requests))
    }

    /// Index and name: those of a launched plugin's file, else those that it gives itself.
    async fn registered(&mut self) -> Result<(String, String), String> {
        loop {
            let Some(incoming) = self.requests.recv().await else {
                return Err("the connection ended before it registered".into());
            };
            let asked = (incoming.request.service.as_str(), incoming.request.method.as_str());
            if asked != (RUNTIME_SERVICE, "RegisterPlugin") {
                let why = format!("{}/{} comes before RegisterPlugin", asked.0, asked.1);
                self.connection.answer(&incoming, Err(Status { code: UNIMPLEMENTED, message: why })).await;
                continue;
            }
            let request = RegisterPluginRequest::decode(incoming.request.payload.as_slice());
            let request = request.map_err(|error| format!("RegisterPlugin: {error}"))?;
            let found = match &self.process {
                Some(process) => Ok((process.index.clone(), process.name.clone())),
                None => check_name(&request.plugin_idx, &request.plugin_name)
                    .map(|()| (request.plugin_idx.clone(), request.plugin_name.clone())),
            };
            match found {
                Ok(found) => {
                    self.connection.answer(&incoming, Ok(Empty {}.encode_to_vec())).await;
                    return Ok(found);
                }
                Err(why) => {
                    self.connection.answer(&incoming, Err(Status { code: INVALID_ARGUMENT, message: why.clone() })).await;
                    return Err(why);
                }
            }
        }
    }
}

/// Refuses an index that is not two digits, and a name that is not letters, digits, `_`, `.`, `+` and `-`.
pub(super) fn check_name(index: &str, name: &str) -> Result<(), String> {
    if index.len() != 2 || !index.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("plugin index {index:?} is not two digits"));
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.+-".contains(&byte);
    if name.is_empty() || name.len() > NAME_MAX_BYTES || !name.bytes().all(plain) {
        let shown: String = name.chars().take(80).collect();
        return Err(format!("plugin name {shown:?} is not 1 to {NAME_MAX_BYTES} letters, digits, _ . + and -"));
    }
    Ok(())
}

impl fmt::Display for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.index, self.name)
    }
}

impl Plugin {
    pub(super) fn wants(&self, event: Event) -> bool {
        self.events & (1 << (event as i32 - 1)) != 0
    }

    pub(super) fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    /// Lets it go.
    pub(super) fn close(&self) {
        self.connection.close();
    }

    pub(super) async fn answer(&self, to: &Incoming, outcome: Result<Vec<u8>, Status>) {
        self.connection.answer(to, outcome).await;
    }

    /// Keeps it from being asked anything else.
    pub(super) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// Tells it what happens and takes its word on it. Nothing where it does not want to know, and where it fails and the request may
    /// go on without it.
    ///
    /// # Errors
    /// It refuses; it failed or is gone, and has said that the request shall fail then or is a validator; it is asked for its word with
    /// more than a message takes.
    pub(super) async fn tell<Q: Relayed>(&self, request: &Q) -> Result<Option<Q::Reply>> {
        if !self.wants(Q::EVENT) {
            return Ok(None);
        }
        let limit = self.limits.turn();
        let answer = match timeout(limit, self.turn()).await {
            Ok(_turn) => self.ask(request).await,
            Err(_) => Err(CallError::Busy(limit)),
        };
        match answer {
            Ok(reply) => Ok(Some(reply)),
            Err(CallError::Refused(status)) => Err(self.refusal(Q::METHOD, &status.message)),
            Err(error) => {
                self.failed(Q::METHOD, &error);
                // Nobody can say yes for a validator; and who writes a pod does not choose which plugins are asked, by its size.
                let needed = match error {
                    CallError::TooLarge(_) => event::asked(Q::EVENT),
                    _ => self.policy.fail_request || Q::EVENT == Event::ValidateContainerAdjustment,
                };
                if needed { Err(self.refusal(Q::METHOD, &error)) } else { Ok(None) }
            }
        }
    }

    fn refusal(&self, method: &str, why: &dyn fmt::Display) -> Error {
        Error::new(Kind::Precondition, format!("NRI plugin {self}: {method}: {why}"))
    }

    fn failed(&self, method: &str, error: &CallError) {
        let kept = match error {
            CallError::Timeout(_) => self.policy.keep_connected,
            CallError::TooLarge(_) | CallError::Late | CallError::Busy(_) => true,
            CallError::Closed | CallError::Protocol(_) | CallError::Refused(_) => false,
        };
        if kept || self.is_closed() {
            tracing::warn!(plugin = %self, method, %error, "NRI plugin not asked");
            return;
        }
        tracing::error!(plugin = %self, method, %error, "NRI plugin let go");
        self.close();
    }

    async fn ask<Q: Relayed>(&self, request: &Q) -> Result<Q::Reply, CallError> {
        if !self.without.lock().expect(POISON).contains(&Q::EVENT) {
            let reply = self.connection.call((SERVICE, Q::METHOD), request, self.limits.request).await;
            match (&reply, request.subject()) {
                (Err(CallError::Refused(status)), Some(_)) if status.code == UNIMPLEMENTED => {
                    self.without.lock().expect(POISON).insert(Q::EVENT);
                }
                _ => return reply,
            }
        }
        let (pod, container) = request.subject().unwrap_or_default();
        let event = StateChangeEvent { event: Q::EVENT.into(), pod, container };
        let _: Empty = self.connection.call((SERVICE, "StateChange"), &event, self.limits.request).await?;
        Ok(Q::Reply::default())
    }

    /// Tells it of everything that there is, in as many messages as that takes; what it wants changed. The caller holds its turn.
    pub(super) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<Vec<ContainerUpdate>, String> {
        let limit = self.limits.registration;
        let deadline = Instant::now() + limit;
        let told = timeout_at(deadline, self.synchronize_until(deadline, pods, containers)).await;
        told.unwrap_or_else(|_| Err(format!("Synchronize: not done in {limit:?}")))
    }

    async fn synchronize_until(
        &self,
        deadline: Instant,
        mut pods: Vec<PodSandbox>,
        mut containers: Vec<Container>,
    ) -> Result<Vec<ContainerUpdate>, String> {
        let (mut pods_each, mut containers_each) = (pods.len(), containers.len());
        loop {
            let these = pods.drain(..pods_each.min(pods.len())).collect();
            let those = containers.drain(..containers_each.min(containers.len())).collect();
            let more = !pods.is_empty() || !containers.is_empty();
            let request = SynchronizeRequest { pods: these, containers: those, more };
            let rest = deadline.saturating_duration_since(Instant::now());
            let reply: Result<SynchronizeResponse, _> = self.connection.call((SERVICE, "Synchronize"), &request, rest).await;
            match reply {
                Ok(reply) if !request.more => return Ok(reply.update),
                Ok(reply) if reply.more && reply.update.is_empty() => {}
                Ok(_) => return Err("it does not take what there is in several messages".into()),
                Err(CallError::TooLarge(_)) if request.pods.len() + request.containers.len() > OBJECTS_MIN => {
                    (pods_each, containers_each) = (request.pods.len().div_ceil(2), request.containers.len().div_ceil(2));
                    pods.splice(..0, request.pods);
                    containers.splice(..0, request.containers);
                }
                Err(error) => return Err(format!("Synchronize: {error}")),
            }
        }
    }

    /// Tells it that the daemon ends. It need not be there.
    pub(super) async fn shut_down(&self) {
        let told: Result<Empty, _> = self.connection.call((SERVICE, "Shutdown"), &Empty {}, self.limits.request).await;
        if let Err(error) = told {
            tracing::debug!(plugin = %self, %error, "Shutdown");
        }
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_indices() {
        check_name("00", "device-injector").expect("good");
        check_name("99", "a_B.c+1").expect("good");
        for (index, name) in
            [("0", "a"), ("000", "a"), ("x1", "a"), ("00", ""), ("00", "a b"), ("00", "a/b"), ("00", &"a".repeat(129))]
        {
            check_name(index, name).expect_err("bad");
        }
    }
}
