//! The OCI runtime configuration of a container, from the CRI's request, the image and the pod. Reads device nodes and mount sources of the
//! host, changes nothing. Every field that is not applied yet and would make the container weaker is refused by name.

mod adjust;
mod annotations;
mod cdi;
mod classes;
mod devices;
mod mounts;
mod paths;
mod resources;
mod seccomp;
mod seccomp_default;
mod security;

pub(crate) use adjust::{Outcome, adjust, limits, more_missing, overlay};
pub(crate) use annotations::of_sandbox as annotations_of_pod;
pub(super) use mounts::{POD_FILES, normal};
pub(crate) use resources::{
    SWAP_KEY, not_enforced as missing_controllers, of_container as limits_of_container, refuse_missing, resources,
};

use super::{declared::Declared, identity::Identity, lookup::Looking, text};
use crate::{
    config::Ulimit,
    error::{Error, Result, known},
    image::Image,
    node::Node,
    pod::{
        self,
        userns::{self, Users},
    },
    selinux::Labels,
};
use oci_spec::runtime::Spec;
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use windlass_proto::cri::{
    ContainerConfig, IdMapping, LinuxContainerSecurityContext, MountPropagation, NamespaceMode, NamespaceOption, Signal,
};

/// What a container's configuration is made from.
pub(super) struct Input {
    pub node: Arc<Node>,
    pub pod: pod::Record,
    pub id: String,
    pub config: ContainerConfig,
    pub image: Arc<Image>,
    pub identity: Identity,
    /// Volumes of the image that are mounted.
    pub declared: Vec<Declared>,
    /// The bundle.
    pub directory: PathBuf,
    /// Told of each path before it is looked at.
    pub looking: Looking,
}

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

impl Input {
    fn security(&self) -> LinuxContainerSecurityContext {
        self.config.linux.as_ref().and_then(|linux| linux.security_context.clone()).unwrap_or_default()
    }

    fn namespaces(&self) -> NamespaceOption {
        self.security().namespace_options.unwrap_or_else(|| pod::namespace_modes(&self.pod.config))
    }

    /// Users of the container's own.
    pub(super) fn users(&self) -> Result<Option<Users>> {
        userns::of(&self.namespaces())
    }

    fn privileged(&self) -> bool {
        self.security().privileged
    }
}

/// Ids that the pod's user namespace does not have cannot be taken.
fn check_identity(identity: &Identity, users: Option<Users>) -> Result<()> {
    let Some(users) = users else { return Ok(()) };
    let ids =
        [("user", identity.uid), ("group", identity.gid)].into_iter().chain(identity.groups.iter().map(|id| ("group", *id)));
    for (what, id) in ids {
        if id >= users.uids.length {
            return Err(Error::invalid(format!(
                "security_context: {what} {id} is not one of the pod's {} ids",
                users.uids.length
            )));
        }
    }
    Ok(())
}

/// A range in the form of the OCI configuration.
fn mapping(ids: &IdMapping) -> Value {
    json!([{ "containerID": ids.container_id, "hostID": ids.host_id, "size": ids.length }])
}

