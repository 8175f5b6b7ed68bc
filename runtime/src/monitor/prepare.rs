//! Turns a freshly started process into a monitor: session, reaper, log, descriptors. Then the loop runs.

use super::note::note;
use super::server::Monitor;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::DumpableBehavior;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// Name of the monitor's own log in the run directory.
const LOG_FILE: &str = "monitor.log";

/// Serves the daemon whose connection is fd 0 (and whose tree of layers fd 1, if that is a directory), and every later one at fd 2, which
/// listens at `monitor.sock` in `directory`, until Shutdown. The socket is older than this process: a daemon that comes after a killed one
/// finds every monitor by it, also one that has not come this far.
pub fn run(directory: &Path) -> std::io::Result<()> {
    let directory = directory.canonicalize()?;
    // A caller may have made it a session leader already.
    match rustix::process::setsid() {
        Ok(_) | Err(Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    let control = std::io::stdin().as_fd().try_clone_to_owned()?;
    let layers = layer_tree()?;
    let listener = std::io::stderr().as_fd().try_clone_to_owned()?;
    rustix::io::ioctl_fionbio(&listener, true)?;
    redirect_standard_streams(&directory)?;
    std::env::set_current_dir("/")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // It was executed by descriptor, whose number would be its name. The kernel keeps 15 bytes.
    let _ = rustix::thread::set_name(c"windlass-monito");
    // Not allowed without CAP_SYS_RESOURCE: then the monitor is killed for memory like anything else.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let children = SigSet::from(Signal::SIGCHLD);
    children.thread_block()?;
    let signals = SignalFd::with_flags(&children, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let result = Monitor::new(directory, signals, listener, control, layers)?.run();
    if let Err(error) = &result {
        note(format_args!("the event loop failed: {error}"));
    }
    result
}

/// The tree of layers that the daemon gave.
fn layer_tree() -> std::io::Result<Option<OwnedFd>> {
    let given = std::io::stdout();
    let directory = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&given)?.st_mode).is_dir();
    directory.then(|| given.as_fd().try_clone_to_owned()).transpose()
}

/// fd 0 and 1 become /dev/null, fd 2 the monitor's log.
fn redirect_standard_streams(directory: &Path) -> std::io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let log = rustix::fs::open(directory.join(LOG_FILE), flags, Mode::from_raw_mode(0o600))?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&log)?)
}
