//! The AppArmor profile that the calling thread enters with its next exec (apparmor(7), proc_pid_attr(5)). Written through the host's /proc,
//! before the mount namespace is left: nothing that an image or a volume lays over /proc can swallow it.

use crate::process::{Context, Kind, StepError};
use oci_spec::runtime::Process;
use std::path::Path;

const ENABLED: &str = "/sys/module/apparmor/parameters/enabled";
/// AppArmor's own file since Linux 5.8; the other belongs to whichever security module comes first.
const EXEC: [&str; 2] = ["/proc/thread-self/attr/apparmor/exec", "/proc/thread-self/attr/exec"];

/// Asks the kernel for the profile of `process`. No profile, and `unconfined`, ask for nothing. Fails where the kernel has no AppArmor and
/// where the profile is not loaded (ENOENT).
pub fn confine_at_exec(process: &Process) -> Result<(), StepError> {
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    if matches!(profile, "" | "unconfined") {
        return Ok(());
    }
    let step = "enter AppArmor profile";
    if !std::fs::read(ENABLED).is_ok_and(|text| text.first() == Some(&b'Y')) {
        return Err(StepError::because(Kind::Unsupported, step, profile, "this kernel has no AppArmor, or it is off"));
    }
    let path = if Path::new(EXEC[0]).exists() { EXEC[0] } else { EXEC[1] };
    match std::fs::write(path, format!("exec {profile}")) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(StepError::because(Kind::Invalid, step, profile, "it is not loaded"))
        }
        other => other.context(step, profile),
    }
}
