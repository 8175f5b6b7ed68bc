//! Sysctls of a container. They are written through the host's /proc/sys, which shows the namespaces of the writer, before the
//! container's root exists: nothing in an image can redirect them.

use super::Owned;
use crate::process::{Context, Kind, StepError};
use std::collections::HashMap;

/// Writes each, after checking that all belong to a namespace which is not the host's.
pub fn write_sysctls(sysctls: &HashMap<String, String>, owned: Owned) -> Result<(), StepError> {
    let mut names: Vec<&String> = sysctls.keys().collect();
    names.sort();
    for name in &names {
        if let Some(why) = refusal(name, owned) {
            return Err(StepError::because(Kind::Invalid, "set sysctl", name, why));
        }
    }
    for name in names {
        let value = sysctls.get(name).map(String::as_str).unwrap_or_default();
        std::fs::write(path_of(name), value).context("set sysctl", format!("{name}={value}"))?;
    }
    Ok(())
}

/// `net.ipv4.x` and `net/ipv4/x` name the same file. With slashes, dots belong to a name (an interface `eth0.1`).
fn path_of(name: &str) -> String {
    let first = name.find(['.', '/']);
    let slashes = first.is_some_and(|at| name.as_bytes().get(at) == Some(&b'/'));
    let relative: String = if slashes {
        name.into()
    } else {
        name.chars()
            .map(|c| {
                if c == '.' {
                    '/'
                } else if c == '/' {
                    '.'
                } else {
                    c
                }
            })
            .collect()
    };
    format!("/proc/sys/{relative}")
}

fn refusal(name: &str, owned: Owned) -> Option<&'static str> {
    let path = path_of(name);
    let relative = path.strip_prefix("/proc/sys/").unwrap_or_default();
    if relative.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Some("not a name");
    }
    let ipc = relative.starts_with("fs/mqueue/")
        || matches!(relative, "kernel/sem" | "kernel/shmall" | "kernel/shmmax" | "kernel/shmmni" | "kernel/shm_rmid_forced")
        || matches!(relative, "kernel/msgmax" | "kernel/msgmnb" | "kernel/msgmni");
    let (known, mine) = match relative {
        _ if relative.starts_with("net/") => (true, owned.net),
        "kernel/domainname" => (true, owned.uts),
        _ => (ipc, owned.ipc),
    };
    match (known, mine) {
        (false, _) => Some("belongs to no namespace of a container"),
        (true, false) => Some("the container uses the host's namespace"),
        (true, true) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sysctls_of_own_namespaces_are_written() {
        let all = Owned { net: true, ipc: true, uts: true, new_uts: true };
        let none = Owned::default();
        for (name, owned, allowed) in [
            ("net.ipv4.ip_forward", all, true),
            ("net/ipv4/conf/eth0.1/forwarding", all, true),
            ("net.ipv4.ip_forward", none, false),
            ("kernel.shmmax", all, true),
            ("kernel.shmmax", none, false),
            ("fs.mqueue.msg_max", all, true),
            ("kernel.panic", all, false),
            ("net/../kernel/panic", all, false),
            ("net..kernel", all, false),
            ("kernel.core_pattern", all, false),
        ] {
            assert_eq!(refusal(name, owned).is_none(), allowed, "{name}");
        }
        assert_eq!(path_of("net.ipv4.conf.eth0/1.forwarding"), "/proc/sys/net/ipv4/conf/eth0.1/forwarding");
    }
}
