//! /dev of a container: nodes, links, and its terminal.

use super::target::{Made, open_host, open_or_make, open_parent};
use super::{Root, attach, open_in_root};
use crate::namespace::User;
use crate::process::{Context, Kind, StepError};
use oci_spec::runtime::{LinuxDeviceType, Spec};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, chownat, makedev, mknodat, symlinkat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// The nodes that the OCI runtime specification demands; /dev/console and /dev/ptmx have their own ways.
const NODES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// statfs type of devpts.
const DEVPTS_MAGIC: i64 = 0x1cd1;

struct Node<'a> {
    path: &'a Path,
    typ: FileType,
    mode: u32,
    major: u32,
    minor: u32,
    owner: (u32, u32),
}

/// The default nodes and `linux.devices`.
fn nodes(spec: &Spec) -> Result<Vec<Node<'_>>, StepError> {
    let listed = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let mut nodes = Vec::new();
    for (path, major, minor) in NODES {
        let path = Path::new(path);
        if !listed.into_iter().flatten().any(|device| device.path() == path) {
            nodes.push(Node { path, typ: FileType::CharacterDevice, mode: 0o666, major, minor, owner: (0, 0) });
        }
    }
    for device in listed.into_iter().flatten() {
        let typ = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::P => FileType::Fifo,
            LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
            LinuxDeviceType::A => {
                return Err(StepError::because(Kind::Invalid, "make device", device.path().display(), "type a is no device"));
            }
        };
        let (major, minor) = (device.major() as u32, device.minor() as u32);
        let owner = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
        let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
        nodes.push(Node { path: device.path(), typ, mode, major, minor, owner });
    }
    Ok(nodes)
}

/// Makes the nodes below /dev in the tmpfs that will be /dev, for a container that may make none itself. What a device rule forbids to
/// make is left to [`Root::populate_dev`].
pub(super) fn make_nodes(dev: BorrowedFd<'_>, spec: &Spec, user: &User) -> Result<(), StepError> {
    for mut node in nodes(spec)? {
        let Ok(below) = node.path.strip_prefix("/dev") else { continue };
        // An id that is not mapped stays the host's, which is nobody inside.
        let (uid, gid) = node.owner;
        node.owner = (user.host_uid(uid).unwrap_or(uid), user.host_gid(gid).unwrap_or(gid));
        let (parent, name) = open_parent(dev, below)?;
        match mknod(parent.as_fd(), name, &node) {
            Err(Errno::PERM) => {}
            other => other.context("make device", node.path.display())?,
        }
    }
    Ok(())
}

impl Root {
    /// Step 5: the default nodes and links, and `linux.devices`; with `made`, [`make_nodes`] has made those below /dev. Nothing is made
    /// in a /dev that is the host's.
    pub fn populate_dev(&self, spec: &Spec, made: bool) -> Result<(), StepError> {
        let from_host = spec.mounts().iter().flatten().any(|mount| {
            let bind = mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind");
            mount.destination() == Path::new("/dev") && (bind || mount.typ().as_deref() == Some("bind"))
        });
        if from_host {
            return Ok(());
        }
        let dev = open_or_make(self.as_fd(), Path::new("/dev"), Made::Directory)?;
        for node in nodes(spec)? {
            // Those were made when it was allowed.
            if !(made && open_in_root(self.as_fd(), node.path, OFlags::PATH | OFlags::NOFOLLOW).is_ok()) {
                self.make_node(&node)?;
            }
        }
        for (name, to) in LINKS {
            link(dev.as_fd(), name, to).context("make link", format!("/dev/{name}"))?;
        }
        Ok(())
    }

