//! HTTP clients: what a registry's host needs of TLS, time-outs and proxies, and one client for all hosts that need the same.

use super::error::ImageError;
use super::proxies::Proxies;
use reqwest::{Certificate, Client, ClientBuilder, Identity, Proxy, Url, redirect};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_REDIRECTS: usize = 10;
/// Clients that are kept.
const MAX_CLIENTS: usize = 64;

/// How to speak to a host. Files are read when the configuration is, so that a changed one counts from the next pull on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Transport {
    /// Accepts any certificate.
    pub(super) skip_verify: bool,
    /// Certificates in PEM that are trusted besides the machine's.
    pub(super) ca: Vec<Vec<u8>>,
    /// Certificate and key in PEM to prove oneself with.
    pub(super) client: Option<Vec<u8>>,
    /// Longest wait for a connection.
    pub(super) dial_timeout: Option<Duration>,
}

impl Transport {
    /// Reads a CA file.
    pub(super) fn trust(&mut self, path: &Path) -> Result<(), ImageError> {
        self.ca.push(read(path)?);
        Ok(())
    }

    /// Reads a client's certificate, and its key unless it is in the same file.
    pub(super) fn prove(&mut self, certificate: &Path, key: Option<&Path>) -> Result<(), ImageError> {
        let mut pem = read(certificate)?;
        if let Some(key) = key {
            pem.push(b'\n');
            pem.extend(read(key)?);
        }
        // The transport offers one identity.
        self.client.get_or_insert(pem);
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    std::fs::read(path).map_err(|e| ImageError::io(format!("read {}", path.display()), e))
}

/// Shared by all pulls, so that connections are kept.
pub(super) struct Clients {
    kept: Mutex<HashMap<(Transport, bool), Client>>,
    proxies: Proxies,
    /// Longest wait for the next bytes of an answer.
    progress_timeout: Duration,
}

impl Clients {
    /// With the proxies of the environment.
    pub(super) fn new(progress_timeout: Duration) -> Clients {
        Clients { kept: Mutex::default(), proxies: Proxies::of_environment(), progress_timeout }
    }

    /// The client for a URL.
    pub(super) fn of(&self, transport: &Transport, url: &Url) -> Result<Client, ImageError> {
        self.proxies.of(url)?;
        let https = url.scheme() == "https";
        let key = (transport.clone(), https);
        let mut clients = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = clients.get(&key) {
            return Ok(client.clone());
        }
        let built = self.build(transport, transport.skip_verify, false);
        // Without any CA certificate on the machine there is no verified client; plain http needs none.
        let client = if https { built } else { built.or_else(|_| self.build(transport, true, true)) };
        let client = client.map_err(|e| ImageError::Io(format!("set up TLS: {e}")))?;
        if clients.len() >= MAX_CLIENTS {
            clients.clear();
        }
        clients.insert(key, client.clone());
        Ok(client)
    }

    /// The host that is spoken to for a URL, as an error names it: a proxy too, without its password.
    pub(super) fn place(&self, url: &Url) -> String {
        match self.proxies.of(url) {
            Ok(Some(proxy)) => format!("{} by way of the proxy {}", authority(url), authority(proxy)),
            _ => authority(url),
        }
    }

    fn build(&self, transport: &Transport, accept_any: bool, only_http: bool) -> Result<Client, String> {
        let proxies = self.proxies.clone();
        let builder = Client::builder()
            .user_agent(concat!("windlass/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(transport.dial_timeout.unwrap_or(CONNECT_TIMEOUT))
            .read_timeout(self.progress_timeout)
            .redirect(redirects(only_http))
            .proxy(Proxy::custom(move |url| proxies.of(url).ok().flatten().cloned()))
            .tls_danger_accept_invalid_certs(accept_any);
        with_certificates(builder, transport)?.build().map_err(|e| cause(&e))
    }
}

/// Host and port.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

fn redirects(only_http: bool) -> redirect::Policy {
    redirect::Policy::custom(move |attempt| {
        if attempt.previous().len() > MAX_REDIRECTS {
            attempt.error("too many redirects")
        } else if only_http && attempt.url().scheme() != "http" {
            attempt.error("redirected to TLS, and this machine has no CA certificates")
        } else {
            attempt.follow()
        }
    })
}

fn with_certificates(mut builder: ClientBuilder, transport: &Transport) -> Result<ClientBuilder, String> {
    for pem in &transport.ca {
        let certificates = Certificate::from_pem_bundle(pem).map_err(|e| format!("CA certificate: {}", cause(&e)))?;
        if certificates.is_empty() {
            return Err("a CA file holds no certificate in PEM".into());
        }
        builder = builder.tls_certs_merge(certificates);
    }
    if let Some(pem) = &transport.client {
        builder = builder.identity(Identity::from_pem(pem).map_err(|e| format!("client certificate: {}", cause(&e)))?);
    }
    Ok(builder)
}

/// The innermost cause: the outer ones only say that a request failed, which the caller says better.
pub(super) fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
