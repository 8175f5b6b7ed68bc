//! Kubelet with its cgroups for pods and kinds of pods, and with every figure that it takes from the runtime: in the guest, where the
//! whole of cgroup v2 is.

mod resize;

use crate::{Bench, built, restarts, sleeper, with};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use windlass_integration::{
    daemon::Daemon,
    guest_tests::GuestTests,
    kubelet::{NODE, container_status, pod},
    node,
};

/// Longest run of the tests in the guest.
const GUEST_LIMIT: Duration = Duration::from_secs(600);
/// Kubelet's group of all pods.
const PODS: &str = "/sys/fs/cgroup/kubepods";

static GUEST: GuestTests = GuestTests::some(GUEST_LIMIT, "guest::", || {
    built();
    resize::built()
});

/// The test `name` with a daemon and a kubelet of its own in the guest.
fn in_guest(name: &str, fields: Value, body: impl FnOnce(&mut Bench) -> Result<()> + Send + 'static) -> Result<()> {
    GUEST.test(name, || {
        node::run(|| {
            tell_clock()?;
            let mut bench = Bench::begin(fields)?;
            body(&mut bench)?;
            bench.end()
        })
    })
}

/// Kubelet does not start on a machine that names no clock in /proc/cpuinfo, as this kernel's does not.
fn tell_clock() -> Result<()> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    if !text.contains("cpu MHz") {
        fs::write("/tmp/cpuinfo", format!("{text}cpu MHz\t\t: 2000.000\n"))?;
        node::run_command("mount", &["--bind", "/tmp/cpuinfo", "/proc/cpuinfo"])?;
    }
    Ok(())
}

/// Kubelet's group of a pod.
fn group_of(pod: &Value) -> Result<PathBuf> {
    let class = pod["status"]["qosClass"].as_str().context("a class")?.to_lowercase();
    let uid = pod["metadata"]["annotations"]["kubernetes.io/config.hash"].as_str().context("a uid")?;
    let above = if class == "guaranteed" { PathBuf::from(PODS) } else { Path::new(PODS).join(class) };
    Ok(above.join(format!("pod{uid}")))
}

/// The container's own group below its pod's.
fn leaf_of(pod: &Value, name: &str) -> Result<PathBuf> {
    let status = container_status(pod, name).context("a status")?;
    let id = status["containerID"].as_str().and_then(|id| id.strip_prefix("windlass://")).context("an id")?;
    Ok(group_of(pod)?.join(id))
}

fn read(group: &Path, file: &str) -> Result<String> {
    let path = group.join(file);
    Ok(fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?.trim_end().to_owned())
}

