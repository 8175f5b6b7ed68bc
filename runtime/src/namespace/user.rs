//! User namespaces: making one, making other namespaces that it owns, becoming its root, and mounts that are seen through its mappings.
//! Ids inside are the container's, ids outside the host's.

use super::open_namespace;
use crate::process::{Context, Kind, StepError, beside};
use crate::sys::mount_attr::{MountAttr, mount_setattr};
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use std::fmt::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// A range of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// First id inside.
    pub inside: u32,
    /// First id outside.
    pub outside: u32,
    /// How many.
    pub length: u32,
}

/// A user namespace with its mappings.
#[derive(Debug)]
pub struct User {
    fd: OwnedFd,
    uids: Vec<Mapping>,
    gids: Vec<Mapping>,
}

impl User {
    /// The user namespace that `config.json` asks for: the pod's, the one at a path, or a new one.
    pub fn of(spec: &Spec, pod: Option<BorrowedFd<'_>>) -> Result<Option<User>, StepError> {
        let Some(linux) = spec.linux() else { return Ok(None) };
        let asked = linux.namespaces().iter().flatten().find(|namespace| namespace.typ() == LinuxNamespaceType::User);
        let Some(asked) = asked else {
            // It would have the pod's other namespaces without the rights over them, and the host's users.
            return match pod {
                Some(_) => {
                    Err(StepError::because(Kind::Invalid, "read", "linux.namespaces", "no user namespace, the pod has one"))
                }
                None => Ok(None),
            };
        };
        let (uids, gids) = (mappings(linux.uid_mappings().as_deref()), mappings(linux.gid_mappings().as_deref()));
        if uids.is_empty() || gids.is_empty() {
            return Err(StepError::because(
                Kind::Invalid,
                "read",
                "linux.uidMappings",
                "a user namespace needs mappings of both kinds",
            ));
        }
        let fd = match (pod, asked.path()) {
            (Some(held), _) => held.try_clone_to_owned().context("join namespace", "User")?,
            (None, Some(path)) => open_namespace(path)?,
            (None, None) => make(&uids, &gids)?,
        };
        Ok(Some(User { fd, uids, gids }))
    }

    /// Its descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The host's id of a user inside.
    pub fn host_uid(&self, uid: u32) -> Result<u32, StepError> {
        outside(&self.uids, uid).ok_or_else(|| StepError::because(Kind::Invalid, "map user", uid, "it has no id on the host"))
    }

    /// The host's id of a group inside.
    pub fn host_gid(&self, gid: u32) -> Result<u32, StepError> {
        outside(&self.gids, gid).ok_or_else(|| StepError::because(Kind::Invalid, "map group", gid, "it has no id on the host"))
    }

    /// Shows a detached mount, and with `recursive` all below, through these mappings.
    pub fn map_mount(&self, mount: BorrowedFd<'_>, recursive: bool) -> Result<(), StepError> {
        let attr = MountAttr { set: libc::MOUNT_ATTR_IDMAP, userns_fd: self.fd.as_raw_fd() as u64, ..MountAttr::default() };
        mount_setattr(mount, recursive, &attr).context("map ids", "").map_err(|mut error| {
            if error.errno == libc::EINVAL {
                error.message = "its file system cannot be mounted with mapped ids".into();
            }
            error
        })
    }

    /// The same with the mappings of a mount, which may be others.
    pub fn map_mount_with(
        user: Option<&User>,
        mount: BorrowedFd<'_>,
        (uids, gids): (Option<&[LinuxIdMapping]>, Option<&[LinuxIdMapping]>),
        recursive: bool,
    ) -> Result<(), StepError> {
        let (uids, gids) = (mappings(uids), mappings(gids));
        match user {
            Some(user) if user.uids == uids && user.gids == gids => user.map_mount(mount, recursive),
            Some(user) if uids.is_empty() && gids.is_empty() => user.map_mount(mount, recursive),
            _ => User { fd: make(&uids, &gids)?, uids, gids }.map_mount(mount, recursive),
        }
    }
}

fn mappings(listed: Option<&[LinuxIdMapping]>) -> Vec<Mapping> {
    let one =
        |mapping: &LinuxIdMapping| Mapping { inside: mapping.container_id(), outside: mapping.host_id(), length: mapping.size() };
    listed.unwrap_or_default().iter().map(one).collect()
}

