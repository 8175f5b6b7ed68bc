//! What a bundle may ask that this build does not do: refused by name, never passed over.

use crate::process::{Kind, StepError};
use oci_spec::runtime::{LinuxMemory, LinuxNetwork, LinuxResources, Spec};

/// Refuses versions that are none of the specification's first, and every field that would have no effect here. A field with the value
/// that means nothing (0, false, empty) is no request.
pub(crate) fn check(spec: &Spec) -> Result<(), StepError> {
    version(spec.version())?;
    let process = spec.process().as_ref();
    let linux = spec.linux().as_ref();
    let asked = [
        ("process.execCPUAffinity", process.is_some_and(|process| process.exec_cpu_affinity().is_some())),
        ("linux.intelRdt", linux.is_some_and(|linux| linux.intel_rdt().is_some())),
        ("linux.personality", linux.is_some_and(|linux| linux.personality().is_some())),
        ("linux.timeOffsets", linux.is_some_and(|linux| linux.time_offsets().as_ref().is_some_and(|list| !list.is_empty()))),
    ];
    first(&asked)?;
    linux.and_then(|linux| linux.resources().as_ref()).map_or(Ok(()), check_resources)
}

fn first(asked: &[(&'static str, bool)]) -> Result<(), StepError> {
    match asked.iter().find(|(_, asked)| *asked) {
        None => Ok(()),
        Some((field, _)) => Err(StepError::because(Kind::Unsupported, "use", field, "not built")),
    }
}

/// Minor versions only add fields, so that a newer one is read as far as it is known.
fn version(text: &str) -> Result<(), StepError> {
    let mut parts = text.splitn(3, '.');
    let (major, minor, patch) = (parts.next(), parts.next(), parts.next());
    let number = |part: Option<&str>| part.is_some_and(|part| part.parse::<u32>().is_ok());
    if major == Some("1") && number(minor) && patch.is_some_and(|patch| patch.starts_with(|c: char| c.is_ascii_digit())) {
        return Ok(());
    }
    Err(StepError::because(Kind::Invalid, "use", format!("ociVersion {text:?}"), "not a version 1.x of the specification"))
}

/// Refuses what cgroup v2 does not have, or nothing here writes.
pub fn check_resources(resources: &LinuxResources) -> Result<(), StepError> {
    let memory = |asked: fn(&LinuxMemory) -> bool| resources.memory().as_ref().is_some_and(asked);
    let cpu = resources.cpu().as_ref();
    first(&[
        ("linux.resources.memory.kernel", memory(|memory| memory.kernel().is_some_and(|limit| limit > 0))),
        ("linux.resources.memory.kernelTCP", memory(|memory| memory.kernel_tcp().is_some_and(|limit| limit > 0))),
        ("linux.resources.memory.swappiness", memory(|memory| memory.swappiness().is_some())),
        ("linux.resources.memory.disableOOMKiller", memory(|memory| memory.disable_oom_killer() == Some(true))),
        ("linux.resources.cpu.realtimeRuntime", cpu.is_some_and(|cpu| cpu.realtime_runtime().is_some_and(|time| time != 0))),
        ("linux.resources.cpu.realtimePeriod", cpu.is_some_and(|cpu| cpu.realtime_period().is_some_and(|time| time != 0))),
        ("linux.resources.network", resources.network().as_ref().is_some_and(network)),
        ("linux.resources.rdma", resources.rdma().as_ref().is_some_and(|limits| !limits.is_empty())),
        ("linux.resources.memory.checkBeforeUpdate", memory(|memory| memory.check_before_update() == Some(true))),
    ])
}

fn network(network: &LinuxNetwork) -> bool {
    network.class_id().is_some_and(|class| class != 0) || network.priorities().as_ref().is_some_and(|list| !list.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(json: &str) -> Option<String> {
        let spec: Spec = serde_json::from_str(json).expect(json);
        check(&spec).err().map(|error| error.object)
    }

    #[test]
    fn what_is_asked_and_not_built_is_named() {
        for (json, field) in [
            (r#"{"ociVersion":"invalid"}"#, "ociVersion \"invalid\""),
            (r#"{"ociVersion":"2.0.0"}"#, "ociVersion \"2.0.0\""),
            (r#"{"ociVersion":"1.0"}"#, "ociVersion \"1.0\""),
            (r#"{"ociVersion":"1.0.0","linux":{"personality":{"domain":"LINUX32"}}}"#, "linux.personality"),
            (r#"{"ociVersion":"1.0.0","linux":{"resources":{"memory":{"swappiness":60}}}}"#, "linux.resources.memory.swappiness"),
            (r#"{"ociVersion":"1.0.0","linux":{"resources":{"network":{"classID":7}}}}"#, "linux.resources.network"),
        ] {
            assert_eq!(refused(json).as_deref(), Some(field), "{json}");
        }
    }

    #[test]
    fn values_that_mean_nothing_are_no_request() {
        for json in [
            r#"{"ociVersion":"1.0.2-dev"}"#,
            r#"{"ociVersion":"1.3.0","linux":{"resources":{"blockIO":{"weight":0},"network":{},"memory":{"disableOOMKiller":false,"kernel":-1}}}}"#,
        ] {
            assert_eq!(refused(json), None, "{json}");
        }
    }
}
