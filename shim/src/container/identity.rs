//! Who a container's process is: uid, gid and groups from the request, the image's USER, and the image's own passwd and group files.

use crate::{
    error::{Error, Result},
    image::{Image, ImageError},
};
use windlass_proto::cri::{ContainerConfig, LinuxContainerUser, SupplementalGroupsPolicy};

/// Largest uid or gid. Above are those that programs and the kernel read as negative: setuid(2) takes 4294967295 for "stay who you are".
const ID_MAX: u32 = i32::MAX as u32;

/// Largest passwd or group file that is read from an image.
const FILE_LIMIT_BYTES: u64 = 4 << 20;

/// The resolved identity of a container's first process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups, the primary one among them, sorted.
    pub groups: Vec<u32>,
    pub home: String,
}

impl Identity {
    /// As ContainerStatus reports it.
    pub(super) fn status(&self) -> LinuxContainerUser {
        LinuxContainerUser {
            uid: i64::from(self.uid),
            gid: i64::from(self.gid),
            supplemental_groups: self.groups.iter().map(|group| i64::from(*group)).collect(),
        }
    }
}

/// What the request and the image together ask for, before the image's files are read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Wanted {
    /// Name or number; empty is 0.
    user: String,
    /// Name or number; empty takes the user's own.
    group: String,
    extra: Vec<u32>,
    merge: bool,
}

/// Resolves the identity. CRI: LinuxContainerSecurityContext; a user without a name in the image is fine when it is a number.
pub(super) fn resolve(config: &ContainerConfig, image: &Image) -> Result<Identity> {
    let image_user = image.config.config().as_ref().and_then(|config| config.user().clone()).unwrap_or_default();
    let wanted = wanted(config, &image_user)?;
    let read = |path: &str| -> Result<String> {
        let bytes = image.read_file(path, FILE_LIMIT_BYTES).map_err(|error| match error {
            ImageError::Io(_) => Error::of_image(error),
            error => Error::invalid(error.to_string()),
        })?;
        Ok(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
    };
    look_up(&wanted, &read("etc/passwd")?, &read("etc/group")?)
}

fn id(field: &str, value: i64) -> Result<u32> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id <= ID_MAX)
        .ok_or_else(|| Error::invalid(format!("security_context.{field} {value} is not between 0 and {ID_MAX}")))
}

fn wanted(config: &ContainerConfig, image_user: &str) -> Result<Wanted> {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.clone()).unwrap_or_default();
    let (mut user, mut group) = match image_user.split_once(':') {
        Some((user, group)) => (user.to_owned(), group.to_owned()),
        None => (image_user.to_owned(), String::new()),
    };
    let explicit = match (&security.run_as_user, security.run_as_username.as_str()) {
        (Some(uid), "") => Some(id("run_as_user", uid.value)?.to_string()),
        (Some(_), _) => return Err(Error::invalid("security_context: both run_as_user and run_as_username are set")),
        (None, "") => None,
        (None, name) => Some(name.to_owned()),
    };
    if let Some(explicit) = &explicit {
        user.clone_from(explicit);
        group.clear();
    }
    if let Some(gid) = &security.run_as_group {
        if explicit.is_none() {
            return Err(Error::invalid("security_context.run_as_group is set without run_as_user or run_as_username"));
        }
        group = id("run_as_group", gid.value)?.to_string();
    }
    let extra = security.supplemental_groups.iter().map(|gid| id("supplemental_groups", *gid)).collect::<Result<_>>()?;
    let policy = SupplementalGroupsPolicy::try_from(security.supplemental_groups_policy)
        .map_err(|unknown| Error::invalid(format!("security_context.supplemental_groups_policy: {unknown}")))?;
    Ok(Wanted { user, group, extra, merge: policy == SupplementalGroupsPolicy::Merge })
}

/// An id in digits.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= ID_MAX && text.bytes().all(|byte| byte.is_ascii_digit()))
}

/// True for what can only be meant as an id: never looked up as a name, or an image could say who user 1000 is.
fn is_number(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// One line of passwd: name, uid, gid, home.
fn passwd_entries(passwd: &str) -> impl Iterator<Item = (&str, u32, u32, &str)> {
    passwd.lines().filter_map(|line| {
        let mut parts = line.split(':');
        let (name, _, uid, gid) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        Some((name, number(uid)?, number(gid)?, parts.nth(1).unwrap_or_default()))
    })
}

/// One line of group: name, gid, members.
fn group_entries(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut parts = line.split(':');
        let (name, _, gid) = (parts.next()?, parts.next()?, parts.next()?);
        Some((name, number(gid)?, parts.next().unwrap_or_default()))
    })
}

