//! Pods with users of their own, and how pods and containers end.

use crate::{FOREVER, eventually, pod, workload};
use anyhow::{Result, ensure};
use serde_json::json;
use std::time::{Duration, Instant};
use windlass_integration::{cluster::Kubectl, setup};

pub(crate) fn users_of_a_pod_are_not_the_host_s(kubectl: &Kubectl) -> Result<()> {
    kubectl.run(&["create", "secret", "generic", "hidden", "--from-literal=word=anchor"])?;
    let mut wanted = pod("users", FOREVER);
    wanted["spec"]["hostUsers"] = json!(false);
    wanted["spec"]["volumes"] = json!([{ "name": "hidden", "secret": { "secretName": "hidden", "defaultMode": 0o400 } }, { "name": "empty", "emptyDir": {} }]);
    wanted["spec"]["containers"][0]["volumeMounts"] =
        json!([{ "name": "hidden", "mountPath": "/hidden" }, { "name": "empty", "mountPath": "/empty" }]);
    kubectl.create(&wanted)?;
    let mut other = wanted.clone();
    other["metadata"]["name"] = json!("others");
    kubectl.create(&other)?;
    let mut first = Vec::new();
    for name in ["users", "others"] {
        kubectl.ready(name)?;
        let shell = |script: &str| kubectl.run(&["exec", name, "--", "sh", "-c", script]);
        let map = shell("cat /proc/self/uid_map")?;
        let numbers: Vec<u64> = map.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        ensure!(matches!(numbers[..], [0, host, 65536] if host >= 65536), "{name}: {map:?}");
        first.push(numbers[1]);
        let seen = shell("id -u; cat /hidden/word; touch /empty/file; stat -c ' %u:%g' /empty/file /hidden/..data/word /bin/sh")?;
        ensure!(seen == "0\nanchor 0:0\n 0:0\n 0:0\n", "{name}: {seen:?}");
    }
    ensure!(first[0] != first[1], "both pods have the users from {}", first[0]);
    Ok(())
}

/// By the classes that `manifests` has. No handler but the native one is configured here.
pub(crate) fn a_runtime_class_chooses_the_handler(kubectl: &Kubectl) -> Result<()> {
    let classes = setup::workspace().join("manifests/runtimeclass.yaml");
    kubectl.run(&["apply", "--validate=strict", "-f", &classes.to_string_lossy()])?;
    for name in ["windlass", "runc"] {
        let mut wanted = pod(name, FOREVER);
        wanted["spec"]["runtimeClassName"] = json!(name);
        kubectl.create(&wanted)?;
    }
    kubectl.ready("windlass")?;
    eventually("the class without a handler is refused", || {
        let told =
            kubectl.run(&["get", "events", "--field-selector=involvedObject.name=runc", "-o", "jsonpath={.items[*].message}"])?;
        ensure!(told.contains("runtime_handler \"runc\" is not configured"), "{told}");
        Ok(())
    })?;
    kubectl.run(&["delete", "pod", "runc", "--now"]).map(drop)
}

pub(crate) fn a_pod_that_is_deleted_has_its_grace(kubectl: &Kubectl) -> Result<()> {
    // It ends by itself, but for the signal never.
    let mut patient = pod("patient", "trap 'sleep 2; exit 0' TERM; while :; do sleep 0.1; done");
    patient["spec"]["terminationGracePeriodSeconds"] = json!(30);
    patient["spec"]["containers"][0]["lifecycle"] = json!({ "preStop": { "exec": { "command": ["sh", "-c", "sleep 1"] } } });
    let mut deaf = pod("deaf", "trap '' TERM; while :; do sleep 0.1; done");
    deaf["spec"]["terminationGracePeriodSeconds"] = json!(2);
    for wanted in [&patient, &deaf] {
        kubectl.create(wanted)?;
    }
    for (name, least, most) in [("patient", 3, 55), ("deaf", 2, 55)] {
        kubectl.ready(name)?;
        let begun = Instant::now();
        kubectl.run(&["delete", "pod", name, "--timeout=60s"])?;
        let took = begun.elapsed();
        ensure!(took >= Duration::from_secs(least) && took < Duration::from_secs(most), "{name} took {took:?}");
    }
    Ok(())
}

/// As `kubectl drain` does; a budget may forbid it.
pub(crate) fn a_pod_is_evicted_when_its_budget_allows(kubectl: &Kubectl) -> Result<()> {
    let mut web = workload("Deployment", "web", FOREVER);
    let begun = json!({ "exec": { "command": ["sh", "-c", "echo begun > /tmp/hook"] } });
    web["spec"]["template"]["spec"]["containers"][0]["lifecycle"] = json!({ "postStart": begun });
    kubectl.create(&web)?;
    kubectl.run(&["create", "poddisruptionbudget", "all", "--selector=app=web", "--min-available=1"])?;
    kubectl.rolled_out("deployment/web")?;
    kubectl.wait("poddisruptionbudget/all", "jsonpath={.status.currentHealthy}=1")?;
    let first = kubectl.list(&["pods"])?[0]["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let hook = kubectl.run(&["exec", &first, "--", "cat", "/tmp/hook"])?;
    ensure!(hook == "begun\n", "the hook after the start: {hook:?}");
    let path = format!("/api/v1/namespaces/{}/pods/{first}/eviction", kubectl.namespace());
    let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": first } });
    let evict = || kubectl.outcome(&["create", "--raw", &path, "-f", "-"], eviction.to_string().as_bytes());
    let refused = evict()?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains("disruption budget"), "{said}");
    kubectl.run(&["scale", "deployment/web", "--replicas=2"])?;
    kubectl.wait("poddisruptionbudget/all", "jsonpath={.status.disruptionsAllowed}=1")?;
    let taken = evict()?;
    ensure!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
    kubectl.wait(&format!("pod/{first}"), "delete")?;
    kubectl.rolled_out("deployment/web")
}

pub(crate) fn a_container_that_ends_is_started_again(kubectl: &Kubectl) -> Result<()> {
    let script = format!(
        "echo start; test -e /work/again && {{ {FOREVER}; }}; touch /work/again; echo why > /dev/termination-log; exit 3"
    );
    let mut wanted = pod("again", &script);
    wanted["spec"]["volumes"] = json!([{ "name": "work", "emptyDir": {} }]);
    wanted["spec"]["containers"][0]["volumeMounts"] = json!([{ "name": "work", "mountPath": "/work" }]);
    kubectl.create(&wanted)?;
    eventually("it was started again", || {
        let status = kubectl.get("pod/again")?["status"]["containerStatuses"][0].clone();
        let last = &status["lastState"]["terminated"];
        ensure!(status["restartCount"] == 1 && status["ready"] == true, "{status}");
        ensure!(last["exitCode"] == 3 && last["message"] == "why\n", "{last}");
        Ok(())
    })?;
    let previous = kubectl.run(&["logs", "again", "--previous"])?;
    ensure!(previous == "start\n", "the log of the one before: {previous:?}");
    Ok(())
}
