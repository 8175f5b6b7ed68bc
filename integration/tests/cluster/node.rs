//! What concerns the whole node.

use crate::{FOREVER, Node, eventually, workload};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{collections::BTreeMap, time::Duration};
use windlass_integration::{client::Client, cluster::NODE};
use windlass_proto::cri;

/// How long a node is without its daemon.
const ABSENCE: Duration = Duration::from_secs(3);

pub(crate) fn the_node_is_ready_and_says_what_it_is(node: &mut Node) -> Result<()> {
    let found = node.cluster.kubectl.get(&format!("node/{NODE}"))?;
    let version = found["status"]["nodeInfo"]["containerRuntimeVersion"].as_str().unwrap_or_default();
    ensure!(version.starts_with("windlass://"), "the runtime: {version:?}");
    let handlers = found["status"]["runtimeHandlers"].as_array().cloned().unwrap_or_default();
    let native =
        handlers.iter().find(|handler| handler["name"].as_str().unwrap_or_default().is_empty()).context("a default handler")?;
    ensure!(native["features"]["recursiveReadOnlyMounts"] == true && native["features"]["userNamespaces"] == true, "{native}");
    ensure!(found["status"]["features"]["supplementalGroupsPolicy"] == true, "{}", found["status"]["features"]);
    // Pods have their addresses from what the cluster has given to the node.
    let range = found["spec"]["podCIDR"].as_str().context("the node has a range")?.to_owned();
    let prefix = range.rsplit_once('.').context("an IPv4 range")?.0.to_owned();
    let pods = node.cluster.kubectl.list(&["pods", "--all-namespaces"])?;
    for pod in pods.iter().filter(|pod| pod["spec"]["hostNetwork"] != true && pod["status"]["phase"] == "Running") {
        let address = pod["status"]["podIP"].as_str().unwrap_or_default();
        ensure!(address.starts_with(&format!("{prefix}.")), "{}: {address} is not in {range}", pod["metadata"]["name"]);
    }
    Ok(())
}

pub(crate) fn statistics_come_through_the_apiserver(node: &mut Node) -> Result<()> {
    let kubectl = &node.cluster.kubectl;
    let running = kubectl.list(&["pods", "--all-namespaces", "--field-selector=status.phase=Running"])?;
    let raw = |path: &str| kubectl.run(&["get", "--raw", &format!("/api/v1/nodes/{NODE}/proxy/{path}")]);
    eventually("every pod has statistics", || {
        let summary: Value = serde_json::from_str(&raw("stats/summary")?)?;
        let resource = raw("metrics/resource")?;
        let stats: BTreeMap<&str, &Value> = summary["pods"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|pod| Some((pod["podRef"]["uid"].as_str()?, pod)))
            .collect();
        for pod in &running {
            let (name, uid) =
                (pod["metadata"]["name"].as_str().unwrap_or_default(), pod["metadata"]["uid"].as_str().unwrap_or_default());
            let found = stats.get(uid).with_context(|| format!("{name} has no statistics"))?;
            ensure!(found["containers"][0]["memory"]["workingSetBytes"].as_u64() > Some(0), "{name}: {found}");
            ensure!(found["containers"][0]["cpu"]["usageCoreNanoSeconds"].as_u64() > Some(0), "{name}: {found}");
            ensure!(resource.contains(&format!("pod=\"{name}\"")), "{name} is not in metrics/resource");
        }
        Ok(())
    })
}

/// Containers of the running pods by pod and name: id and number of starts.
fn containers(node: &Node) -> Result<BTreeMap<String, (String, u64)>> {
    let mut found = BTreeMap::new();
    for pod in node.cluster.kubectl.list(&["pods", "--all-namespaces", "--field-selector=status.phase=Running"])? {
        let name = format!("{}/{}", pod["metadata"]["namespace"], pod["metadata"]["name"]);
        let ready = windlass_integration::kubelet::is_ready(&pod);
        ensure!(ready, "{name} is not ready: {}", pod["status"]["conditions"]);
        for list in ["initContainerStatuses", "containerStatuses", "ephemeralContainerStatuses"] {
            for status in pod["status"][list].as_array().into_iter().flatten() {
                let id = status["containerID"].as_str().unwrap_or_default().to_owned();
                found.insert(format!("{name}/{}", status["name"]), (id, status["restartCount"].as_u64().unwrap_or_default()));
            }
        }
    }
    Ok(found)
}

