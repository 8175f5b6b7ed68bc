//! What controllers make of pods.

use crate::{FOREVER, eventually, pod, workload};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use windlass_integration::{
    cluster::{Kubectl, NODE},
    kubelet::{container, container_status, is_ready},
};

fn version_of_each(kubectl: &Kubectl) -> Result<Vec<String>> {
    let pods = kubectl.list(&["pods", "--selector=app=web"])?;
    let alive = pods.iter().filter(|pod| pod["metadata"].get("deletionTimestamp").is_none());
    alive
        .filter_map(|pod| pod["metadata"]["name"].as_str())
        .map(|name| kubectl.run(&["exec", name, "--", "sh", "-c", "echo $VERSION"]).map(|text| text.trim().to_owned()))
        .collect()
}

pub(crate) fn a_deployment_runs_and_rolls_out(kubectl: &Kubectl) -> Result<()> {
    let mut web = workload("Deployment", "web", FOREVER);
    web["spec"]["replicas"] = json!(2);
    web["spec"]["template"]["spec"]["containers"][0]["env"] = json!([{ "name": "VERSION", "value": "one" }]);
    kubectl.create(&web)?;
    kubectl.rolled_out("deployment/web")?;
    ensure!(version_of_each(kubectl)? == ["one", "one"], "{:?}", version_of_each(kubectl)?);
    kubectl.run(&["set", "env", "deployment/web", "VERSION=two"])?;
    kubectl.rolled_out("deployment/web")?;
    ensure!(version_of_each(kubectl)? == ["two", "two"], "{:?}", version_of_each(kubectl)?);
    kubectl.run(&["rollout", "undo", "deployment/web"])?;
    kubectl.run(&["scale", "deployment/web", "--replicas=3"])?;
    kubectl.rolled_out("deployment/web")?;
    ensure!(version_of_each(kubectl)? == ["one", "one", "one"], "{:?}", version_of_each(kubectl)?);
    Ok(())
}

pub(crate) fn a_daemon_set_has_a_pod_on_the_node(kubectl: &Kubectl) -> Result<()> {
    let mut set = workload("DaemonSet", "agent", FOREVER);
    set["spec"]["template"]["spec"]["hostNetwork"] = json!(true);
    kubectl.create(&set)?;
    kubectl.rolled_out("daemonset/agent")?;
    let pods = kubectl.list(&["pods", "--selector=app=agent"])?;
    let addresses: Vec<&Value> = pods.iter().map(|pod| &pod["status"]["podIP"]).collect();
    ensure!(addresses == [&json!(windlass_integration::cluster::ADDRESS)], "addresses: {addresses:?}");
    Ok(())
}

/// A sidecar that never ends by itself may not keep the job from its end; a pod that fails is made again.
pub(crate) fn a_job_runs_to_completion_with_its_sidecar(kubectl: &Kubectl) -> Result<()> {
    let mut sidecar = container("side", FOREVER);
    sidecar["restartPolicy"] = json!("Always");
    let spec = json!({ "restartPolicy": "Never", "initContainers": [sidecar], "containers": [container("main", "echo done $JOB_COMPLETION_INDEX")] });
    let job = |name: &str, more: Value, pod: &Value| {
        let mut job = json!({ "apiVersion": "batch/v1", "kind": "Job", "metadata": { "name": name }, "spec": { "template": { "spec": pod } } });
        for (key, value) in more.as_object().into_iter().flatten() {
            job["spec"][key] = value.clone();
        }
        job
    };
    kubectl.create(&job("count", json!({ "completions": 3, "parallelism": 2, "completionMode": "Indexed" }), &spec))?;
    let failing = json!({ "restartPolicy": "Never", "containers": [container("main", "exit 7")] });
    kubectl.create(&job("fails", json!({ "backoffLimit": 0 }), &failing))?;
    kubectl.wait("job/count", "condition=Complete")?;
    let log = kubectl.run(&["logs", "--selector=job-name=count", "--container=main"])?;
    let mut lines: Vec<&str> = log.lines().collect();
    lines.sort_unstable();
    ensure!(lines == ["done 0", "done 1", "done 2"], "logs: {lines:?}");
    kubectl.wait("job/fails", "condition=Failed")?;
    let pods = kubectl.list(&["pods", "--selector=job-name=fails"])?;
    let code = pods
        .first()
        .and_then(|pod| container_status(pod, "main"))
        .map(|status| status["state"]["terminated"]["exitCode"].clone());
    ensure!(code == Some(json!(7)), "exit code: {code:?}");
    Ok(())
}

