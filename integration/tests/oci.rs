//! `windlass-oci` with bundles made by others: those of Debian's runc, as `runc spec` writes them, unchanged.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use windlass_integration::setup;

/// A bundle with a root of busybox, in a directory of its own.
struct Bundle {
    directory: tempfile::TempDir,
    id: String,
}

impl Bundle {
    /// Made by `runc spec` with these flags.
    fn new(name: &str, flags: &[&str]) -> Bundle {
        let directory = tempfile::tempdir().expect("a directory");
        let bin = directory.path().join("rootfs/bin");
        fs::create_dir_all(&bin).expect("root");
        fs::copy("/bin/busybox", bin.join("busybox")).expect("Debian's package busybox-static");
        for applet in ["sh", "id", "cat", "tty", "hostname", "touch", "stty"] {
            symlink("busybox", bin.join(applet)).expect("link");
        }
        let made = Command::new("runc").arg("spec").args(flags).current_dir(directory.path()).status();
        assert!(made.expect("Debian's package runc").success());
        Bundle { directory, id: format!("windlass-runc-{name}-{}", std::process::id()) }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(setup::programs().expect("programs").join("windlass-oci"));
        command.arg("--root").arg(self.directory.path().join("state")).args(words);
        command
    }

    /// Runs it in the foreground with `typed` on its terminal.
    fn run(&self, typed: &str) -> Output {
        let bundle = self.directory.path().to_string_lossy().into_owned();
        let mut child = self
            .command(&["run", "--bundle", &bundle, &self.id])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("windlass-oci");
        child.stdin.take().expect("input").write_all(typed.as_bytes()).expect("typed");
        child.wait_with_output().expect("its end")
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.command(&["delete", "--force", &self.id]).output();
        let left: Vec<PathBuf> = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
            .map(|root| Path::new(root).join("windlass-oci").join(&self.id))
            .into_iter()
            .filter(|path| path.exists())
            .collect();
        if !std::thread::panicking() {
            assert!(left.is_empty(), "its cgroup is left: {left:?}");
            let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
            assert!(!mounts.contains(&*self.directory.path().to_string_lossy()), "a mount is left");
        }
    }
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_bundle_of_runc_runs_with_its_terminal() {
    let bundle = Bundle::new("spec", &[]);
    let output = bundle.run("tty; hostname; cat /proc/self/status | busybox grep CapEff; touch /x; exit 3\n");
    let text = printed(&output);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    // kill, net_bind_service and audit_write; a root that is read-only.
    for expected in ["/dev/pts/0", "\nrunc\r\n", "CapEff:\t0000000020000420", "Read-only file system"] {
        assert!(text.contains(expected), "{expected:?} is missing in {text}");
    }
}

#[test]
fn a_rootless_bundle_of_runc_runs_in_its_user_namespace() {
    let bundle = Bundle::new("rootless", &["--rootless"]);
    let output = bundle.run("id; cat /proc/self/uid_map; exit 4\n");
    let text = printed(&output);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(text.contains("uid=0") && text.split_whitespace().collect::<Vec<_>>().ends_with(&["0", "0", "1"]), "{text}");
}
