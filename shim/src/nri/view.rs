//! Pods and containers as plugins are shown them: from their records, and from the configuration that the container was made with.

use crate::{
    container::{self, State},
    node::Node,
    pod,
};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};
use windlass_proto::{
    cri::{self, LinuxContainerResources, NamespaceMode},
    nri::{
        CdiDevice, Container, ContainerState, Hook, Hooks, HugepageLimit, Image, IoPrioClass, LinuxContainer, LinuxCpu,
        LinuxDevice, LinuxDeviceCgroup, LinuxIoPriority, LinuxMemory, LinuxNamespace, LinuxPids, LinuxPodSandbox, LinuxResources,
        LinuxScheduler, LinuxSchedulerPolicy, LinuxSeccomp, LinuxSeccompArg, LinuxSyscall, Mount, OptionalFileMode, OptionalInt,
        OptionalInt64, OptionalUInt32, OptionalUInt64, PodSandbox, PosixRlimit, SecurityProfile, User,
    },
};

pub(super) fn pod(record: &pod::Record) -> PodSandbox {
    let config = &record.config;
    let meta = config.metadata.clone().unwrap_or_default();
    let linux = config.linux.clone().unwrap_or_default();
    let modes = pod::namespace_modes(config);
    let own = |kind: &str, mode: NamespaceMode, path: &Path| {
        let path = path.to_string_lossy().into_owned();
        (mode != NamespaceMode::Node).then(|| LinuxNamespace { r#type: kind.into(), path })
    };
    let namespaces = [
        own("network", modes.network(), &record.netns),
        own("ipc", modes.ipc(), Path::new("")),
        own("uts", modes.network(), Path::new("")),
        (modes.pid() == NamespaceMode::Pod).then(|| LinuxNamespace { r#type: "pid".into(), path: String::new() }),
    ];
    PodSandbox {
        id: record.id.clone(),
        name: meta.name,
        uid: meta.uid,
        namespace: meta.namespace,
        labels: ordered(&config.labels),
        annotations: ordered(&config.annotations),
        runtime_handler: record.runtime_handler.clone(),
        linux: Some(LinuxPodSandbox {
            pod_overhead: linux.overhead.as_ref().map(resources),
            pod_resources: linux.resources.as_ref().map(resources),
            cgroup_parent: linux.cgroup_parent,
            cgroups_path: record.monitor_path(),
            namespaces: namespaces.into_iter().flatten().collect(),
            resources: linux.resources.as_ref().map(resources),
        }),
        // A pod has no process of its own.
        pid: 0,
        ips: record.network.iter().flat_map(|network| &network.ips).map(ToString::to_string).collect(),
    }
}

/// A container with the configuration that its bundle has; less of it where that cannot be read.
pub(super) fn container(node: &Node, record: &container::Record) -> Container {
    let bundle = node.container_directory(&record.id).join("config.json");
    let mut spec: Value = std::fs::read(&bundle).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    // Limits may have changed since.
    if record.more_limits.is_object() && spec.is_object() {
        container::overlay(&mut spec["linux"]["resources"], record.more_limits.clone());
    }
    let mut shown = of_spec(&record.id, &record.pod_id, &record.config, &spec);
    let (state, pid) = match &record.state {
        State::Created { pid } => (ContainerState::ContainerCreated, *pid),
        State::Running { pid, .. } => (ContainerState::ContainerRunning, *pid),
        State::Exited { .. } => (ContainerState::ContainerStopped, 0),
    };
    shown.set_state(state);
    shown.pid = u32::try_from(pid).unwrap_or(0);
    shown.created_at = record.created_at_ns;
    shown.started_at = record.state.started_at_ns();
    if let Some((exit, reason, message)) = record.state.end() {
        shown.finished_at = exit.finished_at_ns;
        shown.exit_code = exit.code;
        shown.status_reason = reason.to_owned();
        shown.status_message = message.to_owned();
    }
    shown.image = Some(image(&record.image_name, &record.image_ref, &record.image_id));
    if let Some(asked) = record.config.linux.as_ref().and_then(|linux| linux.resources.as_ref()) {
        let of_bundle = shown.linux.get_or_insert_default().resources.take().unwrap_or_default();
        let now = resources(asked);
        let next = LinuxResources {
            memory: Some(LinuxMemory {
                limit: now.memory.unwrap_or_default().limit,
                swap: now.memory.unwrap_or_default().swap,
                ..of_bundle.memory.unwrap_or_default()
            }),
            cpu: now.cpu,
            hugepage_limits: now.hugepage_limits,
            unified: now.unified,
            ..of_bundle
        };
        shown.linux.get_or_insert_default().resources = Some(next);
    }
    shown
}

/// An image by name, by the digest that it has in its repository, and by its configuration's.
pub(crate) fn image(name: &str, reference: &str, id: &str) -> Image {
    let digest = reference.split_once('@').map(|(_, digest)| digest).unwrap_or_default();
    let config_digest = if id.contains(':') { id.to_owned() } else { format!("sha256:{id}") };
    Image { name: name.into(), digest: digest.into(), config_digest }
}

/// A container as its configuration has it.
pub(crate) fn of_spec(id: &str, pod_id: &str, config: &cri::ContainerConfig, spec: &Value) -> Container {
    let (process, linux) = (&spec["process"], &spec["linux"]);
    let user = &process["user"];
    Container {
        id: id.into(),
        pod_sandbox_id: pod_id.into(),
        name: config.metadata.as_ref().map(|meta| meta.name.clone()).unwrap_or_default(),
        state: ContainerState::ContainerUnknown.into(),
        labels: ordered(&config.labels),
        annotations: string_map(&spec["annotations"]),
        args: strings(&process["args"]),
        env: strings(&process["env"]),
        mounts: list(&spec["mounts"], mount),
        hooks: Some(hooks(&spec["hooks"])),
        linux: Some(LinuxContainer {
            namespaces: list(&linux["namespaces"], |one| LinuxNamespace { r#type: text(&one["type"]), path: text(&one["path"]) }),
            devices: list(&linux["devices"], device),
            resources: Some(of_oci(&linux["resources"])),
            oom_score_adj: process["oomScoreAdj"].as_i64().map(|value| OptionalInt { value }),
            cgroups_path: text(&linux["cgroupsPath"]),
            io_priority: io_priority(&process["ioPriority"]),
            seccomp_profile: seccomp_profile(config),
            seccomp_policy: seccomp_policy(&linux["seccomp"]),
            sysctl: string_map(&linux["sysctl"]),
            net_devices: BTreeMap::new(),
            scheduler: scheduler(&process["scheduler"]),
            rdt: None,
        }),
        rlimits: list(&process["rlimits"], |one| PosixRlimit {
            r#type: text(&one["type"]),
            hard: one["hard"].as_u64().unwrap_or(0),
            soft: one["soft"].as_u64().unwrap_or(0),
        }),
        cdi_devices: config.cdi_devices.iter().map(|device| CdiDevice { name: device.name.clone() }).collect(),
        user: Some(User {
            uid: small(&user["uid"]).unwrap_or(0),
            gid: small(&user["gid"]).unwrap_or(0),
            additional_gids: list(&user["additionalGids"], |gid| small(gid).unwrap_or(0)),
        }),
        ..Container::default()
    }
}

/// The CRI's numbers as NRI's; 0 and empty are "not given" in the CRI.
pub(super) fn resources(asked: &LinuxContainerResources) -> LinuxResources {
    let some = |value: i64| (value != 0).then_some(OptionalInt64 { value });
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value != 0).map(|value| OptionalUInt64 { value });
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: some(asked.memory_limit_in_bytes),
            swap: some(asked.memory_swap_limit_in_bytes),
            ..LinuxMemory::default()
        }),
        cpu: Some(LinuxCpu {
            shares: positive(asked.cpu_shares),
            quota: some(asked.cpu_quota),
            period: positive(asked.cpu_period),
            cpus: asked.cpuset_cpus.clone(),
            mems: asked.cpuset_mems.clone(),
            ..LinuxCpu::default()
        }),
        hugepage_limits: asked
            .hugepage_limits
            .iter()
            .map(|limit| HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit })
            .collect(),
        unified: ordered(&asked.unified),
        ..LinuxResources::default()
    }
}

/// `linux.resources` of an OCI configuration.
fn of_oci(oci: &Value) -> LinuxResources {
    let int = |value: &Value| value.as_i64().map(|value| OptionalInt64 { value });
    let unsigned = |value: &Value| value.as_u64().map(|value| OptionalUInt64 { value });
    let (memory, cpu) = (&oci["memory"], &oci["cpu"]);
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: int(&memory["limit"]),
            reservation: int(&memory["reservation"]),
            swap: int(&memory["swap"]),
            ..LinuxMemory::default()
        }),
        cpu: Some(LinuxCpu {
            shares: unsigned(&cpu["shares"]),
            quota: int(&cpu["quota"]),
            period: unsigned(&cpu["period"]),
            realtime_runtime: None,
            realtime_period: None,
            cpus: text(&cpu["cpus"]),
            mems: text(&cpu["mems"]),
        }),
        hugepage_limits: list(&oci["hugepageLimits"], |one| HugepageLimit {
            page_size: text(&one["pageSize"]),
            limit: one["limit"].as_u64().unwrap_or(0),
        }),
        unified: string_map(&oci["unified"]),
        devices: list(&oci["devices"], |one| LinuxDeviceCgroup {
            allow: one["allow"].as_bool().unwrap_or(false),
            r#type: text(&one["type"]),
            major: int(&one["major"]),
            minor: int(&one["minor"]),
            access: text(&one["access"]),
        }),
        pids: oci["pids"]["limit"].as_i64().map(|limit| LinuxPids { limit }),
        ..LinuxResources::default()
    }
}

