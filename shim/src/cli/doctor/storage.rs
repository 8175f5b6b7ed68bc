//! The directories of the configuration: on what they are, how much is left there, and who may write.

use super::{Node, report::Report};
use crate::cli::output::size;
use rustix::fs::{StatVfsMountFlags, statfs, statvfs};
use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// Least space and inodes that are left, as shares of all: below the first kubelet collects images (its default), below the second nothing
/// more can be pulled.
const LOW: f64 = 0.15;
const OUT: f64 = 0.02;
/// Space below which a share says nothing.
const LEAST_BYTES: u64 = 1 << 30;

pub(super) fn check(node: &Node, report: &mut Report) {
    report.area("directories");
    let config = &node.config;
    directory(node, "root", &config.root, true, report);
    directory(node, "state", &config.state, false, report);
    let Ok(metadata) = fs::metadata(&config.socket) else { return };
    let mode = metadata.permissions().mode() & 0o777;
    if !metadata.file_type().is_socket() {
        report.error(
            format!("{} is no socket: the daemon replaces it when it starts", config.socket.display()),
            "look what it is, and name another one by `socket` if it is somebody's",
        );
    } else if mode & 0o007 != 0 {
        report.error(
            format!("{} has mode {mode:o}: everybody on this node may run privileged pods", config.socket.display()),
            format!("chmod o= {}", config.socket.display()),
        );
    }
}

/// The directory itself, or the nearest one above it that is there.
pub(super) fn existing(path: &Path) -> Option<PathBuf> {
    path.ancestors().find(|path| path.exists()).map(Path::to_owned)
}

fn directory(node: &Node, field: &str, path: &Path, durable: bool, report: &mut Report) {
    let shown = path.display();
    let Some(place) = existing(path) else { return };
    let (Ok(about), Ok(kind)) = (statvfs(&place), statfs(&place)) else {
        return report.unseen(format!("{field} {shown}"), "run as root");
    };
    let kind = name_of(kind.f_type.cast_unsigned());
    if durable {
        suited(field, &place, kind, report);
    }
    for (flag, bad, means) in [
        (StatVfsMountFlags::RDONLY, "read-only", "the daemon cannot start"),
        (StatVfsMountFlags::NOEXEC, "noexec", "no container can execute anything"),
        (StatVfsMountFlags::NOSUID, "nosuid", "programs like sudo and ping do not raise their rights in containers"),
    ] {
        if about.f_flag.contains(flag) && (durable || flag == StatVfsMountFlags::RDONLY) {
            let says = format!("{field} {shown} is on a file system that is mounted {bad}: {means}");
            let next = "mount it without that option, or give `root` another place";
            if flag == StatVfsMountFlags::NOSUID { report.warning(says, next) } else { report.error(says, next) }
        }
    }
    space(field, path, kind, &about, durable, report);
    permissions(node, field, path, report);
}

/// Whether containers' writable layers can be on it (overlayfs: file types in directory entries, extended attributes, whole renames).
fn suited(field: &str, path: &Path, kind: &str, report: &mut Report) {
    let shown = path.display();
    match kind {
        "overlay" => report.error(
            format!("{field} {shown} is on an overlay: overlays of containers cannot have their writable layers there"),
            "put a volume of another kind at it (in a container: a volume of the host)",
        ),
        "nfs" | "fuse" | "vfat" | "9p" | "smb" | "ceph" | "squashfs" | "ecryptfs" => report.error(
            format!("{field} {shown} is on {kind}: overlays of containers cannot have their writable layers there"),
            "put it on ext4, xfs or btrfs",
        ),
        "tmpfs" | "ramfs" => report.warning(
            format!("{field} {shown} is on {kind}: images and records are gone after a reboot, and take memory"),
            "put it on ext4, xfs or btrfs, unless this node is meant to forget",
        ),
        _ => {}
    }
    if !tells_types(path) {
        report.error(
            format!("{field} {shown}: directory entries have no file types (xfs made with ftype=0): overlays show removed files"),
            "make the file system anew with mkfs.xfs -n ftype=1",
        );
    }
}

