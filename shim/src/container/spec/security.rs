//! Capabilities, masked paths, and the security fields that are refused until they are served.

use super::Input;
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use windlass_proto::cri::{LinuxContainerSecurityContext, NamespaceMode, security_profile::ProfileType};

/// What a container has unless it asks otherwise: the field's customary set.
const DEFAULT: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Every capability of Linux 6.18, capabilities(7).
const ALL: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// Paths that tell too much of the host, or let a container change it.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];
const MASKED_MORE: &str = "/sys/devices/virtual/powercap";
const READONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Refuses what is not served yet: nothing that was asked for is left out in silence.
pub(super) fn check(input: &Input<'_>) -> Result<()> {
    let security = input.security();
    let refuse = |what: String| Err(Error::unimplemented(format!("security_context.{what} is not served yet")));
    if security.privileged {
        return Ok(());
    }
    check_seccomp(&security)?;
    if let Some(profile) = security.apparmor.as_ref().filter(|profile| profile.profile_type() != ProfileType::Unconfined) {
        return refuse(format!("apparmor {}", profile.profile_type().as_str_name()));
    }
    #[expect(deprecated, reason = "older clients still send the deprecated field")]
    let deprecated = security.apparmor_profile.as_str();
    if security.apparmor.is_none() && !matches!(deprecated, "" | "unconfined") {
        return refuse(format!("apparmor_profile {deprecated:?}"));
    }
    if security.selinux_options.as_ref().is_some_and(|options| *options != Default::default()) {
        return refuse("selinux_options".into());
    }
    Ok(())
}

fn check_seccomp(security: &LinuxContainerSecurityContext) -> Result<()> {
    #[expect(deprecated, reason = "older clients still send the deprecated field")]
    let deprecated = security.seccomp_profile_path.as_str();
    let asked = match &security.seccomp {
        Some(profile) => profile.profile_type().as_str_name(),
        None if matches!(deprecated, "" | "unconfined") => "Unconfined",
        None => deprecated,
    };
    if asked != "Unconfined" {
        return Err(Error::unimplemented(format!("security_context.seccomp {asked} is not served yet")));
    }
    Ok(())
}

fn normal(name: &str) -> String {
    name.to_uppercase().trim_start_matches("CAP_").to_owned()
}

/// The five capability sets. Ambient ones are also inheritable (capabilities(7)).
pub(super) fn capabilities(input: &Input<'_>) -> Result<Value> {
    let security = input.security();
    let asked = security.capabilities.unwrap_or_default();
    if security.privileged {
        return Ok(sets(&ALL.iter().map(|name| (*name).to_owned()).collect(), &BTreeSet::new()));
    }
    for (field, names) in [
        ("add_capabilities", &asked.add_capabilities),
        ("drop_capabilities", &asked.drop_capabilities),
        ("add_ambient_capabilities", &asked.add_ambient_capabilities),
    ] {
        if let Some(unknown) = names.iter().find(|name| normal(name) != "ALL" && !ALL.contains(&normal(name).as_str())) {
            return Err(Error::invalid(format!("capabilities.{field}: {unknown:?} is not a capability")));
        }
    }
    let contains_all = |names: &[String]| names.iter().any(|name| normal(name) == "ALL");
    let mut granted: BTreeSet<String> = DEFAULT.iter().map(|name| (*name).to_owned()).collect();
    if contains_all(&asked.add_capabilities) {
        granted = ALL.iter().map(|name| (*name).to_owned()).collect();
    }
    if contains_all(&asked.drop_capabilities) {
        granted.clear();
    }
    let named = |names: &[String]| names.iter().map(|name| normal(name)).filter(|name| name != "ALL").collect::<Vec<_>>();
    granted.extend(named(&asked.add_capabilities));
    for name in named(&asked.drop_capabilities) {
        granted.remove(&name);
    }
    let ambient: BTreeSet<String> = named(&asked.add_ambient_capabilities).into_iter().collect();
    granted.extend(ambient.iter().cloned());
    Ok(sets(&granted, &ambient))
}

fn sets(granted: &BTreeSet<String>, ambient: &BTreeSet<String>) -> Value {
    let full = |names: &BTreeSet<String>| names.iter().map(|name| format!("CAP_{name}")).collect::<Vec<_>>();
    json!({ "bounding": full(granted), "effective": full(granted), "permitted": full(granted), "inheritable": full(ambient), "ambient": full(ambient) })
}

/// Masked and read-only paths: the request's when it gives any, else the customary ones; none for a privileged container.
pub(super) fn paths(input: &Input<'_>) -> (Vec<String>, Vec<String>) {
    let security = input.security();
    if security.privileged {
        return (Vec::new(), Vec::new());
    }
    let own = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
    let host_pid = input.namespaces().pid() == NamespaceMode::Node;
    let linux = &input.config.linux;
    let unspecified = linux.as_ref().and_then(|linux| linux.security_context.as_ref()).is_none();
    let masked = if security.masked_paths.is_empty() && (unspecified || security.readonly_paths.is_empty()) {
        let mut masked = own(&MASKED);
        masked.push(MASKED_MORE.to_owned());
        masked
    } else {
        security.masked_paths
    };
    let readonly = if security.readonly_paths.is_empty() { own(&READONLY) } else { security.readonly_paths };
    let _ = host_pid;
    (masked, readonly)
}
