//! How containers end, and what kubelet learns of it.

use crate::{restarts, under_kubelet, with};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{fs, time::Instant};
use windlass_integration::kubelet::{container_status, pod};

fn ended(pod: &Value) -> Value {
    container_status(pod, "main").map(|status| status["state"]["terminated"].clone()).unwrap_or_default()
}

pub(crate) fn what_a_container_leaves_is_its_termination_message() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        let never = |pod| with(pod, "/spec/restartPolicy", json!("Never"));
        let file = never(pod("file", "echo from the file > /dev/termination-log; exit 3"));
        let log = never(pod("log", "echo from the log; exit 4"));
        let log = with(log, "/spec/containers/0/terminationMessagePolicy", json!("FallbackToLogsOnError"));
        let well = never(pod("well", "exit 0"));
        let absent = with(never(pod("absent", "")), "/spec/containers/0/command", json!(["/no/such/program"]));
        for pod in [&file, &log, &well, &absent] {
            bench.kubelet.place(pod)?;
        }
        for (name, code, reason, message) in
            [("file", 3, "Error", "from the file\n"), ("log", 4, "Error", "from the log\n"), ("well", 0, "Completed", "")]
        {
            let pod = bench.kubelet.wait(name, "ended", |pod| ended(pod).is_object())?;
            let end = ended(&pod);
            ensure!(end["exitCode"] == code && end["reason"] == reason, "{name}: {end}");
            ensure!(end["message"].as_str().unwrap_or_default() == message, "{name}: {end}");
            let phase = if code == 0 { "Succeeded" } else { "Failed" };
            bench.kubelet.wait(name, phase, |pod| pod["status"]["phase"] == phase)?;
        }
        let absent = ended(&bench.kubelet.wait("absent", "ended", |pod| ended(pod).is_object())?);
        ensure!(absent["reason"] == "StartError" && absent["exitCode"] == 128, "absent: {absent}");
        ensure!(absent["message"].as_str().is_some_and(|text| text.contains("/no/such/program")), "absent: {absent}");
        bench.withdraw(&["file", "log", "well", "absent"])
    })
}

pub(crate) fn a_container_that_fails_again_and_again_is_held_back() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        bench.kubelet.place(&pod("fails", "exit 1"))?;
        let waits = |pod: &Value| {
            container_status(pod, "main").is_some_and(|status| status["state"]["waiting"]["reason"] == "CrashLoopBackOff")
        };
        let pod = bench.kubelet.wait("fails", "held back", waits)?;
        ensure!(restarts(&pod, "main") >= 1, "held back before its first restart");
        bench.withdraw(&["fails"])
    })
}

pub(crate) fn a_pod_has_its_hook_and_its_time_to_end() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        let directory = bench.daemon.path("told");
        fs::create_dir(&directory)?;
        let host = json!([{ "name": "told", "hostPath": { "path": directory, "type": "Directory" } }]);
        let mount = json!([{ "name": "told", "mountPath": "/told" }]);
        let make = |name: &str, script: &str, hook: &str, grace: u64| {
            let pod = with(pod(name, script), "/spec/volumes", host.clone());
            let pod = with(pod, "/spec/containers/0/volumeMounts", mount.clone());
            let pod = with(pod, "/spec/terminationGracePeriodSeconds", json!(grace));
            let lifecycle = json!({ "preStop": { "exec": { "command": ["sh", "-c", hook] } } });
            with(pod, "/spec/containers/0/lifecycle", lifecycle)
        };
        let polite = "trap 'echo term >> /told/polite; exit 0' TERM; while :; do sleep 0.1; done";
        const GRACE_SECONDS: u64 = 40;
        bench.kubelet.place(&make("polite", polite, "echo hook >> /told/polite", GRACE_SECONDS))?;
        bench.kubelet.place(&make("deaf", "trap '' TERM; while :; do sleep 0.1; done", "echo hook >> /told/deaf", 3))?;
        bench.kubelet.ready("polite")?;
        bench.kubelet.ready("deaf")?;
        let begin = Instant::now();
        bench.withdraw(&["polite"])?;
        ensure!(begin.elapsed().as_secs() < GRACE_SECONDS, "a polite container took {:?}", begin.elapsed());
        bench.withdraw(&["deaf"])?;
        let told = |name: &str| fs::read_to_string(directory.join(name)).with_context(|| format!("what {name} told"));
        ensure!(told("polite")? == "hook\nterm\n", "polite: {:?}", told("polite"));
        ensure!(told("deaf")? == "hook\n", "deaf: {:?}", told("deaf"));
        Ok(())
    })
}
