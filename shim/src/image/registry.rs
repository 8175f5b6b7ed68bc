//! The client of one repository for one pull: asks its hosts in order, answers challenges, retries what may pass.
//! Protocol: OCI distribution-spec 1.1, "pull".

use super::auth::{Challenge, RegistryAuth, parse_challenge};
use super::digest;
use super::error::ImageError;
use super::hosts::{self, Host};
use super::manifest::{Descriptor, MEDIA_TYPES};
use super::reference::Reference;
use reqwest::header::{ACCEPT, AUTHORIZATION, RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the next bytes of an answer.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(30);
const TRIES: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);
const MAX_MANIFEST_BYTES: u64 = 4 << 20;
const MAX_TOKEN_BYTES: u64 = 1 << 20;
const MAX_REDIRECTS: usize = 10;

type Built = OnceLock<Result<Client, String>>;

/// HTTP clients, shared by all pulls so that connections are kept.
#[derive(Default)]
pub(super) struct Clients {
    verified: Built,
    unverified: Built,
    plain: Built,
}

impl Clients {
    fn of(&self, host: &Host) -> Result<&Client, ImageError> {
        let verified = || self.verified.get_or_init(|| build(false, false));
        let client = match (host.skip_verify, host.base.scheme()) {
            (true, _) => self.unverified.get_or_init(|| build(true, false)),
            // Without any CA certificate on the machine there is no verified client; plain http needs none.
            (false, "http") if verified().is_err() => self.plain.get_or_init(|| build(true, true)),
            (false, _) => verified(),
        };
        client.as_ref().map_err(|e| ImageError::Io(format!("set up TLS: {e}")))
    }
}

