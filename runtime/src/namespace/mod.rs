//! Namespaces of a container: joining the pod's, making its own, writing their sysctls. The pid namespace is chosen by the
//! parent at clone; here are the rest.

mod sysctl;
pub mod user;

pub use sysctl::write_sysctls;
pub use user::User;

use crate::process::{Context, Kind, PodNamespaces, StepError};
use nix::sched::{CloneFlags, setns, unshare};
use oci_spec::runtime::{LinuxNamespaceType as Type, Spec};
use rustix::fs::{Mode, OFlags, open};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// What was joined or made: only sysctls of these may be written.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Owned {
    /// Not the host's network namespace.
    pub net: bool,
    /// Not the host's ipc namespace.
    pub ipc: bool,
    /// Not the host's uts namespace.
    pub uts: bool,
    /// A uts namespace made here, whose hostname is `config.json`'s.
    pub new_uts: bool,
}

enum Choice<'a> {
    Host,
    New,
    Held(BorrowedFd<'a>),
    Path(OwnedFd),
}

/// Joins or makes net, ipc, uts, cgroup and a new mount namespace, after `user`, which is to own the new ones. Descriptors of paths
/// are opened before anything changes. The caller keeps its ids.
pub fn enter(spec: &Spec, pod: &PodNamespaces<'_>, user: Option<&User>) -> Result<Owned, StepError> {
    let mut choices = Vec::with_capacity(4);
    for (typ, held, flag) in [
        (Type::Network, pod.net, CloneFlags::CLONE_NEWNET),
        (Type::Ipc, pod.ipc, CloneFlags::CLONE_NEWIPC),
        (Type::Uts, pod.uts, CloneFlags::CLONE_NEWUTS),
        (Type::Cgroup, None, CloneFlags::CLONE_NEWCGROUP),
    ] {
        choices.push((typ, choose(spec, typ, held)?, flag));
    }
    if let Some(user) = user {
        setns(user.as_fd(), CloneFlags::CLONE_NEWUSER).context("join namespace", "User")?;
    }
    let mut owned = Owned::default();
    let mut new = CloneFlags::CLONE_NEWNS;
    for (typ, choice, flag) in &choices {
        let mine = match choice {
            Choice::Host => false,
            Choice::New => {
                new |= *flag;
                true
            }
            Choice::Held(fd) => setns(fd, *flag).context("join namespace", format!("{typ:?}")).map(|()| true)?,
            Choice::Path(fd) => setns(fd.as_fd(), *flag).context("join namespace", format!("{typ:?}")).map(|()| true)?,
        };
        match typ {
            Type::Network => owned.net = mine,
            Type::Ipc => owned.ipc = mine,
            Type::Uts => (owned.uts, owned.new_uts) = (mine, matches!(choice, Choice::New)),
            _ => {}
        }
    }
    unshare(new).context("make namespaces", format!("{new:?}"))?;
    Ok(owned)
}

fn choose<'a>(spec: &Spec, typ: Type, held: Option<BorrowedFd<'a>>) -> Result<Choice<'a>, StepError> {
    if let Some(fd) = held {
        return Ok(Choice::Held(fd));
    }
    let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    match listed.and_then(|list| list.iter().find(|namespace| namespace.typ() == typ)).map(|namespace| namespace.path()) {
        None => Ok(Choice::Host),
        Some(None) => Ok(Choice::New),
        Some(Some(path)) => open_namespace(path).map(Choice::Path),
    }
}

/// Opens a namespace's pin or /proc file.
pub fn open_namespace(path: &Path) -> Result<OwnedFd, StepError> {
    open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).context("open namespace", path.display())
}

/// Refuses what this build cannot do.
pub fn check(spec: &Spec) -> Result<(), StepError> {
    let refuse = |typ: Type, why: &str| Err(StepError::because(Kind::Unsupported, "use namespace", format!("{typ:?}"), why));
    let list = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    if list.iter().any(|namespace| namespace.typ() == Type::Time) {
        return refuse(Type::Time, "not built yet");
    }
    // The host's tree, or another container's, is no place to build a root in.
    match list.iter().find(|namespace| namespace.typ() == Type::Mount).map(|namespace| namespace.path()) {
        Some(None) => Ok(()),
        Some(Some(_)) => refuse(Type::Mount, "a container has one of its own and joins none"),
        None => refuse(Type::Mount, "a container has one of its own: linux.namespaces must list it"),
    }
}

/// Enters the mount, network, ipc, uts and cgroup namespaces of a process, and with `user` its user namespace, as root there. Its root
/// becomes ours.
pub fn join_process(pidfd: BorrowedFd<'_>, user: bool) -> Result<(), StepError> {
    let user_flag = if user { CloneFlags::CLONE_NEWUSER } else { CloneFlags::empty() };
    let all = user_flag
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    setns(pidfd, all).map_err(|errno| match errno {
        nix::Error::ESRCH => StepError::because(Kind::WrongState, "join the container", "", "it has ended"),
        errno => StepError::errno("join the container", "", errno as i32),
    })?;
    if user { user::become_root() } else { Ok(()) }
}

/// Children of the caller are born in the pid namespace of `target` until this guard goes.
#[derive(Debug)]
pub struct PidForChildren {
    own: OwnedFd,
}

impl PidForChildren {
    /// `target` is a pidfd or a pid namespace descriptor.
    pub fn join(target: BorrowedFd<'_>) -> Result<Self, StepError> {
        let own = open_namespace(Path::new("/proc/self/ns/pid"))?;
        setns(target, CloneFlags::CLONE_NEWPID).context("join namespace", "Pid").map_err(|error| match error.errno {
            libc::ESRCH => StepError::because(Kind::WrongState, "join namespace", "Pid", "its process has ended"),
            _ => error,
        })?;
        Ok(PidForChildren { own })
    }
}

impl Drop for PidForChildren {
    fn drop(&mut self) {
        // Joining the own namespace again cannot fail: the descriptor holds it and the capability was there a moment ago.
        let _ = setns(self.own.as_fd(), CloneFlags::CLONE_NEWPID);
    }
}
