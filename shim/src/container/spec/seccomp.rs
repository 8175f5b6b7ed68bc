//! The seccomp profile of a container, as `linux.seccomp` of the OCI configuration: none, the default one, or a file of this host.
//! Reads and checks; compiling and loading is the runtime's.

use super::{Input, seccomp_default};
use crate::error::{Error, Result};
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};
use serde_json::{Map, Value, json};
use std::{collections::BTreeSet, io::Read, path::Path};
use windlass_proto::cri::{LinuxContainerSecurityContext, security_profile::ProfileType};

/// Largest profile that is read.
const FILE_LIMIT_BYTES: u64 = 1 << 20;

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Unconfined,
    RuntimeDefault,
    /// The field that says so, and the file.
    Localhost(&'static str, String),
}

/// The profile for a container that holds `capabilities`; null is none. A privileged container has none.
pub(super) fn profile(input: &Input, capabilities: &BTreeSet<String>) -> Result<Value> {
    if input.privileged() {
        return Ok(Value::Null);
    }
    match asked(&input.security())? {
        Asked::Unconfined => Ok(Value::Null),
        Asked::RuntimeDefault => Ok(seccomp_default::profile(capabilities)),
        Asked::Localhost(field, path) => {
            let bad = |why: String| Error::invalid(format!("security_context.{field} {path:?}: {why}"));
            input.looking.at(format_args!("security_context.{field} {path:?}"), Path::new(&path))?;
            let text = read(Path::new(&path)).map_err(|error| bad(error.to_string()))?;
            parse(&text).map_err(bad)
        }
    }
}

/// The typed field wins over the deprecated string; neither means unconfined.
fn asked(security: &LinuxContainerSecurityContext) -> Result<Asked> {
    let (field, path) = match &security.seccomp {
        Some(profile) => match ProfileType::try_from(profile.profile_type) {
            Err(unknown) => return Err(Error::invalid(format!("security_context.seccomp.profile_type: {unknown}"))),
            Ok(ProfileType::RuntimeDefault) => return Ok(Asked::RuntimeDefault),
            Ok(ProfileType::Unconfined) => return Ok(Asked::Unconfined),
            Ok(ProfileType::Localhost) => ("seccomp.localhost_ref", profile.localhost_ref.as_str()),
        },
        None => {
            #[expect(deprecated, reason = "older clients still send the deprecated field")]
            let name = security.seccomp_profile_path.as_str();
            match (name, name.strip_prefix("localhost/")) {
                ("" | "unconfined", _) => return Ok(Asked::Unconfined),
                ("runtime/default" | "docker/default", _) => return Ok(Asked::RuntimeDefault),
                (_, Some(path)) => ("seccomp_profile_path", path),
                _ => return Err(Error::invalid(format!("security_context.seccomp_profile_path {name:?} is not a profile"))),
            }
        }
    };
    if !path.starts_with('/') {
        return Err(Error::invalid(format!("security_context.{field} {path:?} is not an absolute path")));
    }
    Ok(Asked::Localhost(field, path.to_owned()))
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = std::fs::File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("not a file"));
    }
    let mut text = Vec::new();
    file.take(FILE_LIMIT_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > FILE_LIMIT_BYTES {
        return Err(std::io::Error::other(format!("larger than {FILE_LIMIT_BYTES} bytes")));
    }
    Ok(text)
}

/// Checks a profile in the OCI runtime specification's JSON. What would be left out in silence and make it weaker is an error.
pub(super) fn parse(text: &[u8]) -> std::result::Result<Value, String> {
    let mut profile: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    for entry in profile.get_mut("syscalls").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(entry) = entry.as_object_mut() else { return Err("an element of syscalls is not an object".into()) };
        normalise(entry)?;
    }
    let parsed: LinuxSeccomp = serde_json::from_value(profile).map_err(|error| error.to_string())?;
    let entries = parsed.syscalls().iter().flatten();
    if entries
        .map(|entry| entry.action())
        .chain([parsed.default_action()])
        .any(|action| action == LinuxSeccompAction::ScmpActNotify)
    {
        return Err("SCMP_ACT_NOTIFY is not served: there is no agent that could be notified".into());
    }
    serde_json::to_value(parsed).map_err(|error| error.to_string())
}

