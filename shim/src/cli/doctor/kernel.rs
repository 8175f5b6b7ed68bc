//! What this kernel can do. What can be tried without a trace is tried; the rest goes by its version.

use super::{Node, read, report::Report};
use crate::{image::can_mount_images, network::look, pod::userns};
use rustix::{
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
        open_tree,
    },
    process::{PidfdFlags, getpid, pidfd_open},
};
use std::path::Path;

/// The oldest kernel that has all that pods need: overlays whose layers are appended one by one, clones of mounts that are nowhere.
const OLDEST: (u32, u32) = (6, 15);
/// Clone into a cgroup of its own (clone3(2)), and `cgroup.kill`.
const CGROUP_KILL: (u32, u32) = (5, 14);
/// Overlays on mapped layers, which pods with users of their own stand on.
const MAPPED_OVERLAY: (u32, u32) = (5, 19);

pub(super) fn check(node: &Node, report: &mut Report) {
    report.area("kernel");
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let version = version(&release).unwrap_or_default();
    let has = |since: (u32, u32)| version >= since;
    if has(OLDEST) {
        report.ok(format!("Linux {release}"));
    } else {
        report.error(
            format!("Linux {release} is older than {}.{}: containers do not start", OLDEST.0, OLDEST.1),
            "boot a newer kernel",
        );
    }
    if has(CGROUP_KILL) {
        report.ok("processes are made in their cgroups, and cgroups are killed as a whole");
    } else {
        report.error("no cgroup.kill (Linux 5.14): what a pod leaves cannot be ended for certain", "boot a newer kernel");
    }
    match pidfd_open(getpid(), PidfdFlags::empty()) {
        Ok(_) => report.ok("processes are followed by descriptors (pidfd)"),
        Err(error) => {
            report.error(format!("pidfd_open: {error}: exits cannot be seen"), "boot a newer kernel, or allow the call")
        }
    }
    overlay(node, report);
    clones(node, report);
    device_filters(report);
    layers(node, report);
    match (userns::available(), has(MAPPED_OVERLAY)) {
        (true, true) => report.ok("pods may have users of their own (user namespaces, mapped mounts)"),
        (false, _) => report.warning(
            "user.max_user_namespaces is 0: pods with hostUsers: false are refused",
            "sysctl -w user.max_user_namespaces=65536, and in /etc/sysctl.d for the next boot",
        ),
        (true, false) => report.warning(
            "overlays cannot stand on mapped mounts before Linux 5.19: pods with hostUsers: false do not start",
            "boot a newer kernel",
        ),
    }
    match read("/proc/sys/kernel/seccomp/actions_avail") {
        Some(actions)
            if ["kill_process", "errno", "user_notif"].iter().all(|one| actions.split(' ').any(|have| have == *one)) =>
        {
            report.ok("system calls are filtered (seccomp)");
        }
        _ => report.error(
            "no seccomp filters: containers with a profile, which is most, are refused",
            "boot a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
    links(node, report);
    modules(report);
}

/// `6.18.5-amd64` as (6, 18).
fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(['.', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn overlay(node: &Node, report: &mut Report) {
    let known = || {
        read("/proc/filesystems")
            .is_some_and(|list| list.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay"))
    };
    match fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => match fsconfig_set_string(&context, "lowerdir+", "/") {
            Ok(()) => report.ok("root file systems are overlays, made without mount(8) (fsopen, lowerdir+)"),
            Err(error) => report.error(
                format!("overlays take no layers one by one (lowerdir+: {error}): containers cannot be made"),
                "boot a newer kernel",
            ),
        },
        Err(Errno::PERM) if known() => report.ok("overlay is in the kernel; root would see whether its options are"),
        Err(Errno::PERM) if !node.root => report.unseen("whether overlays can be mounted", "run as root"),
        Err(Errno::NOSYS) => report.error("no fsopen(2): nothing can be mounted", "boot a newer kernel"),
        Err(error) => report.error(
            format!("overlay: {error}: containers cannot be made"),
            "modprobe overlay, or boot a kernel with CONFIG_OVERLAY_FS",
        ),
    }
}

/// A mount that is nowhere is cloned into each container: the pod's /dev/shm. Tried with one that goes with its descriptor.
fn clones(node: &Node, report: &mut Report) {
    if !node.root {
        return report.unseen("whether detached mounts can be cloned", "run as root");
    }
    let cloned = || -> Result<(), Errno> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        open_tree(&mount, "", flags).map(drop)
    };
    match cloned() {
        Ok(()) => report.ok("mounts that are nowhere can be cloned (open_tree)"),
        Err(error) => report.error(
            format!("mounts that are nowhere cannot be cloned (open_tree: {error}): containers do not start"),
            "boot Linux 6.15 or newer",
        ),
    }
}

/// What asks the filters of devices that every container gets; only a kernel with CONFIG_CGROUP_BPF has it.
const DEVICE_FILTERS: &str = "__cgroup_bpf_check_dev_permission";

fn device_filters(report: &mut Report) {
    match read("/proc/kallsyms").filter(|symbols| !symbols.is_empty()) {
        Some(symbols) if symbols.lines().any(|line| line.split_whitespace().nth(2) == Some(DEVICE_FILTERS)) => {
            report.ok("devices of containers are filtered (BPF)");
        }
        Some(_) => report.error(
            "no filters of devices in cgroups: containers do not start",
            "boot a kernel with CONFIG_CGROUP_BPF and CONFIG_BPF_SYSCALL",
        ),
        None => report
            .unseen("whether devices of containers can be filtered", "look for CONFIG_CGROUP_BPF in the kernel's configuration"),
    }
}

/// Where layers are kept, an image of one is tried.
fn layers(node: &Node, report: &mut Report) {
    if !node.root {
        return report.unseen("whether layers can be kept as EROFS images", "run as root");
    }
    // Where they would be, and apart from what a daemon tries itself when it starts.
    let Some(place) = super::storage::existing(&node.config.root) else { return };
    let directory = place.join(format!("doctor-{}", std::process::id()));
    let tried = match std::fs::create_dir(&directory) {
        Ok(()) => can_mount_images(&directory),
        Err(error) => Err(format!("create {}: {error}", directory.display())),
    };
    let _ = std::fs::remove_dir(&directory);
    match tried {
        Ok(()) => report.ok("layers are kept as EROFS images, which are mounted from their files"),
        Err(why) if node.config.images.layers == crate::config::LayerChoice::Erofs => report.error(
            format!("images.layers is \"erofs\", and {why}: the daemon does not start"),
            "set images.layers = \"auto\", or boot Linux 6.15 or newer with CONFIG_EROFS_FS_BACKED_BY_FILE",
        ),
        Err(why) => report.ok(format!("layers are kept as directories: {why}")),
    }
}

fn links(node: &Node, report: &mut Report) {
    if !node.root {
        return report.unseen("whether links of pods can be made (veth, bridge, ifb)", "run as root");
    }
    let (mut good, tried) = (Vec::new(), look::kinds_of_links());
    for (kind, outcome) in tried {
        match (kind, outcome) {
            (_, Ok(())) => good.push(kind),
            ("ifb", Err(why)) => report.warning(
                format!("{why}: pods with kubernetes.io/egress-bandwidth are refused on the built-in bridge"),
                "modprobe ifb, or boot a kernel with CONFIG_IFB",
            ),
            (_, Err(why)) => report.error(
                format!("{why}: the built-in bridge cannot attach pods"),
                format!("modprobe {kind}, or boot a kernel with it; a node with CNI may do without"),
            ),
        }
    }
    if !good.is_empty() {
        report.ok(format!("links can be made: {}", good.join(", ")));
    }
}

/// The security modules. None is missed unless a pod asks for it.
fn modules(report: &mut Report) {
    if read("/sys/module/apparmor/parameters/enabled").is_none_or(|text| text != "Y") {
        report.ok("AppArmor is not on: pods that ask for a profile of it are refused");
    } else if ["/sbin", "/usr/sbin"].iter().any(|directory| Path::new(directory).join("apparmor_parser").exists()) {
        report.ok("AppArmor is on");
    } else {
        report.warning(
            "AppArmor is on, and apparmor_parser is not there: the default profile cannot be loaded, and containers that ask for RuntimeDefault are refused",
            "apt-get install apparmor, and restart windlass",
        );
    }
    match read("/sys/fs/selinux/enforce").as_deref() {
        Some("1") => report.ok("SELinux is on and enforces"),
        Some(_) => report.ok("SELinux is on and only tells (permissive)"),
        None => report.ok("SELinux is not on: labels that pods ask for have no effect"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_kernels() {
        for (release, expected) in [
            ("6.18.5-amd64", Some((6, 18))),
            ("5.14.0-427.el9.x86_64", Some((5, 14))),
            ("7.3", Some((7, 3))),
            ("6.1+deb", Some((6, 1))),
            ("six", None),
        ] {
            assert_eq!(version(release), expected, "{release}");
        }
    }
}
