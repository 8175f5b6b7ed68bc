//! Devices of the Container Device Interface: what their files say becomes part of the configuration. Reads the host's device nodes.

use super::{Input, devices, text};
use crate::{
    cdi::{self, DeviceNode, Edits, Mount},
    container::lookup::Looking,
    error::{Error, Result},
};
use serde_json::{Value, json};
use std::{fs, path::Path};

/// Annotations of this prefix name devices too, separated by commas, as older device plugins ask.
const ANNOTATION_PREFIX: &str = "cdi.k8s.io/";

/// Applies the edits of every CDI device of the request.
pub(super) fn apply(spec: &mut Value, input: &Input) -> Result<()> {
    let mut names: Vec<String> = input.config.cdi_devices.iter().map(|device| device.name.clone()).collect();
    let mut annotated: Vec<_> = input.config.annotations.iter().filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX)).collect();
    annotated.sort();
    names.extend(annotated.into_iter().flat_map(|(_, value)| value.split(',').map(|name| name.trim().to_owned())));
    let mut seen = std::collections::HashSet::new();
    names.retain(|name| seen.insert(name.clone()));
    inject(spec, input, &names, "config.CDI_devices")
}

/// Applies the edits of devices that `field` names.
pub(super) fn inject(spec: &mut Value, input: &Input, names: &[String], field: &str) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let directories = &input.node.config.devices.cdi_spec_dirs;
    for directory in directories {
        input.looking.at(format_args!("devices.cdi_spec_dirs {directory:?}"), directory)?;
    }
    let edits = cdi::find(directories, names).map_err(|error| error.during(field))?;
    for edit in edits {
        apply_one(spec, &edit, &input.looking).map_err(|error| error.during(format_args!("{field} {}", names.join(", "))))?;
    }
    sort_mounts(spec);
    Ok(())
}

fn apply_one(spec: &mut Value, edits: &Edits, looking: &Looking) -> Result<()> {
    if edits.intel_rdt.is_some() {
        return Err(Error::unimplemented("containerEdits.intelRdt is not served"));
    }
    if !edits.net_devices.is_empty() {
        return Err(Error::unimplemented("containerEdits.netDevices is not served"));
    }
    for entry in &edits.env {
        let (key, _) = entry
            .split_once('=')
            .filter(|(key, _)| !key.is_empty())
            .ok_or_else(|| Error::invalid(format!("containerEdits.env {entry:?} is not KEY=value")))?;
        let key = format!("{key}=");
        change(&mut spec["process"]["env"], |list| {
            list.retain(|have| have.as_str().is_none_or(|have| !have.starts_with(&key)));
            list.push(json!(entry));
        });
    }
    for node in &edits.device_nodes {
        let made = device(node, &spec["process"]["user"], looking)?;
        let access = if node.permissions.is_empty() { "rwm" } else { &node.permissions };
        if made["type"] != "p" {
            let rule = json!({
                "allow": true, "type": made["type"], "major": made["major"], "minor": made["minor"], "access": access,
            });
            change(&mut spec["linux"]["resources"]["devices"], |rules| rules.push(rule));
        }
        change(&mut spec["linux"]["devices"], |devices| {
            devices.retain(|have| have["path"] != made["path"]);
            devices.push(made);
        });
    }
    for wanted in &edits.mounts {
        let made = mount(wanted, looking)?;
        change(&mut spec["mounts"], |mounts| {
            mounts.retain(|have| have["destination"] != made["destination"]);
            mounts.push(made);
        });
    }
    for named in &edits.hooks {
        let stages = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
        if !stages.contains(&named.hook_name.as_str()) {
            return Err(Error::invalid(format!(
                "containerEdits.hooks: hookName {:?} is none of {}",
                named.hook_name,
                stages.join(", ")
            )));
        }
        if !named.hook.path().is_absolute() {
            return Err(Error::invalid(format!("containerEdits.hooks: path {:?} is not absolute", named.hook.path())));
        }
        change(&mut spec["hooks"][&named.hook_name], |hooks| hooks.push(json!(named.hook)));
    }
    change(&mut spec["process"]["user"]["additionalGids"], |groups| {
        for gid in edits.additional_gids.iter().filter(|gid| **gid != 0) {
            if !groups.contains(&json!(gid)) {
                groups.push(json!(gid));
            }
        }
    });
    Ok(())
}

