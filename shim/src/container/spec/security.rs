//! Capabilities and masked paths.

use super::Input;
use crate::error::{Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use windlass_proto::cri::Capability;

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

/// `cap_net_raw`, `NET_RAW` and `CAP_NET_RAW` are the same.
fn normal(name: &str) -> String {
    let name = name.to_ascii_uppercase();
    name.strip_prefix("CAP_").unwrap_or(&name).to_owned()
}

/// Names of one field, and whether ALL is among them.
fn named(field: &str, names: &[String]) -> Result<(BTreeSet<String>, bool)> {
    let mut found: BTreeSet<String> = names.iter().map(|name| normal(name)).collect();
    let all = found.remove("ALL");
    match names.iter().find(|name| !matches!(normal(name).as_str(), known if known == "ALL" || ALL.contains(&known))) {
        Some(unknown) => Err(Error::invalid(format!("security_context.capabilities.{field}: {unknown:?} is not a capability"))),
        None => Ok((found, all)),
    }
}

/// What a container holds, and the part of it that stays with a program of any user. What is dropped by name stays dropped;
/// a drop of ALL leaves what is added by name.
fn held(asked: &Capability, privileged: bool) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    let (add, add_all) = named("add_capabilities", &asked.add_capabilities)?;
    let (drop, drop_all) = named("drop_capabilities", &asked.drop_capabilities)?;
    let (mut ambient, ambient_all) = named("add_ambient_capabilities", &asked.add_ambient_capabilities)?;
    if let Some(both) = ambient.intersection(&drop).next() {
        return Err(Error::invalid(format!(
            "security_context.capabilities: {both} is in drop_capabilities and in add_ambient_capabilities"
        )));
    }
    if ambient_all {
        ambient = set(&ALL).difference(&drop).cloned().collect();
    }
    if privileged {
        return Ok((set(&ALL), ambient));
    }
    let mut granted = match (add_all, drop_all) {
        (_, true) => BTreeSet::new(),
        (true, false) => set(&ALL),
        (false, false) => set(&DEFAULT),
    };
    granted.extend(add);
    granted.extend(ambient.iter().cloned());
    granted.retain(|name| !drop.contains(name));
    Ok((granted, ambient))
}

/// Names without `CAP_` of what the container holds.
pub(super) fn granted(input: &Input) -> Result<BTreeSet<String>> {
    let security = input.security();
    Ok(held(&security.capabilities.unwrap_or_default(), security.privileged)?.0)
}

/// The five capability sets. Ambient ones are also inheritable (capabilities(7)).
pub(super) fn capabilities(input: &Input) -> Result<Value> {
    let security = input.security();
    let (granted, ambient) = held(&security.capabilities.unwrap_or_default(), security.privileged)?;
    let full = |names: &BTreeSet<String>| names.iter().map(|name| format!("CAP_{name}")).collect::<Vec<_>>();
    let (granted, ambient) = (full(&granted), full(&ambient));
    Ok(json!({ "bounding": granted, "effective": granted, "permitted": granted, "inheritable": ambient, "ambient": ambient }))
}

/// Masked and read-only paths: the request's when it gives any, else the customary ones; none for a privileged container. Kubelet
/// sends two empty lists for `procMount: Unmasked`, which Kubernetes allows to pods with users of their own only; so do we.
pub(super) fn paths(input: &Input) -> Result<(Vec<String>, Vec<String>)> {
    let security = input.security();
    for (field, paths) in [("masked_paths", &security.masked_paths), ("readonly_paths", &security.readonly_paths)] {
        paths.iter().try_for_each(|path| super::paths::check(&format!("security_context.{field}:"), path))?;
    }
    if security.privileged {
        return Ok((Vec::new(), Vec::new()));
    }
    let own = |paths: &[&str]| paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>();
    let given = input.config.linux.as_ref().is_some_and(|linux| linux.security_context.is_some());
    if !security.masked_paths.is_empty() || !security.readonly_paths.is_empty() {
        return Ok((security.masked_paths, security.readonly_paths));
    }
    if given && input.users()?.is_some() {
        return Ok((Vec::new(), Vec::new()));
    }
    let mut masked = own(&MASKED);
    masked.push(MASKED_MORE.to_owned());
    Ok((masked, own(&READONLY)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(add: &[&str], drop: &[&str], ambient: &[&str], expected: Option<(&[&str], &[&str])>) {
        let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let asked =
            Capability { add_capabilities: own(add), drop_capabilities: own(drop), add_ambient_capabilities: own(ambient) };
        match (held(&asked, false), expected) {
            (Ok((granted, kept)), Some(expected)) => {
                let wanted = |names: &[&str]| own(names).into_iter().collect::<BTreeSet<_>>();
                assert_eq!((granted, kept), (wanted(expected.0), wanted(expected.1)), "{asked:?}");
            }
            (Err(error), None) => assert!(error.message.contains("capabilities"), "{error}"),
            (found, _) => panic!("{asked:?}: {found:?}"),
        }
    }

    #[test]
    fn capabilities_are_added_dropped_and_kept() {
        check(&[], &[], &[], Some((&DEFAULT, &[])));
        check(&["all"], &[], &[], Some((&ALL, &[])));
        check(&[], &["ALL"], &[], Some((&[], &[])));
        check(&["cap_net_admin"], &["ALL"], &[], Some((&["NET_ADMIN"], &[])));
        check(&["NET_ADMIN"], &["ALL", "net_admin"], &[], Some((&[], &[])));
        check(&["ALL"], &["ALL"], &[], Some((&[], &[])));
        check(&[], &["ALL"], &["CAP_NET_BIND_SERVICE"], Some((&["NET_BIND_SERVICE"], &["NET_BIND_SERVICE"])));
        check(&[], &["ALL"], &["ALL"], Some((&ALL, &ALL)));
        check(&[], &["KILL"], &["KILL"], None);
        for unknown in ["CAP_CAP_KILL", "NO_SUCH", ""] {
            check(&[unknown], &[], &[], None);
            check(&[], &[unknown], &[], None);
            check(&[], &[], &[unknown], None);
        }
    }
}