fn mount(one: &Value) -> Mount {
    Mount {
        destination: text(&one["destination"]),
        r#type: text(&one["type"]),
        source: text(&one["source"]),
        options: strings(&one["options"]),
    }
}

fn device(one: &Value) -> LinuxDevice {
    let small = |value: &Value| small(value).map(|value| OptionalUInt32 { value });
    LinuxDevice {
        path: text(&one["path"]),
        r#type: text(&one["type"]),
        major: one["major"].as_i64().unwrap_or(0),
        minor: one["minor"].as_i64().unwrap_or(0),
        file_mode: one["fileMode"].as_u64().and_then(|mode| u32::try_from(mode).ok()).map(|value| OptionalFileMode { value }),
        uid: small(&one["uid"]),
        gid: small(&one["gid"]),
    }
}

fn hooks(all: &Value) -> Hooks {
    let of = |stage: &str| {
        list(&all[stage], |one| Hook {
            path: text(&one["path"]),
            args: strings(&one["args"]),
            env: strings(&one["env"]),
            timeout: one["timeout"].as_i64().map(|value| OptionalInt { value }),
        })
    };
    Hooks {
        prestart: of("prestart"),
        create_runtime: of("createRuntime"),
        create_container: of("createContainer"),
        start_container: of("startContainer"),
        poststart: of("poststart"),
        poststop: of("poststop"),
    }
}