/// Whether entries of a directory tell their type (d_type of readdir(3)), by those that are there.
fn tells_types(path: &Path) -> bool {
    let Ok(listing) =
        rustix::fs::open(path, rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY, rustix::fs::Mode::empty())
            .and_then(rustix::fs::Dir::new)
    else {
        return true;
    };
    let dots = [c".".to_owned(), c"..".to_owned()];
    let mut types = listing
        .flatten()
        .filter(|entry| !dots.iter().any(|dot| dot.as_c_str() == entry.file_name()))
        .map(|entry| entry.file_type());
    types.all(|kind| kind != rustix::fs::FileType::Unknown)
}

fn space(field: &str, path: &Path, kind: &str, about: &rustix::fs::StatVfs, durable: bool, report: &mut Report) {
    let (all, free) = (about.f_blocks * about.f_frsize, about.f_bavail * about.f_frsize);
    let share = |free: u64, all: u64| if all == 0 { 1.0 } else { free as f64 / all as f64 };
    let left = format!("{} of {}", size(free), size(all));
    let shown = path.display();
    let next = "`windlass image prune` removes images that nobody uses; `windlass image du` shows what takes space";
    let out = share(free, all) < OUT && free < LEAST_BYTES;
    if out {
        report.error(format!("{field} {shown}: {left} are left on its {kind}: pulls and new containers fail"), next);
    } else if durable && share(free, all) < LOW {
        report.warning(format!("{field} {shown}: {left} are left on its {kind}: kubelet collects images below 15 %"), next);
    } else {
        report.ok(format!("{field} {shown} is on {kind}, {left} left"));
    }
    if share(about.f_favail, about.f_files) < OUT {
        report.error(
            format!(
                "{field} {shown}: {} of {} inodes are left on its {kind}: no file can be made",
                about.f_favail, about.f_files
            ),
            next,
        );
    } else if durable && share(about.f_favail, about.f_files) < LOW {
        report.warning(format!("{field} {shown}: {} of {} inodes are left on its {kind}", about.f_favail, about.f_files), next);
    }
}

/// Root's, and nobody else's to write; with others' right to pass, which pods with users of their own need.
fn permissions(node: &Node, field: &str, path: &Path, report: &mut Report) {
    let Ok(about) = fs::metadata(path) else { return };
    let mode = about.permissions().mode() & 0o7777;
    let shown = path.display();
    if about.uid() != 0 && node.root {
        report.error(
            format!("{field} {shown} belongs to user {}, who may change what containers are made of", about.uid()),
            format!("chown root: {shown}"),
        );
    }
    if mode & 0o022 != 0 {
        report.error(
            format!("{field} {shown} has mode {mode:o}: others may change what containers are made of"),
            format!("chmod go-w {shown}"),
        );
    }
    let closed = path.ancestors().find(|path| fs::metadata(path).is_ok_and(|about| about.permissions().mode() & 0o001 == 0));
    if let Some(closed) = closed.filter(|_| field == "root") {
        report.warning(
            format!(
                "{} lets others not pass: pods with users of their own (hostUsers: false) may not reach their files",
                closed.display()
            ),
            format!("chmod o+x {}", closed.display()),
        );
    }
}

/// The file system of a magic number (statfs(2)).
fn name_of(magic: u64) -> &'static str {
    match magic {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x0102_1994 => "tmpfs",
        0x8584_58f6 => "ramfs",
        0x794c_7630 => "overlay",
        0x2fc1_2fc1 => "zfs",
        0xf2f5_2010 => "f2fs",
        0xca45_1a4e => "bcachefs",
        0x6969 => "nfs",
        0x6573_5546 => "fuse",
        0x0102_1997 => "9p",
        0xff53_4d42 | 0xfe53_4d42 => "smb",
        0x00c3_6400 => "ceph",
        0x4d44 => "vfat",
        0x7371_7368 => "squashfs",
        0xf15f => "ecryptfs",
        0x00c0_ffee => "hostfs",
        _ => "a file system of another kind",
    }
}