/// The configuration, and the names of the limits it asks for that this host does not enforce. Blocks.
pub(super) fn build(input: &Input) -> Result<(Spec, Vec<String>)> {
    let linux = input.config.linux.clone().unwrap_or_default();
    let asked = linux.resources.unwrap_or_default();
    let mut oci_resources = serde_json::to_value(limits_of_container(&asked)?).map_err(encode)?;
    let (devices, rules) = devices::build(input)?;
    oci_resources["devices"] = Value::Array(rules);
    classes::refuse_rdt(input)?;
    let mut not_enforced = resources::not_enforced(&asked, &input.node.tree);
    if let Some(block_io) = classes::block_io(input)? {
        oci_resources["blockIO"] = block_io;
        not_enforced.extend((!input.node.tree.has("io")).then(|| "io".to_owned()));
    }
    let (masked, readonly) = security::paths(input)?;
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": text(&input.directory.join("rootfs")), "readonly": input.security().readonly_rootfs },
        "process": process(input)?,
        "mounts": mounts::build(input)?,
        "annotations": annotations::build(input),
        "linux": {
            "namespaces": namespaces(input)?,
            "cgroupsPath": input.pod.container_path(&input.id),
            "resources": oci_resources,
            "devices": devices,
            "mountLabel": given(labels(input)?.file),
            "maskedPaths": masked,
            "readonlyPaths": readonly,
            "seccomp": seccomp::profile(input, &security::granted(input)?)?,
            "rootfsPropagation": mounts::root_propagation(&input.config),
        },
    });
    let mut spec = spec;
    if let Some(users) = input.users()? {
        spec["linux"]["uidMappings"] = mapping(&users.uids);
        spec["linux"]["gidMappings"] = mapping(&users.gids);
    }
    cdi::apply(&mut spec, input)?;
    let spec = serde_json::from_value(spec).map_err(|error| Error::internal(format!("OCI configuration: {error}")))?;
    Ok((spec, not_enforced))
}

fn encode(error: serde_json::Error) -> Error {
    Error::internal(format!("encode OCI configuration: {error}"))
}

fn process(input: &Input) -> Result<Value> {
    let config = &input.config;
    let security = input.security();
    let image = input.image.config.config().clone().unwrap_or_default();
    let cwd = match (config.working_dir.as_str(), image.working_dir().as_deref()) {
        ("", None | Some("")) => "/",
        ("", Some(image)) => image,
        (asked, _) => asked,
    };
    paths::check("config.working_dir", cwd)?;
    let identity = &input.identity;
    let oom = config
        .linux
        .as_ref()
        .and_then(|linux| linux.resources.as_ref())
        .map(|resources| resources.oom_score_adj)
        .unwrap_or_default();
    if !(-1000..=1000).contains(&oom) {
        return Err(Error::invalid(format!("linux.resources.oom_score_adj {oom} is not between -1000 and 1000")));
    }
    Ok(json!({
        "terminal": config.tty,
        "user": { "uid": identity.uid, "gid": identity.gid, "additionalGids": identity.groups },
        "args": arguments(config, image.entrypoint().as_deref(), image.cmd().as_deref())?,
        "env": environment(input, image.env().as_deref().unwrap_or_default())?,
        "cwd": cwd,
        "capabilities": security::capabilities(input)?,
        "noNewPrivileges": security.no_new_privs,
        "oomScoreAdj": oom,
        "rlimits": rlimits(&input.node.config.containers),
        "apparmorProfile": input.node.apparmor.profile(&security)?,
        "selinuxLabel": given(labels(input)?.process),
    }))
}

fn rlimits(config: &crate::config::ContainerConfig) -> Value {
    let limit = |(name, limit): (&String, &Ulimit)| json!({ "type": format!("RLIMIT_{}", name.to_uppercase()), "soft": limit.soft, "hard": limit.hard });
    config.default_ulimits.iter().map(limit).collect()
}

/// Docker's rules: a command of the request replaces the image's entrypoint and its arguments; arguments replace only the arguments.
fn arguments(config: &ContainerConfig, entrypoint: Option<&[String]>, cmd: Option<&[String]>) -> Result<Vec<String>> {
    let mut arguments = Vec::new();
    if config.command.is_empty() {
        arguments.extend_from_slice(entrypoint.unwrap_or_default());
    } else {
        arguments.clone_from(&config.command);
    }
    if !config.args.is_empty() {
        arguments.extend_from_slice(&config.args);
    } else if config.command.is_empty() {
        arguments.extend_from_slice(cmd.unwrap_or_default());
    }
    if arguments.first().is_none_or(String::is_empty) {
        return Err(Error::invalid("no command: neither config.command and config.args nor the image give one"));
    }
    Ok(arguments)
}

