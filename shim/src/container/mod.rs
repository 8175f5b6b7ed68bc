//! Containers: their record, their state and what may happen to it.
//!
//! ```text
//!             create             start
//! (nothing) ---------> Created ---------> Running
//!                         \ start fails      | its first process ends, or its monitor is lost
//!                          `--> Exited <-----'        Exited --remove--> (nothing)
//! ```

mod create;
mod declared;
mod ending;
pub mod exec;
mod identity;
mod image_volume;
mod life;
mod lookup;
mod spec;
pub mod stream;
mod update;

pub use create::create;
pub(crate) use create::restore;
pub(crate) use declared::directory as declared_volumes;
pub use life::{end_again, remove, reopen_log, resume_start, start, stop};
pub use lookup::Lookups;
pub(crate) use spec::{annotations_of_pod, missing_controllers, overlay, refuse_missing, resources as limits};
pub use update::{merge, update, update_to};

use crate::{
    error::Result,
    events::EventKind,
    image::Lease,
    log::names::{self, Known},
    node::Node,
    nri::{self, Told},
    pod, store, telemetry,
};
use ending::Ending;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    sync::Mutex,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use windlass_proto::{
    cri::{ContainerConfig, LinuxContainerUser, NamespaceOption},
    monitor::{self, ContainerState},
};

/// A container as its record keeps it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    pub pod_id: String,
    pub config: ContainerConfig,
    /// Config digest of the image.
    pub image_id: String,
    /// Repository digest of the image, its id when it has none.
    pub image_ref: String,
    /// What a person calls the image.
    pub image_name: String,
    /// Layers that this container holds.
    pub chain_ids: Vec<String>,
    /// Absolute path of the log; empty keeps none.
    pub log_path: String,
    pub user: LinuxContainerUser,
    /// Signal number that a stop begins with.
    pub stop_signal: i32,
    /// A stop has sent it.
    #[serde(default)]
    pub stop_signal_sent: bool,
    /// Limits that were asked for and that this host does not enforce.
    pub not_enforced: Vec<String>,
    /// Limits that the CRI has no field for, as the last updates set them: `linux.resources` of OCI.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub more_limits: Value,
    pub created_at_ns: i64,
    /// Its processes come from a checkpoint.
    #[serde(default)]
    pub from_checkpoint: bool,
    pub state: State,
}

/// Where a container is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Created { pid: i32 },
    Running { pid: i32, started_at_ns: i64 },
    Exited { started_at_ns: i64, exit: Exit, reason: String, message: String },
}

impl State {
    /// When its process was started, in nanoseconds since 1970; 0 before.
    pub fn started_at_ns(&self) -> i64 {
        match self {
            State::Created { .. } => 0,
            State::Running { started_at_ns, .. } | State::Exited { started_at_ns, .. } => *started_at_ns,
        }
    }

    /// How its process ended, and the reason and the message of that, once it has.
    pub fn end(&self) -> Option<(Exit, &str, &str)> {
        match self {
            State::Exited { exit, reason, message, .. } => Some((*exit, reason, message)),
            State::Created { .. } | State::Running { .. } => None,
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub code: i32,
    #[serde(default)]
    pub oom_killed: bool,
    pub finished_at_ns: i64,
}

const POISON: &str = "never poisoned: no panic while held";

impl Exit {
    /// The exit of a process whose end nobody saw.
    pub fn unknown(finished_at_ns: i64) -> Exit {
        Exit { code: 255, oom_killed: false, finished_at_ns }
    }

    fn reason(&self) -> &'static str {
        match (self.oom_killed, self.code) {
            (true, _) => "OOMKilled",
            (false, 0) => "Completed",
            (false, _) => "Error",
        }
    }
}

/// A monitor's exit as the daemon's.
pub fn exit_of(exit: monitor::Exit) -> Exit {
    Exit { code: exit.code, oom_killed: exit.oom_killed, finished_at_ns: exit.finished_at_ns }
}

/// The exit that a monitor wrote down before it went, if it did.
pub fn recorded_exit(node: &Node, pod_id: &str, container_id: &str) -> Option<Exit> {
    store::read(&node.run_directory(pod_id).join("exits").join(format!("{container_id}.json"))).unwrap_or_else(|error| {
        tracing::error!(pod = %pod_id, container = %container_id, %error, "exit not known");
        None
    })
}

/// A container of this node.
pub struct Container {
    pub id: String,
    pub pod_id: String,
    /// The published record; waiting for a change waits here.
    record: watch::Sender<Record>,
    /// Keeps the image's layers from being deleted.
    _lease: Lease,
    /// Held by the one transition that is under way.
    pub turn: tokio::sync::Mutex<()>,
    path: PathBuf,
    /// Held by the one change of its limits that is under way: apart from `turn`, so that a plugin of NRI may change them in a start.
    limits: tokio::sync::Mutex<()>,
    /// Held by the stop that sends the signal.
    stopping: tokio::sync::Mutex<()>,
    /// Serialises writers of the record.
    writing: Mutex<()>,
    /// Whether its start has been told; held while it is told.
    started_told: Mutex<bool>,
    ending: Ending,
    /// Whether plugins of NRI have been told that it has ended.
    pub(crate) end_told: Told,
    /// Cancelled when the one client that its input was for has ended it.
    input_ended: CancellationToken,
    _names: Known,
}

impl Container {
    fn new(node: &Node, record: Record, lease: Lease) -> Container {
        Container {
            id: record.id.clone(),
            pod_id: record.pod_id.clone(),
            _names: names::learn(&record.id, || vec![("container_name", record.name().to_owned())]),
            path: node.container_directory(&record.id).join("record.json"),
            ending: Ending::new(matches!(record.state, State::Exited { .. })),
            end_told: Told::new(matches!(record.state, State::Exited { .. })),
            record: watch::Sender::new(record),
            _lease: lease,
            turn: tokio::sync::Mutex::new(()),
            limits: tokio::sync::Mutex::new(()),
            stopping: tokio::sync::Mutex::new(()),
            writing: Mutex::new(()),
            started_told: Mutex::new(false),
            input_ended: CancellationToken::new(),
        }
    }

