//! Configuration files of CNI networks: which one is the pods' network, and what its file says. Nothing is executed here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Largest configuration file; a longer one is none.
const FILE_LIMIT_BYTES: u64 = 1 << 20;
/// Most plugins of one network.
const PLUGINS_LIMIT: usize = 32;

/// A version of the CNI specification that is spoken here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Version(usize);

/// In order.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

impl Version {
    /// The first with CHECK, and with a result for DEL.
    pub(super) const CHECK: Version = Version(2);
    /// The first whose addresses have no `version`.
    pub(super) const PLAIN_ADDRESSES: Version = Version(3);
    /// The first with GC and STATUS.
    pub(super) const STATUS: Version = Version(4);
}

impl TryFrom<String> for Version {
    type Error = String;

    fn try_from(text: String) -> Result<Version, String> {
        VERSIONS
            .iter()
            .position(|version| *version == text)
            .map(Version)
            .ok_or_else(|| format!("version {text:?} is none of {}", VERSIONS.join(", ")))
    }
}

impl From<Version> for String {
    fn from(version: Version) -> String {
        version.to_string()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(VERSIONS[self.0])
    }
}

/// A network: its plugins in the order of ADD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct NetworkList {
    pub(super) name: String,
    pub(super) version: Version,
    pub(super) file: PathBuf,
    pub(super) disable_check: bool,
    pub(super) disable_gc: bool,
    pub(super) plugins: Vec<Plugin>,
}

/// One plugin of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plugin {
    /// Name of its program.
    pub(super) program: String,
    /// What of `runtimeConfig` it takes.
    pub(super) capabilities: BTreeSet<String>,
    /// Its part of the file, as it stands there.
    pub(super) config: Map<String, Value>,
}

/// Which files lie in the directory, and by what a change of one is seen.
pub(super) type Fingerprint = BTreeMap<PathBuf, (u64, u64, Option<SystemTime>)>;

/// The configuration files of a directory in the order of their names; none where it is absent.
pub(super) fn files(directory: &Path) -> io::Result<Fingerprint> {
    use std::os::unix::fs::MetadataExt;
    let listing = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Fingerprint::new()),
        listing => listing?,
    };
    let mut found = Fingerprint::new();
    for entry in listing {
        let path = entry?.path();
        let known =
            path.extension().is_some_and(|extension| ["conf", "conflist", "json"].iter().any(|known| extension == *known));
        // By way of links: a mounted ConfigMap has nothing else.
        if let (true, Ok(about)) = (known, fs::metadata(&path))
            && about.is_file()
        {
            found.insert(path, (about.ino(), about.len(), about.modified().ok()));
        }
    }
    Ok(found)
}

/// Reads one file. The error names the field, not the file.
pub(super) fn load(path: &Path) -> Result<NetworkList, String> {
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(FILE_LIMIT_BYTES).read_to_string(&mut text).map_err(|error| error.to_string())?;
    parse(path, &text)
}

/// A list, or a single plugin, which is a list of one.
pub(super) fn parse(path: &Path, text: &str) -> Result<NetworkList, String> {
    let mut top: Map<String, Value> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let name = string(&top, "name")?;
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    if !name.bytes().all(good) || !name.as_bytes()[0].is_ascii_alphanumeric() {
        return Err(format!("name {name:?}: letters, digits, '.', '_' and '-' are allowed, a letter or digit first"));
    }
    let version = version(&top)?;
    let parts = match top.remove("plugins") {
        Some(Value::Array(parts)) if parts.is_empty() || parts.len() > PLUGINS_LIMIT => {
            return Err(format!("plugins: {} of them; 1 to {PLUGINS_LIMIT} are served", parts.len()));
        }
        Some(Value::Array(parts)) => parts,
        Some(_) => return Err("plugins: is not a list".to_owned()),
        None => vec![Value::Object(top.clone())],
    };
    let plugins = parts.into_iter().enumerate().map(|(index, part)| {
        let Value::Object(config) = part else { return Err(format!("plugins[{index}]: is not an object")) };
        plugin(config).map_err(|error| format!("plugins[{index}].{error}"))
    });
    Ok(NetworkList {
        name,
        version,
        file: path.to_owned(),
        disable_check: flag(&top, "disableCheck"),
        disable_gc: flag(&top, "disableGC"),
        plugins: plugins.collect::<Result<_, String>>()?,
    })
}

/// `cniVersion`, or the newest of `cniVersions` that is spoken here.
fn version(top: &Map<String, Value>) -> Result<Version, String> {
    let offered = top.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
    let best = offered.filter_map(Value::as_str).filter_map(|text| Version::try_from(text.to_owned()).ok()).max();
    let own = string(top, "cniVersion").and_then(|text| Version::try_from(text).map_err(|why| format!("cniVersion: {why}")));
    match (best, own) {
        (Some(best), Ok(own)) => Ok(best.max(own)),
        (Some(best), Err(_)) => Ok(best),
        (None, own) => own,
    }
}

