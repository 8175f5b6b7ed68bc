//! Processes of containers: making the first one of a bundle up to its gate, and adding an exec to a running container.
//! The caller must be single-threaded: the child is a fork that runs ordinary code. Keeping, waiting for and reaping the
//! process is the caller's.

mod beside;
mod capture;
mod child;
mod criu;
mod entrypoint;
mod error;
mod exec;
mod external;
pub mod hooks;
mod identity;
mod privileges;
mod report;
mod restore;
mod spawn;
mod stdio;

pub use capture::{Captured, capture};
pub use error::{Kind, StepError};
pub use external::create_by;
pub use report::{Message, Report};
pub use restore::create_from_checkpoint;
pub use spawn::{create, create_behind, enter};

pub(crate) use beside::beside;
pub(crate) use error::Context;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;

/// The pid namespace that a container's first process lives in.
#[derive(Debug, Clone, Copy)]
pub enum PidNamespace<'a> {
    /// Its own, where it is process 1.
    New,
    /// The same, of a container in a user namespace, which owns it: the child makes it there and tells by [`Message::Moved`] who the
    /// first process is.
    NewInside,
    /// The one behind this namespace descriptor or pidfd: the pod's, or another container's.
    Join(BorrowedFd<'a>),
    /// The host's.
    Host,
}

/// Namespaces that the pod holds. `None` leaves the choice to `config.json`: a path there is joined, an entry without a
/// path makes a new one, no entry stays on the host.
#[derive(Debug, Default, Clone, Copy)]
pub struct PodNamespaces<'a> {
    /// A user namespace with the mappings of `config.json`; it owns the others.
    pub user: Option<BorrowedFd<'a>>,
    /// A network namespace.
    pub net: Option<BorrowedFd<'a>>,
    /// An ipc namespace.
    pub ipc: Option<BorrowedFd<'a>>,
    /// A uts namespace.
    pub uts: Option<BorrowedFd<'a>>,
    /// A detached tmpfs mount (`fsmount`); the container gets a clone of it at /dev/shm.
    pub shm: Option<BorrowedFd<'a>>,
    /// No namespace, but held in the same way: a detached tree in which EROFS layers are mounted, by the stem of their file's name.
    pub layers: Option<BorrowedFd<'a>>,
}

/// Standard input, output and error of a process.
#[derive(Debug)]
pub enum Stdio {
    /// All three are /dev/null.
    Null,
    /// The child's ends of pipes or files. Without `stdin` that is /dev/null.
    Fds {
        /// Read end.
        stdin: Option<OwnedFd>,
        /// Write end.
        stdout: OwnedFd,
        /// Write end; may be a duplicate of `stdout`.
        stderr: OwnedFd,
    },
    /// A pty of the container's own devpts. Its master comes with [`Message::Ready`].
    Terminal,
}

/// What [`create`] needs to know.
#[derive(Debug)]
pub struct Spawn<'a> {
    /// Absolute directory with `config.json` and, for an overlay root, `rootfs.json`.
    pub bundle: &'a Path,
    /// The container's leaf in the cgroup v2 tree, an open directory: the child is born in it.
    pub cgroup: BorrowedFd<'a>,
    /// Absolute path of the same leaf, below the v2 mount.
    pub cgroup_path: &'a Path,
    /// Its pid namespace; overrides `config.json`.
    pub pid: PidNamespace<'a>,
    /// Namespaces of the pod.
    pub namespaces: PodNamespaces<'a>,
    /// Overrides `process.terminal` of `config.json`.
    pub stdio: Stdio,
    /// The container's id, as hooks are told. The caller runs the bundle's poststart and poststop hooks.
    pub id: &'a str,
}

/// What [`enter`] needs to know.
#[derive(Debug)]
pub struct Enter<'a> {
    /// The container's first process.
    pub target: BorrowedFd<'a>,
    /// A sub-cgroup of the container's leaf, an open directory.
    pub cgroup: BorrowedFd<'a>,
    /// JSON of an OCI runtime `Process`.
    pub process_json: &'a str,
    /// Standard streams; overrides `terminal` of the process.
    pub stdio: Stdio,
    /// The container's bundle, for what the process leaves open (rlimits, oom_score_adj, AppArmor profile, SELinux label, no_new_privs).
    pub bundle: &'a Path,
}

/// A process that was started and reports through its socket.
#[derive(Debug)]
pub struct Child {
    /// Process id in the caller's pid namespace.
    pub pid: i32,
    /// Close-on-exec pidfd. Readable when the process has ended; the caller reaps it with waitid.
    pub pidfd: OwnedFd,
    /// Where it reports to.
    pub report: Report,
}
