//! The RPC face: the only module that knows tonic. Requests become calls of `pod`, `container` and `image`; their results become messages.

pub mod cadvisor;
mod deadline;
mod image;
pub mod images;
mod metrics;
mod runtime;
mod stats;
mod status;
mod stream;
mod streams;
mod timing;
mod verbose;
mod view;

use crate::{node::Node, streaming::Server};
use std::{
    future::{Future, pending},
    sync::Arc,
    time::Duration,
};
use tokio::{net::UnixListener, sync::oneshot, time::sleep};
use tokio_stream::wrappers::UnixListenerStream;
use windlass_proto::cri::{image_service_server::ImageServiceServer, runtime_service_server::RuntimeServiceServer};
use windlass_proto::image::images_server::ImagesServer;

/// Largest message either way: what kubelet's client takes (cri-client, maxMsgSize).
const MESSAGE_LIMIT_BYTES: usize = 16 << 20;

/// Longest wait, once the end is asked for, for running requests and for clients to close their connections.
const END_LIMIT: Duration = Duration::from_secs(5);

/// The node as the two services see it.
#[derive(Clone)]
struct Service {
    node: Arc<Node>,
    streaming: Arc<Server>,
}

/// Serves both services on `listener` until `shutdown` resolves, and [`END_LIMIT`] longer at most: a client that does not read
/// the server's farewell would hold it up for ever. Pods are not touched by the end of it.
pub async fn serve(
    node: Arc<Node>,
    streaming: Arc<Server>,
    listener: UnixListener,
    shutdown: impl Future<Output = ()>,
) -> Result<(), tonic::transport::Error> {
    let users = {
        let node = node.clone();
        move || node.containers().iter().map(|container| (container.id.clone(), container.look(|r| r.image_id.clone()))).collect()
    };
    let own = ImagesServer::new(images::Images::new(node.images.clone(), Arc::new(users)));
    let service = Service { node: node.clone(), streaming };
    let runtime = RuntimeServiceServer::new(service.clone())
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES);
    let image = ImageServiceServer::new(service)
        .max_decoding_message_size(MESSAGE_LIMIT_BYTES)
        .max_encoding_message_size(MESSAGE_LIMIT_BYTES);
    let (ending, asked) = oneshot::channel();
    let shutdown = async move {
        shutdown.await;
        // Streams of events never end by themselves.
        node.events.end();
        let _ = ending.send(());
    };
    let served = tonic::transport::Server::builder()
        .layer(tower_layer::layer_fn(timing::Timing))
        .layer(tower_layer::layer_fn(deadline::Deadline))
        .add_service(runtime)
        .add_service(image)
        .add_service(own)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown);
    let limit = async move {
        match asked.await {
            Ok(()) => sleep(END_LIMIT).await,
            Err(_) => pending().await,
        }
    };
    tokio::select! {
        served = served => served,
        () = limit => Ok(()),
    }
}
