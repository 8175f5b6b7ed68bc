//! The options of one mount of `config.json`, as the OCI runtime specification lists them.

use crate::process::{Kind, StepError};

const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;

/// Parsed options.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Options {
    /// `Some(recursive)` of a bind mount.
    pub(super) bind: Option<bool>,
    /// MOUNT_ATTR_* of the mount itself: to set and to clear.
    pub(super) set: u64,
    pub(super) clear: u64,
    /// The same of the mount and all below.
    pub(super) set_all: u64,
    pub(super) clear_all: u64,
    /// MS_PRIVATE and the like, and whether for all below as well. 0: none given.
    pub(super) propagation: u64,
    pub(super) propagation_all: bool,
    /// Ids of a bind mount are mapped, and with `true` of all below as well.
    pub(super) map_ids: Option<bool>,
    /// What the file system itself takes.
    pub(super) data: Vec<(String, Option<String>)>,
}

/// Names of the options that are ours and not the file system's; those of [`ATTRIBUTES`] come once more with an `r` before them.
pub const NAMES: [&str; 17] = [
    "private",
    "rprivate",
    "slave",
    "rslave",
    "shared",
    "rshared",
    "unbindable",
    "runbindable",
    "bind",
    "rbind",
    "idmap",
    "ridmap",
    "defaults",
    "async",
    "nomand",
    "noiversion",
    "loud",
];

/// Names of the options that set or clear one attribute of a mount.
pub const ATTRIBUTES: [&str; 18] = [
    "ro",
    "rw",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "noatime",
    "strictatime",
    "relatime",
    "atime",
    "nostrictatime",
    "norelatime",
    "nodiratime",
    "diratime",
    "nosymfollow",
    "symfollow",
];

/// Parses `options`. Unknown ones belong to the file system.
pub(super) fn parse(options: &[String]) -> Result<Options, StepError> {
    let mut parsed = Options::default();
    for option in options {
        if known(&mut parsed, option) {
            continue;
        }
        if matches!(option.as_str(), "tmpcopyup" | "remount") {
            return Err(StepError::because(Kind::Unsupported, "mount", option, "this option is not built yet"));
        }
        parsed.data.push(match option.split_once('=') {
            Some((key, value)) => (key.into(), Some(value.into())),
            None => (option.clone(), None),
        });
    }
    Ok(parsed)
}

fn known(parsed: &mut Options, option: &str) -> bool {
    if let Some((bits, clears)) = attribute(option) {
        let (add, remove) = if clears { (&mut parsed.clear, &mut parsed.set) } else { (&mut parsed.set, &mut parsed.clear) };
        *add |= bits;
        *remove &= !bits;
        return true;
    }
    if let Some((bits, clears)) = option.strip_prefix('r').and_then(attribute) {
        let (add, remove) =
            if clears { (&mut parsed.clear_all, &mut parsed.set_all) } else { (&mut parsed.set_all, &mut parsed.clear_all) };
        *add |= bits;
        *remove &= !bits;
        return true;
    }
    let all = option.strip_prefix('r');
    let propagation = match all.unwrap_or(option) {
        "private" => libc::MS_PRIVATE,
        "slave" => libc::MS_SLAVE,
        "shared" => libc::MS_SHARED,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => 0,
    };
    if propagation != 0 {
        (parsed.propagation, parsed.propagation_all) = (propagation, all.is_some());
        return true;
    }
    match option {
        "bind" => parsed.bind = Some(parsed.bind.unwrap_or(false)),
        "rbind" => parsed.bind = Some(true),
        "idmap" => parsed.map_ids = Some(false),
        "ridmap" => parsed.map_ids = Some(true),
        "defaults" | "async" | "nomand" | "noiversion" | "loud" | "" => {}
        _ => return false,
    }
    true
}

/// The bits of an option, and whether it clears them. Setting an access time policy replaces the one that was.
fn attribute(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "ro" => (RDONLY, false),
        "rw" => (RDONLY, true),
        "nosuid" => (libc::MOUNT_ATTR_NOSUID, false),
        "suid" => (libc::MOUNT_ATTR_NOSUID, true),
        "nodev" => (libc::MOUNT_ATTR_NODEV, false),
        "dev" => (libc::MOUNT_ATTR_NODEV, true),
        "noexec" => (libc::MOUNT_ATTR_NOEXEC, false),
        "exec" => (libc::MOUNT_ATTR_NOEXEC, true),
        "noatime" => (libc::MOUNT_ATTR_NOATIME, false),
        "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, false),
        "relatime" | "atime" | "nostrictatime" | "norelatime" => (libc::MOUNT_ATTR_RELATIME, false),
        "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, false),
        "diratime" => (libc::MOUNT_ATTR_NODIRATIME, true),
        "nosymfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, false),
        "symfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, true),
        _ => return None,
    })
}

/// What mount_setattr needs to clear so that `set` may hold an access time policy.
pub(super) fn clear_with_atime(set: u64, clear: u64) -> u64 {
    if set & ATIME != 0 { clear | ATIME } else { clear }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(options: &[&str], expected: Options) {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        assert_eq!(parse(&options).expect("valid"), expected, "{options:?}");
    }

    #[test]
    fn what_is_advertised_is_known() {
        let recursive = ATTRIBUTES.map(|name| format!("r{name}"));
        let names = NAMES.iter().chain(&ATTRIBUTES).copied().chain(recursive.iter().map(String::as_str));
        for name in names {
            assert!(known(&mut Options::default(), name), "{name}");
        }
    }

    #[test]
    fn options_of_volumes_and_file_systems() {
        let none = Options::default;
        check(
            &["rbind", "rprivate", "ro"],
            Options { bind: Some(true), set: RDONLY, propagation: libc::MS_PRIVATE, propagation_all: true, ..none() },
        );
        check(&["bind", "rro"], Options { bind: Some(false), set_all: RDONLY, ..none() });
        check(&["ro", "rw"], Options { clear: RDONLY, ..none() });
        check(
            &["nosuid", "mode=755", "newinstance"],
            Options {
                set: libc::MOUNT_ATTR_NOSUID,
                data: vec![("mode".into(), Some("755".into())), ("newinstance".into(), None)],
                ..none()
            },
        );
        // `relatime` begins with an r and is not recursive `elatime`.
        check(&["relatime"], none());
    }
}
