//! `kubectl top`, which asks the cluster's server of metrics.

use crate::{eventually, pod};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use windlass_integration::{
    cluster::{Kubectl, NODE},
    kubelet::container,
};

/// What the processor's share that is told may be beside the one that was taken.
const TOLERANCE: f64 = 0.1;

/// A quantity of Kubernetes, as `250m` or `64Mi`, in units of the given suffix.
fn number(word: &str, suffix: &str) -> Result<u64> {
    word.strip_suffix(suffix).and_then(|digits| digits.parse().ok()).with_context(|| format!("{word:?} in {suffix}"))
}

/// The least and the most that a load took in a window of seconds whose end is known to the second, in thousandths of a processor. It says
/// itself, line by line, when it had taken how much.
fn taken(log: &str, end: f64, window: f64) -> Result<(f64, f64)> {
    let told: Vec<(f64, f64)> = log
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(at, used)| Some((at.parse::<f64>().ok()? / 1e3, used.trim().parse::<f64>().ok()? / 1e3)))
        .collect();
    let at = |time: f64| told.iter().rev().find(|(then, _)| *then <= time).map(|(_, used)| *used).context("it had not begun");
    ensure!(told.last().is_some_and(|(then, _)| *then > end + 1.0), "its log ends before");
    let shares = (0..=10).map(|tenth| end + f64::from(tenth) / 10.0).map(|end| Ok((at(end)? - at(end - window)?) / window));
    let shares = shares.collect::<Result<Vec<f64>>>()?;
    Ok((shares.iter().copied().fold(f64::MAX, f64::min), shares.iter().copied().fold(0.0, f64::max)))
}

pub(crate) fn figures_are_those_of_a_known_load(kubectl: &Kubectl) -> Result<()> {
    // Thousandths of a processor, of which a busy machine may give less, and MiB.
    let loads = BTreeMap::from([("busy", (250, 64)), ("calm", (50, 16))]);
    let mut wanted = pod("load", "");
    let containers = loads.iter().map(|(name, (share, memory))| {
        let mut container = container(name, "");
        container["command"] = json!(["/probe", "steady", share.to_string(), memory.to_string()]);
        container
    });
    wanted["spec"]["containers"] = containers.collect();
    kubectl.create(&wanted)?;
    let addons = kubectl.within("kube-system");
    addons.rolled_out("deployment/metrics-server")?;
    addons.wait("apiservice/v1beta1.metrics.k8s.io", "condition=Available")?;
    let path = format!("/apis/metrics.k8s.io/v1beta1/namespaces/{}/pods/load", kubectl.namespace());
    eventually("figures of both containers", || {
        let told: Value = serde_json::from_str(&kubectl.run(&["get", "--raw", &path])?)?;
        let shown = kubectl.run(&["top", "pod", "load", "--containers", "--no-headers"])?;
        let shown: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        let end = OffsetDateTime::parse(told["timestamp"].as_str().context("a time")?, &Rfc3339)?.unix_timestamp() as f64;
        let window: f64 = told["window"].as_str().and_then(|text| text.strip_suffix('s')).context("a window")?.parse()?;
        for (name, (_, mebibytes)) in &loads {
            let found = told["containers"].as_array().into_iter().flatten().find(|one| one["name"] == *name);
            let usage = &found.with_context(|| format!("{name} has no figures"))?["usage"];
            let share = number(usage["cpu"].as_str().unwrap_or_default(), "n")? as f64 / 1e6;
            let (least, most) = taken(&kubectl.run(&["logs", "load", "--container", name])?, end, window)?;
            let agrees = share >= least * (1.0 - TOLERANCE) && share <= most * (1.0 + TOLERANCE);
            ensure!(agrees, "{name} took {least:.0}m to {most:.0}m, not {share:.0}m");
            let held = number(usage["memory"].as_str().unwrap_or_default(), "Ki")? >> 10;
            // The program itself is small.
            ensure!((*mebibytes..mebibytes + 4).contains(&held), "{name} holds {mebibytes}Mi, not {held}Mi");
            let row = ["load", name, &format!("{}m", share.ceil()), &format!("{held}Mi")];
            ensure!(shown.iter().any(|line| line == &row), "{row:?} is not in {shown:?}");
        }
        Ok(())
    })?;
    let told = eventually("figures of the node", || kubectl.run(&["top", "node", NODE, "--no-headers"]))?;
    let words: Vec<&str> = told.split_whitespace().collect();
    let [NODE, processor, _, memory, _] = words[..] else { anyhow::bail!("{told}") };
    let processors = std::thread::available_parallelism()?.get() as u64 * 1000;
    ensure!((1..processors * 11 / 10).contains(&number(processor, "m")?), "{told}");
    ensure!(number(memory, "Mi")? > 80, "{told}");
    Ok(())
}
