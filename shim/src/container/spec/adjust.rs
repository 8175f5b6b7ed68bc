//! What plugins of NRI change of a container, put into its configuration. What this runtime has no way to give is refused by name, and
//! nothing is left out.

use super::{Input, cdi, classes, labels, mounts, paths, resources, seccomp};
use crate::{
    cgroup::Tree,
    config::{Config, ULIMITS},
    error::{Error, Result},
};
use serde_json::{Map, Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};
use windlass_proto::{
    cri::{HugepageLimit, LinuxContainerResources},
    nri::{
        ContainerAdjustment, Hook, Hooks, IoPrioClass, KeyValue, LinuxContainerAdjustment, LinuxDevice, LinuxNamespace,
        LinuxResources, LinuxSchedulerPolicy, LinuxSeccomp, Mount, OptionalInt64, PosixRlimit,
    },
};

/// A change of limits: what the CRI has a field for, and the rest as `linux.resources` of the OCI.
pub(crate) struct Limits {
    pub(crate) cri: LinuxContainerResources,
    pub(crate) more: Value,
}

/// What an adjustment comes to beside the configuration.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Limits that now hold instead of the request's.
    pub(crate) limits: Option<LinuxContainerResources>,
    /// Controllers for them that this host's tree lacks.
    pub(crate) not_enforced: Vec<String>,
    /// Volumes that a plugin wants relabelled.
    pub(crate) relabel: Vec<PathBuf>,
}

/// Numbers of the devices that every container has: null, zero, full, random, urandom, tty, ptmx and terminals (any minor number).
const STANDARD: [(i64, Option<i64>); 8] =
    [(1, Some(3)), (1, Some(5)), (1, Some(7)), (1, Some(8)), (1, Some(9)), (5, Some(0)), (5, Some(2)), (136, None)];

/// The name, and whether it is to be removed.
fn removal(name: &str) -> (&str, bool) {
    name.strip_prefix('-').map_or((name, false), |name| (name, true))
}

/// Applies all of it. Blocks.
pub(crate) fn adjust(spec: &mut Value, adjustment: &ContainerAdjustment, input: &Input) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    for (marked, value) in &adjustment.annotations {
        match removal(marked) {
            (name, true) => drop(spec["annotations"].as_object_mut().and_then(|all| all.remove(name))),
            (name, false) => spec["annotations"][name] = json!(value),
        }
    }
    environment(spec, &adjustment.env)?;
    if !adjustment.args.is_empty() {
        if adjustment.args.first().is_some_and(String::is_empty) {
            return Err(Error::invalid("args: the program's name is empty"));
        }
        spec["process"]["args"] = json!(adjustment.args);
    }
    adjustment.hooks.as_ref().map_or(Ok(()), |hooks| add_hooks(spec, hooks))?;
    let names: Vec<String> = adjustment.cdi_devices.iter().map(|device| device.name.clone()).collect();
    cdi::inject(spec, input, &names, "CDI_devices")?;
    if let Some(linux) = &adjustment.linux {
        linux_of(spec, linux, input, &mut outcome)?;
    }
    rlimits(spec, &adjustment.rlimits)?;
    outcome.relabel = add_mounts(spec, &adjustment.mounts, input)?;
    Ok(outcome)
}

fn environment(spec: &mut Value, given: &[KeyValue]) -> Result<()> {
    for variable in given {
        let (key, removed) = removal(&variable.key);
        if key.is_empty() || key.contains(['=', '\0']) || variable.value.contains('\0') {
            return Err(Error::invalid(format!("env: {:?} is not a variable", variable.key)));
        }
        let prefix = format!("{key}=");
        let entry = (!removed).then(|| json!(format!("{prefix}{}", variable.value)));
        cdi::change(&mut spec["process"]["env"], |list| {
            let at = list.iter().position(|have| have.as_str().is_some_and(|have| have.starts_with(&prefix)));
            match (at, entry) {
                (Some(at), Some(entry)) => list[at] = entry,
                (Some(at), None) => drop(list.remove(at)),
                (None, Some(entry)) => list.push(entry),
                (None, None) => {}
            }
        });
    }
    Ok(())
}