fn environment(input: &Input, image: &[String]) -> Result<Vec<String>> {
    let mut environment: Vec<String> = Vec::new();
    let mut set = |entry: String| {
        let key = entry.split('=').next().unwrap_or_default().to_owned() + "=";
        match environment.iter_mut().find(|have| have.starts_with(&key)) {
            Some(have) => *have = entry,
            None => environment.push(entry),
        }
    };
    set(DEFAULT_PATH.into());
    set(format!("HOSTNAME={}", pod_hostname(input)));
    if input.config.tty {
        set("TERM=xterm".into());
    }
    image.iter().cloned().for_each(&mut set);
    let mut home = image.iter().any(|entry| entry.starts_with("HOME="));
    for variable in &input.config.envs {
        if variable.key.is_empty() || variable.key.contains('=') {
            return Err(Error::invalid(format!("config.envs: {:?} is not a variable's name", variable.key)));
        }
        let value = String::from_utf8(variable.value.clone())
            .map_err(|_| Error::unimplemented(format!("config.envs: the value of {} is not UTF-8", variable.key)))?;
        home |= variable.key == "HOME";
        set(format!("{}={value}", variable.key));
    }
    if !home {
        set(format!("HOME={}", input.identity.home));
    }
    Ok(environment)
}

fn pod_hostname(input: &Input) -> String {
    if input.pod.config.hostname.is_empty() {
        return rustix::system::uname().nodename().to_string_lossy().into_owned();
    }
    input.pod.config.hostname.clone()
}

/// Namespaces of the container. The native runtime gets the pod's as descriptors of the monitor; the paths serve other runtimes.
fn namespaces(input: &Input) -> Result<Vec<Value>> {
    let options = input.namespaces();
    let pod = pod::namespace_modes(&input.pod.config);
    for (name, container, pod) in [("network", options.network(), pod.network()), ("ipc", options.ipc(), pod.ipc())] {
        if container != pod {
            return Err(Error::invalid(format!(
                "security_context.namespace_options.{name} is {}, the pod's is {}",
                container.as_str_name(),
                pod.as_str_name()
            )));
        }
    }
    let users = input.users()?;
    if users != userns::of(&pod)? {
        return Err(Error::invalid("security_context.namespace_options.userns_options is not the pod's"));
    }
    check_identity(&input.identity, users)?;
    let mut namespaces = vec![json!({ "type": "mount" })];
    // A privileged one looks after the node, whose cgroups it sees and names as the host does.
    if !input.privileged() {
        namespaces.push(json!({ "type": "cgroup" }));
    }
    if users.is_some() {
        namespaces.push(json!({ "type": "user" }));
    }
    if options.pid() != NamespaceMode::Node {
        namespaces.push(json!({ "type": "pid" }));
    }
    if options.ipc() != NamespaceMode::Node {
        namespaces.push(json!({ "type": "ipc" }));
    }
    if options.network() != NamespaceMode::Node {
        namespaces.push(json!({ "type": "network", "path": text(&input.pod.netns) }));
        namespaces.push(json!({ "type": "uts" }));
    }
    Ok(namespaces)
}

/// The SELinux labels of the container.
pub(super) fn labels(input: &Input) -> Result<Labels> {
    let security = input.security();
    let pod = pod::selinux_options(&input.pod.config);
    input.node.selinux.labels(&input.pod.selinux_categories, pod, security.selinux_options.as_ref(), security.privileged)
}

