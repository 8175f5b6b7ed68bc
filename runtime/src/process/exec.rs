//! The child that joins a running container and becomes one more process there. It reports Ready just before exec, so that a
//! terminal's master arrives before the program's first byte.

use super::entrypoint::Entrypoint;
use super::report::ChildReport;
use super::{Context, Enter, Kind, Stdio, StepError, identity, stdio};
use crate::bundle::{read_config, read_rootfs_plan};
use crate::security::{self, Filter};
use crate::{namespace, rootfs, sys};
use oci_spec::runtime::Process;
use rustix::fs::{Mode, OFlags, open};
use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd};

/// Joins the container and executes the program.
pub(super) fn run(enter: &Enter<'_>, report: &ChildReport) -> Result<Infallible, StepError> {
    stdio::install(&enter.stdio)?;
    let keep = [0, 1, 2, report.as_fd().as_raw_fd(), enter.target.as_raw_fd()];
    // SAFETY: the child runs nothing of the parent's code any more; of the parent's descriptors it uses those kept here.
    unsafe { sys::descriptors::close_all_but(&keep) }.context("close descriptors", "")?;
    rustix::process::setsid().context("make session", "")?;
    let _ = sys::keyring::new_session();
    sys::signal::reset_all();
    rustix::process::umask(Mode::empty());
    let (process, filter, user) = read_process(enter)?;
    security::set_rlimits(process.rlimits().as_deref().unwrap_or_default())?;
    security::set_oom_score(process.oom_score_adj().unwrap_or(0))?;
    security::set_priorities(&process)?;
    security::confine_at_exec(&process)?;
    security::label_at_exec(&process)?;
    if let Some((uid, gid)) = user {
        stdio::give_to(uid, gid)?;
    }
    namespace::join_process(enter.target, user.is_some())?;
    // A user namespace begins with all capabilities over itself.
    let available = security::own_bounding_set();
    let mut console = None;
    if matches!(enter.stdio, Stdio::Terminal) {
        let root = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).context("open", "/")?;
        let (master, slave) = rootfs::open_pty(root.as_fd())?;
        stdio::set_size(master.as_fd(), &process);
        stdio::install_terminal(slave.as_fd())?;
        console = Some(master);
    }
    stdio::give_to(process.user().uid(), process.user().gid())?;
    identity::assume(&process, available, filter.is_some())?;
    let entrypoint = Entrypoint::find(&process)?;
    report.ready(console.as_ref().map(AsFd::as_fd), Vec::new(), false).context("report", "")?;
    sys::descriptors::close_on_exec_from(3).context("close descriptors", "")?;
    entrypoint.execute(filter.as_ref())
}

/// The host's user and group of a process in a user namespace.
type HostIds = (u32, u32);

/// The process, with what it leaves open taken from the container's own, the container's filter, and its ids on the host where those
/// are others.
fn read_process(enter: &Enter<'_>) -> Result<(Process, Option<Filter>, Option<HostIds>), StepError> {
    let parsed: Result<Process, _> = serde_json::from_str(enter.process_json);
    let mut process = parsed.map_err(|error| StepError::because(Kind::Invalid, "read", "process", error))?;
    let spec = read_config(enter.bundle)?;
    if let Some(first) = spec.process() {
        if process.rlimits().is_none() {
            process.set_rlimits(first.rlimits().clone());
        }
        if process.oom_score_adj().is_none() {
            process.set_oom_score_adj(first.oom_score_adj());
        }
        if process.apparmor_profile().is_none() {
            process.set_apparmor_profile(first.apparmor_profile().clone());
        }
        if process.selinux_label().is_none() {
            process.set_selinux_label(first.selinux_label().clone());
        }
        if first.no_new_privileges() == Some(true) {
            process.set_no_new_privileges(Some(true));
        }
    }
    security::check(Some(&spec), &process)?;
    let ids = namespace::user::host_ids(&spec, process.user().uid(), process.user().gid())?;
    let plan = read_rootfs_plan(enter.bundle)?;
    let filter = Filter::of(&spec, plan.as_ref().and_then(|plan| plan.seccomp_program.as_deref()))?;
    Ok((process, filter, ids))
}