fn build(accept_any: bool, only_http: bool) -> Result<Client, String> {
    let policy = redirect::Policy::custom(move |attempt| {
        if attempt.previous().len() > MAX_REDIRECTS {
            attempt.error("too many redirects")
        } else if only_http && attempt.url().scheme() != "http" {
            attempt.error("redirected to TLS, and this machine has no CA certificates")
        } else {
            attempt.follow()
        }
    });
    Client::builder()
        .user_agent(concat!("windlass/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(PROGRESS_TIMEOUT)
        .redirect(policy)
        .tls_danger_accept_invalid_certs(accept_any)
        .build()
        .map_err(|e| cause(&e))
}

/// One repository, as one caller sees it.
pub(super) struct Session {
    clients: std::sync::Arc<Clients>,
    hosts: Vec<Host>,
    repository: String,
    auth: Option<RegistryAuth>,
    /// Authorization headers that were accepted or given, by the host's place in `hosts`.
    granted: Mutex<HashMap<usize, String>>,
}

impl Session {
    pub(super) fn new(
        clients: std::sync::Arc<Clients>,
        config_dir: &Path,
        reference: &Reference,
        auth: Option<RegistryAuth>,
    ) -> Result<Session, ImageError> {
        let hosts = hosts::hosts_for(config_dir, reference.registry())?;
        Ok(Session { clients, hosts, repository: reference.repository().to_owned(), auth, granted: Mutex::default() })
    }

    /// A manifest by tag or digest, with its digest. One asked for by digest is verified.
    pub(super) async fn manifest(&self, wanted: &str) -> Result<(Vec<u8>, String), ImageError> {
        let by_digest = digest::is_digest(wanted);
        let object = format!("manifest {wanted}");
        let path = format!("manifests/{wanted}");
        let able = |h: &Host| if by_digest { h.pull } else { h.resolve };
        let mut response = self.get(&path, &object, Some(MEDIA_TYPES), 0, able).await?;
        let bytes = read_all(&mut response, MAX_MANIFEST_BYTES, &object).await?;
        let found = digest::of(&bytes);
        if by_digest && found != wanted {
            return Err(ImageError::Corrupt(format!("{object}: the registry sent bytes of digest {found}")));
        }
        Ok((bytes, found))
    }

    /// A small blob as a whole, verified.
    pub(super) async fn small_blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let object = format!("blob {}", descriptor.digest);
        let mut response = self.blob(&descriptor.digest, 0).await?;
        let bytes = read_all(&mut response, MAX_MANIFEST_BYTES, &object).await?;
        let found = digest::of(&bytes);
        if found != descriptor.digest {
            return Err(ImageError::Corrupt(format!("{object}: the registry sent bytes of digest {found}")));
        }
        Ok(bytes)
    }

    /// A blob's bytes from `offset` on; the answer may still be the whole (status 200).
    pub(super) async fn blob(&self, digest: &str, offset: u64) -> Result<Response, ImageError> {
        self.get(&format!("blobs/{digest}"), &format!("blob {digest}"), None, offset, |h| h.pull).await
    }

    async fn get(
        &self,
        path: &str,
        object: &str,
        accept: Option<&str>,
        offset: u64,
        able: impl Fn(&Host) -> bool,
    ) -> Result<Response, ImageError> {
        let mut last = ImageError::NotFound(format!("{object}: no host is configured for this"));
        for (index, host) in self.hosts.iter().enumerate().filter(|(_, h)| able(h)) {
            match self.get_from(index, host, path, accept, offset).await {
                Ok(response) => return Ok(response),
                Err(error) => {
                    tracing::debug!(host = %host.base, %error, object, "registry host");
                    last = error.within(object);
                }
            }
        }
        Err(last)
    }

    /// One host, with retries.
    async fn get_from(
        &self,
        index: usize,
        host: &Host,
        path: &str,
        accept: Option<&str>,
        offset: u64,
    ) -> Result<Response, ImageError> {
        let mut url = host.base.clone();
        url.set_path(&format!("{}/{}/{path}", host.base.path(), self.repository));
        if let Some(namespace) = &host.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        let mut backoff = FIRST_BACKOFF;
        let mut challenged = false;
        let mut tries = 0;
        loop {
            tries += 1;
            let (error, wait) = match self.send(index, host, &url, accept, offset).await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status() == StatusCode::UNAUTHORIZED && !challenged => {
                    challenged = true;
                    self.answer_challenge(index, host, &response).await?;
                    continue;
                }
                Ok(response) => {
                    let wait = retry_after(&response);
                    let error = status_error(response.status(), host);
                    if !is_transient(response.status()) {
                        return Err(error);
                    }
                    (error, wait)
                }
                // Nobody listens: the caller retries pulls, and another host may be next.
                Err(error) if error.is_connect() => return Err(unavailable(host, &error)),
                Err(error) => (unavailable(host, &error), None),
            };
            if tries >= TRIES {
                return Err(error);
            }
            tokio::time::sleep(wait.unwrap_or(backoff)).await;
            backoff *= 2;
        }
    }

    async fn send(&self, index: usize, host: &Host, url: &Url, accept: Option<&str>, offset: u64) -> Result<Response, SendError> {
        let mut request = self.clients.of(host).map_err(SendError::Setup)?.get(url.clone());
        if let Some(accept) = accept {
            request = request.header(ACCEPT, accept);
        }
        if offset > 0 {
            request = request.header(RANGE, format!("bytes={offset}-"));
        }
        let granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner).get(&index).cloned();
        if let Some(header) = granted {
            request = request.header(AUTHORIZATION, header);
        }
        request.send().await.map_err(SendError::Http)
    }

    /// Gets what a 401 asks for. The caller's credentials go to the registry itself, never to a mirror of it.
    async fn answer_challenge(&self, index: usize, host: &Host, response: &Response) -> Result<(), ImageError> {
        let refused = |why: &str| ImageError::Unauthorized(format!("{}: {why}", authority(&host.base)));
        let auth = self.auth.as_ref().filter(|_| host.namespace.is_none());
        let headers = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<Challenge> = headers.iter().filter_map(|h| h.to_str().ok()).filter_map(parse_challenge).collect();
        let header = match (challenges.into_iter().next(), auth) {
            (None, _) => return Err(refused("unauthorized, and it names no way to log in")),
            (Some(Challenge::Basic), None) => return Err(refused("credentials are needed")),
            (Some(_), Some(RegistryAuth::Bearer { token })) => format!("Bearer {token}"),
            (Some(Challenge::Basic), Some(RegistryAuth::Basic { username, password })) => basic(username, password),
            (Some(Challenge::Bearer { realm, service, scope }), auth) => {
                let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
                format!("Bearer {}", self.token(host, &realm, service.as_deref(), &scope, auth).await?)
            }
        };
        self.granted.lock().unwrap_or_else(PoisonError::into_inner).insert(index, header);
        Ok(())
    }

    async fn token(
        &self,
        host: &Host,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        auth: Option<&RegistryAuth>,
    ) -> Result<String, ImageError> {
        #[derive(serde::Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let refused = |why: String| ImageError::Unauthorized(format!("token service {realm}: {why}"));
        let mut url = Url::parse(realm).map_err(|e| refused(e.to_string()))?;
        if host.base.scheme() == "https" && url.scheme() != "https" && !host.skip_verify {
            return Err(refused("is not reached by TLS, while its registry is".into()));
        }
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = service {
                query.append_pair("service", service);
            }
            query.append_pair("scope", scope);
        }
        let mut request = self.clients.of(host)?.get(url);
        if let Some(RegistryAuth::Basic { username, password }) = auth {
            request = request.header(AUTHORIZATION, basic(username, password));
        }
        let mut response =
            request.send().await.map_err(|e| ImageError::RegistryUnavailable(format!("token service {realm}: {}", cause(&e))))?;
        match response.status() {
            status if status.is_success() => {}
            status if is_transient(status) => {
                return Err(ImageError::RegistryUnavailable(format!("token service {realm}: {status}")));
            }
            status => return Err(refused(status.to_string())),
        }
        let bytes = read_all(&mut response, MAX_TOKEN_BYTES, "token").await?;
        let token: Token = serde_json::from_slice(&bytes).map_err(|e| refused(format!("sent no token: {e}")))?;
        token.token.or(token.access_token).filter(|t| !t.is_empty()).ok_or_else(|| refused("sent no token".into()))
    }
}

