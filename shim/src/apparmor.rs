//! AppArmor: whether this kernel has it, the profile of our own that is loaded when the daemon starts, and which profile a container gets.
//! Applying it is the runtime's work. Profiles of others are looked up, never loaded or removed.

use crate::error::{Error, Result};
use std::{io, path::Path, process::Stdio, time::Duration};
use tokio::{io::AsyncWriteExt, process::Command};
use windlass_proto::cri::{LinuxContainerSecurityContext, SecurityProfile, security_profile::ProfileType};

/// Name of the profile that `RuntimeDefault` means.
pub const DEFAULT: &str = "windlass-default";

const PROFILE: &str = include_str!("apparmor.profile");
const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// The loaded profiles, a line `name (mode)` each.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
/// The program that compiles a profile and gives it to the kernel, of Debian's package `apparmor`.
const PARSERS: [&str; 2] = ["/sbin/apparmor_parser", "/usr/sbin/apparmor_parser"];
const PARSER_LIMIT: Duration = Duration::from_secs(20);

/// What this node can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AppArmor {
    /// The kernel has no AppArmor, or it is off.
    Absent,
    /// Our profile is loaded.
    Ready,
    /// The kernel has it, and our profile could not be loaded: the reason. Profiles that others loaded can be used.
    Unready(String),
}

impl AppArmor {
    /// Looks at the kernel and loads our profile, in place of the one that an older daemon left. Says in the log what is missing.
    pub async fn start() -> AppArmor {
        if !std::fs::read(ENABLED).is_ok_and(|text| text.first() == Some(&b'Y')) || !Path::new(LOADED).exists() {
            return AppArmor::Absent;
        }
        match load().await {
            Ok(()) => AppArmor::Ready,
            Err(reason) => {
                tracing::warn!(
                    reason,
                    "AppArmor is on, but the profile {DEFAULT} is not loaded: containers that ask for RuntimeDefault are refused"
                );
                AppArmor::Unready(reason)
            }
        }
    }

    /// One word for a person, and the reason.
    pub fn describe(&self) -> String {
        match self {
            AppArmor::Absent => "not in this kernel".into(),
            AppArmor::Ready => format!("on; RuntimeDefault is {DEFAULT}"),
            AppArmor::Unready(reason) => format!("on; RuntimeDefault is refused: {reason}"),
        }
    }

    /// The profile of a container, `None` to run unconfined. A container that names none gets ours where it is loaded, as the pod security
    /// standards have it; one that names a profile gets that, or an error.
    pub fn profile(&self, security: &LinuxContainerSecurityContext) -> Result<Option<String>> {
        let Some((field, asked)) = asked(security)? else {
            return Ok((!security.privileged && *self == AppArmor::Ready).then(|| DEFAULT.to_owned()));
        };
        if security.privileged || asked.profile_type() == ProfileType::Unconfined {
            return Ok(None);
        }
        let refuse = |why: String| Err(Error::invalid(format!("security_context.{field}: {why}")));
        match (self, asked.profile_type()) {
            (AppArmor::Absent, _) => refuse("this node's kernel has no AppArmor, or it is off".into()),
            (AppArmor::Ready, ProfileType::RuntimeDefault) => Ok(Some(DEFAULT.to_owned())),
            (AppArmor::Unready(reason), ProfileType::RuntimeDefault) => refuse(format!("{DEFAULT} is not loaded: {reason}")),
            (_, ProfileType::Localhost | ProfileType::Unconfined) => {
                let name = asked.localhost_ref.strip_prefix("localhost/").unwrap_or(&asked.localhost_ref);
                if name.is_empty() || name.contains(|c: char| c.is_control()) {
                    return refuse(format!("{name:?} is not the name of a profile"));
                }
                let loaded = std::fs::read_to_string(LOADED).map_err(|error| Error::io(format_args!("read {LOADED}"), error))?;
                if !is_loaded(&loaded, name) {
                    return refuse(format!("profile {name:?} is not loaded on this node"));
                }
                Ok(Some(name.to_owned()))
            }
        }
    }
}

