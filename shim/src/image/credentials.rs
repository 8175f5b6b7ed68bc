//! Credentials from a file, as `podman login` and `docker login` write them (containers-auth.json(5), docker's config.json): for
//! registries whose pulls bring none, and for mirrors, which get no others.

use super::auth::RegistryAuth;
use super::error::ImageError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::HashMap;
use std::path::Path;

/// Under this name docker keeps what belongs to docker.io.
const DOCKER_IO: &str = "https://index.docker.io/v1/";

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Credentials {
    #[serde(default)]
    auths: HashMap<String, Entry>,
    #[serde(default)]
    cred_helpers: HashMap<String, String>,
    #[serde(default)]
    creds_store: String,
}

#[derive(Debug, Default, Deserialize)]
struct Entry {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    identitytoken: String,
    #[serde(default)]
    registrytoken: String,
}

impl Credentials {
    /// Reads the file; one that is not there has nothing.
    pub(super) fn load(path: &Path) -> Result<Credentials, ImageError> {
        let what = || format!("read credentials {}", path.display());
        let text = match std::fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Credentials::default()),
            other => other.map_err(|e| ImageError::io(what(), e))?,
        };
        serde_json::from_slice(&text).map_err(|e| ImageError::Io(format!("{}: {e}", what())))
    }

    /// What is there for `host/repository`: the entry of the longest prefix by path components. Errors: an entry that is malformed, or
    /// kept by a helper program, which is not run.
    pub(super) fn find(&self, host: &str, repository: &str) -> Result<Option<RegistryAuth>, ImageError> {
        let full = format!("{host}/{repository}");
        let mut key = full.as_str();
        loop {
            let entry = self.auths.iter().find(|(name, _)| plain(name) == key);
            if let Some((name, entry)) = entry.filter(|(_, entry)| !entry.is_empty()) {
                return entry
                    .read()
                    .map(Some)
                    .map_err(|cause| ImageError::Unauthorized(format!("credentials for {name}: {cause}")));
            }
            match key.rsplit_once('/') {
                Some((shorter, _)) => key = shorter,
                None => break,
            }
        }
        let helper = self.cred_helpers.get(host).or(Some(&self.creds_store).filter(|_| self.auths.contains_key(host)));
        match helper.filter(|helper| !helper.is_empty()) {
            Some(helper) => Err(ImageError::Unauthorized(format!(
                "credentials for {host} are kept by the helper docker-credential-{helper}, which is not run; put them into auths"
            ))),
            None => Ok(None),
        }
    }
}

/// A key without scheme and version, as older files have them.
fn plain(key: &str) -> &str {
    if key == DOCKER_IO {
        return "docker.io";
    }
    let key = key.split_once("://").map_or(key, |(_, rest)| rest).trim_end_matches('/');
    key.strip_suffix("/v1").or(key.strip_suffix("/v2")).unwrap_or(key)
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.auth.is_empty() && self.identitytoken.is_empty() && self.registrytoken.is_empty()
    }

    fn read(&self) -> Result<RegistryAuth, &'static str> {
        if !self.registrytoken.is_empty() {
            return Ok(RegistryAuth::Bearer { token: self.registrytoken.clone() });
        }
        if !self.identitytoken.is_empty() {
            return Ok(RegistryAuth::Identity { token: self.identitytoken.clone() });
        }
        basic(&self.auth).ok_or("auth is not base64 of user:password")
    }
}

/// Reads base64 of `user:password`.
pub(super) fn basic(text: &str) -> Option<RegistryAuth> {
    let decoded = String::from_utf8(STANDARD.decode(text.trim()).ok()?).ok()?;
    let (username, password) = decoded.trim_end_matches('\0').split_once(':')?;
    Some(RegistryAuth::Basic { username: username.into(), password: password.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_entry_is_taken() {
        let encoded = |text: &str| STANDARD.encode(text);
        let file = serde_json::json!({
            "auths": {
                "reg.example": { "auth": encoded("host:1") },
                "reg.example/team": { "auth": encoded("team:2") },
                "reg.example/team/app": { "identitytoken": "refresh" },
                "https://old.example:5000/v2/": { "auth": encoded("old:3:4") },
                "https://index.docker.io/v1/": { "auth": encoded("hub:5") },
                "bad.example": { "auth": "!" },
                "helped.example": {},
                "token.example": { "registrytoken": "t" },
            },
            "credsStore": "secretservice",
            "credHelpers": { "gcr.example": "gcloud" },
        });
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("auth.json");
        std::fs::write(&path, file.to_string()).unwrap();
        let credentials = Credentials::load(&path).unwrap();
        let user = |name: &str, password: &str| Some(RegistryAuth::Basic { username: name.into(), password: password.into() });
        for (host, repository, expected) in [
            ("reg.example", "x", user("host", "1")),
            ("reg.example", "teams/x", user("host", "1")),
            ("reg.example", "team/x", user("team", "2")),
            ("reg.example", "team/app", Some(RegistryAuth::Identity { token: "refresh".into() })),
            ("old.example:5000", "a/b", user("old", "3:4")),
            ("docker.io", "library/x", user("hub", "5")),
            ("token.example", "x", Some(RegistryAuth::Bearer { token: "t".into() })),
            ("other.example", "x", None),
        ] {
            assert_eq!(credentials.find(host, repository).unwrap(), expected, "{host}/{repository}");
        }
        for (host, why) in [("bad.example", "base64"), ("gcr.example", "gcloud"), ("helped.example", "secretservice")] {
            let error = credentials.find(host, "x").unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(host), "{error}");
        }
        assert_eq!(Credentials::load(&directory.path().join("none")).unwrap().find("a", "b").unwrap(), None);
        std::fs::write(&path, "{").unwrap();
        assert!(Credentials::load(&path).unwrap_err().to_string().contains("auth.json"));
    }
}