pub(crate) fn a_cron_job_starts_a_job_each_minute(kubectl: &Kubectl) -> Result<()> {
    let template = json!({ "restartPolicy": "Never", "containers": [container("main", "echo tick")] });
    kubectl.create(&json!({
        "apiVersion": "batch/v1", "kind": "CronJob", "metadata": { "name": "clock" },
        "spec": { "schedule": "* * * * *", "jobTemplate": { "spec": { "template": { "spec": template } } } },
    }))?;
    let job = eventually("a job is there", || {
        let jobs = kubectl.list(&["jobs"])?;
        let job = jobs.iter().find(|job| job["metadata"]["ownerReferences"][0]["name"] == "clock").context("none")?;
        Ok(format!("job/{}", job["metadata"]["name"].as_str().unwrap_or_default()))
    })?;
    kubectl.wait(&job, "condition=Complete")?;
    let log = kubectl.run(&["logs", &job])?;
    ensure!(log == "tick\n", "log: {log:?}");
    // Cases that look at all pods want no new ones.
    kubectl.run(&["delete", "cronjob/clock"]).map(drop)
}

/// Each of its pods has its own volume, of the node, whichever pod of that name comes.
pub(crate) fn a_stateful_set_keeps_its_claims(kubectl: &Kubectl) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    for number in 0..2 {
        let path = scratch.path().join(number.to_string());
        std::fs::create_dir(&path)?;
        let here = json!([{ "matchExpressions": [{ "key": "kubernetes.io/hostname", "operator": "In", "values": [NODE] }] }]);
        kubectl.create(&json!({
            "apiVersion": "v1", "kind": "PersistentVolume", "metadata": { "name": format!("local-{number}") },
            "spec": {
                "capacity": { "storage": "1Gi" }, "accessModes": ["ReadWriteOnce"], "storageClassName": "local",
                "local": { "path": path }, "nodeAffinity": { "required": { "nodeSelectorTerms": here } },
            },
        }))?;
    }
    kubectl.create(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "db" },
        "spec": { "clusterIP": "None", "selector": { "app": "db" }, "ports": [{ "port": 80 }] },
    }))?;
    let mut db = workload("StatefulSet", "db", &format!("echo $HOSTNAME >> /data/starts; {FOREVER}"));
    db["spec"]["replicas"] = json!(2);
    db["spec"]["serviceName"] = json!("db");
    db["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] = json!([{ "name": "data", "mountPath": "/data" }]);
    db["spec"]["volumeClaimTemplates"] = json!([{
        "metadata": { "name": "data" },
        "spec": { "accessModes": ["ReadWriteOnce"], "storageClassName": "local", "resources": { "requests": { "storage": "1Gi" } } },
    }]);
    kubectl.create(&db)?;
    kubectl.rolled_out("statefulset/db")?;
    let before = kubectl.get("pod/db-1")?["metadata"]["uid"].clone();
    kubectl.run(&["delete", "pod", "db-1"])?;
    eventually("another pod of the name is ready", || {
        let pod = kubectl.get("pod/db-1")?;
        ensure!(pod["metadata"]["uid"] != before && is_ready(&pod), "{}", pod["status"]);
        Ok(())
    })?;
    for (name, starts) in [("db-0", "db-0\n"), ("db-1", "db-1\ndb-1\n")] {
        let seen = kubectl.run(&["exec", name, "--", "cat", "/data/starts"])?;
        ensure!(seen == starts, "{name} has {seen:?}");
        crate::dns::said(kubectl, "db-0", &["resolve", &format!("{name}.db")])?;
    }
    // The volumes are this test's own.
    kubectl.run(&["delete", "statefulset/db"])?;
    kubectl.run(&["wait", "pods", "--selector=app=db", "--for=delete", "--timeout=90s"])?;
    kubectl.run(&["delete", "persistentvolumeclaims", "--all"])?;
    kubectl.run(&["delete", "persistentvolume", "local-0", "local-1"]).map(drop)
}

pub(crate) fn init_containers_and_sidecars_come_in_order(kubectl: &Kubectl) -> Result<()> {
    let mut sidecar = container("side", &format!("echo side >> /work/order; {FOREVER}"));
    sidecar["restartPolicy"] = json!("Always");
    sidecar["startupProbe"] = json!({ "exec": { "command": ["test", "-s", "/work/order"] }, "periodSeconds": 1 });
    let mut parts = [container("first", "echo first >> /work/order"), sidecar, container("second", "echo second >> /work/order")];
    let mut wanted = pod("ordered", &format!("cat /work/order; {FOREVER}"));
    for part in parts.iter_mut().chain([&mut wanted["spec"]["containers"][0]]) {
        part["volumeMounts"] = json!([{ "name": "work", "mountPath": "/work" }]);
    }
    wanted["spec"]["volumes"] = json!([{ "name": "work", "emptyDir": {} }]);
    wanted["spec"]["initContainers"] = json!(parts);
    kubectl.create(&wanted)?;
    kubectl.ready("ordered")?;
    let log = crate::eventually("the log", || {
        let log = kubectl.run(&["logs", "ordered", "--container=main"])?;
        ensure!(log.lines().count() == 3, "log: {log:?}");
        Ok(log)
    })?;
    ensure!(log == "first\nside\nsecond\n", "log: {log:?}");
    Ok(())
}
