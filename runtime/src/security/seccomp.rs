//! Seccomp filters, from the profile of a bundle to the kernel. The compiler is our own: libseccomp needs milliseconds where this
//! needs tens of microseconds, and other crates serve one architecture or one errno in a filter. A start and an
//! exec each compile anew, 0.1 ms for the default profile with its three architectures: a cache would save less than it could get wrong. Besides, mandatory access control labels:
//! not built yet, so a bundle that asks for one is refused rather than run without it.

mod filter;
mod program;
mod rules;
mod table;
#[cfg(test)]
mod tests;

pub use filter::Filter;

use crate::process::{Kind, StepError};
use oci_spec::runtime::{Process, Spec};

/// Refuses what this build cannot apply.
pub fn check(spec: Option<&Spec>, process: &Process) -> Result<(), StepError> {
    let refuse = |object: &str| Err(StepError::because(Kind::Unsupported, "apply", object, "not built yet"));
    let linux = spec.and_then(|spec| spec.linux().as_ref());
    let mount_label = linux.and_then(|linux| linux.mount_label().as_deref());
    if [process.selinux_label().as_deref(), mount_label].into_iter().flatten().any(|label| !label.is_empty()) {
        return refuse("SELinux label");
    }
    Ok(())
}