enum SendError {
    Setup(ImageError),
    Http(reqwest::Error),
}

impl SendError {
    fn is_connect(&self) -> bool {
        match self {
            SendError::Setup(_) => true,
            SendError::Http(error) => error.is_connect(),
        }
    }
}

fn unavailable(host: &Host, error: &SendError) -> ImageError {
    match error {
        SendError::Setup(error) => error.clone(),
        SendError::Http(error) => ImageError::RegistryUnavailable(format!("{}: {}", authority(&host.base), cause(error))),
    }
}

fn status_error(status: StatusCode, host: &Host) -> ImageError {
    let text = format!("{}: {status}", authority(&host.base));
    match status {
        StatusCode::NOT_FOUND => ImageError::NotFound(authority(&host.base)),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ImageError::Unauthorized(text),
        status if is_transient(status) => ImageError::RegistryUnavailable(text),
        _ => ImageError::Io(text),
    }
}

fn is_transient(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

fn basic(username: &str, password: &str) -> String {
    use base64::Engine as _;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}")))
}

fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The innermost cause: the outer ones only say that a request failed, which the caller says better.
pub(super) fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

async fn read_all(response: &mut Response, limit_bytes: u64, object: &str) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) => bytes.extend_from_slice(&chunk),
            Ok(None) => return Ok(bytes),
            Err(error) => return Err(ImageError::RegistryUnavailable(format!("{object}: {}", cause(&error)))),
        }
        if bytes.len() as u64 > limit_bytes {
            return Err(ImageError::TooMany(format!("{object}: is over the limit of {limit_bytes} bytes")));
        }
    }
}