fn plugin(config: Map<String, Value>) -> Result<Plugin, String> {
    let program = string(&config, "type")?;
    if program.contains('/') || program.starts_with('.') {
        return Err(format!("type {program:?}: is a path, not the name of a program"));
    }
    let capabilities = match config.get("capabilities") {
        None | Some(Value::Null) => BTreeSet::new(),
        Some(Value::Object(map)) => {
            map.iter().filter(|(_, on)| **on == Value::Bool(true)).map(|(name, _)| name.clone()).collect()
        }
        Some(_) => return Err("capabilities: is not an object".to_owned()),
    };
    Ok(Plugin { program, capabilities, config })
}

fn string(map: &Map<String, Value>, field: &str) -> Result<String, String> {
    match map.get(field) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text.clone()),
        Some(Value::String(_)) => Err(format!("{field}: is empty")),
        Some(_) => Err(format!("{field}: is not a string")),
        None => Err(format!("{field}: is missing")),
    }
}

/// Written as a boolean or, by some, as a string.
fn flag(map: &Map<String, Value>, field: &str) -> bool {
    match map.get(field) {
        Some(Value::Bool(on)) => *on,
        Some(Value::String(text)) => text.eq_ignore_ascii_case("true"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<(&str, &str, &[&str]), &str>) {
        let found = parse(Path::new("x"), text);
        match (found, expected) {
            (Ok(found), Ok((name, version, programs))) => {
                let got: Vec<&str> = found.plugins.iter().map(|plugin| plugin.program.as_str()).collect();
                assert_eq!(
                    (found.name.as_str(), found.version.to_string().as_str(), &got[..]),
                    (name, version, programs),
                    "{text}"
                );
            }
            (Err(error), Err(part)) => assert!(error.contains(part), "{text}: {error}"),
            (found, expected) => panic!("{text}: {found:?}, expected {expected:?}"),
        }
    }

    #[test]
    fn files_are_read_and_the_wrong_field_is_named() {
        for (text, expected) in [
            (r#"{"name":"n","cniVersion":"0.3.1","type":"bridge"}"#, Ok(("n", "0.3.1", &["bridge"][..]))),
            (r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"},{"type":"b"}]}"#, Ok(("n", "1.0.0", &["a", "b"][..]))),
            (
                r#"{"name":"n","cniVersion":"0.4.0","cniVersions":["1.1.0","9.0.0","1.0.0"],"type":"a"}"#,
                Ok(("n", "1.1.0", &["a"][..])),
            ),
            (r#"{"name":"n","cniVersions":["1.0.0"],"type":"a"}"#, Ok(("n", "1.0.0", &["a"][..]))),
            (r#"{"cniVersion":"1.0.0","type":"a"}"#, Err("name: is missing")),
            (r#"{"name":"a b","cniVersion":"1.0.0","type":"a"}"#, Err("name \"a b\"")),
            (r#"{"name":"n","type":"a"}"#, Err("cniVersion: is missing")),
            (r#"{"name":"n","cniVersion":"2.0.0","type":"a"}"#, Err("cniVersion: version \"2.0.0\"")),
            (r#"{"name":"n","cniVersion":"1.0.0","plugins":[]}"#, Err("plugins: 0")),
            (r#"{"name":"n","cniVersion":"1.0.0","plugins":{}}"#, Err("plugins: is not a list")),
            (r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"},{}]}"#, Err("plugins[1].type: is missing")),
            (r#"{"name":"n","cniVersion":"1.0.0","type":"../sh"}"#, Err("type \"../sh\"")),
            (r#"{"name":"n","cniVersion":"1.0.0","type":"a","capabilities":[]}"#, Err("capabilities")),
            (r#"{"name":"n","#, Err("EOF")),
        ] {
            check(text, expected);
        }
    }

    #[test]
    fn the_example_is_a_network() {
        let plugins: &[&str] = &["bridge", "portmap", "bandwidth"];
        check(include_str!("../../../../manifests/cni/10-bridge.conflist"), Ok(("pods", "1.0.0", plugins)));
    }

    #[test]
    fn files_are_found_by_name_and_in_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["20.conf", "10.conflist", "30.json", "05.conf.bak", "readme"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let names: Vec<_> = files(folder.path()).unwrap().into_keys().collect();
        assert_eq!(names, ["10.conflist", "20.conf", "30.json"].map(|name| folder.path().join(name)));
        assert!(files(&folder.path().join("absent")).unwrap().is_empty());
    }
}
