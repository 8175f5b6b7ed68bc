//! The streaming server: what the URLs of Exec, Attach and PortForward lead to. kubelet asks for a URL over the CRI and connects its client to it.
//!
//! A connection brings one request, whose path has a token that was given out for one use within a minute. It is upgraded to SPDY/3.1 or to
//! WebSocket; `remote_command` and `port_forward` find their streams in either. What the streams lead to is the [`Handler`]'s.

mod channel;
mod fuzz;
mod http;
mod port_forward;
mod remote_command;
mod session;
mod spdy;
mod status;
mod tls;
mod websocket;
mod wire;

#[doc(hidden)]
pub use fuzz::fuzz_client;
pub use session::{Ending, Handler, Input, Output, Streams, Target, TerminalSize, Wanted};
pub use websocket::client;

use crate::{
    config::StreamingConfig,
    error::{Error, Kind, Result},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use wire::{Peer, Wire};

/// How long a URL may be used.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// URLs that wait for their use.
const TOKENS_MAX: usize = 1000;
/// Connections at a time.
const CONNECTIONS_MAX: usize = 1024;
/// Longest wait for a request's head.
const HEAD_LIMIT: Duration = Duration::from_secs(30);

const POISON: &str = "never poisoned: no panic while held";

#[derive(Default)]
struct Tokens(HashMap<String, (Target, Instant)>);

impl Tokens {
    fn insert(&mut self, target: Target) -> Result<String> {
        self.0.retain(|_, (_, made)| made.elapsed() < TOKEN_LIFE);
        if self.0.len() >= TOKENS_MAX {
            return Err(Error::new(
                Kind::Exhausted,
                format!("{TOKENS_MAX} streaming URLs wait to be used; try again in a minute"),
            ));
        }
        let mut bytes = [0u8; 6];
        getrandom::fill(&mut bytes).map_err(|error| Error::internal(format!("random token: {error}")))?;
        let token = URL_SAFE_NO_PAD.encode(bytes);
        self.0.insert(token.clone(), (target, Instant::now()));
        Ok(token)
    }

    /// The target of a token that was not used yet.
    fn take(&mut self, kind: &str, token: &str) -> Option<Target> {
        if self.0.get(token).is_none_or(|(target, _)| target.kind() != kind) {
            return None;
        }
        self.0.remove(token).filter(|(_, made)| made.elapsed() < TOKEN_LIFE).map(|(target, _)| target)
    }
}

/// The server; dropping it ends the accepting of connections, not those that are served.
pub struct Server {
    address: SocketAddr,
    secure: bool,
    tokens: Arc<Mutex<Tokens>>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Server {
    /// Listens, and serves every connection with `handler`.
    pub async fn start(config: &StreamingConfig, handler: Arc<dyn Handler>) -> Result<Server> {
        let failed = |error| {
            Error::io(
                format_args!("listen on streaming.address {} (an address of this node, and a free port or 0)", config.address),
                error,
            )
        };
        let listener = TcpListener::bind(&config.address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let tls = tls::acceptor(config)?;
        let secure = tls.is_some();
        let tokens: Arc<Mutex<Tokens>> = Arc::default();
        let shared = Arc::new(Shared { tokens: tokens.clone(), handler, tls });
        let accepting = tokio::spawn(accept(listener, shared));
        Ok(Server { address, secure, tokens, accepting })
    }

    /// A URL for one use within a minute.
    pub fn url(&self, target: Target) -> Result<String> {
        let kind = target.kind();
        let token = self.tokens.lock().expect(POISON).insert(target)?;
        Ok(format!("{}/{kind}/{token}", self.origin()))
    }

    /// How the URLs begin: scheme, address and port.
    pub fn origin(&self) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }
}

struct Shared {
    tokens: Arc<Mutex<Tokens>>,
    handler: Arc<dyn Handler>,
    tls: Option<tokio_rustls::TlsAcceptor>,
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((socket, _)) => {
                let shared = shared.clone();
                tokio::spawn(async move {
                    if let Err(error) = shared.connection(socket).await {
                        tracing::debug!(%error, "streaming connection ended");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "streaming connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// What a request asks to be upgraded to.
enum Upgrade {
    Spdy(&'static str),
    WebSocket { protocol: &'static str, key: String },
}

impl Shared {
    async fn connection(&self, socket: TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        let peer = Peer::of(&socket)?;
        match &self.tls {
            None => {
                let (input, output) = socket.into_split();
                self.request(Box::new(input), Box::new(output), peer).await
            }
            Some(tls) => {
                let secured = timeout(HEAD_LIMIT, tls.accept(socket)).await.map_err(|_| io::ErrorKind::TimedOut)??;
                let (input, output) = tokio::io::split(secured);
                self.request(Box::new(input), Box::new(output), peer).await
            }
        }
    }

    async fn request(&self, mut input: Input, mut output: Output, peer: Peer) -> io::Result<()> {
        let read = timeout(HEAD_LIMIT, http::read(&mut input)).await.map_err(|_| io::ErrorKind::TimedOut)?;
        let mut request = match read {
            Ok(request) => request,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return http::refuse(&mut output, "400 Bad Request", &[], &error.to_string()).await;
            }
            Err(error) => return Err(error),
        };
        if !["GET", "POST"].contains(&request.method.as_str()) {
            return http::refuse(&mut output, "405 Method Not Allowed", &[("Allow", "GET, POST")], "GET or POST only").await;
        }
        let path = request.path.split('?').next().unwrap_or_default().trim_matches('/');
        let target = path.split_once('/').and_then(|(kind, token)| self.tokens.lock().expect(POISON).take(kind, token));
        let Some(target) = target else {
            let message = "no such URL: each is for one use within a minute";
            return http::refuse(&mut output, "404 Not Found", &[("Cache-Control", "no-store")], message).await;
        };
        match upgrade(&request, matches!(target, Target::PortForward { .. })) {
            Ok(upgrade) => {
                let wire = Wire { first: std::mem::take(&mut request.rest), input, output, peer };
                self.upgraded(upgrade, target, request, wire).await
            }
            Err(Refusal::NoUpgrade) => {
                let message = "an upgrade to SPDY/3.1 or to websocket is needed: Connection: Upgrade, Upgrade: SPDY/3.1";
                http::refuse(&mut output, "400 Bad Request", &[], message).await
            }
            Err(Refusal::Protocol(served)) => {
                let headers: Vec<_> = served.iter().map(|name| ("X-Accepted-Stream-Protocol-Versions", *name)).collect();
                let message = format!("none of the client's protocols is served; these are: {}", served.join(", "));
                http::refuse(&mut output, "403 Forbidden", &headers, &message).await
            }
        }
    }

    async fn upgraded(&self, upgrade: Upgrade, target: Target, request: http::Request, mut wire: Wire) -> io::Result<()> {
        let handler = self.handler.clone();
        match upgrade {
            Upgrade::Spdy(protocol) => {
                let mut headers = vec![("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")];
                if !protocol.is_empty() {
                    headers.push(("X-Stream-Protocol-Version", protocol));
                }
                http::switch(&mut wire.output, &headers).await?;
                let connection = spdy::Connection::start(wire);
                match target {
                    Target::PortForward { pod_id, .. } => port_forward::over_spdy(handler, pod_id, connection).await,
                    target => remote_command::over_spdy(handler, target, protocol, connection).await,
                }
            }
            Upgrade::WebSocket { protocol, key } => {
                let accept = websocket::accept_key(&key);
                let mut headers = vec![("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", &accept)];
                headers.push(("Sec-WebSocket-Protocol", protocol));
                http::switch(&mut wire.output, &headers).await?;
                wire.output.flush().await?;
                match target {
                    Target::PortForward { pod_id, .. } if protocol == port_forward::TUNNEL_PROTOCOL => {
                        let connection = spdy::Connection::start(websocket::tunnel(wire));
                        port_forward::over_spdy(handler, pod_id, connection).await;
                    }
                    Target::PortForward { pod_id, mut ports } => {
                        if ports.is_empty() {
                            ports = request
                                .parameters("port")
                                .flat_map(|ports| ports.split(','))
                                .filter_map(|port| port.parse().ok())
                                .collect();
                        }
                        port_forward::over_websocket(handler, pod_id, ports, protocol, wire).await;
                    }
                    target => remote_command::over_websocket(handler, target, protocol, wire).await,
                }
            }
        }
        Ok(())
    }
}

enum Refusal {
    NoUpgrade,
    Protocol(&'static [&'static str]),
}

/// What both sides speak: the first of ours that the client names.
fn upgrade(request: &http::Request, port_forward: bool) -> std::result::Result<Upgrade, Refusal> {
    let choose = |served: &'static [&'static str], header: &str| {
        let found = served.iter().find(|name| request.values(header).any(|offered| offered == **name));
        found.copied().ok_or(Refusal::Protocol(served))
    };
    if request.has("Upgrade", "SPDY/3.1") {
        let header = "X-Stream-Protocol-Version";
        let served: &'static [&'static str] =
            if port_forward { &[port_forward::PROTOCOL] } else { &remote_command::SPDY_PROTOCOLS };
        if request.values(header).next().is_none() {
            return Ok(Upgrade::Spdy(""));
        }
        return choose(served, header).map(Upgrade::Spdy);
    }
    if request.has("Upgrade", "websocket") {
        let header = "Sec-WebSocket-Protocol";
        let served: &'static [&'static str] = if port_forward {
            &[port_forward::TUNNEL_PROTOCOL, port_forward::WEBSOCKET_PROTOCOLS[0], port_forward::WEBSOCKET_PROTOCOLS[1]]
        } else {
            &remote_command::WEBSOCKET_PROTOCOLS
        };
        let key = request.values("Sec-WebSocket-Key").next().ok_or(Refusal::NoUpgrade)?.to_owned();
        return Ok(Upgrade::WebSocket { protocol: choose(served, header)?, key });
    }
    Err(Refusal::NoUpgrade)
}

#[cfg(test)]
mod tests;
