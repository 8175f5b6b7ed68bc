//! features: what this build can do, whatever the host has, in the form of features.md of the OCI runtime specification.

use crate::Outcome;
use crate::arguments::Call;
use serde_json::json;
use windlass_runtime::process::hooks::Stage;
use windlass_runtime::rootfs::{MOUNT_ATTRIBUTES, MOUNT_OPTIONS};
use windlass_runtime::security::CAPABILITIES;

/// `features`.
pub(crate) fn features(_: &Call) -> Outcome<i32> {
    let mut options: Vec<String> = MOUNT_OPTIONS.iter().map(|name| (*name).to_owned()).collect();
    for name in MOUNT_ATTRIBUTES {
        options.extend([name.to_owned(), format!("r{name}")]);
    }
    options.sort();
    let features = json!({
        "ociVersionMin": crate::SPECIFICATION.0,
        "ociVersionMax": crate::SPECIFICATION.1,
        "hooks": Stage::ALL.map(Stage::name),
        "mountOptions": options,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "capabilities": CAPABILITIES.map(|name| format!("CAP_{name}")).to_vec(),
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD",
                    "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"],
                "operators": ["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ",
                    "SCMP_CMP_NE"],
                "archs": ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", "SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
                "supportedFlags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": true},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
        "annotations": {"windlass.version": env!("CARGO_PKG_VERSION")},
    });
    println!("{features:#}");
    Ok(0)
}
