//! A node full of pods in a real cluster: how long until all are ready, what the runtime takes for it, and what is left when they are gone.

use super::{
    images,
    rival::{Ground, Kind, Network, Rival},
    table::Table,
};
use crate::{
    cluster::{Cluster, Programs},
    kubelet::Kubelet,
    node,
    wait::until_within,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    path::Path,
    time::{Duration, Instant},
};

/// Pods on the node: kubelet's own limit by default.
const PODS: usize = 110;
const ROUNDS: usize = 2;
/// How long nothing happens before memory is weighed.
const REST: Duration = Duration::from_secs(5);
/// Longest wait for the end of what deleted pods leave: kubelet collects it once a minute.
const TRACE_LIMIT: Duration = Duration::from_secs(150);

type Sample = (&'static str, f64);

/// Measures the runtimes in turns; prints the table.
pub(super) fn measure(ground: &Ground<'_>, kinds: &[Kind]) -> Result<()> {
    let programs = Programs::build()?;
    let mut table = Table::default();
    for round in 1..=ROUNDS {
        for kind in kinds {
            println!("round {round}: {}", kind.name());
            let samples = on_a_node(ground, *kind, programs.clone()).with_context(|| kind.name())?;
            samples.into_iter().for_each(|(measure, value)| table.add(measure, kind.name(), value));
        }
    }
    println!("\n{PODS} pods in a cluster of one node, median of {ROUNDS} rounds\n\n{}", table.markdown());
    Ok(())
}

fn on_a_node(ground: &Ground<'_>, kind: Kind, programs: Programs) -> Result<Vec<Sample>> {
    let (products, registry) = (ground.products.to_owned(), ground.registry.twin());
    node::run(move || {
        node::share_mounts()?;
        let ground = Ground { products: &products, registry: &registry, tmpfs: false, layers: "auto" };
        let rival = ground.start_here(kind, Network::Own)?;
        let directory = tempfile::Builder::new().prefix("windlass-compare-").tempdir()?;
        let cluster = start(&programs, directory.path(), &rival.socket)?;
        let image = format!("{}/{}", registry.host(), images::RUN);
        let samples = full(&cluster, &rival, &image).with_context(|| format!("{}\n{}", rival.log(), cluster.logs()))?;
        drop(cluster);
        rival.stop()?;
        Ok(samples)
    })
}

/// A cluster over any runtime, with its files below `directory`.
pub(super) fn start(programs: &Programs, directory: &Path, socket: &Path) -> Result<Cluster> {
    let prepare = |fields| Kubelet::prepare_over(programs.kubelet(), &directory.join("kubelet"), socket, false, fields);
    Cluster::start_over(programs, &directory.join("cluster"), socket, prepare)
}

fn full(cluster: &Cluster, rival: &Rival, image: &str) -> Result<Vec<Sample>> {
    let kubectl = &cluster.kubectl;
    // The first pod brings the images and what the runtime keeps.
    run(cluster, image, 1)?;
    kubectl.run(&["delete", "pods", "--all", "--timeout=120s"])?;
    let before = until_within(TRACE_LIMIT, "the first pod is gone", || {
        let traces = rival.traces()?;
        Ok((!traces.iter().any(|trace| trace.starts_with("pin "))).then_some(traces))
    })?;
    let (fresh, _) = rival.memory_kib();
    let cpu = rival.cpu_seconds();
    let begun = Instant::now();
    run(cluster, image, PODS)?;
    let mut samples = vec![("s until all are ready", begun.elapsed().as_secs_f64())];
    samples.push(("CPU-s of the runtime and of what it starts, until then", rival.cpu_seconds() - cpu));
    std::thread::sleep(REST);
    let (daemon, helpers) = rival.memory_kib();
    samples.push(("MiB of the daemon", daemon as f64 / 1024.0));
    samples.push(("KiB for a pod: helpers", helpers as f64 / PODS as f64));
    samples
        .push(("KiB for a pod: helpers and the daemon's growth", (helpers + daemon.saturating_sub(fresh)) as f64 / PODS as f64));
    let cpu = rival.cpu_seconds();
    let begun = Instant::now();
    kubectl.run(&["delete", "pods", "--all", "--timeout=300s"])?;
    samples.push(("s until all are deleted", begun.elapsed().as_secs_f64()));
    samples.push(("CPU-s of the runtime and of what it starts, from the first deletion on", rival.cpu_seconds() - cpu));
    let left = || -> Result<BTreeSet<String>> { Ok(rival.traces()?.difference(&before).cloned().collect()) };
    if let Err(error) = until_within(TRACE_LIMIT, "every trace is gone", || Ok(left()?.is_empty().then_some(()))) {
        println!("{error}: {:#?}", left()?);
    }
    samples.push(("links, mounts, pins, cgroups and processes left", left()?.len() as f64));
    ensure!(rival.kind != Kind::Windlass || left()?.is_empty(), "left: {:#?}", left()?);
    Ok(samples)
}

/// Creates so many pods, and waits until all are ready.
fn run(cluster: &Cluster, image: &str, count: usize) -> Result<()> {
    let pods: Vec<Value> = (0..count).map(|number| pod(&format!("pod-{number}"), image)).collect();
    cluster.kubectl.create(&json!({ "apiVersion": "v1", "kind": "List", "items": pods }))?;
    cluster.kubectl.run(&["wait", "pods", "--all", "--for=condition=Ready", "--timeout=300s"]).map(drop)
}

fn pod(name: &str, image: &str) -> Value {
    let command = ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"];
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name },
        "spec": { "terminationGracePeriodSeconds": 10, "containers": [{ "name": "main", "image": image, "command": command }] },
    })
}
