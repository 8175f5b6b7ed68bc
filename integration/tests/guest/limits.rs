//! Limits of a container: they are written, they hold, and what they end is told as it was.

use crate::{Bench, counter, expect, in_guest, read};
use anyhow::{Context, Result, ensure};
use std::fs;
use windlass_integration::wait::until;
use windlass_proto::cri::{self, LinuxContainerResources as Resources};

const MIB: i64 = 1 << 20;

/// Waits until the log of the container `main` holds `text`.
fn logged(bench: &Bench, text: &str) -> Result<()> {
    until(text, || {
        let pods = fs::read_dir(bench.daemon.path("logs"))?.flatten();
        let found = pods.filter_map(|pod| fs::read_to_string(pod.path().join("main.log")).ok()).any(|log| log.contains(text));
        Ok(found.then_some(()))
    })
}

#[test]
fn a_memory_limit_ends_a_container_as_oom_killed() -> Result<()> {
    in_guest("a_memory_limit_ends_a_container_as_oom_killed", |bench| {
        let limits = Resources { memory_limit_in_bytes: 32 * MIB, ..Default::default() };
        let (pod, id) = bench.limited(limits, &["/probe", "hold-mem", "64"])?;
        let ended = bench.exited(&id)?;
        ensure!(ended.exit_code == 137 && ended.reason == "OOMKilled", "{ended:?}");
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn an_oom_killed_child_leaves_the_first_process_alone() -> Result<()> {
    in_guest("an_oom_killed_child_leaves_the_first_process_alone", |bench| {
        let limits = Resources { memory_limit_in_bytes: 32 * MIB, ..Default::default() };
        let (pod, id) = bench.limited(limits, &["sh", "-c", "/probe hold-mem 64; echo child $?; exec sleep 1000"])?;
        let leaf = bench.leaf(&id);
        logged(bench, "child 137")?;
        ensure!(counter(&leaf, "memory.events", "oom_kill ")? > 0, "the child was killed otherwise");
        let seen = bench.client.exec(&id, &["true"])?;
        ensure!(seen.exit_code == 0, "{seen:?}");
        ensure!(bench.client.container(&id)?.state() == cri::ContainerState::ContainerRunning, "the first process has ended");
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn an_end_that_memory_did_not_bring_is_not_called_so() -> Result<()> {
    in_guest("an_end_that_memory_did_not_bring_is_not_called_so", |bench| {
        let limits = Resources { memory_limit_in_bytes: 32 * MIB, ..Default::default() };
        let ended = |script: &str, waits: Option<&str>| -> Result<(i32, String)> {
            let script = format!("/probe hold-mem 64; code=$?; {script}");
            let (pod, id) = bench.limited(limits.clone(), &["sh", "-c", &script])?;
            if let Some(said) = waits {
                logged(bench, said)?;
                bench.client.stop(&id, 1)?;
            }
            let status = bench.exited(&id)?;
            bench.client.remove(&pod)?;
            Ok((status.exit_code, status.reason))
        };
        let polite = "trap 'exit 0' TERM; echo polite after $code; while :; do sleep 0.1; done";
        let deaf = "trap '' TERM; echo deaf after $code; while :; do sleep 0.1; done";
        for (script, waits, expected) in [
            ("exit 0", None, (0, "Completed")),
            ("exit $code", None, (137, "OOMKilled")),
            (polite, Some("polite after 137"), (0, "Completed")),
            (deaf, Some("deaf after 137"), (137, "Error")),
        ] {
            let (code, reason) = ended(script, waits)?;
            ensure!((code, reason.as_str()) == expected, "{script}: {code} {reason}, not {expected:?}");
        }
        Ok(())
    })
}

#[test]
fn an_exec_that_is_killed_for_memory_leaves_the_container_to_the_next() -> Result<()> {
    in_guest("an_exec_that_is_killed_for_memory_leaves_the_container_to_the_next", |bench| {
        let limits = Resources { memory_limit_in_bytes: 32 * MIB, ..Default::default() };
        let (pod, id) = bench.limited(limits, &["sleep", "1000"])?;
        for _ in 0..3 {
            let killed = bench.client.exec(&id, &["/probe", "hold-mem", "64"])?;
            ensure!(killed.exit_code == 137, "{killed:?}");
            let next = bench.client.exec(&id, &["echo", "there"])?;
            ensure!(next.exit_code == 0 && next.stdout == b"there\n", "{next:?}");
        }
        let state = bench.client.container(&id)?;
        ensure!(state.state() == cri::ContainerState::ContainerRunning, "{state:?}");
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn oom_group_ends_the_whole_container() -> Result<()> {
    in_guest("oom_group_ends_the_whole_container", |bench| {
        let unified = [("memory.oom.group".to_owned(), "1".to_owned())].into();
        let limits = Resources { memory_limit_in_bytes: 32 * MIB, unified, ..Default::default() };
        let (pod, id) = bench.limited(limits, &["sh", "-c", "/probe hold-mem 64; exec sleep 1000"])?;
        let ended = bench.exited(&id)?;
        ensure!(ended.exit_code == 137 && ended.reason == "OOMKilled", "{ended:?}");
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn a_limit_of_processes_fails_the_next_fork() -> Result<()> {
    in_guest("a_limit_of_processes_fails_the_next_fork", |bench| {
        let limits = Resources { unified: [("pids.max".to_owned(), "4".to_owned())].into(), ..Default::default() };
        let script = "for i in 1 2 3 4 5 6; do sleep 1000 & done; wait";
        let (pod, id) = bench.limited(limits, &["sh", "-c", script])?;
        let leaf = bench.leaf(&id);
        until("a refused fork", || Ok((counter(&leaf, "pids.events", "max ")? > 0).then_some(())))?;
        logged(bench, "can't fork: Resource temporarily unavailable")?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn a_quota_throttles_and_shares_are_a_weight() -> Result<()> {
    in_guest("a_quota_throttles_and_shares_are_a_weight", |bench| {
        let limits = Resources { cpu_quota: 10_000, cpu_period: 50_000, cpu_shares: 512, ..Default::default() };
        let (pod, id) = bench.limited(limits, &["sh", "-c", "while :; do :; done"])?;
        let leaf = bench.leaf(&id);
        expect(&leaf, "cpu.max", "10000 50000")?;
        expect(&leaf, "cpu.weight", "59")?;
        until("throttling", || Ok((counter(&leaf, "cpu.stat", "nr_throttled ")? > 2).then_some(())))?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn limits_of_a_running_container_change() -> Result<()> {
    in_guest("limits_of_a_running_container_change", |bench| {
        let limits = Resources { memory_limit_in_bytes: 64 * MIB, cpu_quota: 50_000, cpu_period: 100_000, ..Default::default() };
        let (pod, id) = bench.limited(limits, &["sleep", "1000"])?;
        let leaf = bench.leaf(&id);
        expect(&leaf, "memory.max", &(64 * MIB).to_string())?;
        let update = |linux: Resources| {
            let request =
                cri::UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
            bench.client.update_container_resources(request)
        };
        update(Resources { memory_limit_in_bytes: 96 * MIB, cpu_quota: 20_000, cpu_shares: 2048, ..Default::default() })?;
        expect(&leaf, "memory.max", &(96 * MIB).to_string())?;
        let quota = read(&leaf, "cpu.max")?;
        ensure!(quota.starts_with("20000 "), "cpu.max is {quota:?}");
        let status = bench.client.container(&id)?;
        let shown = status.resources.and_then(|all| all.linux).context("resources of the status")?;
        ensure!(shown.memory_limit_in_bytes == 96 * MIB, "{shown:?}");
        let bad = update(Resources { unified: [("memory.no-such".to_owned(), "1".to_owned())].into(), ..Default::default() });
        let bad = bad.expect_err("no such file");
        ensure!(bad.message().contains("memory.no-such"), "{bad}");
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn unified_names_files_of_the_group() -> Result<()> {
    in_guest("unified_names_files_of_the_group", |bench| {
        let unified =
            |key: &str, value: &str| Resources { unified: [(key.to_owned(), value.to_owned())].into(), ..Default::default() };
        let (pod, id) = bench.limited(unified("memory.high", "50331648"), &["sleep", "1000"])?;
        expect(&bench.leaf(&id), "memory.high", "50331648")?;
        bench.client.remove(&pod)?;
        for (key, value) in [("memory.no-such", "1"), ("memory.high", "much"), ("../memory.max", "1"), ("cgroup.freeze", "1")] {
            let error = bench.refusal(unified(key, value))?;
            ensure!(error.message().contains(key), "{key}={value}: {error}");
            ensure!(error.code() == tonic::Code::InvalidArgument, "{key}={value}: {error}");
        }
        Ok(())
    })
}

#[test]
fn unified_enables_the_controller_that_it_names() -> Result<()> {
    in_guest("unified_enables_the_controller_that_it_names", |bench| {
        let available = read("/sys/fs/cgroup".as_ref(), "cgroup.controllers")?;
        ensure!(available.split(' ').any(|name| name == "misc"), "no misc in {available:?}");
        let (pod, id) = bench.limited(Resources::default(), &["sleep", "1000"])?;
        let leaf = bench.leaf(&id);
        ensure!(!read(&leaf, "cgroup.controllers")?.contains("misc"), "misc is enabled for a container that does not name it");
        let named = |value: &str| Resources { unified: [("misc.max".to_owned(), value.to_owned())].into(), ..Default::default() };
        let request = cri::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(named("no-such-resource 1")),
            ..Default::default()
        };
        // The kernel is asked, and knows no such resource.
        let error = bench.client.update_container_resources(request).expect_err("no such resource");
        ensure!(error.message().contains("misc.max") && !error.message().contains("no such file"), "{error}");
        ensure!(read(&leaf, "cgroup.controllers")?.contains("misc"), "misc is not enabled");
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn a_privileged_container_leaves_the_tree_as_it_is_mounted() -> Result<()> {
    in_guest("a_privileged_container_leaves_the_tree_as_it_is_mounted", |bench| {
        let options = || -> Result<String> {
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            let line = mounts.lines().find(|line| line.contains(" /sys/fs/cgroup ")).context("the tree")?;
            Ok(line.rsplit(' ').next().unwrap_or_default().to_owned())
        };
        windlass_integration::node::run_command("mount", &["-o", "remount,nsdelegate,memory_recursiveprot", "/sys/fs/cgroup"])?;
        let before = options()?;
        ensure!(before.contains("nsdelegate") && before.contains("memory_recursiveprot"), "{before}");
        let mut config = bench.pod();
        config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let pod = bench.client.run(&config)?;
        let limits = Resources { memory_limit_in_bytes: 64 * MIB, ..Default::default() };
        let mut wanted =
            crate::with_resources(windlass_integration::client::container(&config, "main", &["sleep", "1000"]), limits);
        wanted.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let id = bench.client.create(&pod, &config, &wanted)?;
        bench.client.start(&id)?;
        let seen =
            bench.client.shell(&id, "path=$(sed -n s/^0:://p /proc/1/cgroup); echo $path; cat /sys/fs/cgroup$path/memory.max");
        let expected = format!("{}/{id}\n{}", bench.daemon.cgroup, 64 * MIB);
        ensure!(seen.as_ref().is_ok_and(|seen| seen.trim() == expected), "{seen:?}, not {expected}");
        ensure!(options()? == before, "the tree is now mounted with {}", options()?);
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn swap_is_what_is_left_above_memory() -> Result<()> {
    in_guest("swap_is_what_is_left_above_memory", |bench| {
        let both = |memory: i64, swap: i64| Resources {
            memory_limit_in_bytes: memory * MIB,
            memory_swap_limit_in_bytes: swap * MIB,
            ..Default::default()
        };
        let (pod, id) = bench.limited(both(64, 96), &["sleep", "1000"])?;
        expect(&bench.leaf(&id), "memory.swap.max", &(32 * MIB).to_string())?;
        bench.client.remove(&pod)?;
        let (pod, id) = bench.limited(both(64, 64), &["sleep", "1000"])?;
        expect(&bench.leaf(&id), "memory.swap.max", "0")?;
        bench.client.remove(&pod)?;
        // A limit of memory alone leaves none, also when it changes; who names swap itself has what is named.
        let (pod, id) = bench.limited(both(64, 0), &["sleep", "1000"])?;
        let leaf = bench.leaf(&id);
        expect(&leaf, "memory.swap.max", "0")?;
        let update = |linux: Resources| {
            let request =
                cri::UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
            bench.client.update_container_resources(request)
        };
        update(both(96, 0))?;
        expect(&leaf, "memory.swap.max", "0")?;
        update(Resources { unified: [("memory.swap.max".to_owned(), MIB.to_string())].into(), ..both(96, 0) })?;
        expect(&leaf, "memory.swap.max", &MIB.to_string())?;
        update(both(80, 0))?;
        expect(&leaf, "memory.max", &(80 * MIB).to_string())?;
        expect(&leaf, "memory.swap.max", &MIB.to_string())?;
        bench.client.remove(&pod)?;
        let error = bench.refusal(both(64, 32))?;
        ensure!(error.code() == tonic::Code::InvalidArgument && error.message().contains("swap"), "{error}");
        Ok(())
    })
}

#[test]
fn processors_are_those_of_the_set() -> Result<()> {
    in_guest("processors_are_those_of_the_set", |bench| {
        let set = |cpus: &str| Resources { cpuset_cpus: cpus.into(), cpuset_mems: "0".into(), ..Default::default() };
        let (pod, id) = bench.limited(set("0"), &["sleep", "1000"])?;
        let leaf = bench.leaf(&id);
        expect(&leaf, "cpuset.cpus", "0")?;
        expect(&leaf, "cpuset.mems", "0")?;
        bench.client.remove(&pod)?;
        let error = bench.refusal(set("zero"))?;
        ensure!(error.message().contains("cpuset.cpus"), "{error}");
        Ok(())
    })
}

#[test]
fn huge_pages_without_their_controller_are_told() -> Result<()> {
    in_guest("huge_pages_without_their_controller_are_told", |bench| {
        ensure!(!read("/sys/fs/cgroup".as_ref(), "cgroup.controllers")?.contains("hugetlb"), "this kernel has huge pages");
        let limits =
            Resources { hugepage_limits: vec![cri::HugepageLimit { page_size: "2MB".into(), limit: 0 }], ..Default::default() };
        // Kubelet sends a limit for every size that it knows, most of them zero.
        let (pod, id) = bench.limited(limits, &["sleep", "1000"])?;
        let request = cri::ContainerStatusRequest { container_id: id, verbose: true };
        let info = bench.client.container_status(request)?.info;
        ensure!(info.values().any(|text| text.contains("hugetlb")), "{info:?}");
        bench.client.remove(&pod)?;
        Ok(())
    })
}
