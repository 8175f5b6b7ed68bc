//! exec, cp, attach, logs and debug of kubectl, over WebSocket and, where kubectl still has it, over SPDY.

use crate::{FOREVER, eventually, pod};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
};
use windlass_integration::{
    cluster::{Kubectl, NODE},
    image::{BUSYBOX, noise},
};

/// A command with a terminal of its own, after what another one does to it.
fn on_a_terminal(first: &str, command: &Command) -> Command {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line: Vec<String> = words.map(|word| format!("'{}'", word.to_string_lossy())).collect();
    let mut script = Command::new("script");
    script.args(["-qec", &format!("{first}; {}", line.join(" ")), "/dev/null"]).stdin(Stdio::null());
    script
}

pub(crate) fn a_command_has_its_input_its_outputs_and_its_code(kubectl: &Kubectl) -> Result<()> {
    kubectl.create(&pod("shell", FOREVER))?;
    kubectl.ready("shell")?;
    let run = kubectl.outcome(&["exec", "shell", "--", "sh", "-c", "echo out; echo err >&2; exit 7"], b"")?;
    ensure!(run.status.code() == Some(7), "code: {:?}", run.status);
    ensure!(run.stdout == b"out\n", "output: {:?}", String::from_utf8_lossy(&run.stdout));
    ensure!(run.stderr.starts_with(b"err\n"), "errors: {:?}", String::from_utf8_lossy(&run.stderr));
    let blob = noise(7, 3_000_000);
    let run = kubectl.outcome(&["exec", "-i", "shell", "--", "cat"], &blob)?;
    ensure!(run.stdout == blob, "{} bytes of {} came back", run.stdout.len(), blob.len());
    let absent = kubectl.outcome(&["exec", "shell", "--", "/absent"], b"")?;
    let said = String::from_utf8_lossy(&absent.stderr).into_owned();
    ensure!(!absent.status.success() && said.contains("/absent"), "a command that is not there: {said}");
    // A terminal on both sides; its size comes a moment after the command's start.
    let size = "for i in $(seq 50); do size=$(stty size 2>/dev/null); test -n \"$size\" && break; sleep 0.1; done; echo $size; tty; exit 5";
    let mut command = on_a_terminal("stty rows 33 cols 99", &kubectl.command(&["exec", "-it", "shell", "--", "sh", "-c", size]));
    let output = command.output().context("run script (bsdutils)")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(said.contains("33 99") && said.contains("/dev/pts/0"), "the terminal said {said:?}");
    ensure!(output.status.code() == Some(5), "code: {:?}, {said:?}", output.status);
    Ok(())
}

pub(crate) fn files_are_copied_both_ways(kubectl: &Kubectl) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let at = |name: &str| scratch.path().join(name).to_string_lossy().into_owned();
    fs::create_dir_all(at("tree/sub"))?;
    fs::write(at("tree/blob"), noise(11, 2_000_000))?;
    fs::write(at("tree/sub/text"), "text\n")?;
    kubectl.create(&pod("box", FOREVER))?;
    kubectl.ready("box")?;
    kubectl.run(&["cp", &at("tree"), "box:/tmp/there"])?;
    let seen = kubectl.run(&["exec", "box", "--", "cat", "/tmp/there/sub/text"])?;
    ensure!(seen == "text\n", "in the pod: {seen:?}");
    kubectl.run(&["cp", "box:/tmp/there", &at("back")])?;
    ensure!(fs::read(at("back/blob"))? == fs::read(at("tree/blob"))?, "another file came back");
    ensure!(fs::read(at("back/sub/text"))? == b"text\n", "another text came back");
    Ok(())
}