/// After the daemon is back: everything as before, and new pods too.
fn undisturbed(node: &Node, before: &BTreeMap<String, (String, u64)>, name: &str) -> Result<()> {
    let kubectl = node.cluster.kubectl.clone();
    // A new pod shows that kubelet speaks with the new daemon.
    kubectl.create(&crate::pod(name, FOREVER))?;
    kubectl.ready(name)?;
    kubectl.run(&["delete", "pod", name, "--now"])?;
    eventually("every pod is as it was", || {
        let after = containers(node)?;
        ensure!(&after == before, "before: {before:#?}\nafter: {after:#?}");
        Ok(())
    })
}

pub(crate) fn a_daemon_that_starts_again_disturbs_no_pod(node: &mut Node) -> Result<()> {
    let before = eventually("all pods are ready", || containers(node))?;
    node.daemon.stop()?;
    std::thread::sleep(ABSENCE);
    node.daemon.serve()?;
    undisturbed(node, &before, "after-restart")
}

/// While a deployment is scaled up and down and a command writes without end.
pub(crate) fn a_daemon_that_is_killed_under_load_disturbs_no_pod(node: &mut Node) -> Result<()> {
    let kubectl = node.cluster.namespace("load")?;
    kubectl.create(&workload("Deployment", "load", &format!("while :; do echo line; sleep 0.01; done & {FOREVER}")))?;
    kubectl.rolled_out("deployment/load")?;
    let before = eventually("all pods are ready", || containers(node))?;
    for replicas in ["--replicas=6", "--replicas=1", "--replicas=6", "--replicas=1"] {
        kubectl.run(&["scale", "deployment/load", replicas])?;
        std::thread::sleep(Duration::from_millis(700));
        node.daemon.kill9()?;
        std::thread::sleep(Duration::from_millis(300));
        node.daemon.serve()?;
    }
    kubectl.rolled_out("deployment/load")?;
    // Which of the load's pods stays is the controller's choice.
    kubectl.run(&["delete", "deployment/load"])?;
    let others: BTreeMap<_, _> = before.into_iter().filter(|(name, _)| !name.starts_with("\"load\"/")).collect();
    eventually("the load is gone", || {
        let left = kubectl.list(&["pods"])?;
        ensure!(left.is_empty(), "{} pods are left", left.len());
        Ok(())
    })?;
    undisturbed(node, &others, "after-kill")
}

pub(crate) fn namespaces_that_are_deleted_leave_nothing(node: &mut Node) -> Result<()> {
    let kubectl = node.cluster.kubectl.clone();
    let namespaces = kubectl.list(&["namespaces"])?;
    let names: Vec<&str> = namespaces.iter().filter_map(|one| one["metadata"]["name"].as_str()).collect();
    let ours = names.into_iter().filter(|name| *name != "default" && !name.starts_with("kube-"));
    let words: Vec<&str> = ["delete", "namespace", "--timeout=120s"].into_iter().chain(ours).collect();
    if words.len() > 3 {
        kubectl.run(&words)?;
    }
    kubectl.run(&["delete", "pods", "--all", "--now"])?;
    node.cluster.remove_addons()?;
    let client = Client::connect(&node.daemon)?;
    for pod in client.list_pod_sandbox(cri::ListPodSandboxRequest::default())?.items {
        ensure!(pod.state() != cri::PodSandboxState::SandboxReady, "pod {:?} runs", pod.metadata);
        // kubelet would do it within a minute.
        client.remove(&pod.id)?;
    }
    node.cluster.stop_proxy()?;
    eventually("every trace is gone", || node.before.expect_again(&node.daemon))
}
