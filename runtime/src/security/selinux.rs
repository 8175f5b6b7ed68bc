//! SELinux labels: of the process, from its next exec on, and of the file systems that are made for a container. Written through the host's
//! /proc and looked up in the host's /sys, before the mount namespace is left.

use crate::process::{Context, Kind, StepError};
use crate::sys;
use oci_spec::runtime::{Process, Spec};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

/// There only with SELinux on and a policy loaded.
const POLICY: &str = "/sys/fs/selinux/policyvers";
/// The label of the thread's next program, and of the keys that it makes (proc_pid_attr(5)).
const EXEC: &str = "/proc/thread-self/attr/exec";
const KEYS: &str = "/proc/thread-self/attr/keycreate";

/// File systems that take a label as a whole, when they are made.
const LABELLED: [&str; 3] = ["overlay", "tmpfs", "devpts"];

/// Refuses labels where the kernel cannot apply them.
pub fn check(spec: Option<&Spec>, process: &Process) -> Result<(), StepError> {
    let mount_label = spec.and_then(mount_label);
    let process_label = process.selinux_label().as_deref().filter(|label| !label.is_empty());
    match process_label.or(mount_label) {
        Some(label) if !Path::new(POLICY).exists() => Err(StepError::because(
            Kind::Unsupported,
            "apply SELinux label",
            label,
            "this kernel has no SELinux, or no policy is loaded",
        )),
        _ => Ok(()),
    }
}

/// Asks the kernel for the label of `process`, for its program and for its session keyring. No label asks for nothing.
pub fn label_at_exec(process: &Process) -> Result<(), StepError> {
    let Some(label) = process.selinux_label().as_deref().filter(|label| !label.is_empty()) else { return Ok(()) };
    let set = |path: &str, label: &str| {
        std::fs::write(path, label).context("apply SELinux label", label).map_err(|error| match error.errno {
            libc::EINVAL => error.kind(Kind::Invalid),
            _ => error,
        })
    };
    set(KEYS, label)?;
    // The session's keyring was made without the label; a kernel or quota without keyrings is no reason to fail.
    let _ = sys::keyring::new_session();
    set(KEYS, "\n")?;
    set(EXEC, label)
}

/// `linux.mountLabel`, if it is not empty.
pub(crate) fn mount_label(spec: &Spec) -> Option<&str> {
    spec.linux().as_ref()?.mount_label().as_deref().filter(|label| !label.is_empty())
}

/// The mount option that labels a new file system of this type. The others take their labels from the policy.
pub(crate) fn mount_option(label: Option<&str>, typ: &str) -> Option<(&'static str, Option<String>)> {
    label.filter(|_| LABELLED.contains(&typ)).map(|label| ("context", Some(label.to_owned())))
}

/// Labels the root of a new mqueue: there is one for each ipc namespace, made before anybody could say its label.
pub(crate) fn label_queues(label: Option<&str>, typ: &str, mount: BorrowedFd<'_>) -> Result<(), StepError> {
    let Some(label) = label.filter(|_| typ == "mqueue") else { return Ok(()) };
    let path = format!("/proc/thread-self/fd/{}", mount.as_raw_fd());
    match rustix::fs::setxattr(path, "security.selinux", label.as_bytes(), XattrFlags::empty()) {
        Err(Errno::NOTSUP) => Ok(()),
        other => other.context("label mqueue", label),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_of_our_own_are_labelled_and_the_kernels_are_not() {
        let label = Some("system_u:object_r:container_file_t:s0:c1,c2");
        for typ in LABELLED {
            let option = mount_option(label, typ).expect(typ);
            assert_eq!(option, ("context", label.map(str::to_owned)));
            assert_eq!(mount_option(None, typ), None);
        }
        for typ in ["proc", "sysfs", "cgroup2", "mqueue"] {
            assert_eq!(mount_option(label, typ), None, "{typ}");
        }
    }
}