    fn make_node(&self, node: &Node<'_>) -> Result<(), StepError> {
        let refused = |mut error: StepError| {
            error.step = format!("devices: {}", error.step);
            error.kind(Kind::Invalid)
        };
        let (parent, name) = open_parent(self.as_fd(), node.path).map_err(refused)?;
        match mknod(parent.as_fd(), name, node) {
            Err(Errno::PERM) => self.bind_node(node),
            Err(errno @ (Errno::ISDIR | Errno::NOTDIR | Errno::NAMETOOLONG)) => {
                Err(refused(StepError::errno("make device", node.path.display(), errno.raw_os_error())))
            }
            other => other.context("make device", node.path.display()),
        }
    }

    /// Where mknod is not allowed, the host's node of the same name is bound.
    fn bind_node(&self, node: &Node<'_>) -> Result<(), StepError> {
        let object = node.path.display();
        let host = open_host(node.path, OFlags::PATH).context("bind device", &object)?;
        let target = open_or_make(self.as_fd(), node.path, Made::File)?;
        bind(host.as_fd(), target.as_fd()).context("bind device", &object)
    }

    /// Opens a new pty of the container's own devpts and binds its slave on /dev/console. Master and slave.
    pub fn open_terminal(&self) -> Result<(OwnedFd, OwnedFd), StepError> {
        let (master, slave) = open_pty(self.as_fd())?;
        let console = open_or_make(self.as_fd(), Path::new("/dev/console"), Made::File)?;
        bind(slave.as_fd(), console.as_fd()).context("bind terminal", "/dev/console")?;
        Ok((master, slave))
    }
}

/// Opens a new pty of the devpts at /dev/pts below `root`, and nothing else that might be there: master and slave.
pub(crate) fn open_pty(root: BorrowedFd<'_>) -> Result<(OwnedFd, OwnedFd), StepError> {
    let path = "/dev/pts/ptmx";
    // Looked at before it is opened: opening a device that an image put there could do anything.
    let found = match open_in_root(root, Path::new(path), OFlags::PATH) {
        Err(Errno::NOENT | Errno::NOTDIR) => {
            let why = "there is none in what is mounted on /dev";
            return Err(StepError::because(Kind::Invalid, "mounts: open terminal", path, why));
        }
        other => other.context("open terminal", path)?,
    };
    let stat = rustix::fs::fstat(&found).context("open terminal", path)?;
    let magic = rustix::fs::fstatfs(&found).context("open terminal", path)?.f_type;
    if magic != DEVPTS_MAGIC || stat.st_rdev != makedev(5, 2) {
        return Err(StepError::because(Kind::Invalid, "open terminal", path, "not the ptmx of a devpts"));
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let master = open_in_root(root, Path::new(path), flags).context("open terminal", path)?;
    let slave = crate::sys::terminal::open_peer(master.as_fd()).context("open terminal", path)?;
    Ok((master, slave))
}

fn bind(source: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    attach(open_tree(source, "", flags)?.as_fd(), target)
}

fn mknod(parent: BorrowedFd<'_>, name: &OsStr, node: &Node<'_>) -> Result<(), Errno> {
    let device = makedev(node.major, node.minor);
    let make = || mknodat(parent, name, node.typ, Mode::from_raw_mode(node.mode), device);
    match make() {
        Err(Errno::EXIST) => match unlinkat(parent, name, AtFlags::empty()) {
            Ok(()) => make()?,
            // A mount of the request lies there.
            Err(Errno::BUSY) => return Ok(()),
            Err(errno) => return Err(errno),
        },
        other => other?,
    }
    let (uid, gid) = node.owner;
    if node.owner == (0, 0) {
        return Ok(());
    }
    chownat(parent, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW)
}

fn link(dev: BorrowedFd<'_>, name: &str, to: &str) -> Result<(), Errno> {
    match symlinkat(to, dev, name) {
        Err(Errno::EXIST) => match unlinkat(dev, name, AtFlags::empty()) {
            Ok(()) => symlinkat(to, dev, name),
            // An image's own directory there is left alone, as is a mount of the request.
            Err(Errno::ISDIR | Errno::BUSY) => Ok(()),
            Err(errno) => Err(errno),
        },
        other => other,
    }
}
