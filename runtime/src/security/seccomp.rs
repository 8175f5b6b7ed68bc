//! Seccomp profiles and mandatory access control labels. Not built yet: a bundle that asks for one is refused rather than run
//! without it.

use crate::process::{Kind, StepError};
use oci_spec::runtime::{Process, Spec};

/// Refuses what this build cannot apply.
pub fn check(spec: Option<&Spec>, process: &Process) -> Result<(), StepError> {
    let refuse = |object: &str| Err(StepError::because(Kind::Unsupported, "apply", object, "not built yet"));
    let linux = spec.and_then(|spec| spec.linux().as_ref());
    if linux.is_some_and(|linux| linux.seccomp().is_some()) {
        return refuse("seccomp profile");
    }
    if process.apparmor_profile().as_deref().is_some_and(|profile| !profile.is_empty() && profile != "unconfined") {
        return refuse("AppArmor profile");
    }
    let mount_label = linux.and_then(|linux| linux.mount_label().as_deref());
    if [process.selinux_label().as_deref(), mount_label].into_iter().flatten().any(|label| !label.is_empty()) {
        return refuse("SELinux label");
    }
    Ok(())
}
