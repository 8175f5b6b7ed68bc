//! Limits that change while a container or a pod lives: all of them or none, in the kernel and in the status.

use crate::{Bench, TREE, expect, in_guest, read, with_resources};
use anyhow::{Context, Result, ensure};
use std::{fs, path::Path};
use windlass_integration::{client::container, wait::until};
use windlass_proto::cri::{self, LinuxContainerResources as Resources};

const MIB: i64 = 1 << 20;

fn update(bench: &Bench, id: &str, linux: Resources) -> Result<(), tonic::Status> {
    let request = cri::UpdateContainerResourcesRequest { container_id: id.into(), linux: Some(linux), ..Default::default() };
    bench.client.update_container_resources(request).map(drop)
}

fn status(bench: &Bench, id: &str) -> Result<Resources> {
    bench.client.container(id)?.resources.and_then(|all| all.linux).context("resources of the status")
}

#[test]
fn an_update_that_fails_changes_nothing() -> Result<()> {
    in_guest("an_update_that_fails_changes_nothing", |bench| {
        let limits = Resources {
            memory_limit_in_bytes: 64 * MIB,
            memory_swap_limit_in_bytes: 80 * MIB,
            cpu_quota: 50_000,
            cpu_period: 100_000,
            cpu_shares: 1024,
            ..Default::default()
        };
        let (pod, id) = bench.limited(limits, &["sleep", "1000"])?;
        let leaf = bench.leaf(&id);
        let files = ["memory.max", "memory.swap.max", "cpu.max", "cpu.weight", "cpuset.cpus", "pids.max"];
        let look = || files.iter().map(|file| read(&leaf, file)).collect::<Result<Vec<_>>>();
        let (before, told) = (look()?, status(bench, &id)?);
        let unified = |key: &str, value: &str| [(key.to_owned(), value.to_owned())].into();
        let all = Resources {
            memory_limit_in_bytes: 96 * MIB,
            memory_swap_limit_in_bytes: 96 * MIB,
            cpu_quota: 20_000,
            cpu_shares: 512,
            ..Default::default()
        };
        for (what, last) in [
            ("cpuset.cpus", Resources { cpuset_cpus: "4096".into(), ..all.clone() }),
            ("pids.max", Resources { unified: unified("pids.max", "many"), ..all.clone() }),
            ("memory.no-such", Resources { unified: unified("memory.no-such", "1"), ..all.clone() }),
            ("cgroup.freeze", Resources { unified: unified("cgroup.freeze", "1"), ..all.clone() }),
            ("cpu_shares", Resources { cpu_shares: -1, ..all.clone() }),
        ] {
            let error = update(bench, &id, last).err().with_context(|| format!("{what} was taken"))?;
            ensure!(error.message().contains(what) && error.message().contains(&id), "{what}: {error}");
            ensure!(error.code() == tonic::Code::InvalidArgument, "{what}: {error:?}");
            ensure!(look()? == before, "{what} left {:?}, before it was {before:?}", look()?);
            ensure!(status(bench, &id)? == told, "{what} changed the status");
        }
        update(bench, &id, all)?;
        expect(&leaf, "cpu.max", "20000 100000")?;
        expect(&leaf, "memory.swap.max", "0")?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn a_change_that_cannot_be_enforced_is_told() -> Result<()> {
    in_guest("a_change_that_cannot_be_enforced_is_told", |bench| {
        let limits = Resources { cpu_quota: 50_000, cpu_period: 100_000, ..Default::default() };
        let (pod, id) = bench.limited(limits, &["sleep", "1000"])?;
        let hugepage_limits = vec![cri::HugepageLimit { page_size: "2MB".into(), limit: 0 }];
        update(bench, &id, Resources { cpu_quota: 20_000, hugepage_limits, ..Default::default() })?;
        expect(&bench.leaf(&id), "cpu.max", "20000 100000")?;
        let told = |line: &str| ["not enforced", "hugetlb", &pod, &id].iter().all(|part| line.contains(part));
        until("the warning", || Ok(bench.daemon.log().lines().any(told).then_some(())))?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn what_an_update_does_not_name_stays() -> Result<()> {
    in_guest("what_an_update_does_not_name_stays", |bench| {
        let limits = Resources {
            memory_limit_in_bytes: 64 * MIB,
            memory_swap_limit_in_bytes: 80 * MIB,
            cpu_quota: 25_000,
            cpu_period: 50_000,
            oom_score_adj: 500,
            ..Default::default()
        };
        // Created, then running.
        let config = bench.pod();
        let pod = bench.client.run(&config)?;
        let wanted = with_resources(container(&config, "main", &["sleep", "1000"]), limits);
        let id = bench.client.create(&pod, &config, &wanted)?;
        let leaf = bench.leaf(&id);
        update(bench, &id, Resources { cpu_quota: 10_000, ..Default::default() })?;
        expect(&leaf, "cpu.max", "10000 50000")?;
        bench.client.start(&id)?;
        expect(&leaf, "cpu.max", "10000 50000")?;
        update(bench, &id, Resources { cpu_period: 40_000, oom_score_adj: 7, ..Default::default() })?;
        expect(&leaf, "cpu.max", "10000 40000")?;
        update(bench, &id, Resources { memory_limit_in_bytes: 96 * MIB, ..Default::default() })?;
        expect(&leaf, "memory.swap.max", &(16 * MIB).to_string())?;
        update(bench, &id, Resources { memory_swap_limit_in_bytes: 128 * MIB, ..Default::default() })?;
        expect(&leaf, "memory.max", &(96 * MIB).to_string())?;
        expect(&leaf, "memory.swap.max", &(32 * MIB).to_string())?;
        let told = status(bench, &id)?;
        let seen = (told.cpu_quota, told.cpu_period, told.memory_limit_in_bytes, told.memory_swap_limit_in_bytes);
        ensure!(seen == (10_000, 40_000, 96 * MIB, 128 * MIB), "the status says {seen:?}");
        let score = bench.client.exec(&id, &["cat", "/proc/1/oom_score_adj"])?;
        ensure!(score.stdout == b"500\n" && told.oom_score_adj == 500, "the score is of processes: {score:?}");
        bench.client.stop(&id, 0)?;
        let error = update(bench, &id, Resources { cpu_shares: 2, ..Default::default() }).err().context("it has exited")?;
        ensure!(error.code() == tonic::Code::FailedPrecondition, "{error}");
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn a_memory_limit_below_what_is_in_use_is_refused_at_once() -> Result<()> {
    in_guest("a_memory_limit_below_what_is_in_use_is_refused_at_once", |bench| {
        let limits = Resources { memory_limit_in_bytes: 128 * MIB, cpu_shares: 1024, ..Default::default() };
        let (pod, id) = bench.limited(limits, &["/probe", "hold-mem", "48"])?;
        let leaf = bench.leaf(&id);
        until("the memory is held", || Ok((read(&leaf, "memory.current")?.parse::<i64>()? > 48 * MIB).then_some(())))?;
        let began = std::time::Instant::now();
        let error = update(bench, &id, Resources { memory_limit_in_bytes: 32 * MIB, cpu_shares: 512, ..Default::default() });
        let (error, took) = (error.err().context("a limit below what is in use was taken")?, began.elapsed());
        ensure!(error.code() == tonic::Code::FailedPrecondition, "{error}");
        ensure!(error.message().contains("memory.max=33554432") && error.message().contains("in use"), "{error}");
        ensure!(took.as_secs() < 30, "it took {took:?}");
        expect(&leaf, "memory.max", &(128 * MIB).to_string())?;
        expect(&leaf, "cpu.weight", "100")?;
        ensure!(bench.client.container(&id)?.state() == cri::ContainerState::ContainerRunning, "it was killed");
        ensure!(status(bench, &id)?.memory_limit_in_bytes == 128 * MIB);
        // What is in use, and a little more.
        update(bench, &id, Resources { memory_limit_in_bytes: 64 * MIB, ..Default::default() })?;
        expect(&leaf, "memory.max", &(64 * MIB).to_string())?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn a_pods_limits_hold_where_the_runtime_made_its_group() -> Result<()> {
    in_guest("a_pods_limits_hold_where_the_runtime_made_its_group", |bench| {
        let mut config = bench.pod();
        let uid = config.metadata.clone().unwrap_or_default().uid;
        let linux = config.linux.as_mut().context("linux")?;
        linux.cgroup_parent = format!("/made/pod{uid}");
        linux.resources = Some(Resources { memory_limit_in_bytes: 64 * MIB, cpu_shares: 512, ..Default::default() });
        linux.overhead = Some(Resources { memory_limit_in_bytes: 16 * MIB, ..Default::default() });
        let pod = bench.client.run(&config)?;
        let group = Path::new(TREE).join("made").join(format!("pod{uid}"));
        expect(&group, "memory.max", &(80 * MIB).to_string())?;
        expect(&group, "cpu.weight", "59")?;
        let update = |pod: &str, resources: Resources| {
            let resources = Some(resources);
            let request = cri::UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.into(), resources, ..Default::default() };
            bench.client.update_pod_sandbox_resources(request)
        };
        update(&pod, Resources { memory_limit_in_bytes: 112 * MIB, cpu_quota: 50_000, ..Default::default() })?;
        expect(&group, "memory.max", &(128 * MIB).to_string())?;
        expect(&group, "cpu.max", "50000 100000")?;
        let bad = [("memory.no-such".to_owned(), "1".to_owned())].into();
        let error = update(&pod, Resources { memory_limit_in_bytes: 48 * MIB, unified: bad, ..Default::default() });
        ensure!(error.err().context("no such file")?.message().contains("memory.no-such"));
        expect(&group, "memory.max", &(128 * MIB).to_string())?;
        let told = |pod: &str| -> Result<String> {
            let request = cri::PodSandboxStatusRequest { pod_sandbox_id: pod.into(), verbose: true };
            Ok(bench.client.pod_sandbox_status(request)?.info.get("info").cloned().unwrap_or_default())
        };
        ensure!(told(&pod)?.contains(&(112 * MIB).to_string()) && !told(&pod)?.contains("no-such"), "{}", told(&pod)?);
        bench.client.remove(&pod)?;
        ensure!(!group.exists(), "the pod's group is left");

        // One that kubelet made is kubelet's: recorded, and not written.
        fs::create_dir(&group)?;
        let pod = bench.client.run(&config)?;
        expect(&group, "memory.max", "max")?;
        update(&pod, Resources { memory_limit_in_bytes: 99 * MIB, ..Default::default() })?;
        expect(&group, "memory.max", "max")?;
        ensure!(told(&pod)?.contains(&(99 * MIB).to_string()), "not recorded");
        bench.client.remove(&pod)?;
        ensure!(group.exists(), "kubelet's group was removed");
        fs::remove_dir(&group)?;
        fs::remove_dir(Path::new(TREE).join("made"))?;
        let gone = update(&pod, Resources::default()).err().context("no such pod")?;
        ensure!(gone.code() == tonic::Code::NotFound, "{gone}");
        Ok(())
    })
}
