//! The monitors that run on this node, of whatever daemon. A process says what it likes in its command line: what is found by that alone keeps
//! things from being removed, and nothing more.

use super::Node;
use std::{
    ffi::OsStr,
    fs,
    io::Read,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Digits of a pod's id.
const ID_DIGITS: usize = 64;
/// Read of a command line: a monitor's is shorter.
const COMMAND_MAX_BYTES: u64 = 4096;

/// A process that says that it is a pod's monitor.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Monitor {
    pub(super) pid: i64,
    /// The pod's.
    pub(super) id: String,
    /// Its directory, `<state>/pods/<id>`.
    run: PathBuf,
}

/// Lower-case hexadecimal digits, as ids have them.
pub(super) fn hexadecimal(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// All of them.
pub(super) fn all() -> Vec<Monitor> {
    let names = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.file_name());
    names
        .filter_map(|name| {
            let pid: i64 = name.to_str()?.parse().ok()?;
            let mut command = Vec::new();
            fs::File::open(format!("/proc/{pid}/cmdline")).ok()?.take(COMMAND_MAX_BYTES).read_to_end(&mut command).ok()?;
            said(pid, &command)
        })
        .collect()
}

/// The monitor of a command line (proc_pid_cmdline(5)): `windlass-monitor ... --dir <state>/pods/<id> ...`.
fn said(pid: i64, command: &[u8]) -> Option<Monitor> {
    let mut words = command.split(|byte| *byte == 0);
    if words.next() != Some(b"windlass-monitor") {
        return None;
    }
    let run = PathBuf::from(OsStr::from_bytes(words.skip_while(|word| *word != b"--dir").nth(1)?));
    let id = run.file_name()?.to_str().filter(|id| id.len() == ID_DIGITS && hexadecimal(id))?.to_owned();
    Some(Monitor { pid, id, run })
}

impl Monitor {
    /// Its directory is one of these.
    pub(super) fn serves(&self, pods: &Path) -> bool {
        self.run.parent() == Some(pods)
    }

    /// Whether it is what it says, by the kernel's word: root's, in the mount namespace of this program or of the daemon, where no
    /// container's process is, and with the monitor's program, perhaps of an earlier package.
    pub(super) fn proven(&self, node: &Node) -> bool {
        let directory = PathBuf::from(format!("/proc/{}", self.pid));
        let status = fs::read(directory.join("status")).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let roots = status.is_ok_and(|text| {
            text.lines().find_map(|line| line.strip_prefix("Uid:")).is_some_and(|ids| ids.split_whitespace().all(|id| id == "0"))
        });
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        let own = namespace(&self.pid.to_string());
        let daemon = node.daemon.as_ref().and_then(|daemon| daemon.pid).map(|pid| pid.to_string());
        let here = own.is_some() && (own == namespace("self") || daemon.is_some_and(|pid| own == namespace(&pid)));
        let program = fs::read_link(directory.join("exe")).unwrap_or_default();
        let name = program.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let expected = node.config.monitor_path();
        let expected = expected.file_name().unwrap_or_default().to_string_lossy().into_owned();
        roots && here && name.trim_end_matches(" (deleted)") == expected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_is_found_by_its_command_line_and_only_with_an_id() {
        let id = "0f".repeat(32);
        let command = |run: &str| format!("windlass-monitor\0--dir\0{run}\0--x\0");
        let found = said(7, command(&format!("/run/windlass/pods/{id}")).as_bytes()).expect("a monitor");
        assert!(found.pid == 7 && found.id == id && found.serves(Path::new("/run/windlass/pods")), "{found:?}");
        assert!(!found.serves(Path::new("/run/other/pods")));
        for run in ["/run/windlass/pods/x\nOK", "/run/windlass/pods/0f0f", &format!("/p/{}", "0F".repeat(32)), ""] {
            assert_eq!(said(7, command(run).as_bytes()), None, "{run:?}");
        }
        assert_eq!(said(7, format!("other\0--dir\0/run/windlass/pods/{id}").as_bytes()), None);
    }
}
