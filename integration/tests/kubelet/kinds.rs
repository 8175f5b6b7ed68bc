//! Pods of each class of service, with init containers and sidecars.

use crate::{sleeper, under_kubelet, with};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use windlass_integration::kubelet::{container, container_status, pod};

pub(crate) fn pods_of_every_class_run_under_a_kubelet() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        let limits = json!({ "cpu": "100m", "memory": "64Mi" });
        let burstable = with(sleeper("burstable"), "/spec/containers/0/resources", json!({ "requests": { "cpu": "50m" } }));
        let guaranteed =
            with(sleeper("guaranteed"), "/spec/containers/0/resources", json!({ "requests": limits, "limits": limits }));
        let hosts = with(sleeper("hosts"), "/spec/hostNetwork", json!(true));
        for pod in [&sleeper("besteffort"), &burstable, &guaranteed, &hosts] {
            bench.kubelet.place(pod)?;
        }
        for (name, class) in
            [("besteffort", "BestEffort"), ("burstable", "Burstable"), ("guaranteed", "Guaranteed"), ("hosts", "BestEffort")]
        {
            let pod = bench.kubelet.ready(name)?;
            ensure!(pod["status"]["qosClass"] == class, "{name} is {}", pod["status"]["qosClass"]);
            let status = container_status(&pod, "main").cloned().unwrap_or_default();
            let id = status["containerID"].as_str().unwrap_or_default();
            ensure!(id.starts_with("windlass://"), "{name}: container id {id:?}");
        }
        let address = |name: &str| -> Result<Value> { Ok(bench.kubelet.ready(name)?["status"]["podIP"].clone()) };
        ensure!(address("besteffort")? != address("burstable")?, "two pods have one address");
        bench.withdraw(&["besteffort", "burstable", "guaranteed", "hosts"])
    })
}

pub(crate) fn init_containers_come_one_by_one_and_sidecars_stay() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        let mut sidecar = container("side", "echo side >> /work/order; trap 'exit 0' TERM; while :; do sleep 0.1; done");
        sidecar["restartPolicy"] = json!("Always");
        // The next container waits for this.
        sidecar["startupProbe"] = json!({ "exec": { "command": ["grep", "side", "/work/order"] }, "periodSeconds": 1 });
        let mut first = container("first", "echo first >> /work/order");
        let mut second = container("second", "echo second >> /work/order");
        let mut pod = pod("ordered", "cat /work/order; trap 'exit 0' TERM; while :; do sleep 0.1; done");
        for part in [&mut sidecar, &mut first, &mut second, &mut pod["spec"]["containers"][0]] {
            part["volumeMounts"] = json!([{ "name": "work", "mountPath": "/work" }]);
        }
        pod["spec"]["volumes"] = json!([{ "name": "work", "emptyDir": {} }]);
        pod["spec"]["initContainers"] = json!([first, sidecar, second]);
        bench.kubelet.place(&pod)?;
        let pod = bench.kubelet.ready("ordered")?;
        let log = bench.eventually("the log", || {
            let log = bench.kubelet.container_log("ordered", "main")?;
            ensure!(log.lines().count() == 3, "log: {log:?}");
            Ok(log)
        })?;
        ensure!(log == "first\nside\nsecond\n", "log: {log:?}");
        let side = container_status(&pod, "side").cloned().unwrap_or_default();
        ensure!(side["state"].get("running").is_some(), "the sidecar: {}", side["state"]);
        let first = container_status(&pod, "first").cloned().unwrap_or_default();
        ensure!(first["state"]["terminated"]["reason"] == "Completed", "the first: {}", first["state"]);
        bench.withdraw(&["ordered"])
    })
}