fn io_priority(oci: &Value) -> Option<LinuxIoPriority> {
    let class = IoPrioClass::from_str_name(oci["class"].as_str()?)?;
    Some(LinuxIoPriority { class: class.into(), priority: signed(&oci["priority"]) })
}

fn scheduler(oci: &Value) -> Option<LinuxScheduler> {
    let policy = LinuxSchedulerPolicy::from_str_name(oci["policy"].as_str()?)?;
    let ns = |key: &str| oci[key].as_u64().unwrap_or(0);
    Some(LinuxScheduler {
        policy: policy.into(),
        nice: signed(&oci["nice"]),
        priority: signed(&oci["priority"]),
        flags: Vec::new(),
        runtime: ns("runtime"),
        deadline: ns("deadline"),
        period: ns("period"),
    })
}

fn seccomp_profile(config: &cri::ContainerConfig) -> Option<SecurityProfile> {
    let asked = config.linux.as_ref()?.security_context.as_ref()?.seccomp.clone()?;
    Some(SecurityProfile { profile_type: asked.profile_type, localhost_ref: asked.localhost_ref })
}

fn seccomp_policy(oci: &Value) -> Option<LinuxSeccomp> {
    let errno = |value: &Value| small(value).map(|value| OptionalUInt32 { value });
    oci.is_object().then(|| LinuxSeccomp {
        default_action: text(&oci["defaultAction"]),
        default_errno: errno(&oci["defaultErrnoRet"]),
        architectures: strings(&oci["architectures"]),
        flags: strings(&oci["flags"]),
        listener_path: String::new(),
        listener_metadata: String::new(),
        syscalls: list(&oci["syscalls"], |one| LinuxSyscall {
            names: strings(&one["names"]),
            action: text(&one["action"]),
            errno_ret: errno(&one["errnoRet"]),
            args: list(&one["args"], |argument| LinuxSeccompArg {
                index: small(&argument["index"]).unwrap_or(0),
                value: argument["value"].as_u64().unwrap_or(0),
                value_two: argument["valueTwo"].as_u64().unwrap_or(0),
                op: text(&argument["op"]),
            }),
        }),
    })
}

fn ordered(map: &std::collections::HashMap<String, String>) -> BTreeMap<String, String> {
    map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn signed(value: &Value) -> i32 {
    value.as_i64().and_then(|value| i32::try_from(value).ok()).unwrap_or(0)
}

fn small(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|value| u32::try_from(value).ok())
}

fn list<T>(value: &Value, of: impl Fn(&Value) -> T) -> Vec<T> {
    value.as_array().into_iter().flatten().map(of).collect()
}

fn strings(value: &Value) -> Vec<String> {
    list(value, text)
}

fn string_map(value: &Value) -> BTreeMap<String, String> {
    value.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), text(value))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn priorities_are_shown_as_the_configuration_has_them() {
        let spec = json!({ "process": {
            "ioPriority": { "class": "IOPRIO_CLASS_BE", "priority": 3 },
            "scheduler": { "policy": "SCHED_BATCH", "nice": -5 },
        } });
        let linux = of_spec("c", "p", &cri::ContainerConfig::default(), &spec).linux.expect("linux");
        let io = linux.io_priority.expect("shown");
        assert_eq!((io.class(), io.priority), (IoPrioClass::IoprioClassBe, 3));
        let scheduler = linux.scheduler.expect("shown");
        assert_eq!((scheduler.policy(), scheduler.nice, scheduler.priority), (LinuxSchedulerPolicy::SchedBatch, -5, 0));
        let bare = of_spec("c", "p", &cri::ContainerConfig::default(), &json!({})).linux.expect("linux");
        assert!(bare.io_priority.is_none() && bare.scheduler.is_none());
    }
}
