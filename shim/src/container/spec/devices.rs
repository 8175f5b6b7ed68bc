//! Devices: the nodes a container gets, and the rules that say which it may open.

use super::Input;
use crate::error::{Error, Result};
use rustix::fs::{FileType, Stat};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Most device nodes that one container may get.
const DEVICES_MAX: usize = 4096;
/// Most entries of a directory of devices and all below it.
const ENTRIES_MAX: usize = 16_384;

/// Device nodes and cgroup rules.
pub(super) fn build(input: &Input) -> Result<(Vec<Value>, Vec<Value>)> {
    let mut devices = Vec::new();
    let mut rules = vec![json!({ "allow": input.privileged(), "access": "rwm" })];
    if input.privileged() {
        input.looking.at("devices of a privileged container: /dev", Path::new("/dev"))?;
        walk(Path::new("/dev"), Path::new("/dev"), &mut devices).map_err(|why| Error::internal(format!("/dev: {why}")))?;
    }
    for (index, device) in input.config.devices.iter().enumerate() {
        let invalid = |field: &str, value: &str, why: &dyn std::fmt::Display| {
            Error::invalid(format!("config.devices[{index}].{field} {value:?}: {why}"))
        };
        if device.permissions.is_empty() || device.permissions.chars().any(|c| !"rwm".contains(c)) {
            return Err(invalid("permissions", &device.permissions, &"not made of r, w and m"));
        }
        let target = if device.container_path.is_empty() { &device.host_path } else { &device.container_path };
        if !target.starts_with('/') {
            return Err(invalid("container_path", target, &"not absolute"));
        }
        let mut found = Vec::new();
        let named = format_args!("config.devices[{index}].host_path {:?}", device.host_path).to_string();
        input.looking.at(named, Path::new(&device.host_path))?;
        let source = fs::canonicalize(&device.host_path).map_err(|error| invalid("host_path", &device.host_path, &error))?;
        if source.is_dir() {
            walk(&source, Path::new(target), &mut found).map_err(|why| invalid("host_path", &device.host_path, &why))?;
        } else {
            found.push(
                node(&source, Path::new(target))
                    .ok_or_else(|| invalid("host_path", &device.host_path, &"no device, nor a directory of devices"))?,
            );
        }
        for device_node in found {
            rules.push(json!({
                "allow": true, "type": device_node["type"], "major": device_node["major"], "minor": device_node["minor"], "access": device.permissions,
            }));
            devices.retain(|have: &Value| have["path"] != device_node["path"]);
            devices.push(device_node);
        }
    }
    if devices.len() > DEVICES_MAX {
        return Err(Error::invalid(format!("{} devices, the limit is {DEVICES_MAX}", devices.len())));
    }
    Ok((devices, rules))
}

/// Device nodes below a directory, without what every container has of its own. What vanishes meanwhile is left out.
fn walk(source: &Path, target: &Path, into: &mut Vec<Value>) -> Result<(), String> {
    let mut rest: Vec<(PathBuf, PathBuf, usize)> = vec![(source.into(), target.into(), 0)];
    let mut seen = 0;
    while let Some((source, target, depth)) = rest.pop() {
        for entry in fs::read_dir(&source).into_iter().flatten().flatten() {
            seen += 1;
            if seen > ENTRIES_MAX {
                return Err(format!("more than {ENTRIES_MAX} entries, which is no directory of devices"));
            }
            let name = entry.file_name();
            let own =
                matches!(name.to_str(), Some("pts" | "shm" | "mqueue" | "console" | "fd" | "ptmx" | "core" | ".lxc" | ".udev"));
            let (source, target) = (entry.path(), target.join(&name));
            match entry.file_type() {
                Ok(_) if own && depth == 0 => {}
                Ok(kind) if kind.is_dir() && depth < 8 => rest.push((source, target, depth + 1)),
                _ => into.extend(node(&source, &target)),
            }
        }
    }
    Ok(())
}

/// The node of a device of the host, for another path in the container; `None` if there is none.
pub(super) fn node(source: &Path, target: &Path) -> Option<Value> {
    let stat: Stat = rustix::fs::lstat(source).ok()?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice => "c",
        FileType::BlockDevice => "b",
        _ => return None,
    };
    Some(json!({
        "path": target.to_string_lossy(), "type": kind,
        "major": rustix::fs::major(stat.st_rdev), "minor": rustix::fs::minor(stat.st_rdev),
        "fileMode": stat.st_mode & 0o7777, "uid": stat.st_uid, "gid": stat.st_gid,
    }))
}
