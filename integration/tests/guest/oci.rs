//! `windlass-oci` where every controller is there: limits of a bundle, and other ones by `update`.

use crate::{TREE, expect, in_guest};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};
use windlass_integration::setup;

const ID: &str = "windlass-update";

/// A bundle and its container. Dropping it deletes the container.
struct Made(tempfile::TempDir);

impl Made {
    /// A bundle that runs busybox with these words.
    fn make(words: &[&str], change: impl FnOnce(&Path, &mut serde_json::Value)) -> Result<Made> {
        let directory = tempfile::tempdir()?;
        fs::create_dir_all(directory.path().join("rootfs/bin"))?;
        fs::copy("/bin/busybox", directory.path().join("rootfs/bin/busybox")).context("copy busybox")?;
        let words: Vec<&str> = ["/bin/busybox"].iter().chain(words).copied().collect();
        let mut config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "args": words, "cwd": "/"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"cgroupsPath": format!("/{ID}"), "namespaces": [{"type": "mount"}, {"type": "pid"}]},
        });
        change(directory.path(), &mut config);
        fs::write(directory.path().join("config.json"), config.to_string())?;
        Ok(Made(directory))
    }

    /// Runs one that sleeps.
    fn start(resources: &serde_json::Value) -> Result<Made> {
        let made = Self::make(&["sleep", "1000"], |_, config| config["linux"]["resources"] = resources.clone())?;
        made.done(&["create", "--bundle", &made.path(), ID], "")?;
        made.done(&["start", ID], "")?;
        Ok(made)
    }

    fn path(&self) -> String {
        self.0.path().to_string_lossy().into_owned()
    }

    fn call(&self, words: &[&str], input: &str) -> Result<Output> {
        let mut command = Command::new(setup::programs()?.join("windlass-oci"));
        command.arg("--root").arg(self.0.path().join("state")).args(words).stdin(Stdio::piped());
        if words.first() == Some(&"create") {
            // The container keeps the streams.
            let status = command.stdout(Stdio::null()).stderr(Stdio::inherit()).status()?;
            return Ok(Output { status, stdout: Vec::new(), stderr: Vec::new() });
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("input")?.write_all(input.as_bytes())?;
        Ok(child.wait_with_output()?)
    }

    fn done(&self, words: &[&str], input: &str) -> Result<()> {
        let output = self.call(words, input)?;
        ensure!(output.status.success(), "{words:?}: {output:?}");
        Ok(())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let _ = self.call(&["delete", "--force", ID], "");
    }
}

#[test]
fn an_update_changes_limits_or_none() -> Result<()> {
    in_guest("an_update_changes_limits_or_none", |_| {
        let made = Made::start(&json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 50}, "cpu": {"shares": 512}}))?;
        let leaf: PathBuf = Path::new(TREE).join(ID);
        expect(&leaf, "memory.max", "67108864")?;
        expect(&leaf, "pids.max", "50")?;
        let flags = ["--memory", "33554432", "--memory-swap", "67108864", "--pids-limit", "20", "--cpu-quota", "20000"];
        let more = ["--cpu-period", "50000", "--cpu-share", "1024", "--memory-reservation", "1048576", "--cpuset-cpus", "0", ID];
        made.done(&[&["update"], &flags[..], &more[..]].concat(), "")?;
        for (file, value) in [
            ("memory.max", "33554432"),
            ("memory.swap.max", "33554432"),
            ("memory.low", "1048576"),
            ("pids.max", "20"),
            ("cpu.max", "20000 50000"),
            ("cpu.weight", "100"),
            ("cpuset.cpus", "0"),
        ] {
            expect(&leaf, file, value)?;
        }
        // As managers give them, with what is not to change left out.
        made.done(&["update", "--resources", "-", ID], r#"{"pids": {"limit": -1}, "unified": {"memory.high": "16777216"}}"#)?;
        expect(&leaf, "pids.max", "max")?;
        expect(&leaf, "memory.high", "16777216")?;
        expect(&leaf, "memory.max", "33554432")?;
        // One that is refused leaves the others as they were.
        let output = made.call(&["update", "--pids-limit", "7", "--cpu-quota", "5", ID], "")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains("cpu.max"), "{output:?}");
        expect(&leaf, "pids.max", "max")?;
        let output = made.call(&["update", "--resources", "-", ID], r#"{"memory": {"swappiness": 5}}"#)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains("swappiness"), "{output:?}");
        drop(made);
        ensure!(!leaf.exists(), "its cgroup is left");
        Ok(())
    })
}

#[test]
fn a_hook_of_the_host_is_not_confined_as_the_program_is() -> Result<()> {
    in_guest("a_hook_of_the_host_is_not_confined_as_the_program_is", |_| {
        let made = Made::make(&["cat", "/proc/self/attr/current"], |directory, config| {
            let script = format!("cat /proc/self/attr/current > {}/hook", directory.display());
            config["process"]["apparmorProfile"] = json!("windlass-default");
            config["hooks"] = json!({"createContainer": [{"path": "/bin/busybox", "args": ["sh", "-c", script]}]});
        })?;
        let output = made.call(&["run", "--bundle", &made.path(), ID], "")?;
        ensure!(output.status.success(), "{output:?}");
        let program = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(program.trim_end_matches(['\n', '\0']) == "windlass-default (enforce)", "the program is {program:?}");
        let hook = fs::read_to_string(made.0.path().join("hook"))?;
        ensure!(hook.trim_end_matches(['\n', '\0']) == "unconfined", "the hook is {hook:?}");
        Ok(())
    })
}