#[test]
fn limits_hold_in_kubelets_own_groups() -> Result<()> {
    in_guest("limits_hold_in_kubelets_own_groups", json!({}), |bench| {
        let limits = json!({ "cpu": "100m", "memory": "64Mi" });
        let requests = json!({ "cpu": "50m", "memory": "32Mi" });
        let guaranteed =
            with(sleeper("guaranteed"), "/spec/containers/0/resources", json!({ "requests": limits, "limits": limits }));
        let burstable = with(sleeper("burstable"), "/spec/containers/0/resources", json!({ "requests": requests }));
        let hungry = with(pod("hungry", ""), "/spec/containers/0/command", json!(["/probe", "hold-mem", "96"]));
        let hungry = with(hungry, "/spec/containers/0/resources", json!({ "limits": { "memory": "64Mi" } }));
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

/// Names that kubelet's own cAdvisor gives for a container on cgroup v2, as dashboards and alerts ask for them. Reads and writes of disks
/// are not among them: the guest's files are on none.
const OF_A_CONTAINER: [&str; 34] = [
    "container_cpu_usage_seconds_total",
    "container_cpu_user_seconds_total",
    "container_cpu_system_seconds_total",
    "container_cpu_cfs_periods_total",
    "container_cpu_cfs_throttled_periods_total",
    "container_cpu_cfs_throttled_seconds_total",
    "container_file_descriptors",
    "container_fs_usage_bytes",
    "container_fs_limit_bytes",
    "container_fs_inodes_free",
    "container_fs_inodes_total",
    "container_last_seen",
    "container_memory_cache",
    "container_memory_failcnt",
    "container_memory_failures_total",
    "container_memory_mapped_file",
    "container_memory_max_usage_bytes",
    "container_memory_rss",
    "container_memory_swap",
    "container_memory_usage_bytes",
    "container_memory_working_set_bytes",
    "container_oom_events_total",
    "container_pressure_cpu_waiting_seconds_total",
    "container_pressure_io_waiting_seconds_total",
    "container_pressure_memory_waiting_seconds_total",
    "container_processes",
    "container_sockets",
    "container_spec_cpu_period",
    "container_spec_cpu_shares",
    "container_spec_memory_limit_bytes",
    "container_spec_memory_swap_limit_bytes",
    "container_start_time_seconds",
    "container_threads",
    "container_threads_max",
];

/// Names that belong to the network, which is the pod's.
const OF_A_POD: [&str; 4] = [
    "container_network_receive_bytes_total",
    "container_network_receive_packets_total",
    "container_network_transmit_bytes_total",
    "container_network_transmit_errors_total",
];

#[test]
fn statistics_through_kubelet_are_complete() -> Result<()> {
    let gate = json!({ "featureGates": { "PodAndContainerStatsFromCRI": true } });
    in_guest("statistics_through_kubelet_are_complete", gate, |bench| {
        let limits = json!({ "limits": { "cpu": "500m", "memory": "128Mi" } });
        let script = "echo a line; dd if=/dev/zero of=/file bs=1M count=8; trap 'exit 0' TERM; while :; do sleep 0.1; done";
        let measured = with(pod("measured", script), "/spec/containers/0/resources", limits);
        let measured = with(measured, "/spec/containers/0/volumeMounts", json!([{ "name": "work", "mountPath": "/work" }]));
        bench.kubelet.place(&with(measured, "/spec/volumes", json!([{ "name": "work", "emptyDir": {} }])))?;
        let pod = bench.kubelet.ready("measured")?;
        bench.eventually("the summary", || {
            let summary: Value = serde_json::from_str(&bench.kubelet.look("/stats/summary")?)?;
            summary_is_complete(&summary, &pod)
        })?;
        bench.eventually("the metrics", || metrics_are_complete(&bench.kubelet.look("/metrics/cadvisor")?))?;
        bench.withdraw(&["measured"])
    })
}

/// Kubelet as it comes takes its metrics from its own cAdvisor, which asks containerd for labels: here it is answered by the daemon.
#[test]
fn a_kubelet_with_its_own_cadvisor_shows_labels() -> Result<()> {
    GUEST.test("a_kubelet_with_its_own_cadvisor_shows_labels", || {
        node::run(|| {
            tell_clock()?;
            let daemon = Daemon::configured(&format!("[cadvisor]\ncontainerd_socket = {CONTAINERD:?}\n"))?;
            let bench = Bench::over(daemon, json!({}))?;
            labels_of_cadvisor(&bench).with_context(|| bench.kubelet.log_of(&["cadvisor", "containerd", "manager.go"]))?;
            bench.end()
        })
    })
}

/// Where cAdvisor looks, whatever kubelet's configuration says.
const CONTAINERD: &str = "/run/containerd/containerd.sock";

fn labels_of_cadvisor(bench: &Bench) -> Result<()> {
    bench.kubelet.place(&pod("labelled", "trap 'exit 0' TERM; while :; do sleep 0.1; done"))?;
    let pod = bench.kubelet.ready("labelled")?;
    let leaf = leaf_of(&pod, "main")?;
    let (id, name) = (leaf.strip_prefix("/sys/fs/cgroup")?.display(), leaf.file_name().context("an id")?.to_string_lossy());
    let of_container = [
        r#"container="main""#.to_owned(),
        format!(r#"id="/{id}""#),
        r#"image="localhost/"#.to_owned(),
        format!(r#"name="{name}""#),
        r#"namespace="default""#.to_owned(),
        format!(r#"pod="labelled-{NODE}""#),
    ];
    let of_pod = [r#"interface="eth0""#, r#"namespace="default""#, r#"container="""#].map(str::to_owned);
    let of_pod: Vec<String> = of_pod.into_iter().chain([format!(r#"pod="labelled-{NODE}""#)]).collect();
    let wanted = [
        ("container_cpu_usage_seconds_total", &of_container[..]),
        ("container_memory_working_set_bytes", &of_container),
        ("container_processes", &of_container),
        ("container_network_receive_bytes_total", &of_pod),
        ("container_network_transmit_packets_total", &of_pod),
    ];
    bench.eventually("the metrics with their labels", || {
        let text = bench.kubelet.look("/metrics/cadvisor")?;
        for (name, labels) in &wanted {
            let lines = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
            let found = lines.filter(|line| labels.iter().all(|label| line.contains(label.as_str()))).count();
            let of_name: Vec<&str> = text.lines().filter(|line| line.starts_with(name) && line.contains("labelled")).collect();
            ensure!(found == 1, "{found} lines of {name} have {labels:?}: {of_name:#?}");
        }
        Ok(())
    })?;
    bench.eventually("the summary", || {
        let summary: Value = serde_json::from_str(&bench.kubelet.look("/stats/summary")?)?;
        let pods = summary["pods"].as_array().context("pods")?;
        let full = format!("labelled-{NODE}");
        let found =
            pods.iter().find(|found| found["podRef"]["name"] == full.as_str()).context("the pod is not in the summary")?;
        for pointer in [
            "/cpu/usageCoreNanoSeconds",
            "/memory/workingSetBytes",
            "/network/rxBytes",
            "/network/txErrors",
            "/containers/0/cpu/usageNanoCores",
            "/containers/0/memory/workingSetBytes",
            "/containers/0/rootfs/usedBytes",
        ] {
            ensure!(found.pointer(pointer).is_some_and(Value::is_number), "no {pointer} in {found}");
        }
        ensure!(found["network"]["name"] == "eth0", "{}", found["network"]);
        Ok(())
    })?;
    bench.withdraw(&["labelled"])
}

/// Fails unless every field that a consumer of the summary reads has a number.
fn summary_is_complete(summary: &Value, pod: &Value) -> Result<()> {
    let name = format!("measured-{NODE}");
    let pods = summary["pods"].as_array().context("pods")?;
    let found = pods.iter().find(|found| found["podRef"]["name"] == name.as_str()).context("the pod is not in the summary")?;
    let uid = &pod["metadata"]["annotations"]["kubernetes.io/config.hash"];
    ensure!(found["podRef"]["uid"] == *uid, "the pod's uid is {}", found["podRef"]["uid"]);
    let container = found["containers"].as_array().and_then(|list| list.first()).context("a container")?;
    ensure!(container["name"] == "main", "{container}");
    let present = |at: &Value, what: &str, pointers: &[&str]| -> Result<()> {
        let missing: Vec<&&str> = pointers.iter().filter(|pointer| !at.pointer(pointer).is_some_and(Value::is_number)).collect();
        ensure!(missing.is_empty(), "{what} has no {missing:?}: {at}");
        Ok(())
    };
    let both = [
        "/cpu/usageNanoCores",
        "/cpu/usageCoreNanoSeconds",
        "/cpu/psi/some/total",
        "/memory/usageBytes",
        "/memory/workingSetBytes",
        "/memory/rssBytes",
        "/memory/pageFaults",
        "/memory/majorPageFaults",
        "/memory/psi/full/total",
        "/io/psi/some/total",
    ];
    present(found, "the pod", &both)?;
    present(container, "the container", &both)?;
    let of_container =
        ["/memory/availableBytes", "/rootfs/usedBytes", "/rootfs/inodesUsed", "/rootfs/capacityBytes", "/logs/usedBytes"];
    present(container, "the container", &of_container)?;
    let of_pod = ["/network/rxBytes", "/network/txBytes", "/network/rxErrors", "/network/txErrors"];
    present(found, "the pod", &of_pod)?;
    present(found, "the pod", &["/process_stats/process_count", "/ephemeral-storage/usedBytes", "/volume/0/usedBytes"])?;
    ensure!(found["network"]["name"] == "eth0", "{}", found["network"]);
    let written = container["rootfs"]["usedBytes"].as_u64().unwrap_or_default();
    ensure!(written >= 8 << 20, "8 MiB are written, {written} bytes are told");
    present(&summary["node"], "the node", &["/runtime/imageFs/usedBytes", "/runtime/containerFs/usedBytes", "/fs/usedBytes"])
}

/// Fails unless each name has a value with the labels of the pod.
fn metrics_are_complete(text: &str) -> Result<()> {
    let pod = [r#"namespace="default""#.to_owned(), format!(r#"pod="measured-{NODE}""#)];
    let container = [r#"container="main""#, r#"image=""#, r#"id="/kubepods/"#, r#"name=""#].map(str::to_owned);
    let has = |name: &str, labels: &mut dyn Iterator<Item = &String>| {
        let labels: Vec<&String> = labels.collect();
        let of_name = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
        text.lines().filter(of_name).any(|line| labels.iter().all(|label| line.contains(label.as_str())))
    };
    let mut missing: Vec<&str> =
        OF_A_CONTAINER.into_iter().filter(|name| !has(name, &mut pod.iter().chain(&container))).collect();
    missing.extend(OF_A_POD.into_iter().filter(|name| !has(name, &mut pod.iter())));
    ensure!(missing.is_empty(), "no {missing:?} with the pod's labels");
    Ok(())
}

/// Static pods count as critical and stay, but kubelet says whom it would take.
#[test]
fn kubelet_finds_the_pod_that_fills_the_disk_by_our_figures() -> Result<()> {
    let gate = json!({ "featureGates": { "PodAndContainerStatsFromCRI": true } });
    in_guest("kubelet_finds_the_pod_that_fills_the_disk_by_our_figures", gate, |bench| {
        let filling = pod("filling", "dd if=/dev/zero of=/file bs=1M count=24; trap 'exit 0' TERM; while :; do sleep 0.1; done");
        let limit = json!({ "limits": { "ephemeral-storage": "8Mi" } });
        for pod in [filling, sleeper("modest")] {
            bench.kubelet.place(&with(pod, "/spec/containers/0/resources", limit.clone()))?;
        }
        let chosen = |name: &str| {
            let pod = format!("pod=\"default/{name}-{NODE}\"");
            bench.kubelet.log().lines().any(|line| line.contains("cannot evict a critical pod") && line.contains(&pod))
        };
        bench.eventually("the choice", || {
            ensure!(chosen("filling"), "kubelet has not chosen the pod that fills the disk");
            Ok(())
        })?;
        ensure!(!chosen("modest"), "kubelet has chosen the modest pod");
        bench.withdraw(&["filling", "modest"])
    })
}
