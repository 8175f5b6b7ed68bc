//! The endpoint: `GET /metrics` over HTTP/1.1, one request for each connection. Reads nothing but a bounded head.

use super::text;
use crate::{
    error::{Error, Result},
    node::Node,
};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

/// Connections at a time, the length of a request's head, and the time for a connection.
const CONNECTIONS_MAX: usize = 8;
const HEAD_LIMIT_BYTES: usize = 8 << 10;
const LIMIT: Duration = Duration::from_secs(10);

/// The bound address. Serves until it is dropped.
pub struct Endpoint(tokio::task::JoinHandle<()>);

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Endpoint {
    /// Serves at the configured address; nothing when there is none.
    pub async fn start(node: &Arc<Node>) -> Result<Option<Endpoint>> {
        let address = node.config.metrics.address.clone();
        if address.is_empty() {
            return Ok(None);
        }
        let listener = TcpListener::bind(&address).await;
        let listener = listener.map_err(|error| {
            Error::io(format_args!("listen at metrics.address {address:?} (an address of this node, and a free port)"), error)
        })?;
        let bound = listener.local_addr().map_err(|error| Error::io("address of metrics", error))?;
        if !bound.ip().is_loopback() {
            tracing::warn!(address = %bound, "metrics are served without authentication, and not on loopback alone");
        }
        tracing::info!(address = %bound, "serving metrics");
        Ok(Some(Endpoint(tokio::spawn(serve(node.clone(), listener)))))
    }
}

async fn serve(node: Arc<Node>, listener: TcpListener) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(turn) = room.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, for example: not in a tight loop.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let node = node.clone();
        tokio::spawn(async move {
            let _ = tokio::time::timeout(LIMIT, answer(&node, stream)).await;
            drop(turn);
        });
    }
}

async fn answer(node: &Arc<Node>, mut stream: TcpStream) -> std::io::Result<()> {
    let mut head = Vec::new();
    let asked = loop {
        if head.len() >= HEAD_LIMIT_BYTES || stream.read_buf(&mut head).await? == 0 {
            break None;
        }
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut headers);
        match request.parse(&head) {
            Ok(httparse::Status::Complete(_)) => {
                let path = request.path.unwrap_or_default().split('?').next().unwrap_or_default();
                break Some((request.method.unwrap_or_default().to_owned(), path.to_owned()));
            }
            Ok(httparse::Status::Partial) => {}
            Err(_) => break None,
        }
    };
    let (status, body, with_body) = match asked.as_ref().map(|(method, path)| (method.as_str(), path.as_str())) {
        None => ("400 Bad Request", "not a request\n".to_owned(), true),
        Some((method @ ("GET" | "HEAD"), "/metrics")) => {
            let node = node.clone();
            let text = tokio::task::spawn_blocking(move || text::write(&node)).await.map_err(std::io::Error::other)?;
            ("200 OK", text, method == "GET")
        }
        Some(("GET" | "HEAD", _)) => ("404 Not Found", "only /metrics is here\n".to_owned(), true),
        Some(_) => ("405 Method Not Allowed", "only GET is served\n".to_owned(), true),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    if with_body {
        stream.write_all(body.as_bytes()).await?;
    }
    stream.shutdown().await
}