fn look_up(wanted: &Wanted, passwd: &str, group: &str) -> Result<Identity> {
    let user = if wanted.user.is_empty() { "0" } else { &wanted.user };
    let (uid, mut gid, name, home) = if is_number(user) {
        let uid = number(user).ok_or_else(|| Error::invalid(format!("user {user} is not between 0 and {ID_MAX}")))?;
        let entry = passwd_entries(passwd).find(|(_, known, ..)| *known == uid);
        entry.map_or((uid, 0, "", ""), |(name, uid, gid, home)| (uid, gid, name, home))
    } else {
        let entry = passwd_entries(passwd).find(|(name, ..)| *name == user);
        let unknown = || Error::invalid(format!("user {user:?} is not in the image's /etc/passwd"));
        entry.map(|(name, uid, gid, home)| (uid, gid, name, home)).ok_or_else(unknown)?
    };
    if is_number(&wanted.group) && !wanted.group.is_empty() {
        let group = &wanted.group;
        gid = number(group).ok_or_else(|| Error::invalid(format!("group {group} is not between 0 and {ID_MAX}")))?;
    } else if !wanted.group.is_empty() {
        gid = group_entries(group)
            .find(|(name, ..)| *name == wanted.group)
            .map(|(_, gid, _)| gid)
            .ok_or_else(|| Error::invalid(format!("group {:?} is not in the image's /etc/group", wanted.group)))?;
    }
    let mut groups = wanted.extra.clone();
    groups.push(gid);
    if wanted.merge && !name.is_empty() {
        groups.extend(
            group_entries(group).filter(|(_, _, members)| members.split(',').any(|member| member == name)).map(|(_, gid, _)| gid),
        );
    }
    groups.sort_unstable();
    groups.dedup();
    Ok(Identity { uid, gid, groups, home: if home.is_empty() { "/".into() } else { home.into() } })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33::/var/www:/bin/false\nuser:x:1000:1000::/home/user:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nwww-data:x:33:\nusers:x:100:\nextra:x:50000:user,other\n";

    fn check(user: &str, group: &str, extra: &[u32], merge: bool, expected: (u32, u32, &[u32], &str)) {
        let wanted = Wanted { user: user.into(), group: group.into(), extra: extra.into(), merge };
        let found = look_up(&wanted, PASSWD, GROUP).expect("resolves");
        assert_eq!((found.uid, found.gid, found.groups.as_slice(), found.home.as_str()), expected, "{wanted:?}");
    }

    #[test]
    fn users_and_groups_by_name_and_number() {
        check("", "", &[], true, (0, 0, &[0], "/root"));
        check("www-data", "", &[], true, (33, 33, &[33], "/var/www"));
        check("1000", "", &[], true, (1000, 1000, &[1000, 50000], "/home/user"));
        check("1000", "", &[7], false, (1000, 1000, &[7, 1000], "/home/user"));
        check("user", "users", &[], true, (1000, 100, &[100, 50000], "/home/user"));
        check("4242", "", &[], true, (4242, 0, &[0], "/"));
        check("4242", "77", &[9], true, (4242, 77, &[9, 77], "/"));
    }

    #[test]
    fn a_number_is_never_a_name() {
        let passwd = "1000:x:0:0::/evil:\nreal:x:1000:7::/real:\n4294967295:x:0:0::/:\nall:x:4294967295:0::/:\n";
        let wanted = |user: &str, group: &str| Wanted { user: user.into(), group: group.into(), ..Wanted::default() };
        let found = look_up(&wanted("1000", "50"), passwd, "50:x:0:\n").expect("resolves");
        assert_eq!((found.uid, found.gid, found.home.as_str()), (1000, 50, "/real"));
        for (user, group) in
            [("4294967295", ""), ("99999999999", ""), ("all", ""), ("-1", ""), ("+1000", ""), ("0", "2147483648")]
        {
            look_up(&wanted(user, group), passwd, "").expect_err(user);
        }
    }

    #[test]
    fn every_form_of_an_images_user() {
        let config = ContainerConfig::default();
        for (text, user, group) in [
            ("", "", ""),
            ("user", "user", ""),
            ("7", "7", ""),
            ("user:users", "user", "users"),
            ("7:8", "7", "8"),
            (":users", "", "users"),
            ("user:", "user", ""),
        ] {
            let found = wanted(&config, text).expect("valid");
            assert_eq!((found.user.as_str(), found.group.as_str()), (user, group), "{text}");
        }
    }

    #[test]
    fn contradictions_and_bad_ids_name_their_field() {
        use windlass_proto::cri::{Int64Value, LinuxContainerConfig, LinuxContainerSecurityContext as Context};
        let int = |value| Some(Int64Value { value });
        for (security, field) in [
            (Context { run_as_group: int(5), ..Default::default() }, "run_as_group"),
            (Context { run_as_user: int(5), run_as_username: "user".into(), ..Default::default() }, "run_as_username"),
            (Context { run_as_user: int(-1), ..Default::default() }, "run_as_user"),
            (Context { run_as_user: int(1 << 31), ..Default::default() }, "run_as_user"),
            (Context { run_as_user: int(1), run_as_group: int(i64::MAX), ..Default::default() }, "run_as_group"),
            (Context { supplemental_groups: vec![1, -1], ..Default::default() }, "supplemental_groups"),
            (Context { supplemental_groups_policy: 9, ..Default::default() }, "supplemental_groups_policy"),
        ] {
            let linux = Some(LinuxContainerConfig { security_context: Some(security), ..Default::default() });
            let error = wanted(&ContainerConfig { linux, ..Default::default() }, "").expect_err(field);
            assert!(error.message.contains(field), "{error}");
        }
    }

    #[test]
    fn unknown_names_are_named() {
        for (user, group) in [("nobody-here", ""), ("root", "no-such-group")] {
            let wanted = Wanted { user: user.into(), group: group.into(), ..Wanted::default() };
            let error = look_up(&wanted, PASSWD, GROUP).expect_err("unknown");
            assert!(error.message.contains(if group.is_empty() { user } else { group }), "{error}");
        }
    }
}