    /// A container whose record an earlier daemon wrote.
    pub fn restored(node: &Node, record: Record) -> Container {
        let lease = node.images.lease_layers(&record.chain_ids);
        Container::new(node, record, lease)
    }

    /// A copy of the record as it is now.
    pub fn record(&self) -> Record {
        self.record.borrow().clone()
    }

    /// Looks at the record without copying it.
    pub fn look<T>(&self, view: impl FnOnce(&Record) -> T) -> T {
        view(&self.record.borrow())
    }

    /// Changes the record, on disk first.
    pub fn change(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let _writing = self.writing.lock().expect(POISON);
        let mut next = self.record();
        change(&mut next);
        store::write(&self.path, &next)?;
        self.record.send_replace(next);
        Ok(())
    }

    /// Changes the published record even when the disk is full: what has ended must not look alive.
    fn change_always(&self, change: impl Fn(&mut Record)) {
        if let Err(error) = self.change(&change) {
            tracing::error!(container = %self.id, %error, "container record not written");
            self.record.send_modify(&change);
        }
    }

    /// Publishes that the container has ended. A second word on the same end changes nothing, and one that comes in the middle of a start
    /// waits for the start's own outcome.
    pub fn exited(&self, node: &Node, exit: Exit) {
        self.ending.exited(exit, |exit| self.publish_end(node, exit));
    }

    fn publish_end(&self, node: &Node, exit: Exit) {
        let started_at_ns = self.look(|record| match record.state {
            State::Running { started_at_ns, .. } => started_at_ns,
            _ => 0,
        });
        telemetry::EXITS.add(1);
        telemetry::OOM_KILLS.add(u64::from(exit.oom_killed));
        let state = State::Exited { started_at_ns, exit, reason: exit.reason().into(), message: String::new() };
        self.change_always(|record| record.state = state.clone());
        tracing::info!(pod = %self.pod_id, container = %self.id, code = exit.code, oom_killed = exit.oom_killed, "container exited");
        self.tell_stopped(node);
    }

    /// Tells that it runs, once.
    fn tell_started(&self, node: &Node) {
        let mut told = self.started_told.lock().expect(POISON);
        if let (false, Ok(pod)) = (*told, node.pod(&self.pod_id)) {
            *told = true;
            node.tell(&pod, &self.id, EventKind::ContainerStartedEvent);
        }
    }

    /// Tells that it has ended; its start comes first, however soon the end came.
    fn tell_stopped(&self, node: &Node) {
        node.stats.ended(&self.id);
        if let Ok(pod) = node.pod(&self.pod_id) {
            node.stats.note_ended(node, &pod, &self.id, &mut pod.ended());
        }
        let started = self.look(|record| matches!(record.state, State::Exited { started_at_ns, .. } if started_at_ns != 0));
        if started {
            self.tell_started(node);
        }
        if let Ok(pod) = node.pod(&self.pod_id) {
            node.tell(&pod, &self.id, EventKind::ContainerStoppedEvent);
        }
        nri::container_ends(node, self);
    }

    /// Takes over what a monitor says of a container that has not ended.
    pub fn adopt(&self, state: &ContainerState) {
        if state.phase() != monitor::container_state::Phase::Running || self.is_exited() {
            return;
        }
        let pid = state.pid;
        self.change_always(|record| {
            // The time that was told before goes over the monitor's, which is a moment later.
            let started_at_ns = match record.state {
                State::Running { started_at_ns, .. } => started_at_ns,
                _ => state.started_at_ns,
            };
            record.state = State::Running { pid, started_at_ns };
        });
    }

    pub fn is_running(&self) -> bool {
        self.look(|record| matches!(record.state, State::Running { .. }))
    }

    pub fn is_exited(&self) -> bool {
        self.look(|record| matches!(record.state, State::Exited { .. }))
    }

    /// Waits until the container has ended.
    pub async fn wait_exited(&self) {
        let mut receiver = self.record.subscribe();
        // The sender lives in self, so this ends only by the condition.
        let _ = receiver.wait_for(|record| matches!(record.state, State::Exited { .. })).await;
    }
}

impl Record {
    /// Which namespaces are its own: what it asks for, else what its pod does.
    pub fn namespaces(&self, pod: &pod::Record) -> NamespaceOption {
        let security = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        security.and_then(|security| security.namespace_options.clone()).unwrap_or_else(|| pod::namespace_modes(&pod.config))
    }

    /// Name within the pod.
    pub fn name(&self) -> &str {
        self.config.metadata.as_ref().map(|meta| meta.name.as_str()).unwrap_or_default()
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