fn add_hooks(spec: &mut Value, hooks: &Hooks) -> Result<()> {
    for (stage, given) in [
        ("prestart", &hooks.prestart),
        ("createRuntime", &hooks.create_runtime),
        ("createContainer", &hooks.create_container),
        ("startContainer", &hooks.start_container),
        ("poststart", &hooks.poststart),
        ("poststop", &hooks.poststop),
    ] {
        if given.is_empty() {
            continue;
        }
        let made: Vec<Value> = given.iter().map(|one| hook(stage, one)).collect::<Result<_>>()?;
        cdi::change(&mut spec["hooks"][stage], |list| list.extend(made));
    }
    Ok(())
}

fn hook(stage: &str, given: &Hook) -> Result<Value> {
    paths::check(&format!("hooks.{stage}: path"), &given.path)?;
    let mut made = json!({ "path": given.path, "args": given.args, "env": given.env });
    if let Some(timeout) = &given.timeout {
        if timeout.value <= 0 {
            return Err(Error::invalid(format!("hooks.{stage}: timeout {} of {} is not positive", timeout.value, given.path)));
        }
        made["timeout"] = json!(timeout.value);
    }
    Ok(made)
}

fn rlimits(spec: &mut Value, given: &[PosixRlimit]) -> Result<()> {
    for limit in given {
        let name = limit.r#type.strip_prefix("RLIMIT_").map(str::to_lowercase).unwrap_or_default();
        if !ULIMITS.contains(&name.as_str()) {
            return Err(Error::invalid(format!(
                "rlimits: type {:?} is not RLIMIT_ and one of {}",
                limit.r#type,
                ULIMITS.join(", ")
            )));
        }
        if limit.soft > limit.hard {
            return Err(Error::invalid(format!("rlimits: {}: soft {} is above hard {}", limit.r#type, limit.soft, limit.hard)));
        }
        cdi::change(&mut spec["process"]["rlimits"], |list| {
            list.retain(|have| have["type"] != limit.r#type.as_str());
            list.push(json!({ "type": limit.r#type, "soft": limit.soft, "hard": limit.hard }));
        });
    }
    Ok(())
}

fn unserved(field: &str) -> Error {
    Error::unimplemented(format!("linux.{field}: this runtime does not serve it"))
}

fn linux_of(spec: &mut Value, linux: &LinuxContainerAdjustment, input: &Input, outcome: &mut Outcome) -> Result<()> {
    if linux.memory_policy.is_some() {
        return Err(unserved("memory_policy"));
    }
    if linux.net_devices.keys().any(|name| !removal(name).1) {
        return Err(unserved("net_devices"));
    }
    let rdt = linux.rdt.clone().unwrap_or_default();
    if rdt.clos_id.is_some() || rdt.schemata.is_some() || rdt.enable_monitoring.is_some_and(|on| on.value) {
        return Err(unserved("rdt"));
    }
    if !linux.cgroups_path.is_empty() && spec["linux"]["cgroupsPath"] != linux.cgroups_path.as_str() {
        return Err(unserved("cgroups_path"));
    }
    priorities(spec, linux)?;
    linux.devices.iter().try_for_each(|given| device(spec, given))?;
    if let Some(score) = &linux.oom_score_adj {
        if !(-1000..=1000).contains(&score.value) {
            return Err(Error::invalid(format!("linux.oom_score_adj {} is not between -1000 and 1000", score.value)));
        }
        spec["process"]["oomScoreAdj"] = json!(score.value);
    }
    if let Some(policy) = &linux.seccomp_policy {
        spec["linux"]["seccomp"] = seccomp_policy(policy)?;
    }
    linux.namespaces.iter().try_for_each(|given| namespace(spec, given))?;
    for (marked, value) in &linux.sysctl {
        match removal(marked) {
            (name, true) => drop(spec["linux"]["sysctl"].as_object_mut().and_then(|all| all.remove(name))),
            (name, false) => spec["linux"]["sysctl"][name] = json!(value),
        }
    }
    let Some(given) = &linux.resources else { return Ok(()) };
    device_rules(spec, given)?;
    let Limits { cri, more } = limits(given, &input.node.config)?;
    let mut now = input.config.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
    crate::container::merge(&mut now, cri);
    if given.memory.as_ref().is_some_and(|memory| memory.limit.is_some() && memory.swap.is_none()) {
        // No swap beyond a limit that says nothing of it, as other runtimes have it.
        now.memory_swap_limit_in_bytes = now.memory_limit_in_bytes;
    }
    let rules = spec["linux"]["resources"]["devices"].take();
    let block_io = spec["linux"]["resources"]["blockIO"].take();
    let mut all = serde_json::to_value(resources::of_container(&now)?).map_err(super::encode)?;
    all["devices"] = rules;
    all["blockIO"] = block_io;
    outcome.not_enforced = resources::not_enforced(&now, &input.node.tree);
    outcome.not_enforced.extend(more_missing(&more, &input.node.tree));
    overlay(&mut all, more);
    spec["linux"]["resources"] = all;
    outcome.limits = Some(now);
    Ok(())
}

fn priorities(spec: &mut Value, linux: &LinuxContainerAdjustment) -> Result<()> {
    if let Some(io) = &linux.io_priority {
        let class = IoPrioClass::try_from(io.class).map_err(|error| Error::invalid(format!("linux.io_priority: {error}")))?;
        spec["process"]["ioPriority"] = match class {
            IoPrioClass::IoprioClassNone => Value::Null,
            class => json!({ "class": class.as_str_name(), "priority": io.priority }),
        };
    }
    let Some(scheduler) = &linux.scheduler else { return Ok(()) };
    let policy =
        LinuxSchedulerPolicy::try_from(scheduler.policy).map_err(|error| Error::invalid(format!("linux.scheduler: {error}")))?;
    if !scheduler.flags.is_empty() {
        return Err(unserved("scheduler.flags"));
    }
    spec["process"]["scheduler"] = match policy {
        LinuxSchedulerPolicy::SchedNone => Value::Null,
        policy => json!({
            "policy": policy.as_str_name(), "nice": scheduler.nice, "priority": scheduler.priority,
            "runtime": scheduler.runtime, "deadline": scheduler.deadline, "period": scheduler.period,
        }),
    };
    Ok(())
}

fn device(spec: &mut Value, given: &LinuxDevice) -> Result<()> {
    let (path, removed) = removal(&given.path);
    if !removed {
        paths::check("linux.devices: path", path)?;
    }
    cdi::change(&mut spec["linux"]["devices"], |list| list.retain(|have| have["path"] != path));
    if removed {
        return Ok(());
    }
    if !["b", "c", "u", "p"].contains(&given.r#type.as_str()) {
        return Err(Error::invalid(format!("linux.devices: {path}: type {:?} is none of b, c, u and p", given.r#type)));
    }
    let mut made = json!({ "path": path, "type": given.r#type, "major": given.major, "minor": given.minor });
    for (key, value) in [
        ("fileMode", given.file_mode.as_ref().map(|mode| mode.value & 0o7777)),
        ("uid", given.uid.as_ref().map(|id| id.value)),
        ("gid", given.gid.as_ref().map(|id| id.value)),
    ] {
        if let Some(value) = value {
            made[key] = json!(value);
        }
    }
    cdi::change(&mut spec["linux"]["devices"], |list| list.push(made));
    if given.r#type != "p" {
        // Making nodes is allowed to all anyway.
        let rule = json!({ "allow": true, "type": given.r#type, "major": given.major, "minor": given.minor, "access": "rw" });
        cdi::change(&mut spec["linux"]["resources"]["devices"], |rules| rules.push(rule));
    }
    Ok(())
}

fn device_rules(spec: &mut Value, given: &LinuxResources) -> Result<()> {
    for rule in &given.devices {
        let invalid = |field: &str, value: &str| {
            Error::invalid(format!("linux.resources.devices: {field} {value:?} is not of a rule for devices"))
        };
        if !["", "a", "b", "c", "u"].contains(&rule.r#type.as_str()) {
            return Err(invalid("type", &rule.r#type));
        }
        if rule.access.chars().any(|c| !"rwm".contains(c)) {
            return Err(invalid("access", &rule.access));
        }
        let number = |value: &Option<OptionalInt64>| value.as_ref().map(|value| value.value).filter(|value| *value >= 0);
        if let (false, Some(major)) = (rule.allow, number(&rule.major))
            && ["", "a", "c", "u"].contains(&rule.r#type.as_str())
            && STANDARD
                .iter()
                .any(|own| own.0 == major && number(&rule.minor).is_none_or(|minor| own.1.is_none_or(|own| own == minor)))
        {
            let minor = number(&rule.minor).map_or("*".to_owned(), |minor| minor.to_string());
            return Err(Error::unimplemented(format!("linux.resources.devices: every container has device c {major}:{minor}")));
        }
        let mut made = json!({ "allow": rule.allow, "access": rule.access });
        if !rule.r#type.is_empty() {
            made["type"] = json!(rule.r#type);
        }
        for (key, value) in [("major", &rule.major), ("minor", &rule.minor)] {
            if let Some(value) = value {
                made[key] = json!(value.value);
            }
        }
        cdi::change(&mut spec["linux"]["resources"]["devices"], |rules| rules.push(made));
    }
    Ok(())
}

/// A container's namespaces are its pod's, which the pod's monitor holds.
fn namespace(spec: &Value, given: &LinuxNamespace) -> Result<()> {
    let (kind, removed) = removal(&given.r#type);
    let have = spec["linux"]["namespaces"].as_array().into_iter().flatten().find(|have| have["type"] == kind);
    let same = match (have, removed) {
        (None, true) => true,
        (Some(have), false) => have["path"].as_str().unwrap_or_default() == given.path,
        _ => false,
    };
    if same {
        return Ok(());
    }
    Err(Error::unimplemented(format!("linux.namespaces: {:?}: a container has the namespaces of its pod", given.r#type)))
}

fn seccomp_policy(given: &LinuxSeccomp) -> Result<Value> {
    let invalid = |why: String| Error::invalid(format!("linux.seccomp_policy: {why}"));
    if !given.listener_path.is_empty() {
        return Err(Error::unimplemented("linux.seccomp_policy.listener_path: no agent is notified"));
    }
    let mut policy = json!({ "defaultAction": given.default_action, "architectures": given.architectures, "flags": given.flags });
    if let Some(errno) = &given.default_errno {
        policy["defaultErrnoRet"] = json!(errno.value);
    }
    let entries = given.syscalls.iter().map(|one| {
        let arguments = one.args.iter().map(
            |argument| json!({ "index": argument.index, "value": argument.value, "valueTwo": argument.value_two, "op": argument.op }),
        );
        let mut entry = json!({ "names": one.names, "action": one.action, "args": arguments.collect::<Vec<_>>() });
        if let Some(errno) = &one.errno_ret {
            entry["errnoRet"] = json!(errno.value);
        }
        entry
    });
    policy["syscalls"] = entries.collect();
    seccomp::parse(policy.to_string().as_bytes()).map_err(invalid)
}

/// Limits as a plugin gives them. An absent one stays as it is.
pub(crate) fn limits(given: &LinuxResources, config: &Config) -> Result<Limits> {
    let number = |field: &str, value: u64| {
        i64::try_from(value).map_err(|_| Error::invalid(format!("linux.resources.{field} {value} is too large")))
    };
    let memory = given.memory.unwrap_or_default();
    let cpu = given.cpu.clone().unwrap_or_default();
    let cri = LinuxContainerResources {
        cpu_period: number("cpu.period", cpu.period.map_or(0, |value| value.value))?,
        cpu_quota: cpu.quota.map_or(0, |value| value.value),
        cpu_shares: number("cpu.shares", cpu.shares.map_or(0, |value| value.value))?,
        memory_limit_in_bytes: memory.limit.as_ref().map_or(0, |value| value.value),
        memory_swap_limit_in_bytes: memory.swap.map_or(0, |value| value.value),
        oom_score_adj: 0,
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        hugepage_limits: given
            .hugepage_limits
            .iter()
            .map(|limit| HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit })
            .collect(),
        unified: given.unified.clone().into_iter().collect(),
    };
    if memory.use_hierarchy.is_some_and(|on| !on.value) {
        return Err(Error::unimplemented("linux.resources.memory.use_hierarchy: false is not of cgroup v2"));
    }
    if given.rdt_class.as_ref().is_some_and(|class| !class.value.is_empty()) {
        return Err(Error::unimplemented("linux.resources.rdt_class: classes of Intel RDT are not served"));
    }
    let mut more = json!({});
    for (group, key, value) in [
        ("memory", "reservation", memory.reservation.map(|value| json!(value.value))),
        ("memory", "kernel", memory.kernel.map(|value| json!(value.value))),
        ("memory", "kernelTCP", memory.kernel_tcp.map(|value| json!(value.value))),
        ("memory", "swappiness", memory.swappiness.map(|value| json!(value.value))),
        ("memory", "disableOOMKiller", memory.disable_oom_killer.map(|value| json!(value.value))),
        ("cpu", "realtimeRuntime", cpu.realtime_runtime.map(|value| json!(value.value))),
        ("cpu", "realtimePeriod", cpu.realtime_period.map(|value| json!(value.value))),
        ("pids", "limit", given.pids.as_ref().map(|pids| json!(if pids.limit > 0 { pids.limit } else { -1 }))),
    ] {
        if let Some(value) = value {
            more[group][key] = value;
        }
    }
    if let Some(class) = &given.blockio_class {
        more["blockIO"] = if class.value.is_empty() { Value::Null } else { classes::block_io_class(config, &class.value)? };
    }
    Ok(Limits { cri, more })
}

/// Names of the controllers for limits beside the CRI's that this host's tree lacks.
pub(crate) fn more_missing(more: &Value, tree: &Tree) -> Vec<String> {
    let wanted = [
        ("pids", more["pids"]["limit"].as_i64().is_some_and(|limit| limit > 0)),
        ("memory", more["memory"]["reservation"].as_i64().is_some_and(|limit| limit > 0)),
        ("io", more["blockIO"].is_object()),
    ];
    wanted.into_iter().filter(|(name, wanted)| *wanted && !tree.has(name)).map(|(name, _)| name.to_owned()).collect()
}

/// Lays one over the other, object by object.
pub(crate) fn overlay(under: &mut Value, over: Value) {
    match (under, over) {
        (Value::Object(under), Value::Object(over)) => {
            for (key, value) in over {
                overlay(under.entry(key).or_insert_with(|| Value::Object(Map::new())), value);
            }
        }
        (under, over) => *under = over,
    }
}

/// Volumes to be relabelled.
fn add_mounts(spec: &mut Value, given: &[Mount], input: &Input) -> Result<Vec<PathBuf>> {
    let mut relabel = Vec::new();
    for one in given {
        let (destination, removed) = removal(&one.destination);
        if !removed {
            paths::check("mounts: destination", destination)?;
        }
        let target = mounts::normal(destination);
        cdi::change(&mut spec["mounts"], |list| {
            list.retain(|have| have["destination"].as_str().map(mounts::normal).as_ref() != Some(&target));
        });
        if removed {
            continue;
        }
        if target == "/" || destination.split('/').any(|part| part == "..") {
            return Err(Error::invalid(format!("mounts: destination {destination:?} is not plain and below the root")));
        }
        let (made, source) = mount(spec, one, input)?;
        if one.options.iter().any(|option| option == "relabel") && !labels(input)?.file.is_empty() {
            relabel.extend(source);
        }
        cdi::change(&mut spec["mounts"], |list| list.push(made));
    }
    if !given.is_empty() {
        cdi::sort_mounts(spec);
    }
    Ok(relabel)
}

/// A mount, and the place on the host that it shows, if it shows any.
fn mount(spec: &mut Value, given: &Mount, input: &Input) -> Result<(Value, Option<PathBuf>)> {
    let mut options: Vec<&str> = given.options.iter().map(String::as_str).filter(|option| *option != "relabel").collect();
    let bind = given.r#type == "bind" || options.iter().any(|option| ["bind", "rbind"].contains(option));
    if !bind {
        let made = json!({ "destination": given.destination, "type": given.r#type, "source": given.source, "options": options });
        return Ok((made, None));
    }
    let named = format!("mounts: source {:?} of {}", given.source, given.destination);
    input.looking.at(&named, Path::new(&given.source))?;
    let source = fs::canonicalize(&given.source).map_err(|error| Error::invalid(format!("{named}: {error}")))?;
    if !options.iter().any(|option| ["bind", "rbind"].contains(option)) {
        options.insert(0, "rbind");
    }
    let propagation = ["rshared", "shared", "rslave", "slave", "rprivate", "private", "runbindable", "unbindable"];
    let asked = options.iter().rev().find(|option| propagation.contains(option)).copied();
    let root = spec["linux"]["rootfsPropagation"].as_str().map(str::to_owned);
    let passed_on: Option<(&[&str], &str)> = match asked {
        Some("rshared" | "shared") => Some((&["shared:"], "rshared")),
        Some("rslave" | "slave") => {
            Some((&["shared:", "master:"], if root.as_deref() == Some("rshared") { "rshared" } else { "rslave" }))
        }
        Some(_) => None,
        None => {
            options.push("rprivate");
            None
        }
    };
    if let Some((needed, root)) = passed_on {
        if root == "rshared" && input.users()?.is_some() {
            return Err(Error::invalid(format!(
                "mounts: {}: a pod with users of its own passes no mounts on",
                given.destination
            )));
        }
        mounts::check_shared(&source, needed).map_err(|error| error.during(format_args!("mounts: {}", given.destination)))?;
        spec["linux"]["rootfsPropagation"] = json!(root);
    }
    let made = json!({ "destination": given.destination, "type": "bind", "source": super::text(&source), "options": options });
    Ok((made, Some(source)))
}