/// The field that asks for a profile, and what it asks for. The typed field goes before the deprecated string.
fn asked(security: &LinuxContainerSecurityContext) -> Result<Option<(&'static str, SecurityProfile)>> {
    if let Some(profile) = &security.apparmor {
        if ProfileType::try_from(profile.profile_type).is_err() {
            return Err(Error::invalid(format!("security_context.apparmor.profile_type {} is unknown", profile.profile_type)));
        }
        return Ok(Some(("apparmor", profile.clone())));
    }
    #[expect(deprecated, reason = "older clients still send the deprecated field")]
    let text = security.apparmor_profile.as_str();
    let (kind, name) = match text {
        "" => return Ok(None),
        "runtime/default" => (ProfileType::RuntimeDefault, ""),
        "unconfined" => (ProfileType::Unconfined, ""),
        _ if text.starts_with("localhost/") => (ProfileType::Localhost, text),
        _ => {
            let forms = "runtime/default, unconfined or localhost/NAME";
            return Err(Error::invalid(format!("security_context.apparmor_profile {text:?} is not {forms}")));
        }
    };
    Ok(Some(("apparmor_profile", SecurityProfile { profile_type: kind.into(), localhost_ref: name.to_owned() })))
}

fn is_loaded(profiles: &str, name: &str) -> bool {
    profiles.lines().any(|line| line.rsplit_once(" (").is_some_and(|(loaded, _)| loaded == name))
}

async fn load() -> std::result::Result<(), String> {
    let parser = PARSERS.into_iter().find(|path| Path::new(path).exists());
    let parser = parser.ok_or("there is no apparmor_parser; install the package apparmor")?;
    let run = async {
        let mut child = Command::new(parser)
            .args(["--replace", "--skip-cache"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(PROFILE.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let late = || io::Error::new(io::ErrorKind::TimedOut, format!("not within {PARSER_LIMIT:?}"));
    let output = tokio::time::timeout(PARSER_LIMIT, run).await.unwrap_or_else(|_| Err(late()));
    let output = output.map_err(|error| format!("run {parser}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said: String = String::from_utf8_lossy(&output.stderr).chars().take(500).collect();
    Err(format!("{parser} ended with {}: {}", output.status, said.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(kind: ProfileType, name: &str) -> LinuxContainerSecurityContext {
        let apparmor = SecurityProfile { profile_type: kind.into(), localhost_ref: name.into() };
        LinuxContainerSecurityContext { apparmor: Some(apparmor), ..Default::default() }
    }

    #[expect(deprecated, reason = "older clients still send the deprecated field")]
    fn text(text: &str) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext { apparmor_profile: text.into(), ..Default::default() }
    }

    #[test]
    fn what_is_asked_for_is_applied_or_refused() {
        let unready = AppArmor::Unready("no parser".into());
        let default = Some(DEFAULT.to_owned());
        for (node, security, expected) in [
            (&AppArmor::Ready, text(""), Ok(default.clone())),
            (&AppArmor::Ready, typed(ProfileType::RuntimeDefault, ""), Ok(default.clone())),
            (&AppArmor::Ready, text("runtime/default"), Ok(default)),
            (&AppArmor::Ready, text("unconfined"), Ok(None)),
            (&AppArmor::Ready, typed(ProfileType::Unconfined, ""), Ok(None)),
            (&AppArmor::Ready, typed(ProfileType::Localhost, ""), Err("apparmor:")),
            (&AppArmor::Ready, text("strange"), Err("apparmor_profile")),
            (&AppArmor::Absent, text(""), Ok(None)),
            (&AppArmor::Absent, text("unconfined"), Ok(None)),
            (&AppArmor::Absent, text("localhost/x"), Err("apparmor_profile")),
            (&AppArmor::Absent, typed(ProfileType::RuntimeDefault, ""), Err("no AppArmor")),
            (&unready, text(""), Ok(None)),
            (&unready, text("runtime/default"), Err("no parser")),
        ] {
            let found = node.profile(&security);
            match (&found, &expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected, "{node:?} {security:?}"),
                (Err(error), Err(part)) => assert!(error.message.contains(part), "{error}"),
                _ => panic!("{node:?} {security:?}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_privileged_container_is_not_confined() {
        for mut security in [text(""), text("runtime/default"), typed(ProfileType::Localhost, "x")] {
            security.privileged = true;
            assert_eq!(AppArmor::Ready.profile(&security), Ok(None));
        }
    }

    #[test]
    fn the_typed_field_goes_first_and_names_are_whole() {
        let mut both = text("localhost/x");
        both.apparmor = typed(ProfileType::Unconfined, "").apparmor;
        assert_eq!(AppArmor::Ready.profile(&both), Ok(None));
        let profiles = "docker-default (enforce)\na profile (complain)\n";
        assert!(is_loaded(profiles, "docker-default") && is_loaded(profiles, "a profile"));
        assert!(!is_loaded(profiles, "docker") && !is_loaded(profiles, "profile"));
        assert!(PROFILE.contains(&format!("profile {DEFAULT} ")));
    }
}
