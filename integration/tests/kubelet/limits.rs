//! Kubelet with its cgroups for pods and kinds of pods.

use crate::{
    groups::{group_of, leaf_of, read},
    restarts, sleeper, under_kubelet, with,
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use windlass_integration::{
    kubelet::{NODE, container, container_status, pod},
    wait,
};

pub(crate) fn limits_hold_in_kubelets_own_groups() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        let limits = json!({ "cpu": "100m", "memory": "64Mi" });
        let requests = json!({ "cpu": "50m", "memory": "32Mi" });
        let guaranteed =
            with(sleeper("guaranteed"), "/spec/containers/0/resources", json!({ "requests": limits, "limits": limits }));
        // The probe's command has to live on the same tenth of a processor.
        let probe = json!({ "exec": { "command": ["true"] }, "periodSeconds": 1, "timeoutSeconds": 5 * wait::factor() });
        let guaranteed = with(guaranteed, "/spec/containers/0/readinessProbe", probe);
        let burstable = with(sleeper("burstable"), "/spec/containers/0/resources", json!({ "requests": requests }));
        // Kubelet wants all of a container to end with the process that is killed.
        let hungry = pod("hungry", "/probe hold-mem 96; exec sleep 100000");
        let hungry = with(hungry, "/spec/containers/0/resources", json!({ "limits": { "memory": "64Mi" } }));
        let hungry = with(hungry, "/spec/containers/1", container("beside", "exec sleep 100000"));
        let all =
            [("guaranteed", guaranteed), ("burstable", burstable), ("besteffort", sleeper("besteffort")), ("hungry", hungry)];
        for (_, pod) in &all {
            bench.kubelet.place(pod)?;
        }
        let ended = bench.kubelet.wait("hungry", "killed for its memory", |pod| {
            let status = container_status(pod, "main");
            status.is_some_and(|s| [&s["state"], &s["lastState"]].iter().any(|s| s["terminated"]["reason"] == "OOMKilled"))
        })?;
        let again = bench.kubelet.wait("hungry", "started again", |pod| restarts(pod, "main") > 0)?;
        ensure!(group_of(&ended)? == group_of(&again)?, "the pod's group has changed");
        let status = container_status(&again, "beside").cloned().unwrap_or_default();
        ensure!(status["restartCount"] == 0 && status["state"]["running"].is_object(), "the container beside: {status}");
        let oom = &container_status(&again, "main").context("a status")?["lastState"]["terminated"];
        ensure!(oom["exitCode"] == 137 && oom["reason"] == "OOMKilled", "{oom}");
        let pods = bench.client.list_pod_sandbox(Default::default())?.items;
        let pods = pods.iter().filter(|pod| pod.metadata.as_ref().is_some_and(|meta| meta.name == format!("hungry-{NODE}")));
        ensure!(pods.count() == 1, "the pod was made again");

        let ready = |name: &str| bench.kubelet.ready(name);
        let (guaranteed, burstable, besteffort) = (ready("guaranteed")?, ready("burstable")?, ready("besteffort")?);
        for group in [leaf_of(&guaranteed, "main")?, group_of(&guaranteed)?] {
            ensure!(
                read(&group, "memory.max")? == (64 << 20).to_string(),
                "{}: {}",
                group.display(),
                read(&group, "memory.max")?
            );
            ensure!(read(&group, "cpu.max")? == "10000 100000", "{}: {}", group.display(), read(&group, "cpu.max")?);
        }
        let weight = |pod: &Value| -> Result<u64> { Ok(read(&leaf_of(pod, "main")?, "cpu.weight")?.parse()?) };
        ensure!(weight(&burstable)? > weight(&besteffort)?, "a request of the processor weighs nothing");
        ensure!(read(&leaf_of(&burstable, "main")?, "memory.max")? == "max", "a request became a limit");
        let groups = [&guaranteed, &burstable, &besteffort, &again].map(group_of).into_iter().collect::<Result<Vec<_>>>()?;
        bench.withdraw(&["guaranteed", "burstable", "besteffort", "hungry"])?;
        bench.eventually("the pods' groups are gone", || match groups.iter().find(|group| group.exists()) {
            Some(group) => bail!("{} is there", group.display()),
            None => Ok(()),
        })
    })
}
