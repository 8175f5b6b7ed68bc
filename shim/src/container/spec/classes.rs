//! Classes that annotations ask for: of block I/O, which the configuration describes, and of Intel RDT, which is not served. The names of
//! the annotations are those that containerd and CRI-O read (goresctrl).

use super::Input;
use crate::{
    config::{BlockIoClass, BlockIoLimit, Config},
    error::{Error, Result},
};
use serde_json::{Value, json};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

/// The class that the container has by the first of: its own annotation, its pod's for this container, its pod's for all.
fn class<'a>(input: &'a Input, kind: &str) -> Option<&'a str> {
    let name = input.config.metadata.as_ref().map_or("", |metadata| metadata.name.as_str());
    let of_pod = |key: String| input.pod.config.annotations.get(&key);
    let own = input.config.annotations.get(&format!("io.kubernetes.cri.{kind}-class"));
    let found = own
        .or_else(|| of_pod(format!("{kind}.resources.beta.kubernetes.io/container.{name}")))
        .or_else(|| of_pod(format!("{kind}.resources.beta.kubernetes.io/pod")));
    found.map(String::as_str).filter(|class| !class.is_empty())
}

/// Refuses a class of Intel RDT: nothing here writes to a resctrl file system.
pub(super) fn refuse_rdt(input: &Input) -> Result<()> {
    match class(input, "rdt") {
        Some(class) => {
            Err(Error::unimplemented(format!("annotations: RDT class {class:?}: classes of Intel RDT are not served")))
        }
        None => Ok(()),
    }
}

/// `blockIO` of the OCI configuration for the container's class. `None`: it has no class.
pub(super) fn block_io(input: &Input) -> Result<Option<Value>> {
    let Some(name) = class(input, "blockio") else { return Ok(None) };
    block_io_class(&input.node.config, name).map(Some).map_err(|error| error.during("annotations"))
}

/// `blockIO` of the OCI configuration for a class.
pub(super) fn block_io_class(config: &Config, name: &str) -> Result<Value> {
    let classes = &config.block_io_classes;
    let class = classes.get(name).ok_or_else(|| {
        let known: Vec<&str> = classes.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "there are none".to_owned() } else { format!("there are {}", known.join(", ")) };
        Error::invalid(format!("block I/O class {name:?} is not in the configuration (block_io_classes): {known}"))
    })?;
    described(class).map_err(|error| error.during(format_args!("block I/O class {name:?}")))
}

fn described(class: &BlockIoClass) -> Result<Value> {
    let mut block_io = json!({});
    if class.weight != 0 {
        block_io["weight"] = json!(class.weight);
    }
    for device in &class.devices {
        let (major, minor) = number(device)?;
        for (list, key, value) in [
            ("weightDevice", "weight", u64::from(device.weight)),
            ("throttleReadBpsDevice", "rate", device.read_bytes_per_second),
            ("throttleWriteBpsDevice", "rate", device.write_bytes_per_second),
            ("throttleReadIOPSDevice", "rate", device.reads_per_second),
            ("throttleWriteIOPSDevice", "rate", device.writes_per_second),
        ] {
            if value == 0 {
                continue;
            }
            if block_io[list].is_null() {
                block_io[list] = json!([]);
            }
            if let Some(list) = block_io[list].as_array_mut() {
                list.push(json!({ "major": major, "minor": minor, key: value }));
            }
        }
    }
    Ok(block_io)
}

/// The device's number as it is now: device nodes may come and go.
fn number(limit: &BlockIoLimit) -> Result<(u64, u64)> {
    let path = limit.path.display();
    let found = std::fs::metadata(&limit.path).map_err(|error| Error::io(format_args!("look at {path}"), error))?;
    if !found.file_type().is_block_device() {
        return Err(Error::precondition(format!("{path} is no block device")));
    }
    Ok((rustix::fs::major(found.rdev()).into(), rustix::fs::minor(found.rdev()).into()))
}