/// Nothing instead of an empty text.
fn given(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// Refuses numbers that are in none of the CRI's enumerations.
pub(super) fn check_numbers(config: &ContainerConfig) -> Result<()> {
    known::<Signal>("config.stop_signal", config.stop_signal)?;
    for mount in &config.mounts {
        known::<MountPropagation>(format_args!("config.mounts: {}: propagation", mount.container_path), mount.propagation)?;
    }
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let options = security.and_then(|security| security.namespace_options.as_ref());
    options.map_or(Ok(()), |options| pod::check_modes("security_context.namespace_options", options))
}

/// The signal that a stop begins with: the request's, the image's, else TERM.
pub(super) fn stop_signal(config: &ContainerConfig, image: &Image) -> Result<i32> {
    if config.stop_signal() != Signal::RuntimeDefault {
        let name = config.stop_signal().as_str_name().trim_start_matches("SIGNAL_");
        return signal_number(name).ok_or_else(|| Error::invalid(format!("stop_signal {name} is not a signal of Linux")));
    }
    let image = image.config.config().as_ref().and_then(|config| config.stop_signal().clone()).unwrap_or_default();
    Ok(signal_number(&image).unwrap_or(nix::sys::signal::Signal::SIGTERM as i32))
}

/// `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3` or `SIGRTMINPLUS3` as a number.
fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let name = if name.starts_with("SIG") { name.to_owned() } else { format!("SIG{name}") };
    let offset =
        |rest: &str| rest.trim_start_matches("PLUS").trim_start_matches("MINUS").trim_start_matches(['+', '-']).parse::<i32>();
    if let Some(rest) = name.strip_prefix("SIGRTMIN") {
        return if rest.is_empty() { Some(34) } else { offset(rest).ok().map(|offset| 34 + offset) };
    }
    if let Some(rest) = name.strip_prefix("SIGRTMAX") {
        return if rest.is_empty() { Some(64) } else { offset(rest).ok().map(|offset| 64 - offset) };
    }
    let name = match name.as_str() {
        "SIGCLD" => "SIGCHLD",
        "SIGIOT" => "SIGABRT",
        "SIGPOLL" => "SIGIO",
        other => other,
    };
    name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
}

/// The OCI process of an exec, as JSON: the container's own with another command.
pub(super) fn exec_process(bundle: &Path, command: Vec<String>, terminal: bool) -> Result<String> {
    let path = bundle.join("config.json");
    let bytes = std::fs::read(&path).map_err(|error| Error::io(format_args!("read {}", path.display()), error))?;
    let mut spec: Value =
        serde_json::from_slice(&bytes).map_err(|error| Error::internal(format!("{}: {error}", path.display())))?;
    let mut process = spec["process"].take();
    process["args"] = json!(command);
    process["terminal"] = json!(terminal);
    if let Some(environment) = process["env"].as_array_mut().filter(|_| terminal)
        && !environment.iter().any(|entry| entry.as_str().is_some_and(|entry| entry.starts_with("TERM=")))
    {
        environment.push(json!("TERM=xterm"));
    }
    Ok(process.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(command: &[&str], args: &[&str], expected: &[&str]) {
        let own = |list: &[&str]| list.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>();
        let config = ContainerConfig { command: own(command), args: own(args), ..Default::default() };
        let (entrypoint, cmd) = (own(&["entry"]), own(&["cmd"]));
        assert_eq!(arguments(&config, Some(&entrypoint), Some(&cmd)).expect("a command"), own(expected));
    }

    #[test]
    fn command_and_args_follow_dockers_rules() {
        check(&[], &[], &["entry", "cmd"]);
        check(&[], &["a"], &["entry", "a"]);
        check(&["c"], &[], &["c"]);
        check(&["c"], &["a"], &["c", "a"]);
    }

    #[test]
    fn signals_in_every_form() {
        for (name, number) in [
            ("SIGTERM", 15),
            ("TERM", 15),
            ("9", 9),
            ("SIGRTMIN", 34),
            ("SIGRTMIN+3", 37),
            ("SIGRTMINPLUS3", 37),
            ("SIGRTMAX", 64),
        ] {
            assert_eq!(signal_number(name), Some(number), "{name}");
        }
        for name in ["", "SIGNOPE", "0", "99"] {
            assert_eq!(signal_number(name), None, "{name}");
        }
        for number in 0..=i32::from(u8::MAX) {
            let Ok(signal) = Signal::try_from(number) else { continue };
            let name = signal.as_str_name().trim_start_matches("SIGNAL_");
            assert!(signal == Signal::RuntimeDefault || signal_number(name).is_some(), "{name}");
        }
    }
}
