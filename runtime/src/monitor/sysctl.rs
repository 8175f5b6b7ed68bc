//! sysctls of a pod: which namespace one belongs to, and writing it there. Anything that is not namespaced is refused.

use crate::process::{Kind, StepError};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The namespace that holds a sysctl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    Net,
    Ipc,
}

/// Written into each new network namespace: a pod's program may bind low ports and ping without capabilities, and an address
/// is usable at once. Where the kernel has no IPv6 the last two are absent.
pub(super) const NET_DEFAULTS: [(&str, &str); 4] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
];

/// Where a sysctl lives, `None` if it is not namespaced or is set in another way (the hostname).
pub(super) fn home(name: &str) -> Option<Home> {
    let dotted = dotted(name);
    if dotted.split('.').any(str::is_empty) || name.contains("..") {
        return None;
    }
    let ipc = dotted.starts_with("kernel.shm") || dotted.starts_with("kernel.msg") || dotted == "kernel.sem";
    if dotted.starts_with("net.") {
        Some(Home::Net)
    } else if ipc || dotted.starts_with("fs.mqueue.") {
        Some(Home::Ipc)
    } else {
        None
    }
}

/// A name may have slashes as separators, and then dots inside an interface's name.
fn uses_slashes(name: &str) -> bool {
    name.find(['.', '/']).is_some_and(|at| name.as_bytes().get(at) == Some(&b'/'))
}

fn dotted(name: &str) -> String {
    if uses_slashes(name) { name.replace('/', ".") } else { name.to_owned() }
}

fn path(name: &str) -> PathBuf {
    let relative = if uses_slashes(name) { name.to_owned() } else { name.replace('.', "/") };
    PathBuf::from("/proc/sys").join(relative)
}

/// Refuses what cannot be set for a pod with these namespaces of its own.
pub(super) fn check(sysctls: &HashMap<String, String>, own_net: bool, own_ipc: bool) -> Result<(), StepError> {
    for name in sysctls.keys() {
        let (own, space) = match home(name) {
            Some(Home::Net) => (own_net, "network"),
            Some(Home::Ipc) => (own_ipc, "ipc"),
            None => return Err(StepError::because(Kind::Invalid, "set sysctl", name, "it is not namespaced")),
        };
        if !own {
            let why = format!("the pod uses the host's {space} namespace");
            return Err(StepError::because(Kind::Invalid, "set sysctl", name, why));
        }
    }
    Ok(())
}

/// Writes those of `home` into the namespace that the caller is in. With `later` those of an interface that is not there are left to another call.
pub(super) fn write(sysctls: &HashMap<String, String>, into: Home, later: bool) -> Result<(), StepError> {
    for (name, value) in sysctls.iter().filter(|(name, _)| home(name) == Some(into)) {
        let path = path(name);
        let written = std::fs::write(&path, value);
        if later && written.is_err() && interface_directory(&path).is_some_and(|directory| !directory.exists()) {
            continue;
        }
        written.map_err(|error| {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            StepError::errno("set sysctl", format_args!("{name} to {value:?}"), errno).kind(Kind::Invalid)
        })?;
    }
    Ok(())
}

/// The directory of the one interface that a file is about: /proc/sys/net/ipv4/conf/eth0.
fn interface_directory(path: &Path) -> Option<&Path> {
    let directory = path.parent()?;
    let group = directory.parent()?;
    let of_protocol = group.parent()?.parent()? == Path::new("/proc/sys/net");
    (of_protocol && (group.ends_with("conf") || group.ends_with("neigh"))).then_some(directory)
}

/// Writes [`NET_DEFAULTS`] into the network namespace that the caller is in.
pub(super) fn write_net_defaults() -> Result<(), StepError> {
    for (name, value) in NET_DEFAULTS {
        match std::fs::write(path(name), value) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StepError::errno("set sysctl", name, error.raw_os_error().unwrap_or(libc::EIO)));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn homes() {
        for (name, expected) in [
            ("net.ipv4.tcp_syncookies", Some(Home::Net)),
            ("net/ipv4/conf/eth0.1/forwarding", Some(Home::Net)),
            ("kernel.shmmax", Some(Home::Ipc)),
            ("kernel.shm_rmid_forced", Some(Home::Ipc)),
            ("kernel.msgmnb", Some(Home::Ipc)),
            ("kernel.sem", Some(Home::Ipc)),
            ("fs.mqueue.msg_max", Some(Home::Ipc)),
            ("kernel.hostname", None),
            ("kernel.semaphore", None),
            ("kernel.pid_max", None),
            ("vm.swappiness", None),
            ("net/../kernel/pid_max", None),
            ("net..x", None),
            ("net.", None),
            ("", None),
        ] {
            assert_eq!(home(name), expected, "{name}");
        }
    }

    #[test]
    fn separators() {
        assert_eq!(path("net.ipv4.ip_forward"), PathBuf::from("/proc/sys/net/ipv4/ip_forward"));
        assert_eq!(path("net/ipv4/conf/eth0.1/forwarding"), PathBuf::from("/proc/sys/net/ipv4/conf/eth0.1/forwarding"));
    }

    #[test]
    fn files_of_an_interface() {
        for (name, expected) in [
            ("net.ipv4.conf.eth0.rp_filter", Some("/proc/sys/net/ipv4/conf/eth0")),
            ("net/ipv6/conf/eth0.1/accept_ra", Some("/proc/sys/net/ipv6/conf/eth0.1")),
            ("net.ipv4.neigh.eth0.gc_stale_time", Some("/proc/sys/net/ipv4/neigh/eth0")),
            ("net.ipv4.tcp_syncookies", None),
            ("net.ipv4.conf.rp_filter", None),
            ("kernel.net.ipv4.conf.eth0.x", None),
        ] {
            assert_eq!(interface_directory(&path(name)), expected.map(Path::new), "{name}");
        }
    }
}
