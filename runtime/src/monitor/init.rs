//! The first process of a shared pid namespace: reaps what is orphaned there and waits to be killed, which ends the namespace.
//! The monitor's own program with another argument, started anew so that it shares no memory with the monitor. Holds no file of
//! the host, no capability and an empty root: containers of the pod see it as process 1.

use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use rustix::fs::{Mode, OFlags};
use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Never returns but with an error. End of file on standard output says that the namespace may be used.
pub fn run() -> std::io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // Process 1 gets no signal from inside its namespace without a handler; blocking them all leaves only SIGKILL from outside.
    SigSet::all().thread_block()?;
    leave_root()?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&root)?;
    rustix::stdio::dup2_stderr(&root)?;
    rustix::stdio::dup2_stdout(&root)?;
    drop(root);
    let children = SigSet::from(Signal::SIGCHLD);
    loop {
        while !matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive) | Err(nix::Error::ECHILD)) {}
        children.wait()?;
    }
}

/// Swaps the host's file tree for an empty one in a mount namespace of its own.
fn leave_root() -> std::io::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    let nothing: Option<&str> = None;
    nix::mount::mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("none"), "/proc", Some("tmpfs"), flags, Some("size=4k,nr_inodes=1,mode=555"))?;
    std::env::set_current_dir("/proc")?;
    rustix::process::pivot_root(".", ".")?;
    Ok(nix::mount::umount2(".", MntFlags::MNT_DETACH)?)
}
