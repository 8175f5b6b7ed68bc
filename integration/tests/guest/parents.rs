//! Where groups are made: below kubelet's, whatever its driver calls them, and below our own.

use crate::{Bench, TREE, expect, in_guest, in_guest_with, with_resources};
use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};
use windlass_integration::client::container;
use windlass_proto::cri::LinuxContainerResources as Resources;

/// Kubelet's groups for a pod: each with all controllers given to those below, the last with the pod's own limit. Removed when dropped.
struct Kubelet(Vec<PathBuf>);

impl Kubelet {
    fn make(path: &str, memory: &str) -> Result<Kubelet> {
        let mut made = Vec::new();
        let mut at = PathBuf::from(TREE);
        for part in path.trim_matches('/').split('/') {
            at.push(part);
            fs::create_dir(&at).with_context(|| format!("create {}", at.display()))?;
            for controller in ["cpu", "memory", "pids", "cpuset", "io"] {
                fs::write(at.join("cgroup.subtree_control"), format!("+{controller}"))?;
            }
            made.push(at.clone());
        }
        fs::write(at.join("memory.max"), memory)?;
        Ok(Kubelet(made))
    }

    fn pod(&self) -> Result<&Path> {
        self.0.last().map(PathBuf::as_path).context("a group")
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        for directory in self.0.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}

fn children(directory: &Path) -> Result<BTreeSet<String>> {
    let listing = fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
    Ok(listing
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect())
}

/// The layout of a pod with one container below `parent`, its limits, and that all of it goes with the pod.
fn check(bench: &Bench, asked: &str, parent: &Path) -> Result<()> {
    let mut config = bench.pod();
    config.linux.as_mut().context("linux")?.cgroup_parent = asked.to_owned();
    let before = if parent.exists() { children(parent)? } else { BTreeSet::new() };
    let pod = bench.client.run(&config)?;
    let limits = Resources { memory_limit_in_bytes: 16 << 20, ..Default::default() };
    let wanted = with_resources(container(&config, "main", &["sleep", "1000"]), limits);
    let id = bench.client.create(&pod, &config, &wanted)?;
    bench.client.start(&id)?;
    let mut expected = before.clone();
    expected.extend([id.clone(), pod.clone()]);
    let found = children(parent)?;
    ensure!(found == expected, "below {}: {found:?}", parent.display());
    expect(&parent.join(&id), "memory.max", "16777216")?;
    expect(&parent.join(&id), "cgroup.subtree_control", "")?;
    let inside = bench.client.exec(&id, &["cat", "/sys/fs/cgroup/memory.max"])?;
    ensure!(inside.stdout == b"16777216\n", "seen from inside: {inside:?}");
    let first = fs::read_to_string(parent.join(&id).join("cgroup.procs"))?;
    ensure!(first.lines().count() == 1, "the container's own group holds its first process alone: {first:?}");
    let monitor = fs::read_to_string(parent.join(&pod).join("cgroup.procs"))?;
    ensure!(monitor.lines().count() == 1, "the monitor is alone in its group: {monitor:?}");
    bench.client.remove(&pod)?;
    let found = children(parent)?;
    ensure!(found == before, "left below {}: {found:?}", parent.display());
    Ok(())
}

#[test]
fn a_kubelet_parent_in_either_form_holds_the_pod() -> Result<()> {
    in_guest("a_kubelet_parent_in_either_form_holds_the_pod", |bench| {
        for parent in ["/kubepods/burstable/pod7", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod7.slice"] {
            let kubelet = Kubelet::make(parent, "67108864")?;
            check(bench, parent, kubelet.pod()?).context(parent)?;
            expect(kubelet.pod()?, "memory.max", "67108864")?;
            drop(kubelet);
            ensure!(!Path::new(TREE).join(parent.trim_matches('/')).exists(), "{parent} could not be removed");
        }
        Ok(())
    })
}

#[test]
fn no_parent_means_the_runtimes_own() -> Result<()> {
    in_guest("no_parent_means_the_runtimes_own", |bench| check(bench, "", &bench.daemon.cgroup_directory()))
}

#[test]
fn a_pods_limit_holds_for_its_containers_together() -> Result<()> {
    in_guest("a_pods_limit_holds_for_its_containers_together", |bench| {
        let kubelet = Kubelet::make("/kubepods/pod8", "50331648")?;
        let mut config = bench.pod();
        config.linux.as_mut().context("linux")?.cgroup_parent = "/kubepods/pod8".into();
        let pod = bench.client.run(&config)?;
        let id = bench.client.create(&pod, &config, &container(&config, "main", &["/probe", "hold-mem", "96"]))?;
        bench.client.start(&id)?;
        let ended = bench.exited(&id)?;
        ensure!(ended.exit_code == 137 && ended.reason == "OOMKilled", "{ended:?}");
        ensure!(bench.client.pod(&pod)?.state() == windlass_proto::cri::PodSandboxState::SandboxReady, "the monitor was killed");
        bench.client.remove(&pod)?;
        drop(kubelet);
        Ok(())
    })
}

/// Runs a pod that has a twentieth of a processor and wants all of one, with this configuration; where its monitor is, and seconds that an
/// exec, a stop and the removal took. The guest charges processor time by ticks of 10 ms: with less than that an exec takes a minute now
/// and then.
fn saturated(bench: &Bench, name: &str) -> Result<(PathBuf, [f64; 3])> {
    let kubelet = Kubelet::make(&format!("/kubepods/{name}"), "max")?;
    fs::write(kubelet.pod()?.join("cpu.max"), "5000 100000")?;
    let mut config = bench.pod();
    config.linux.as_mut().context("linux")?.cgroup_parent = format!("/kubepods/{name}");
    let pod = bench.client.run(&config)?;
    let id = bench.client.create(&pod, &config, &container(&config, "main", &["sh", "-c", "while :; do :; done"]))?;
    bench.client.start(&id)?;
    let monitors = [kubelet.pod()?.to_owned(), bench.daemon.cgroup_directory()].map(|at| at.join(&pod));
    let found: Vec<&PathBuf> = monitors.iter().filter(|leaf| leaf.exists()).collect();
    let [leaf] = found[..] else { anyhow::bail!("the monitor is in {found:?}") };
    let leaf = leaf.clone();
    let procs = fs::read_to_string(leaf.join("cgroup.procs"))?;
    ensure!(procs.lines().count() == 1, "the monitor is alone in its group: {procs:?}");
    let mut took = [0.0; 3];
    let mut timed = |at: usize, result: Result<(), tonic::Status>, begun: Instant| -> Result<()> {
        took[at] = begun.elapsed().as_secs_f64();
        Ok(result?)
    };
    let begun = Instant::now();
    timed(0, bench.client.exec(&id, &["true"]).map(drop), begun)?;
    let begun = Instant::now();
    timed(1, bench.client.stop(&id, 0), begun)?;
    let begun = Instant::now();
    timed(2, bench.client.remove(&pod), begun)?;
    let left = children(kubelet.pod()?)?;
    ensure!(left.is_empty() && !leaf.exists(), "left: {left:?}, {}", leaf.display());
    drop(kubelet);
    Ok((leaf, took))
}

#[test]
fn a_pods_limits_hold_for_its_monitor() -> Result<()> {
    in_guest("a_pods_limits_hold_for_its_monitor", |bench| {
        let (leaf, took) = saturated(bench, "pod9")?;
        println!("exec, stop and removal in a pod of fifty millicores: {took:.2?} s");
        ensure!(leaf.starts_with(Path::new(TREE).join("kubepods")), "the monitor is in {}", leaf.display());
        Ok(())
    })
}

#[test]
fn a_monitor_of_the_systems_is_not_held_by_its_pods_limits() -> Result<()> {
    in_guest_with("a_monitor_of_the_systems_is_not_held_by_its_pods_limits", "[monitor]\naccount = \"system\"\n", |bench| {
        let (leaf, took) = saturated(bench, "pod10")?;
        println!("exec, stop and removal in a pod of fifty millicores: {took:.2?} s");
        ensure!(leaf.starts_with(bench.daemon.cgroup_directory()), "the monitor is in {}", leaf.display());
        Ok(())
    })
}
