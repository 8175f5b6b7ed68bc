//! The user namespace that a pod asks for: what of it is valid, and whether this kernel can give it. Makes nothing.

use crate::error::{Error, Result};
use windlass_proto::{
    cri::{IdMapping, NamespaceMode, NamespaceOption, UserNamespace},
    monitor,
};

const FIELD: &str = "security_context.namespace_options.userns_options";

/// One range of users and one of groups, both from id 0 inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Users {
    pub uids: IdMapping,
    pub gids: IdMapping,
}

const LIMIT: &str = "/proc/sys/user/max_user_namespaces";

/// Whether this kernel lets user namespaces be made. Mapped mounts it has: the lowest version that is served is newer than they.
pub fn available() -> bool {
    limit().is_ok_and(|limit| limit != "0")
}

/// The kernel's limit; `0` in one without user namespaces.
fn limit() -> Result<String> {
    match std::fs::read_to_string(LIMIT) {
        Ok(limit) => Ok(limit.trim().to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok("0".to_owned()),
        Err(error) => Err(Error::io(format_args!("read {LIMIT}"), error)),
    }
}

/// The pod's users; `None` are the host's.
pub fn of(options: &NamespaceOption) -> Result<Option<Users>> {
    let Some(asked) = &options.userns_options else { return Ok(None) };
    match asked.mode() {
        NamespaceMode::Node if asked.uids.is_empty() && asked.gids.is_empty() => return Ok(None),
        NamespaceMode::Node => return Err(Error::invalid(format!("{FIELD}: mode NODE has no mappings"))),
        NamespaceMode::Pod => {}
        other => return Err(Error::invalid(format!("{FIELD}.mode {} is not POD or NODE", other.as_str_name()))),
    }
    let users = users(asked)?;
    for (name, mode) in [("pid", options.pid()), ("ipc", options.ipc())] {
        if mode == NamespaceMode::Node {
            let why = format!("security_context.namespace_options.{name} is NODE, which a pod with users of its own cannot have");
            return Err(Error::invalid(why));
        }
    }
    if limit()? == "0" {
        return Err(Error::unimplemented(format!("{FIELD}: user.max_user_namespaces of this host is 0")));
    }
    Ok(Some(users))
}

fn users(asked: &UserNamespace) -> Result<Users> {
    let one = |field: &str, list: &[IdMapping]| match list {
        [only] if only.container_id != 0 => Err(Error::invalid(format!("{FIELD}.{field}: container_id 0 is not mapped"))),
        [only] if only.length == 0 || only.host_id.checked_add(only.length).is_none() => {
            Err(Error::invalid(format!("{FIELD}.{field}: {} ids from {} are no range", only.length, only.host_id)))
        }
        [only] => Ok(*only),
        _ => Err(Error::invalid(format!("{FIELD}.{field} has {} mappings, one is needed", list.len()))),
    };
    let users = Users { uids: one("uids", &asked.uids)?, gids: one("gids", &asked.gids)? };
    if users.uids.length != users.gids.length {
        return Err(Error::invalid(format!("{FIELD}: uids and gids have different lengths")));
    }
    Ok(users)
}

/// The range as the monitor takes it.
pub fn mapping(ids: &IdMapping) -> monitor::IdMapping {
    monitor::IdMapping { container_id: ids.container_id, host_id: ids.host_id, length: ids.length }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mode: NamespaceMode, ids: &[(u32, u32, u32)], expected: Option<bool>) {
        let list: Vec<IdMapping> = ids
            .iter()
            .map(|(container_id, host_id, length)| IdMapping { container_id: *container_id, host_id: *host_id, length: *length })
            .collect();
        let asked = UserNamespace { mode: mode.into(), uids: list.clone(), gids: list };
        let found =
            of(&NamespaceOption { userns_options: Some(asked), pid: NamespaceMode::Container.into(), ..Default::default() });
        assert_eq!(found.as_ref().ok().map(Option::is_some), expected, "{mode:?} {ids:?}: {found:?}");
    }

    #[test]
    fn one_range_from_zero_is_served() {
        use NamespaceMode::{Container, Node, Pod, Target};
        check(Pod, &[(0, 65536, 65536)], Some(true));
        check(Node, &[], Some(false));
        check(Node, &[(0, 65536, 65536)], None);
        check(Pod, &[], None);
        check(Pod, &[(1, 65536, 65536)], None);
        check(Pod, &[(0, 65536, 0)], None);
        check(Pod, &[(0, u32::MAX, 2)], None);
        check(Pod, &[(0, 1, 5), (0, 9, 5)], None);
        check(Container, &[], None);
        check(Target, &[], None);
    }
}
