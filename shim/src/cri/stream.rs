//! The Stream RPCs and GetContainerEvents: one snapshot in messages of bounded size, and what happens from now on.

use super::{Service, view};
use crate::events::{End, Event, Following};
use prost::Message;
use std::{pin::Pin, vec};
use tokio_stream::{Iter, Stream};
use tonic::{Response, Status};
use windlass_proto::cri;

/// Size that a message is filled up to. One item that is larger goes alone.
const BATCH_LIMIT_BYTES: usize = 1 << 20;

/// A list in several messages.
pub(super) type Batches<T> = Iter<vec::IntoIter<Result<T, Status>>>;

/// Splits a list; an empty one is no message at all.
pub(super) fn batches<T: Message, R>(items: Vec<T>, wrap: impl Fn(Vec<T>) -> R) -> Response<Batches<R>> {
    let (mut messages, mut batch, mut size) = (Vec::new(), Vec::new(), 0);
    for item in items {
        // The field's key and length take at most six bytes.
        let bytes = item.encoded_len() + 6;
        if size + bytes > BATCH_LIMIT_BYTES && !batch.is_empty() {
            messages.push(Ok(wrap(std::mem::take(&mut batch))));
            size = 0;
        }
        size += bytes;
        batch.push(item);
    }
    if !batch.is_empty() {
        messages.push(Ok(wrap(batch)));
    }
    Response::new(tokio_stream::iter(messages))
}

/// Events until the client goes, falls behind, or the daemon ends.
pub(super) type EventStream = Pin<Box<dyn Stream<Item = Result<cri::ContainerEventResponse, Status>> + Send>>;

impl Service {
    pub(super) fn events(&self) -> Result<Response<EventStream>, Status> {
        let following = self.node.events.follow();
        let following = following.ok_or_else(|| Status::resource_exhausted("too many clients follow events already"))?;
        let next = |following: Option<Following>| async move {
            let mut following = following?;
            match following.next().await {
                Ok(event) => Some((Ok(message(&event)), Some(following))),
                Err(End::Finished) => None,
                Err(End::LeftBehind) => {
                    let limit = crate::events::QUEUE_LIMIT;
                    let status =
                        format!("events are not read: more than {limit} waited, later ones are lost; list and begin again");
                    Some((Err(Status::resource_exhausted(status)), None))
                }
            }
        };
        Ok(Response::new(Box::pin(futures_util::stream::unfold(Some(following), next))))
    }
}

fn message(event: &Event) -> cri::ContainerEventResponse {
    cri::ContainerEventResponse {
        container_id: event.id.clone(),
        container_event_type: event.kind.into(),
        created_at: event.at_ns,
        pod_sandbox_status: Some(view::pod_status(&event.pod)),
        containers_statuses: event.containers.iter().map(view::container_status).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt;

    async fn sizes(lengths: &[usize]) -> Vec<usize> {
        let items = lengths.iter().map(|length| cri::Container { id: "x".repeat(*length), ..Default::default() }).collect();
        let stream = batches(items, |containers| cri::StreamContainersResponse { containers }).into_inner();
        stream.map(|message| message.expect("no error").containers.len()).collect().await
    }

    #[tokio::test]
    async fn messages_are_bounded_and_an_empty_list_is_none() {
        assert!(sizes(&[]).await.is_empty());
        assert_eq!(sizes(&[1, 2, 3]).await, [3]);
        assert_eq!(sizes(&[600_000, 600_000, 100]).await, [1, 2]);
        assert_eq!(sizes(&[100, 2_000_000, 100]).await, [1, 1, 1]);
    }
}