pub(crate) fn an_attached_client_speaks_with_the_program(kubectl: &Kubectl) -> Result<()> {
    let mut wanted = pod("echo", "while read line; do echo \"said $line\"; done; echo over");
    wanted["spec"]["restartPolicy"] = json!("Never");
    wanted["spec"]["containers"][0]["stdin"] = json!(true);
    wanted["spec"]["containers"][0]["stdinOnce"] = json!(true);
    kubectl.create(&wanted)?;
    kubectl.ready("echo")?;
    let said = kubectl.feed(&["attach", "-i", "echo"], b"one\ntwo\n")?;
    ensure!(said.contains("said one\nsaid two\n"), "attached: {said:?}");
    // Its input has ended with the client.
    kubectl.wait("pod/echo", "jsonpath={.status.phase}=Succeeded")?;
    let log = kubectl.run(&["logs", "echo"])?;
    ensure!(log == "said one\nsaid two\nover\n", "log: {log:?}");
    Ok(())
}

pub(crate) fn an_attached_client_has_the_program_s_terminal(kubectl: &Kubectl) -> Result<()> {
    for name in ["with", "without"] {
        let mut wanted = pod(name, "while read line; do echo \"said $line on $(tty)\"; done; stty size; exit 4");
        wanted["spec"]["restartPolicy"] = json!("Never");
        for field in ["stdin", "tty"] {
            wanted["spec"]["containers"][0][field] = json!(true);
        }
        kubectl.create(&wanted)?;
    }
    // A client with a terminal of this size; and one that has none and asks for none: what the program writes comes all the same.
    let with = on_a_terminal("stty rows 31 cols 97", &kubectl.command(&["attach", "-it", "with"]));
    let without = kubectl.command(&["attach", "-i", "without"]);
    for (name, mut command, told) in [("with", with, "31 97"), ("without", without, "said")] {
        kubectl.ready(name)?;
        let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("run the client")?;
        let mut keys = client.stdin.take().context("an input")?;
        keys.write_all(b"one\r")?;
        eventually("the program answers", || {
            let log = kubectl.run(&["logs", name])?;
            ensure!(log.contains("said one on /dev/pts/0"), "log: {log:?}");
            Ok(())
        })?;
        // The key that ends the program's input.
        keys.write_all(b"\x04")?;
        let said = String::from_utf8_lossy(&client.wait_with_output()?.stdout).into_owned();
        drop(keys);
        ensure!(said.contains("said one on /dev/pts/0") && said.contains(told), "{name}: {said:?}");
    }
    for name in ["with", "without"] {
        kubectl.wait(&format!("pod/{name}"), "jsonpath={.status.containerStatuses[0].state.terminated.exitCode}=4")?;
    }
    Ok(())
}

pub(crate) fn a_log_is_followed_to_its_end(kubectl: &Kubectl) -> Result<()> {
    let script = "for i in 0 1 2 3 4 5 6 7 8 9; do echo tick $i; sleep 0.2; done; printf 'no newline'";
    let mut wanted = pod("ticks", script);
    wanted["spec"]["restartPolicy"] = json!("Never");
    kubectl.create(&wanted)?;
    eventually("the container has begun", || kubectl.run(&["logs", "ticks"]))?;
    let followed = kubectl.run(&["logs", "-f", "ticks"])?;
    let expected: String = (0..10).map(|i| format!("tick {i}\n")).collect();
    ensure!(followed.trim_end() == format!("{expected}no newline"), "followed: {followed:?}");
    let tail = kubectl.run(&["logs", "ticks", "--tail=2", "--timestamps"])?;
    ensure!(tail.lines().count() == 2 && tail.contains("Z tick 9"), "the last two: {tail:?}");
    let all = kubectl.run(&["logs", "ticks", "--timestamps", "--since=1h"])?;
    let sixth = all.lines().find(|line| line.ends_with("tick 6")).and_then(|line| line.split(' ').next()).context("a line")?;
    let late = kubectl.run(&["logs", "ticks", &format!("--since-time={sixth}")])?;
    // kubectl asks for whole seconds.
    ensure!(late.ends_with("tick 6\ntick 7\ntick 8\ntick 9\nno newline") && !late.contains("tick 0"), "since {sixth}: {late:?}");
    let recent = kubectl.run(&["logs", "ticks", "--since=1s"])?;
    ensure!(!recent.contains("tick 0"), "of the last second: {recent:?}");
    let short = kubectl.run(&["logs", "ticks", "--limit-bytes=9"])?;
    ensure!(short == "tick 0\nti", "of nine bytes: {short:?}");
    Ok(())
}

