//! update: other limits for a container, all of them or none.

use crate::arguments::{Call, Flag, value};
use crate::record::{Record, Status};
use crate::{Outcome, failed, invalid, unsupported};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};
use std::io::Read;
use windlass_runtime::bundle::check_resources;
use windlass_runtime::cgroup;
use windlass_runtime::process::{Kind, StepError};

/// Its flags.
pub(crate) const FLAGS: &[Flag] = &[
    value("--resources", "-r", "FILE", "limits as the JSON of linux.resources, - for the standard input; no other flag with it"),
    value("--cpu-period", "", "US", "period of the quota"),
    value("--cpu-quota", "", "US", "time of processors in a period, -1 for no limit"),
    value("--cpu-burst", "", "US", "what may be saved up"),
    value("--cpu-share", "", "SHARES", "weight against others, 2 to 262144"),
    value("--cpu-idle", "", "0|1", "runs only when nothing else does"),
    value("--cpuset-cpus", "", "LIST", "processors"),
    value("--cpuset-mems", "", "LIST", "memory nodes"),
    value("--memory", "", "BYTES", "limit, -1 for none"),
    value("--memory-reservation", "", "BYTES", "what is not reclaimed while others have more"),
    value("--memory-swap", "", "BYTES", "memory and swap together, -1 for no limit"),
    value("--pids-limit", "", "COUNT", "processes, -1 for no limit"),
    value("--blkio-weight", "", "WEIGHT", "refused"),
    value("--cpu-rt-period", "", "US", "refused"),
    value("--cpu-rt-runtime", "", "US", "refused"),
    value("--kernel-memory", "", "BYTES", "refused"),
    value("--kernel-memory-tcp", "", "BYTES", "refused"),
    value("--l3-cache-schema", "", "SCHEMA", "refused"),
    value("--mem-bw-schema", "", "SCHEMA", "refused"),
];

/// What cgroup v2 does not have, or this program does not set.
const REFUSED: [&str; 7] = [
    "--blkio-weight",
    "--cpu-rt-period",
    "--cpu-rt-runtime",
    "--kernel-memory",
    "--kernel-memory-tcp",
    "--l3-cache-schema",
    "--mem-bw-schema",
];

/// Largest file of resources.
const FILE_LIMIT_BYTES: u64 = 1 << 20;

/// `update`.
pub(crate) fn update(call: &Call) -> Outcome<i32> {
    let home = call.home()?;
    let record = Record::load(&home)?;
    record.require(&home, "update", &[Status::Created, Status::Running, Status::Paused])?;
    let resources = resources(call)?;
    check_resources(&resources)?;
    let missing = cgroup::unavailable(&record.cgroup, &resources)?;
    if !missing.is_empty() {
        let why = format!("this host's cgroup tree has no controller for: {}", missing.join(", "));
        return Err(StepError::because(Kind::Unsupported, "update", &record.id, why));
    }
    cgroup::apply(&record.cgroup, &resources)?;
    Ok(0)
}

fn resources(call: &Call) -> Outcome<LinuxResources> {
    let flags = &call.flags;
    if let Some(flag) = REFUSED.into_iter().find(|flag| flags.has(flag)) {
        return Err(unsupported(flag, "not a limit that can be set here"));
    }
    let Some(file) = flags.path("--resources") else { return from_flags(call) };
    if let Some(other) = FLAGS.iter().find(|flag| flag.name != "--resources" && flags.has(flag.name)) {
        return Err(invalid(other.name, "the limits come from a file"));
    }
    let mut text = Vec::new();
    let read = if file.as_os_str() == "-" {
        std::io::stdin().take(FILE_LIMIT_BYTES).read_to_end(&mut text)
    } else {
        std::fs::File::open(&file).and_then(|opened| opened.take(FILE_LIMIT_BYTES).read_to_end(&mut text))
    };
    read.map_err(|error| failed("read", &file, &error))?;
    serde_json::from_slice(&text).map_err(|error| invalid(&file.display().to_string(), &error.to_string()))
}

fn from_flags(call: &Call) -> Outcome<LinuxResources> {
    let flags = &call.flags;
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(flags.number("--cpu-share")?)
        .set_quota(flags.number("--cpu-quota")?)
        .set_burst(flags.number("--cpu-burst")?)
        .set_period(flags.number("--cpu-period")?)
        .set_idle(flags.number("--cpu-idle")?)
        .set_cpus(flags.get("--cpuset-cpus").map(str::to_owned))
        .set_mems(flags.get("--cpuset-mems").map(str::to_owned));
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(flags.number("--memory")?)
        .set_reservation(flags.number("--memory-reservation")?)
        .set_swap(flags.number("--memory-swap")?);
    let mut resources = LinuxResources::default();
    resources.set_cpu(Some(cpu)).set_memory(Some(memory)).set_devices(None);
    if let Some(limit) = flags.number("--pids-limit")? {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    Ok(resources)
}
