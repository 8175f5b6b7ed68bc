//! The client of one repository for one pull: asks its hosts in order, answers challenges, retries what may pass.
//! Protocol: OCI distribution-spec 1.1, "pull".

use super::auth::{Challenge, RegistryAuth, parse_challenge};
use super::credentials::Credentials;
use super::digest;
use super::error::ImageError;
use super::hosts::{self, Host, RegistryFiles};
use super::manifest::{Descriptor, MEDIA_TYPES};
use super::reference::Reference;
use super::tls::{Clients, authority, cause};
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use std::collections::HashMap;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

const TRIES: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const MAX_MANIFEST_BYTES: u64 = 4 << 20;
const MAX_TOKEN_BYTES: u64 = 1 << 20;

/// One repository, as one caller sees it.
pub(super) struct Session {
    clients: std::sync::Arc<Clients>,
    hosts: Vec<Host>,
    repository: String,
    /// The caller's, for the registry itself.
    auth: Option<RegistryAuth>,
    /// For mirrors, and for the registry if the caller has none: read once somebody asks for a login that the caller has not.
    credentials: OnceLock<Result<Credentials, ImageError>>,
    files: RegistryFiles,
    registry: String,
    /// Authorization headers that were accepted or given, by the host's place in `hosts`.
    granted: Mutex<HashMap<usize, String>>,
}