/// Brings an entry to the specification's form.
fn normalise(entry: &mut Map<String, Value>) -> std::result::Result<(), String> {
    // Docker's own format has conditions that this format has not; without them the entry would hold for everybody.
    for key in ["includes", "excludes"] {
        let empty = match entry.get(key) {
            None | Some(Value::Null) => true,
            Some(Value::Object(conditions)) => conditions.is_empty(),
            Some(_) => false,
        };
        if !empty {
            return Err(format!("syscalls.{key} is Docker's format; the OCI format has no conditions"));
        }
    }
    if !entry.contains_key("names") {
        // The format's first version had one name.
        let name = entry.get("name").cloned().ok_or("an element of syscalls has no names")?;
        entry.insert("names".into(), json!([name]));
    }
    for argument in entry.get_mut("args").and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut) {
        for key in ["index", "value"] {
            argument.entry(key).or_insert(json!(0));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use windlass_proto::cri::SecurityProfile;

    fn check(typed: Option<(ProfileType, &str)>, deprecated: &str, expected: Option<Asked>) {
        #[expect(deprecated, reason = "older clients still send the deprecated field")]
        let security = LinuxContainerSecurityContext {
            seccomp: typed.map(|(kind, path)| SecurityProfile { profile_type: kind.into(), localhost_ref: path.into() }),
            seccomp_profile_path: deprecated.into(),
            ..Default::default()
        };
        match (asked(&security), expected) {
            (Ok(found), Some(expected)) => assert_eq!(found, expected, "{typed:?} {deprecated:?}"),
            (Err(error), None) => assert!(error.message.contains("seccomp"), "{error}"),
            (found, expected) => panic!("{typed:?} {deprecated:?}: {found:?}, not {expected:?}"),
        }
    }

    #[test]
    fn the_typed_field_wins_and_nothing_means_unconfined() {
        let file = |field| Some(Asked::Localhost(field, "/p.json".into()));
        check(None, "", Some(Asked::Unconfined));
        check(None, "unconfined", Some(Asked::Unconfined));
        check(None, "runtime/default", Some(Asked::RuntimeDefault));
        check(None, "docker/default", Some(Asked::RuntimeDefault));
        check(None, "localhost//p.json", file("seccomp_profile_path"));
        check(None, "localhost/p.json", None);
        check(None, "something", None);
        check(Some((ProfileType::Unconfined, "")), "runtime/default", Some(Asked::Unconfined));
        check(Some((ProfileType::RuntimeDefault, "")), "unconfined", Some(Asked::RuntimeDefault));
        check(Some((ProfileType::Localhost, "/p.json")), "", file("seccomp.localhost_ref"));
        check(Some((ProfileType::Localhost, "p.json")), "", None);
        check(Some((ProfileType::Localhost, "")), "", None);
    }

    #[test]
    fn profiles_that_would_be_weaker_than_they_read_are_refused() {
        for (profile, word) in [
            (r#"{"defaultAction":"SCMP_ACT_DENY"}"#, "SCMP_ACT_DENY"),
            (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_NOTIFY"}]}"#, "SCMP_ACT_NOTIFY"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"action":"SCMP_ACT_KILL"}]}"#, "names"),
            (
                r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["a"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["b"]}}]}"#,
                "includes",
            ),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["a"],"action":"SCMP_ACT_KILL","args":[{"op":"SCMP_CMP_IS"}]}]}"#,
                "SCMP_CMP_IS",
            ),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_NEW"]}"#, "SECCOMP_FILTER_FLAG_NEW"),
            ("{", "EOF"),
        ] {
            let error = parse(profile.as_bytes()).expect_err(profile);
            assert!(error.contains(word), "{profile}: {error}");
        }
    }

    #[test]
    fn the_default_profile_follows_the_capabilities() {
        let text = |capabilities: &[&str]| {
            let held = capabilities.iter().map(|name| (*name).to_owned()).collect();
            let profile = seccomp_default::profile(&held);
            parse(profile.to_string().as_bytes()).expect("valid").to_string()
        };
        let plain = text(&[]);
        assert!(!plain.contains("\"mount\"") && !plain.contains("\"bpf\"") && plain.contains("\"clone3\""));
        let admin = text(&["SYS_ADMIN"]);
        assert!(admin.contains("\"mount\"") && !admin.contains("\"errnoRet\":38"));
    }
}
