//! Events: every step of a pod's life in order, and the end of the stream with the daemon's.

use anyhow::{Context, Result, ensure};
use std::time::Duration;
use tokio_stream::StreamExt;
use tonic::transport::Endpoint;
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    node,
};
use windlass_proto::cri::{self, ContainerEventType as Kind, runtime_service_client::RuntimeServiceClient};

/// Longest wait for the next event.
const EVENT_LIMIT: Duration = Duration::from_secs(60);

async fn events_of(daemon: &Daemon) -> Result<tonic::Streaming<cri::ContainerEventResponse>> {
    let address = format!("unix://{}", daemon.socket().display());
    let mut client = RuntimeServiceClient::new(Endpoint::from_shared(address)?.connect().await?);
    Ok(client.get_container_events(cri::GetEventsRequest {}).await?.into_inner())
}

#[test]
fn events_tell_a_pods_life_in_order_and_end_with_the_daemon() {
    node::run(|| {
        let mut daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let mut events = runtime.block_on(events_of(&daemon))?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        // It ends at once, so that its start and its end are hard to keep in order.
        let created = client.create(&id, &config, &container(&config, "short", &["true"]))?;
        client.start(&created)?;
        let mut next = || -> Result<cri::ContainerEventResponse> {
            let event = runtime.block_on(async { tokio::time::timeout(EVENT_LIMIT, events.next()).await });
            Ok(event.context("an event in time")?.context("the stream goes on")??)
        };
        let mut seen = Vec::new();
        for _ in 0..5 {
            let event = next()?;
            ensure!(event.created_at > 0, "an event without its time");
            let status = event.pod_sandbox_status.as_ref().context("the pod's status")?;
            ensure!(status.id == id && status.metadata.is_some(), "of another pod: {status:?}");
            if event.container_event_type() == Kind::ContainerStoppedEvent {
                let ended = event.containers_statuses.iter().any(|status| status.state() == cri::ContainerState::ContainerExited);
                ensure!(ended, "stopped, and no status says so: {:?}", event.containers_statuses);
            }
            seen.push((event.container_id.clone(), event.container_event_type()));
        }
        client.remove(&id)?;
        for _ in 0..3 {
            let event = next()?;
            seen.push((event.container_id.clone(), event.container_event_type()));
        }
        use Kind::{ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted};
        use Kind::{ContainerStartedEvent as Started, ContainerStoppedEvent as Stopped};
        let expected = [
            (&id, Created),
            (&id, Started),
            (&created, Created),
            (&created, Started),
            (&created, Stopped),
            (&id, Stopped),
            (&created, Deleted),
            (&id, Deleted),
        ];
        let expected: Vec<(String, Kind)> = expected.into_iter().map(|(id, kind)| (id.clone(), kind)).collect();
        ensure!(seen == expected, "events: {seen:#?}");
        daemon.stop()?;
        let end = runtime.block_on(async { tokio::time::timeout(EVENT_LIMIT, events.next()).await });
        ensure!(end.is_ok_and(|end| end.is_none_or(|event| event.is_err())), "the stream outlives the daemon");
        Ok(())
    })
    .expect("events");
}

#[test]
fn a_start_that_fails_is_one_end_and_no_start() {
    node::run(|| {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let mut events = runtime.block_on(events_of(&daemon))?;
        let mut expected = Vec::new();
        for number in 0..50 {
            let created = client.create(&id, &config, &container(&config, &format!("bad-{number}"), &["/no/such/program"]))?;
            ensure!(client.start(&created).is_err(), "it started");
            let status = client.container(&created)?;
            ensure!(status.reason == "StartError" && status.exit_code == 128, "{status:?}");
            client.remove_container(cri::RemoveContainerRequest { container_id: created.clone() })?;
            expected.extend([(created.clone(), Kind::ContainerCreatedEvent), (created.clone(), Kind::ContainerStoppedEvent)]);
            expected.push((created, Kind::ContainerDeletedEvent));
        }
        let mut seen = Vec::new();
        while seen.len() < expected.len() {
            let event = runtime.block_on(async { tokio::time::timeout(EVENT_LIMIT, events.next()).await });
            let event = event.context("an event in time")?.context("the stream goes on")??;
            if event.container_event_type() == Kind::ContainerStoppedEvent {
                let status = event.containers_statuses.iter().find(|status| status.id == event.container_id);
                ensure!(status.is_some_and(|status| status.reason == "StartError"), "told as {status:?}");
            }
            seen.push((event.container_id.clone(), event.container_event_type()));
        }
        ensure!(seen == expected, "events: {seen:#?}");
        client.remove(&id)?;
        Ok(())
    })
    .expect("events");
}
