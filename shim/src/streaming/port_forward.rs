//! Port-forward: for each connection of the client a data stream, which is joined to a port of the pod, and an error stream, which tells why that
//! failed. Over SPDY, and in the old form over WebSocket.

use super::{
    channel::{MESSAGE_BYTES, Outgoing, Reader, Writer},
    session::Handler,
    spdy,
    websocket::{self, Form},
    wire::Wire,
};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

/// The protocol over SPDY.
pub(super) const PROTOCOL: &str = "portforward.k8s.io";
/// The same within a WebSocket.
pub(super) const TUNNEL_PROTOCOL: &str = "SPDY/3.1+portforward.k8s.io";
/// The old form over WebSocket, by which the ports are in the query.
pub(super) const WEBSOCKET_PROTOCOLS: [&str; 2] = ["v4.channel.k8s.io", "v4.base64.channel.k8s.io"];

/// Longest wait for the second stream of a pair.
const PAIR_LIMIT: Duration = Duration::from_secs(30);
/// Connections at a time.
const CONNECTIONS_MAX: usize = 1024;
/// Once one side has ended, how long the other may say nothing.
const HALF_CLOSED_LIMIT: Duration = Duration::from_secs(3600);

#[derive(Default)]
struct Pair {
    data: Option<spdy::Stream>,
    error: Option<spdy::Stream>,
    since: Option<Instant>,
}

/// Serves a SPDY connection until the client ends it.
pub(super) async fn over_spdy(handler: Arc<dyn Handler>, pod_id: String, mut connection: spdy::Connection) {
    let mut pairs: HashMap<String, Pair> = HashMap::new();
    let mut running = JoinSet::new();
    let gone = connection.gone.clone();
    loop {
        let stream = tokio::select! {
            stream = connection.streams.recv() => stream,
            () = gone.cancelled() => None,
            Some(_) = running.join_next() => continue,
        };
        let Some(stream) = stream else { break };
        pairs.retain(|_, pair| pair.since.is_none_or(|since| since.elapsed() < PAIR_LIMIT));
        let port = spdy::value(&stream.headers, "port").and_then(|port| port.parse::<u16>().ok()).filter(|port| *port > 0);
        let (Some(request), Some(port), true) = (request_of(&stream), port, running.len() + pairs.len() < CONNECTIONS_MAX) else {
            connection.reset(stream.id).await;
            continue;
        };
        connection.accept(stream.id).await;
        let pair = pairs.entry(request.clone()).or_default();
        pair.since.get_or_insert_with(Instant::now);
        match spdy::value(&stream.headers, "streamtype") {
            Some("error") => pair.error = Some(stream),
            _ => pair.data = Some(stream),
        }
        if pair.data.is_some()
            && pair.error.is_some()
            && let Some(Pair { data: Some(data), error: Some(error), .. }) = pairs.remove(&request)
        {
            let (handler, pod_id, resetter) = (handler.clone(), pod_id.clone(), connection.resetter());
            running.spawn(async move { forward(handler, pod_id, port, data, error, resetter).await });
        }
    }
    running.shutdown().await;
    connection.farewell().await;
}

/// The pair that a stream belongs to. Clients that name none open the error stream first and the data stream next.
fn request_of(stream: &spdy::Stream) -> Option<String> {
    if let Some(request) = spdy::value(&stream.headers, "requestid") {
        return Some(request.to_owned());
    }
    match spdy::value(&stream.headers, "streamtype")? {
        "error" => Some(stream.id.to_string()),
        "data" => Some(stream.id.checked_sub(2)?.to_string()),
        _ => None,
    }
}

async fn forward(
    handler: Arc<dyn Handler>,
    pod_id: String,
    port: u16,
    data: spdy::Stream,
    mut error: spdy::Stream,
    resetter: tokio::sync::mpsc::Sender<Outgoing>,
) {
    match handler.dial(&pod_id, port).await {
        Ok(socket) => {
            join(socket, data.reader, data.writer).await;
            let _ = error.writer.shutdown().await;
        }
        Err(failure) => {
            let text = format!("port {port} of pod {pod_id}: {}", failure.message);
            tracing::debug!(pod = %pod_id, port, error = %failure, "port not reached");
            let _ = error.writer.write_all(text.as_bytes()).await;
            let _ = error.writer.shutdown().await;
            let _ = resetter.send(Outgoing::Reset { id: data.id }).await;
        }
    }
}

/// Copies both ways until both have ended, or one has and the other is silent.
async fn join(mut socket: TcpStream, mut reader: Reader, mut writer: Writer) {
    let _ = socket.set_nodelay(true);
    let (mut from_pod, mut to_pod) = socket.split();
    let up = async {
        while let Some(piece) = reader.piece().await {
            if to_pod.write_all(&piece).await.is_err() {
                return;
            }
        }
        let _ = to_pod.shutdown().await;
    };
    let down = async {
        copy(&mut from_pod, &mut writer).await;
        let _ = writer.shutdown().await;
    };
    tokio::pin!(up, down);
    // The pod's end ends the connection: a client that is not told goes on for ever.
    tokio::select! {
        () = &mut down => {}
        () = &mut up => {
            let _ = timeout(HALF_CLOSED_LIMIT, down).await;
        }
    }
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) {
    let mut buffer = vec![0; MESSAGE_BYTES];
    while let Ok(count) = from.read(&mut buffer).await {
        if count == 0 || to.write_all(buffer.get(..count).unwrap_or_default()).await.is_err() {
            return;
        }
    }
}

/// Serves the old form: for port number n of the query, data on channel 2n and errors on 2n+1, each beginning with the port.
pub(super) async fn over_websocket(handler: Arc<dyn Handler>, pod_id: String, ports: Vec<u16>, protocol: &str, wire: Wire) {
    let form = if protocol.contains("base64") { Form::Base64 } else { Form::Binary };
    let mut queues = Vec::new();
    let mut readers = Vec::new();
    for (channel, port) in (0u8..254).step_by(2).zip(ports) {
        let (queue, reader) = Reader::new();
        queues.push((channel, queue));
        readers.push((channel, port, reader));
    }
    let connection = websocket::Connection::start(form, queues, wire);
    let mut running = JoinSet::new();
    for (channel, port, reader) in readers {
        let (mut data, mut error) = (connection.writer(channel), connection.writer(channel + 1));
        let (handler, pod_id) = (handler.clone(), pod_id.clone());
        running.spawn(async move {
            for writer in [&mut data, &mut error] {
                let _ = writer.write_all(&port.to_le_bytes()).await;
            }
            match handler.dial(&pod_id, port).await {
                Ok(socket) => join(socket, reader, data).await,
                Err(failure) => {
                    let _ = error.write_all(format!("port {port}: {}", failure.message).as_bytes()).await;
                }
            }
        });
    }
    let gone = connection.gone.clone();
    tokio::select! {
        () = gone.cancelled() => running.shutdown().await,
        () = async { while running.join_next().await.is_some() {} } => {}
    }
    connection.farewell().await;
}
