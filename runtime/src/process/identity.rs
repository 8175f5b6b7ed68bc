//! Who the program runs as: session, limits, user, groups, capabilities, no_new_privs, umask, working directory.

use super::{Context, Kind, StepError};
use crate::security::Capabilities;
use oci_spec::runtime::Process;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{
    set_keep_capabilities, set_no_new_privs, set_thread_gid, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Umask of a program whose bundle gives none.
const UMASK: u32 = 0o022;

/// Changes the calling process to what `process` says, in the container's root. `available` is the bounding set that was ours;
/// with `filtered` a seccomp filter follows.
pub(super) fn assume(process: &Process, available: u64, filtered: bool) -> Result<(), StepError> {
    let user = process.user();
    let mut capabilities = Capabilities::new(process.capabilities().as_ref(), available);
    if filtered && process.no_new_privileges() != Some(true) {
        capabilities.keep_for_filter(available);
    }
    let ids = [user.uid(), user.gid()].into_iter().chain(user.additional_gids().iter().flatten().copied());
    if ids.into_iter().any(|id| id == u32::MAX) {
        // To the kernel this one means: no change.
        return Err(StepError::because(Kind::Invalid, "set user", u32::MAX, "is not an id"));
    }
    make_working_directory(process.cwd())?;
    capabilities.apply_bounding()?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    set_keep_capabilities(true).context("set user", user.uid())?;
    set_thread_groups(&groups).context("set groups", format!("{:?}", user.additional_gids()))?;
    set_thread_gid(gid).context("set group", user.gid())?;
    set_thread_res_gid(gid, gid, gid).context("set group", user.gid())?;
    set_thread_res_uid(uid, uid, uid).context("set user", user.uid())?;
    change_directory(process.cwd(), &capabilities)?;
    set_keep_capabilities(false).context("set user", user.uid())?;
    if process.no_new_privileges().unwrap_or(false) {
        set_no_new_privs(true).context("set no_new_privs", "")?;
    }
    rustix::process::umask(Mode::from_raw_mode(user.umask().unwrap_or(UMASK)));
    Ok(())
}

fn make_working_directory(cwd: &Path) -> Result<(), StepError> {
    if !cwd.is_absolute() {
        return Err(StepError::because(Kind::Invalid, "change directory to", cwd.display(), "must be absolute"));
    }
    // Without a "." at the end, which could only be made after its parent.
    let cwd: PathBuf = cwd.components().collect();
    // The umask is empty here: without a mode everybody could write to it.
    match std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&cwd) {
        // A read-only root without it: the change of directory says so.
        Err(error) if error.raw_os_error() == Some(libc::EROFS) => Ok(()),
        other => other.context("make working directory", cwd.display()).map_err(|error| error.kind(Kind::Entrypoint)),
    }
}

/// As the user, because a file server may refuse root; then with the final capabilities, which leave no other way in.
fn change_directory(cwd: &Path, capabilities: &Capabilities) -> Result<(), StepError> {
    let changed = rustix::process::chdir(cwd);
    capabilities.apply()?;
    let changed = match changed {
        Err(Errno::ACCESS | Errno::PERM) => rustix::process::chdir(cwd),
        other => other,
    };
    changed.context("change directory to", cwd.display()).map_err(|error| error.kind(Kind::Entrypoint))?;
    // The kernel marks a directory outside of the root as unreachable.
    let inside = rustix::process::getcwd(Vec::new()).is_ok_and(|path| path.as_bytes().first() == Some(&b'/'));
    if inside {
        Ok(())
    } else {
        Err(StepError::because(Kind::Invalid, "change directory to", cwd.display(), "outside of the root"))
    }
}