impl Session {
    pub(super) fn new(
        clients: std::sync::Arc<Clients>,
        files: &RegistryFiles,
        reference: &Reference,
        auth: Option<RegistryAuth>,
    ) -> Result<Session, ImageError> {
        let hosts = hosts::hosts_for(files, reference)?;
        let (registry, repository) = (reference.registry().to_owned(), reference.repository().to_owned());
        let (credentials, files) = (OnceLock::new(), files.clone());
        Ok(Session { clients, hosts, repository, auth, credentials, files, registry, granted: Mutex::default() })
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

    /// The index of what refers to a manifest, as it came (distribution-spec 1.1); a registry without that call has it under a tag.
    pub(super) async fn referrers(&self, digest: &str) -> Result<Vec<u8>, ImageError> {
        let object = format!("referrers of {digest}");
        match self.get(&format!("referrers/{digest}"), &object, Some(INDEX_TYPE), 0, |h| h.resolve).await {
            Ok(mut response) => read_all(&mut response, MAX_MANIFEST_BYTES, &object).await,
            Err(error @ ImageError::RegistryUnavailable(_)) => Err(error),
            Err(_) => self.manifest(&digest.replace(':', "-")).await.map(|(bytes, _)| bytes),
        }
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
        url.set_path(&format!("{}/{}/{path}", host.base.path(), self.repository_at(host)));
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
                Err(error) if error.is_connect() => return Err(self.unavailable(host, &error)),
                Err(error) => (self.unavailable(host, &error), None),
            };
            if tries >= TRIES {
                return Err(error);
            }
            tokio::time::sleep(wait.unwrap_or(backoff)).await;
            backoff *= 2;
        }
    }

    async fn send(&self, index: usize, host: &Host, url: &Url, accept: Option<&str>, offset: u64) -> Result<Response, SendError> {
        let client = self.clients.of(&host.transport, url).map_err(SendError::Setup)?;
        let mut request = client.get(url.clone()).headers(host.headers.clone());
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

    fn unavailable(&self, host: &Host, error: &SendError) -> ImageError {
        match error {
            SendError::Setup(error) => error.clone(),
            SendError::Http(error) => {
                ImageError::RegistryUnavailable(format!("{}: {}", self.clients.place(&host.base), cause(error)))
            }
        }
    }

    fn repository_at<'a>(&'a self, host: &'a Host) -> &'a str {
        host.repository.as_deref().unwrap_or(&self.repository)
    }

    /// The caller's credentials go to the registry itself, never to a mirror of it. Those of the file go where it says.
    fn auth_for(&self, host: &Host) -> Result<Option<RegistryAuth>, ImageError> {
        if !host.mirror && self.auth.is_some() {
            return Ok(self.auth.clone());
        }
        let credentials = self.credentials.get_or_init(|| self.files.credentials()).as_ref().map_err(Clone::clone)?;
        let repository = self.repository_at(host);
        let named = match host.mirror {
            true => None,
            false => credentials.find(&self.registry, repository)?,
        };
        named.map_or_else(|| credentials.find(&authority(&host.base), repository), |auth| Ok(Some(auth)))
    }

    /// Gets what a 401 asks for.
    async fn answer_challenge(&self, index: usize, host: &Host, response: &Response) -> Result<(), ImageError> {
        let refused = |why: &str| ImageError::Unauthorized(format!("{}: {why}", authority(&host.base)));
        let auth = self.auth_for(host)?;
        let headers = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<Challenge> = headers.iter().filter_map(|h| h.to_str().ok()).filter_map(parse_challenge).collect();
        let header = match (challenges.into_iter().next(), auth.as_ref()) {
            (None, _) => return Err(refused("unauthorized, and it names no way to log in")),
            (Some(Challenge::Basic), None) => return Err(refused("credentials are needed")),
            (Some(_), Some(RegistryAuth::Bearer { token })) => format!("Bearer {token}"),
            (Some(Challenge::Basic), Some(RegistryAuth::Basic { username, password })) => basic(username, password),
            (Some(Challenge::Basic), Some(RegistryAuth::Identity { .. })) => {
                return Err(refused("an identity token is for registries with a token service, and this one has none"));
            }
            (Some(Challenge::Bearer { realm, service, scope }), auth) => {
                let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository_at(host)));
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
        if host.base.scheme() == "https" && url.scheme() != "https" && !host.transport.skip_verify {
            return Err(refused("is not reached by TLS, while its registry is".into()));
        }
        let client = self.clients.of(&host.transport, &url)?;
        let place = self.clients.place(&url);
        let mut fields: Vec<(&str, &str)> = service.iter().map(|service| ("service", *service)).collect();
        fields.push(("scope", scope));
        let request = match auth {
            // Distribution's "OAuth2 token authentication".
            Some(RegistryAuth::Identity { token }) => {
                fields.extend([("grant_type", "refresh_token"), ("refresh_token", token), ("client_id", "windlass")]);
                let mut body = Url::parse("form:").map_err(|e| refused(e.to_string()))?;
                body.query_pairs_mut().extend_pairs(fields);
                let form = "application/x-www-form-urlencoded";
                client.post(url).header(CONTENT_TYPE, form).body(body.query().unwrap_or_default().to_owned())
            }
            auth => {
                url.query_pairs_mut().extend_pairs(fields);
                let request = client.get(url);
                match auth {
                    Some(RegistryAuth::Basic { username, password }) => request.header(AUTHORIZATION, basic(username, password)),
                    _ => request,
                }
            }
        };
        let mut response =
            request.send().await.map_err(|e| ImageError::RegistryUnavailable(format!("token service {place}: {}", cause(&e))))?;
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
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim();
    Some(wait_of(value, time::OffsetDateTime::now_utc())?.min(MAX_RETRY_AFTER))
}

/// Seconds, or a date (RFC 9110, 10.2.3).
fn wait_of(value: &str, now: time::OffsetDateTime) -> Option<Duration> {
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = time::OffsetDateTime::parse(value, &time::format_description::well_known::Rfc2822).ok()?;
    Some(Duration::try_from(at - now).unwrap_or(Duration::ZERO))
}

fn basic(username: &str, password: &str) -> String {
    use base64::Engine as _;
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}")))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_seconds_or_dates() {
        let now = time::OffsetDateTime::from_unix_timestamp(1_445_412_480).unwrap();
        for (value, expected) in [
            ("120", Some(120)),
            ("Wed, 21 Oct 2015 07:28:30 GMT", Some(30)),
            ("Wed, 21 Oct 2015 07:00:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            assert_eq!(wait_of(value, now), expected.map(Duration::from_secs), "{value}");
        }
    }
}