/// A node as the host has it, but for what the file says. A process that is not root gets it as its own.
fn device(node: &DeviceNode, user: &Value, looking: &Looking) -> Result<Value> {
    let invalid = |field: &str, value: &str, why: &dyn std::fmt::Display| {
        Error::invalid(format!("containerEdits.deviceNodes {}: {field} {value:?}: {why}", node.path))
    };
    if !node.path.starts_with('/') {
        return Err(invalid("path", &node.path, &"not absolute"));
    }
    if node.permissions.chars().any(|c| !"rwm".contains(c)) {
        return Err(invalid("permissions", &node.permissions, &"not made of r, w and m"));
    }
    if !["", "b", "c", "u", "p"].contains(&node.kind.as_str()) {
        return Err(invalid("type", &node.kind, &"none of b, c, u and p"));
    }
    let source = if node.host_path.is_empty() { &node.path } else { &node.host_path };
    let complete = !node.kind.is_empty() && (node.kind == "p" || (node.major.is_some() && node.minor.is_some()));
    let mut made = if complete {
        json!({ "path": node.path, "type": node.kind.replace('u', "c"), "major": node.major.unwrap_or(0), "minor": node.minor.unwrap_or(0) })
    } else {
        looking.at(format_args!("containerEdits.deviceNodes {}: hostPath {source:?}", node.path), Path::new(source))?;
        let real = fs::canonicalize(source).map_err(|error| invalid("hostPath", source, &error))?;
        let made = devices::node(&real, Path::new(&node.path)).ok_or_else(|| invalid("hostPath", source, &"no device"))?;
        if !node.kind.is_empty() && made["type"] != node.kind.replace('u', "c") {
            return Err(invalid("type", &node.kind, &"the host's is another"));
        }
        made
    };
    let given = [("fileMode", node.file_mode.map(i64::from)), ("major", node.major), ("minor", node.minor)];
    for (key, value) in given {
        if let Some(value) = value {
            made[key] = json!(value);
        }
    }
    for (key, value) in [("uid", node.uid), ("gid", node.gid)] {
        let own = user[key].as_u64().filter(|id| *id > 0);
        match (value, own) {
            (Some(value), _) => made[key] = json!(value),
            (None, Some(own)) => made[key] = json!(own),
            (None, None) => {}
        }
    }
    Ok(made)
}

fn mount(wanted: &Mount, looking: &Looking) -> Result<Value> {
    let target = &wanted.container_path;
    if !target.starts_with('/') || target.split('/').any(|part| part == "..") {
        return Err(Error::invalid(format!("containerEdits.mounts: containerPath {target:?} is not absolute and plain")));
    }
    let mut options = wanted.options.clone();
    if !["", "bind", "none"].contains(&wanted.kind.as_str()) {
        return Ok(json!({ "destination": target, "type": wanted.kind, "source": wanted.host_path, "options": options }));
    }
    let named = format!("containerEdits.mounts: hostPath {:?} of {target}", wanted.host_path);
    looking.at(&named, Path::new(&wanted.host_path))?;
    let source = fs::canonicalize(&wanted.host_path).map_err(|error| Error::invalid(format!("{named}: {error}")))?;
    if !options.iter().any(|option| option == "bind" || option == "rbind") {
        options.insert(0, "rbind".into());
    }
    let modes = ["private", "shared", "slave", "unbindable"];
    if !options.iter().any(|option| modes.contains(&option.trim_start_matches('r'))) {
        options.push("rprivate".into());
    }
    Ok(json!({ "destination": target, "type": "bind", "source": text(&source), "options": options }))
}

/// Parents before children; the kernel's own file systems keep their order.
pub(super) fn sort_mounts(spec: &mut Value) {
    let depth =
        |mount: &Value| mount["destination"].as_str().unwrap_or_default().split('/').filter(|part| !part.is_empty()).count();
    change(&mut spec["mounts"], |mounts| mounts.sort_by_key(depth));
}

/// Changes the list at a place that may be empty still.
pub(super) fn change(value: &mut Value, change: impl FnOnce(&mut Vec<Value>)) {
    let mut list = match value.take() {
        Value::Array(list) => list,
        _ => Vec::new(),
    };
    change(&mut list);
    *value = Value::Array(list);
}
