//! Exit records: `exits/<container id>.json` in the run directory, for a daemon that was away when a container ended.

use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use std::io::Write;
use std::path::Path;
use windlass_proto::monitor::Exit;

#[derive(Serialize)]
struct Record {
    version: u32,
    code: i32,
    signal: i32,
    oom_killed: bool,
    finished_at_ns: i64,
}

/// Writes a record by rename. It need not survive a power loss, which ends the container too.
pub(super) fn write(run_directory: &Path, container_id: &str, exit: &Exit) -> std::io::Result<()> {
    let directory = run_directory.join("exits");
    let made = rustix::fs::mkdir(&directory, Mode::from_raw_mode(0o700));
    if made != Err(rustix::io::Errno::EXIST) {
        made?;
    }
    let temporary = directory.join(format!(".{container_id}.new"));
    let Exit { code, signal, oom_killed, finished_at_ns } = *exit;
    let bytes = serde_json::to_vec(&Record { version: 1, code, signal, oom_killed, finished_at_ns })?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    std::fs::File::from(rustix::fs::open(&temporary, flags, Mode::from_raw_mode(0o600))?).write_all(&bytes)?;
    std::fs::rename(temporary, directory.join(format!("{container_id}.json")))
}
