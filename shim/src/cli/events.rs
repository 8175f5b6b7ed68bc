//! `windlass events`: what happens to pods and containers, as it happens.

use super::{
    Place,
    client::{Client, answer, told},
    output::{Format, json, line, moment, short},
};
use crate::error::{Error, Kind, Result};
use clap::Args;
use windlass_proto::cri::{self, ContainerEventType};

/// `windlass events ...`
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: Place,
    /// Only of pods of this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// How to print events
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// Follows until the daemon ends or leaves us behind.
pub(super) async fn run(options: Options) -> Result<()> {
    let (_, mut client) = Client::of(options.place.clone()).await?;
    let mut events = answer(client.runtime.get_container_events(cri::GetEventsRequest::default())).await?;
    while let Some(event) = events.message().await.map_err(|status| told(&status))? {
        let meta = event.pod_sandbox_status.as_ref().and_then(|status| status.metadata.clone()).unwrap_or_default();
        if options.namespace.as_ref().is_some_and(|namespace| *namespace != meta.namespace) {
            continue;
        }
        match options.format {
            Format::Json => json(&event)?,
            Format::Text => line(told_in_words(&event, &meta))?,
        }
    }
    Err(Error::new(Kind::Unavailable, "the daemon has ended; pods go on running, and `windlass events` follows the next daemon"))
}

fn told_in_words(event: &cri::ContainerEventResponse, meta: &cri::PodSandboxMetadata) -> String {
    let what = match event.container_event_type() {
        ContainerEventType::ContainerCreatedEvent => "created",
        ContainerEventType::ContainerStartedEvent => "started",
        ContainerEventType::ContainerStoppedEvent => "stopped",
        ContainerEventType::ContainerDeletedEvent => "removed",
    };
    let (when, pod) = (moment(event.created_at), format!("{}/{}", meta.namespace, meta.name));
    let status = event.containers_statuses.iter().find(|status| status.id == event.container_id);
    let name = status.and_then(|status| status.metadata.as_ref()).map(|meta| meta.name.as_str());
    let of_pod = event.pod_sandbox_status.as_ref().is_some_and(|status| status.id == event.container_id);
    let object = match (of_pod, name) {
        (true, _) => format!("pod {pod}"),
        (false, Some(name)) => format!("container {pod}/{name}"),
        (false, None) => format!("container of {pod}"),
    };
    let exit = status.filter(|status| what == "stopped" && status.state() == cri::ContainerState::ContainerExited);
    let exit = exit.map(|status| format!(", code {} {}", status.exit_code, status.reason)).unwrap_or_default();
    format!("{when} {what:<7} {object} {}{exit}", short(&event.container_id))
}
