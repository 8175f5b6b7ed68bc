//! Credentials, and a registry's challenge (`WWW-Authenticate`) for them.

use std::collections::HashMap;
use std::fmt;

/// What a caller may prove itself with.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum RegistryAuth {
    /// A user's name and password, also sent to the registry's token service.
    Basic {
        /// The user.
        username: String,
        /// The password, or an access token used as one.
        password: String,
    },
    /// A token that the registry itself takes.
    Bearer {
        /// The token.
        token: String,
    },
    /// A refresh token, for which the token service gives tokens (OAuth2).
    Identity {
        /// The refresh token.
        token: String,
    },
}

impl RegistryAuth {
    /// Reads base64 of `user:password`.
    pub fn basic(text: &str) -> Option<RegistryAuth> {
        super::credentials::basic(text)
    }
}

impl fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegistryAuth::Basic { .. } => f.write_str("Basic(..)"),
            RegistryAuth::Bearer { .. } => f.write_str("Bearer(..)"),
            RegistryAuth::Identity { .. } => f.write_str("Identity(..)"),
        }
    }
}

/// What a 401 asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// Reads one `WWW-Authenticate` header (RFC 9110, 11.6.1).
pub(super) fn parse_challenge(header: &str) -> Option<Challenge> {
    let (scheme, rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let mut values = parameters(rest);
    Some(Challenge::Bearer { realm: values.remove("realm")?, service: values.remove("service"), scope: values.remove("scope") })
}

/// `key="value"` pairs; a quoted value may hold commas.
fn parameters(mut text: &str) -> HashMap<String, String> {
    let mut values = HashMap::new();
    while let Some((key, rest)) = text.split_once('=') {
        let key = key.trim_matches([' ', ',']).to_ascii_lowercase();
        let (value, rest) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_once(',').unwrap_or((rest, "")),
        };
        values.insert(key, value.trim().to_owned());
        text = rest;
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges() {
        let bearer = r#"Bearer realm="https://auth.example/token",service="reg",scope="repository:a/b:pull,push""#;
        let expected = Challenge::Bearer {
            realm: "https://auth.example/token".into(),
            service: Some("reg".into()),
            scope: Some("repository:a/b:pull,push".into()),
        };
        assert_eq!(parse_challenge(bearer), Some(expected));
        assert_eq!(parse_challenge("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(parse_challenge("Bearer service=x"), None);
        assert_eq!(parse_challenge("Negotiate"), None);
    }
}
