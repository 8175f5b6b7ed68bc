//! Capability sets, cut to what our own bounding set holds: a privileged container on a host that withholds a capability runs
//! without it instead of failing.

use crate::process::{Context, StepError};
use oci_spec::runtime::{Capabilities as Names, LinuxCapabilities};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
};

/// Names without `CAP_`, by number from CAP_CHOWN (0) on.
pub const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// CAP_SYS_ADMIN.
const SYS_ADMIN: u64 = 1 << 21;

/// The sets that a process shall have.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Capabilities {
    /// Reads the sets of a `Process` and cuts them to `available`. No sets at all means no capabilities.
    pub fn new(wanted: Option<&LinuxCapabilities>, available: u64) -> Capabilities {
        let Some(wanted) = wanted else { return Capabilities::default() };
        let cut = |names: &Option<Names>| bits(names.as_ref()) & available;
        let permitted = cut(wanted.permitted());
        let inheritable = cut(wanted.inheritable());
        Capabilities {
            bounding: cut(wanted.bounding()),
            effective: cut(wanted.effective()) & permitted,
            permitted,
            inheritable,
            // The kernel's rule: ambient is a part of both.
            ambient: cut(wanted.ambient()) & permitted & inheritable,
        }
    }

    /// Keeps CAP_SYS_ADMIN permitted, not effective, until exec: without no_new_privs a filter needs it, and a filter is loaded last of
    /// all. exec takes it away again, because it computes the permitted set from the inheritable, bounding and ambient ones only.
    pub(crate) fn keep_for_filter(&mut self, available: u64) {
        self.permitted |= SYS_ADMIN & available;
    }

    /// Drops what is not in the bounding set. Before the user changes: it needs CAP_SETPCAP.
    pub fn apply_bounding(&self) -> Result<(), StepError> {
        for (number, name) in NAMES.iter().enumerate() {
            let bit = 1u64 << number;
            if self.bounding & bit == 0 && held(bit) {
                remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(bit)).context("drop capability", name)?;
            }
        }
        Ok(())
    }

    /// Sets the rest. After the user has changed, with capabilities kept across it.
    pub fn apply(&self) -> Result<(), StepError> {
        let sets = CapabilitySets {
            effective: CapabilitySet::from_bits_retain(self.effective),
            permitted: CapabilitySet::from_bits_retain(self.permitted),
            inheritable: CapabilitySet::from_bits_retain(self.inheritable),
        };
        set_capabilities(None, sets).context("set capabilities", "")?;
        clear_ambient_capability_set().context("set capabilities", "ambient")?;
        for (number, name) in NAMES.iter().enumerate() {
            let bit = 1u64 << number;
            if self.ambient & bit != 0 {
                configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(bit), true)
                    .context("set ambient capability", name)?;
            }
        }
        Ok(())
    }
}

/// Makes CAP_SYS_ADMIN effective where it is permitted.
pub(super) fn raise_for_filter() -> Result<(), StepError> {
    let admin = CapabilitySet::from_bits_retain(SYS_ADMIN);
    let mut sets = capabilities(None).context("get capabilities", "")?;
    if sets.permitted.contains(admin) && !sets.effective.contains(admin) {
        sets.effective |= admin;
        set_capabilities(None, sets).context("set capabilities", "CAP_SYS_ADMIN")?;
    }
    Ok(())
}

/// The bounding set of a `Process`; none without any sets.
pub(crate) fn bounding_set(wanted: Option<&LinuxCapabilities>) -> u64 {
    bits(wanted.and_then(|wanted| wanted.bounding().as_ref()))
}

/// The calling process's bounding set.
pub(crate) fn own_bounding_set() -> u64 {
    (0..NAMES.len()).map(|number| 1u64 << number).filter(|bit| held(*bit)).sum()
}

fn held(bit: u64) -> bool {
    capability_is_in_bounding_set(CapabilitySet::from_bits_retain(bit)).unwrap_or(false)
}

fn bits(names: Option<&Names>) -> u64 {
    names.into_iter().flatten().filter_map(|name| number(&name.to_string())).map(|number| 1u64 << number).sum()
}

fn number(name: &str) -> Option<usize> {
    let name = name.strip_prefix("CAP_").unwrap_or(name);
    NAMES.iter().position(|known| *known == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_the_specification_has_its_number() {
        for (index, name) in NAMES.iter().enumerate() {
            let json = format!("[\"CAP_{name}\"]");
            let parsed: Names = serde_json::from_str(&json).expect("a capability");
            assert_eq!(bits(Some(&parsed)), 1 << index, "{name}");
        }
    }

    #[test]
    fn sets_are_cut_to_what_is_available_and_ambient_to_inheritable() {
        let all: LinuxCapabilities = serde_json::from_str(
            r#"{"bounding":["CAP_CHOWN","CAP_SYS_RESOURCE"],"effective":["CAP_CHOWN","CAP_KILL"],"permitted":["CAP_CHOWN"],
                "inheritable":[],"ambient":["CAP_CHOWN"]}"#,
        )
        .expect("valid");
        let cut = Capabilities::new(Some(&all), 1);
        assert_eq!(cut, Capabilities { bounding: 1, effective: 1, permitted: 1, inheritable: 0, ambient: 0 });
    }
}
