//! Labels of a volume's files. Goes down by descriptors and never through a link, so that a container which shares the volume cannot send it
//! anywhere else.

use crate::error::{Error, Result};
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, XattrFlags, lsetxattr, openat, statat},
    io::Errno,
};
use std::{
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

const XATTR: &str = "security.selinux";
/// Levels of directories that are gone down; a descriptor is open for each.
const DEPTH_MAX: usize = 256;
/// Directories of the system, whose new label would lock out everything else.
const SYSTEM: [&str; 20] = [
    "/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/mnt", "/opt", "/proc", "/root", "/run", "/sbin", "/srv",
    "/sys", "/tmp", "/usr", "/var", "/var/lib",
];

/// Gives `label` to the file or directory at `path`, which has no links in it any more, and to all that is below. A file system without labels is
/// left as it is. Blocks; `goes_on` is asked for each file, and ends it.
pub fn relabel(path: &Path, label: &str, goes_on: &dyn Fn() -> bool) -> Result<()> {
    if SYSTEM.iter().any(|system| Path::new(system) == path) {
        return Err(Error::invalid(format!("selinux_relabel of {}, a directory of the system, is refused", path.display())));
    }
    let failed = |error: Errno| Error::io(format_args!("relabel {}", path.display()), error);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = rustix::fs::open(parent, flags, Mode::empty()).map_err(failed)?;
    match one(&parent, name.as_encoded_bytes(), label, goes_on, 0) {
        Ok(()) | Err(Errno::NOTSUP) => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

/// Labels one entry of a directory and what is below it. The name is looked up below the descriptor; its last part is never followed.
fn one(parent: &OwnedFd, name: &[u8], label: &str, goes_on: &dyn Fn() -> bool, depth: usize) -> std::result::Result<(), Errno> {
    if !goes_on() {
        return Err(Errno::CANCELED);
    }
    let path = [format!("/proc/self/fd/{}/", parent.as_raw_fd()).as_bytes(), name].concat();
    match lsetxattr(path.as_slice(), XATTR, label.as_bytes(), XattrFlags::empty()) {
        // Gone meanwhile.
        Err(Errno::NOENT) if depth > 0 => return Ok(()),
        other => other?,
    }
    if depth >= DEPTH_MAX {
        return Err(Errno::LOOP);
    }
    let found = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) if depth > 0 => return Ok(()),
        other => other?,
    };
    if FileType::from_raw_mode(found.st_mode) != FileType::Directory {
        return Ok(());
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match openat(parent, name, flags, Mode::empty()) {
        // Replaced meanwhile, by a link or by nothing.
        Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) if depth > 0 => return Ok(()),
        other => other?,
    };
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            one(&directory, name, label, goes_on, depth + 1)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn label(path: &Path) -> String {
        let mut bytes = [0u8; 64];
        let count = rustix::fs::lgetxattr(path, XATTR, &mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..count]).trim_end_matches('\0').to_owned()
    }

    #[test]
    fn everything_below_is_labelled_and_nothing_behind_a_link() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let (volume, outside) = (directory.path().join("volume"), directory.path().join("outside"));
        fs::create_dir_all(volume.join("a/b")).expect("create");
        fs::write(volume.join("a/b/file"), "x").expect("write");
        fs::write(&outside, "x").expect("write");
        std::os::unix::fs::symlink(&outside, volume.join("link")).expect("link");
        relabel(&volume, "u:object_r:t:s0", &|| true).expect("relabel");
        // Without SELinux the attribute is an ordinary one, which root may write.
        for path in [&volume, &volume.join("a/b"), &volume.join("a/b/file"), &volume.join("link")] {
            assert_eq!(label(path), "u:object_r:t:s0", "{}", path.display());
        }
        assert_eq!(label(&outside), "");
        relabel(&outside, "u:object_r:f:s0", &|| true).expect("relabel a file");
        assert_eq!(label(&outside), "u:object_r:f:s0");
    }

    #[test]
    fn the_systems_directories_are_refused() {
        for path in SYSTEM {
            assert!(relabel(Path::new(path), "u:object_r:t:s0", &|| true).is_err(), "{path}");
        }
    }
}
