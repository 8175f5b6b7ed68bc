//! Turns a freshly started process into a monitor: session, reaper, log, descriptors. Then the loop runs.

use super::note::note;
use super::server::Monitor;
use crate::process::{Context, StepError};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::DumpableBehavior;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use windlass_proto::frame;
use windlass_proto::monitor::{Frame, frame::Body};

/// Name of the monitor's own log in the run directory.
const LOG_FILE: &str = "monitor.log";

/// Serves the daemon whose connection is fd 0 (and whose tree of layers fd 1, if that is a directory), and every later one at fd 2, which
/// listens at `monitor.sock` in `directory`, until Shutdown. The socket is older than this process: a daemon that comes after a killed one
/// finds every monitor by it, also one that has not come this far. One that cannot begin tells the daemon why.
pub fn run(directory: &Path) -> Result<(), StepError> {
    let monitor = prepare(directory).inspect_err(tell)?;
    monitor.run().inspect_err(|error| note(format_args!("the event loop failed: {error}"))).context("serve", directory.display())
}

fn prepare(directory: &Path) -> Result<Monitor, StepError> {
    let directory = directory.canonicalize().context("find", directory.display())?;
    // A caller may have made it a session leader already.
    match rustix::process::setsid() {
        Ok(_) | Err(Errno::PERM) => {}
        Err(errno) => return Err(errno).context("make session", ""),
    }
    let control = std::io::stdin().as_fd().try_clone_to_owned().context("duplicate", "the daemon's connection")?;
    let layers = layer_tree().context("take", "the tree of layers")?;
    let listener = std::io::stderr().as_fd().try_clone_to_owned().context("duplicate", "the monitor's socket")?;
    rustix::io::ioctl_fionbio(&listener, true).context("set up", "the monitor's socket")?;
    std::env::set_current_dir("/").context("change directory to", "/")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("become the pod's reaper", "")?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).context("hide", "the monitor's memory")?;
    // It was executed by descriptor, whose number would be its name. The kernel keeps 15 bytes.
    let _ = rustix::thread::set_name(c"windlass-monito");
    // Not allowed without CAP_SYS_RESOURCE: then the monitor is killed for memory like anything else.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let children = SigSet::from(Signal::SIGCHLD);
    children.thread_block().context("block", "SIGCHLD")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&children, flags).context("make", "a signal descriptor")?;
    let log = directory.join(LOG_FILE);
    let monitor = Monitor::new(directory, signals, listener, control, layers).context("watch", "the daemon's connection")?;
    // Last: until then the connection is fd 0, and takes the word of what failed.
    redirect_standard_streams(&log)?;
    Ok(monitor)
}

/// Tells the daemon why there will be no monitor.
fn tell(error: &StepError) {
    let last = Frame { id: 0, body: Some(Body::Failure(error.clone().into())) };
    if let Ok(bytes) = frame::encode(&last) {
        // Who does not take it sees the connection's end.
        let _ = rustix::io::write(std::io::stdin(), &bytes);
    }
}

/// The tree of layers that the daemon gave.
fn layer_tree() -> std::io::Result<Option<OwnedFd>> {
    let given = std::io::stdout();
    let directory = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&given)?.st_mode).is_dir();
    directory.then(|| given.as_fd().try_clone_to_owned()).transpose()
}

/// fd 2 becomes the monitor's log, fd 1 and 0 /dev/null.
fn redirect_standard_streams(log: &Path) -> Result<(), StepError> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).context("open", "/dev/null")?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::APPEND | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::open(log, flags, Mode::from_raw_mode(0o600)).context("open", log.display())?;
    rustix::stdio::dup2_stderr(&file).context("redirect standard error to", log.display())?;
    rustix::stdio::dup2_stdout(&null).context("redirect standard output to", "/dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("redirect standard input to", "/dev/null")
}