fn outside(mappings: &[Mapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.inside).filter(|offset| *offset < mapping.length)?;
        mapping.outside.checked_add(offset)
    })
}

fn lines(mappings: &[Mapping]) -> String {
    mappings.iter().fold(String::new(), |mut text, Mapping { inside, outside, length }| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{inside} {outside} {length}");
        text
    })
}

/// The host's ids of a user and group in the user namespace that `config.json` asks for, if it does.
pub fn host_ids(spec: &Spec, uid: u32, gid: u32) -> Result<Option<(u32, u32)>, StepError> {
    let Some(linux) = spec.linux() else { return Ok(None) };
    if !linux.namespaces().iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
        return Ok(None);
    }
    let unmapped = |what, id| StepError::because(Kind::Invalid, what, id, "it has no id on the host");
    let uid = outside(&mappings(linux.uid_mappings().as_deref()), uid).ok_or_else(|| unmapped("map user", uid))?;
    let gid = outside(&mappings(linux.gid_mappings().as_deref()), gid).ok_or_else(|| unmapped("map group", gid))?;
    Ok(Some((uid, gid)))
}

/// Makes a user namespace. Its maps are written by the caller, who has the rights of the host.
pub fn make(uids: &[Mapping], gids: &[Mapping]) -> Result<OwnedFd, StepError> {
    let new = || unshare(CloneFlags::CLONE_NEWUSER).context("make namespace", "User").map(|()| Vec::new());
    beside(new, |pid, _| {
        for (file, mappings) in [("gid_map", gids), ("uid_map", uids)] {
            let text = lines(mappings);
            std::fs::write(format!("/proc/{pid}/{file}"), &text)
                .context("write", format_args!("{file} {:?}", text.trim_end()))?;
        }
        open_namespace(Path::new(&format!("/proc/{pid}/ns/user")))
    })
}

/// Makes namespaces that `user` owns, one for each kind as /proc names it, in that order.
pub fn make_owned(user: BorrowedFd<'_>, kinds: &[(CloneFlags, &str)]) -> Result<Vec<OwnedFd>, StepError> {
    let flags = kinds.iter().fold(CloneFlags::empty(), |flags, (flag, _)| flags | *flag);
    let new = || {
        setns(user, CloneFlags::CLONE_NEWUSER).context("join namespace", "User")?;
        unshare(flags).context("make namespaces", format_args!("{flags:?}")).map(|()| Vec::new())
    };
    beside(new, |pid, _| kinds.iter().map(|(_, kind)| open_namespace(Path::new(&format!("/proc/{pid}/ns/{kind}")))).collect())
}

/// Does something as root of a user namespace, in other namespaces that it owns. What it starts is the caller's to reap,
/// who must be a reaper.
pub fn inside(
    user: BorrowedFd<'_>,
    others: &[(BorrowedFd<'_>, CloneFlags)],
    work: impl FnOnce() -> Result<Vec<String>, StepError>,
) -> Result<Vec<String>, StepError> {
    let there = || {
        setns(user, CloneFlags::CLONE_NEWUSER).context("join namespace", "User")?;
        for (fd, flag) in others {
            setns(fd, *flag).context("join namespace", format_args!("{flag:?}"))?;
        }
        become_root()?;
        work()
    };
    beside(there, |_, words| Ok(words))
}

/// Becomes user and group 0 of the user namespace that the caller is in, without further groups. Joining a namespace leaves the ids of
/// the host, which nothing inside has.
pub fn become_root() -> Result<(), StepError> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    set_thread_groups(&[]).context("set groups", "")?;
    set_thread_res_gid(gid, gid, gid).context("set group", 0)?;
    set_thread_res_uid(uid, uid, uid).context("set user", 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_outside_of_a_mapping_have_no_host_id() {
        let mappings = [Mapping { inside: 0, outside: 65536, length: 10 }, Mapping { inside: 100, outside: 7, length: 1 }];
        for (id, expected) in [(0, Some(65536)), (9, Some(65545)), (10, None), (99, None), (100, Some(7)), (101, None)] {
            assert_eq!(outside(&mappings, id), expected, "{id}");
        }
        assert_eq!(lines(&mappings), "0 65536 10\n100 7 1\n");
    }
}
