//! exec, cp, attach, logs and debug of kubectl, over WebSocket and, where kubectl still has it, over SPDY.

use crate::{FOREVER, eventually, pod};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::fs;
use windlass_integration::{
    cluster::Kubectl,
    image::{BUSYBOX, noise},
};

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
    let words = kubectl.command(&["exec", "-it", "shell", "--", "sh", "-c", size]);
    let line = std::iter::once(words.get_program()).chain(words.get_args()).map(|word| format!("'{}'", word.to_string_lossy()));
    let line = format!("stty rows 33 cols 99; {}", line.collect::<Vec<_>>().join(" "));
    let output =
        std::process::Command::new("script").args(["-qec", &line, "/dev/null"]).output().context("run script (bsdutils)")?;
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
    let run = kubectl.run(&["exec", "patient", "--container=doctor", "--", "pidof", "sleep"])?;
    ensure!(!run.trim().is_empty(), "no process of the target is seen");
    let pod = kubectl.get("pod/patient")?;
    ensure!(pod["status"]["containerStatuses"][0]["restartCount"] == 0, "the patient was started again");
    ensure!(pod["status"]["ephemeralContainerStatuses"][0]["state"].get("running").is_some(), "{}", pod["status"]);
    Ok(())
}
