//! Image references with Docker's rules of normalisation: `busybox` is `docker.io/library/busybox:latest`.

use super::digest::is_digest;
use super::error::ImageError;
use std::fmt;
use std::str::FromStr;

const DEFAULT_REGISTRY: &str = "docker.io";
const MAX_NAME_BYTES: usize = 255;
const MAX_TAG_BYTES: usize = 128;

/// A normalised reference: registry and repository, then a tag, a digest, or both.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
}

impl Reference {
    /// The registry as the name says it (`docker.io`, not the host that serves it), with its port.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path below the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag; `latest` where the text named neither tag nor digest.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was named.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// `registry/repository`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// `registry/repository:tag`, if there is a tag.
    pub(super) fn tagged(&self) -> Option<String> {
        self.tag.as_ref().map(|tag| format!("{}:{tag}", self.name()))
    }

    /// `registry/repository@digest` for a digest found.
    pub(super) fn with_digest(&self, digest: &str) -> String {
        format!("{}@{digest}", self.name())
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        parse(text).map_err(|cause| ImageError::InvalidReference { reference: text.to_owned(), cause: cause.to_owned() })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("is empty");
    }
    if super::digest::is_hex(text) {
        return Err("is an image id, not a name");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((_, digest)) if !is_digest(digest) => return Err("the digest is not sha256 and 64 lowercase hex digits"),
        Some((rest, digest)) => (rest, Some(digest.to_owned())),
        None => (text, None),
    };
    // A colon after the last slash begins a tag; one before it, a port.
    let last_slash = rest.rfind('/').map_or(0, |i| i + 1);
    let (name, tag) = match rest[last_slash..].find(':') {
        Some(i) => (&rest[..last_slash + i], Some(&rest[last_slash + i + 1..])),
        None => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err("the tag is not up to 128 letters, digits, '_', '.' or '-'");
    }
    let (registry, path) = split_registry(name);
    if !is_registry(registry) {
        return Err("the registry is not a host name with an optional port");
    }
    let registry = if registry == "index.docker.io" { DEFAULT_REGISTRY } else { registry };
    let repository =
        if registry == DEFAULT_REGISTRY && !path.contains('/') { format!("library/{path}") } else { path.to_owned() };
    if registry.len() + 1 + repository.len() > MAX_NAME_BYTES {
        return Err("the name is longer than 255 bytes");
    }
    if !repository.split('/').all(is_path_component) {
        return Err("the repository is not lowercase letters and digits, separated by '.', '_', '__', '-' or '/'");
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, None) => Some("latest".to_owned()),
        (None, Some(_)) => None,
    };
    Ok(Reference { registry: registry.to_owned(), repository, tag, digest })
}

/// The first component is a registry if it has a dot, a port or an upper-case letter, or is `localhost`.
fn split_registry(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.bytes().any(|b| b.is_ascii_uppercase())
                || first.starts_with('[') =>
        {
            (first, rest)
        }
        _ => (DEFAULT_REGISTRY, name),
    }
}

fn is_registry(text: &str) -> bool {
    let (host, port) = if text.starts_with('[') {
        match text.split_once(']') {
            Some((host, "")) => (host, None),
            Some((host, rest)) => match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None => return false,
            },
            None => return false,
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    if port.is_some_and(|p| p.parse::<u16>().is_err() || !p.bytes().all(|b| b.is_ascii_digit())) {
        return false;
    }
    if let Some(address) = host.strip_prefix('[') {
        return address.parse::<std::net::Ipv6Addr>().is_ok();
    }
    host.split('.').all(|label| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    })
}

fn is_tag(tag: &str) -> bool {
    tag.len() <= MAX_TAG_BYTES
        && tag.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

/// Runs of lowercase letters and digits, between them one '.', one or two '_', or any number of '-'.
fn is_path_component(text: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    if !bytes.first().is_some_and(|b| alnum(*b)) || !bytes.last().is_some_and(|b| alnum(*b)) {
        return false;
    }
    bytes.split(|b| alnum(*b)).all(|gap| matches!(gap, b"" | b"." | b"_" | b"__") || gap.iter().all(|b| *b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn normalises_as_docker_does() {
        let d = format!("sha256:{}", "a".repeat(64));
        let table = [
            ("busybox", "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36", "docker.io/library/busybox:1.36".to_owned()),
            ("foo/bar", "docker.io/foo/bar:latest".to_owned()),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest".to_owned()),
            ("localhost/a", "localhost/a:latest".to_owned()),
            ("localhost:5000/a/b:x", "localhost:5000/a/b:x".to_owned()),
            ("127.0.0.1:5000/a", "127.0.0.1:5000/a:latest".to_owned()),
            ("[::1]:5000/a", "[::1]:5000/a:latest".to_owned()),
            ("registry.k8s.io/pause:3.10", "registry.k8s.io/pause:3.10".to_owned()),
            ("q.io/a__b/c-d.e", "q.io/a__b/c-d.e:latest".to_owned()),
            (&format!("busybox@{d}"), format!("docker.io/library/busybox@{d}")),
            (&format!("q.io/a:t@{d}"), format!("q.io/a:t@{d}")),
        ];
        for (input, expected) in table {
            assert_eq!(input.parse::<Reference>().unwrap().to_string(), expected, "{input}");
        }
    }

    #[test]
    fn refuses_what_is_no_reference() {
        for bad in [
            "",
            "UPPER/x/",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:-x",
            "a@sha256:12",
            "a b",
            "q.io:x/a",
            "a..b",
            "a___b",
            ":t",
            "http://q.io/a",
        ] {
            assert!(matches!(bad.parse::<Reference>(), Err(ImageError::InvalidReference { .. })), "{bad:?}");
        }
        assert!("a".repeat(64).parse::<Reference>().is_err());
        assert!(format!("q.io/{}", "a".repeat(300)).parse::<Reference>().is_err());
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,80}") {
            let _ = text.parse::<Reference>();
        }

        #[test]
        fn normal_form_is_a_fixed_point(text in "([a-z0-9.-]{1,8}(:[0-9]{1,4})?/)?[a-z0-9._-]{1,8}(/[a-z0-9_]{1,5})?(:[A-Za-z0-9._-]{1,9})?(@sha256:[0-9a-f]{64})?") {
            if let Ok(reference) = text.parse::<Reference>() {
                let again: Reference = reference.to_string().parse().unwrap();
                prop_assert_eq!(&again, &reference);
                prop_assert!(reference.tag().is_some() || reference.digest().is_some());
            }
        }
    }
}