pub(crate) fn an_ephemeral_container_sees_its_target(kubectl: &Kubectl) -> Result<()> {
    kubectl.create(&pod("patient", &format!("echo secret > /tmp/mark; {FOREVER}")))?;
    kubectl.ready("patient")?;
    let look = format!("cat /proc/1/root/tmp/mark; {FOREVER}");
    let image = format!("--image={BUSYBOX}");
    let words = [
        "debug",
        "patient",
        &image,
        "--image-pull-policy=Never",
        "--target=main",
        "--container=doctor",
        "--profile=sysadmin",
        "--",
    ];
    kubectl.run(&[&words[..], &["sh", "-c", &look]].concat())?;
    eventually("the ephemeral container sees the file", || {
        let log = kubectl.run(&["logs", "patient", "--container=doctor"])?;
        ensure!(log == "secret\n", "log: {log:?}");
        Ok(())
    })?;
    // Its sleeps are short, and between two there is none.
    windlass_integration::wait::until("a process of the target", || {
        let run = kubectl.run(&["exec", "patient", "--container=doctor", "--", "sh", "-c", "pidof sleep || true"])?;
        Ok((!run.trim().is_empty()).then_some(()))
    })?;
    let pod = kubectl.get("pod/patient")?;
    ensure!(pod["status"]["containerStatuses"][0]["restartCount"] == 0, "the patient was started again");
    ensure!(pod["status"]["ephemeralContainerStatuses"][0]["state"].get("running").is_some(), "{}", pod["status"]);
    Ok(())
}

/// In a pod whose containers share their processes it needs no target; on a node it is a pod of the host's namespaces.
pub(crate) fn a_pod_and_a_node_are_looked_into(kubectl: &Kubectl) -> Result<()> {
    let mut wanted = pod("patient", FOREVER);
    wanted["spec"]["shareProcessNamespace"] = json!(true);
    kubectl.create(&wanted)?;
    kubectl.ready("patient")?;
    let debug = |of: &str, more: &[&str], script: &str| {
        let image = format!("--image={BUSYBOX}");
        kubectl.run(&[&["debug", of, &image, "--image-pull-policy=Never"], more, &["--", "sh", "-c", script]].concat())
    };
    debug("patient", &["--container=doctor"], &format!("cat /proc/[0-9]*/cmdline | tr '\\0' '\\n'; {FOREVER}"))?;
    eventually("the ephemeral container sees the pod's processes", || {
        let log = kubectl.run(&["logs", "patient", "--container=doctor"])?;
        ensure!(log.lines().any(|line| line == FOREVER), "log: {log:?}");
        Ok(())
    })?;
    debug(
        &format!("node/{NODE}"),
        &["--profile=sysadmin"],
        "readlink /proc/self/ns/pid; readlink /proc/self/ns/net; cat /host/etc/debian_version",
    )?;
    let namespace = |name: &str| fs::read_link(format!("/proc/thread-self/ns/{name}"));
    let release = fs::read_to_string("/etc/debian_version")?;
    let namespaces = format!("{}\n{}\n{release}", namespace("pid")?.display(), namespace("net")?.display());
    eventually("the node's own processes are seen", || {
        let pods = kubectl.list(&["pods"])?;
        let mut names = pods.iter().filter_map(|pod| pod["metadata"]["name"].as_str());
        let name = names.find(|name| name.starts_with("node-debugger-")).context("no pod on the node")?;
        let log = kubectl.run(&["logs", name])?;
        ensure!(log == namespaces, "log: {log:?}, not {namespaces:?}");
        Ok(())
    })
}
