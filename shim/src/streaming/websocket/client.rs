//! A client's end of a WebSocket connection that carries channels in version 5 of the protocol: what `windlass exec` speaks.

use super::{
    CLOSE_CHANNEL,
    frame::{self, Kind, Sender},
};
use crate::error::{Error, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{Buf, Bytes, BytesMut};
use reqwest::{Certificate, StatusCode, Upgraded};
use std::{io, path::Path};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

const PROTOCOL: &str = "v5.channel.k8s.io";

/// What comes from the server.
pub struct Incoming {
    input: ReadHalf<Upgraded>,
    buffer: BytesMut,
    /// What has come of a message in several frames.
    message: BytesMut,
}

/// What goes to the server.
pub struct Outgoing(WriteHalf<Upgraded>);

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Error::internal(format!("random bytes: {error}")))?;
    Ok(bytes)
}

/// Connects to a URL that the streaming server gave out. Over TLS nothing is trusted but the certificates of this file.
pub async fn connect(url: &str, trusted: &Path) -> Result<(Incoming, Outgoing)> {
    let failed = |why: String| Error::internal(format!("connect to the streaming server at {url}: {why}"));
    let mut builder = reqwest::Client::builder().no_proxy().http1_only();
    if url.starts_with("https:") {
        let pem = std::fs::read(trusted).map_err(|error| Error::io(format_args!("read {}", trusted.display()), error))?;
        builder = builder.tls_certs_only(Certificate::from_pem_bundle(&pem).map_err(|error| failed(innermost(&error)))?);
    }
    let client = builder.build().map_err(|error| failed(innermost(&error)))?;
    let request = client
        .get(url)
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", STANDARD.encode(random::<16>()?))
        .header("Sec-WebSocket-Protocol", PROTOCOL);
    let response = request.send().await.map_err(|error| failed(innermost(&error)))?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status();
        return Err(failed(format!("{status}: {}", response.text().await.unwrap_or_default().trim())));
    }
    let (input, output) = tokio::io::split(response.upgrade().await.map_err(|error| failed(innermost(&error)))?);
    Ok((Incoming { input, buffer: BytesMut::new(), message: BytesMut::new() }, Outgoing(output)))
}

fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

impl Incoming {
    /// The next channel and what came on it; `None` at the end of the connection. What is dropped half-way is taken up by the next call.
    pub async fn next(&mut self) -> io::Result<Option<(u8, Bytes)>> {
        let broken = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        loop {
            match frame::read_of(Sender::Server, &self.buffer).map_err(broken)? {
                Some(head) if self.buffer.len() >= head.head_bytes + head.length => {
                    self.buffer.advance(head.head_bytes);
                    let payload = self.buffer.split_to(head.length);
                    match head.kind {
                        Kind::Close => return Ok(None),
                        Kind::Ping | Kind::Pong => continue,
                        Kind::Continuation | Kind::Text | Kind::Binary => self.message.unsplit(payload),
                    }
                    if head.last && !self.message.is_empty() {
                        let mut message = std::mem::take(&mut self.message).freeze();
                        return Ok(Some((message.get_u8(), message)));
                    }
                }
                _ => {
                    if self.input.read_buf(&mut self.buffer).await? == 0 {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

impl Outgoing {
    /// Sends bytes on a channel.
    pub async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        let message = [&[channel], bytes].concat();
        let written = self.0.write_all(&frame::of_client(Kind::Binary, &message, random()?)).await;
        written.map_err(|error| Error::io("write to the streaming server", error))?;
        self.0.flush().await.map_err(|error| Error::io("write to the streaming server", error))
    }

    /// Says that a channel has ended.
    pub async fn end(&mut self, channel: u8) -> Result<()> {
        self.send(CLOSE_CHANNEL, &[channel]).await
    }
}
