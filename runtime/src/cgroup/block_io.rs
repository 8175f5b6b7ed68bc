//! Limits and weights of block devices: the OCI's `blockIO`, made for cgroup v1, as files of cgroup v2's io controller. Pure.

use super::limits::Write;
use crate::process::{Kind, StepError};
use oci_spec::runtime::{LinuxBlockIo, LinuxThrottleDevice};

/// The weight of the budget fair queueing scheduler, where the kernel has it: 1 to 1000, as in cgroup v1.
const BFQ_WEIGHT: &str = "io.bfq.weight";
/// The weight of the io.cost controller: 1 to 10000.
const COST_WEIGHT: &str = "io.weight";
/// Takes away all limits of a device (Documentation/admin-guide/cgroup-v2.rst, io.max).
const NO_LIMIT: &str = "rbps=max wbps=max riops=max wiops=max";

/// What to write for `block_io`. `now` reads a file of the cgroup as it is; what it says of a device is written back to undo a change.
pub(super) fn plan(block_io: &LinuxBlockIo, now: &dyn Fn(&str) -> Option<String>) -> Result<Vec<Write>, StepError> {
    let mut writes = Vec::new();
    if block_io.leaf_weight().is_some_and(|weight| weight != 0) {
        return Err(invalid("blockIO.leafWeight", "cgroup v2 has no weight of leaves"));
    }
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        writes.push(weighed(None, checked("blockIO.weight", weight)?, now));
    }
    for device in block_io.weight_device().iter().flatten() {
        if device.leaf_weight().is_some_and(|weight| weight != 0) {
            return Err(invalid("blockIO.weightDevice.leafWeight", "cgroup v2 has no weight of leaves"));
        }
        if let Some(weight) = device.weight().filter(|weight| *weight != 0) {
            let name = format!("{}:{}", device.major(), device.minor());
            writes.push(weighed(Some(&name), checked("blockIO.weightDevice.weight", weight)?, now));
        }
    }
    let throttles: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("rbps", block_io.throttle_read_bps_device()),
        ("wbps", block_io.throttle_write_bps_device()),
        ("riops", block_io.throttle_read_iops_device()),
        ("wiops", block_io.throttle_write_iops_device()),
    ];
    for (key, devices) in throttles {
        for device in devices.iter().flatten() {
            let name = format!("{}:{}", device.major(), device.minor());
            // As in cgroup v1, 0 is no limit.
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            let before = now("io.max").unwrap_or_default();
            let undo = line_of(&before, &name).map_or_else(|| format!("{name} {NO_LIMIT}"), str::to_owned);
            writes.push(Write::of("io.max", format!("{name} {key}={rate}")).undone_by(undo));
        }
    }
    Ok(writes)
}

/// The write of a weight, of one device or of all others.
fn weighed(device: Option<&str>, weight: u16, now: &dyn Fn(&str) -> Option<String>) -> Write {
    let bfq = now(BFQ_WEIGHT);
    let (file, value) =
        if bfq.is_some() { (BFQ_WEIGHT, u64::from(weight)) } else { (COST_WEIGHT, cost_weight(u64::from(weight))) };
    let before = bfq.or_else(|| now(COST_WEIGHT)).unwrap_or_default();
    let of = device.unwrap_or("default");
    let undo = match (line_of(&before, of), device) {
        (Some(line), _) => line.to_owned(),
        (None, Some(device)) => format!("{device} default"),
        (None, None) => "default 100".to_owned(),
    };
    Write::of(file, format!("{of} {value}")).undone_by(undo)
}

/// The line of a nested-keyed file that is about `key`.
fn line_of<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find(|line| line.split_whitespace().next() == Some(key))
}

/// The ends of v1's weights (10 to 1000) are the ends of v2's (1 to 10000), on a straight line as the OCI runtimes draw it.
fn cost_weight(weight: u64) -> u64 {
    1 + (weight - 10) * 9999 / 990
}

fn checked(field: &str, weight: u16) -> Result<u16, StepError> {
    if (10..=1000).contains(&weight) { Ok(weight) } else { Err(invalid(&format!("{field} {weight}"), "weights are 10 to 1000")) }
}

fn invalid(what: &str, why: &str) -> StepError {
    StepError::because(Kind::Invalid, "set limit", what, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(json: &str, now: &dyn Fn(&str) -> Option<String>) -> Result<Vec<(String, String, String)>, StepError> {
        let block_io: LinuxBlockIo = serde_json::from_str(json).expect(json);
        let writes = plan(&block_io, now)?;
        Ok(writes.into_iter().map(|write| (write.file, write.value, write.undo.unwrap_or_default())).collect())
    }

    fn check(json: &str, now: &dyn Fn(&str) -> Option<String>, expected: &[(&str, &str, &str)]) {
        let planned = planned(json, now).expect(json);
        let planned: Vec<_> = planned.iter().map(|(f, v, u)| (f.as_str(), v.as_str(), u.as_str())).collect();
        assert_eq!(planned, expected, "{json}");
    }

    #[test]
    fn weights_go_to_the_scheduler_that_is_there() {
        let cost = |file: &str| (file == COST_WEIGHT).then(|| "default 100\n8:0 50\n".to_owned());
        let both = |file: &str| file.ends_with("weight").then(|| "default 70\n".to_owned());
        check(r#"{"weight":10}"#, &cost, &[(COST_WEIGHT, "default 1", "default 100")]);
        check(r#"{"weight":1000}"#, &cost, &[(COST_WEIGHT, "default 10000", "default 100")]);
        check(r#"{"weight":500}"#, &both, &[(BFQ_WEIGHT, "default 500", "default 70")]);
        let devices = r#"{"weightDevice":[{"major":8,"minor":0,"weight":10},{"major":8,"minor":16,"weight":10}]}"#;
        check(devices, &cost, &[(COST_WEIGHT, "8:0 1", "8:0 50"), (COST_WEIGHT, "8:16 1", "8:16 default")]);
    }

    #[test]
    fn throttles_are_undone_device_by_device() {
        let now = |file: &str| (file == "io.max").then(|| "8:0 rbps=1 wbps=max riops=max wiops=max\n".to_owned());
        let json = r#"{"throttleWriteBpsDevice":[{"major":8,"minor":0,"rate":5}],"throttleReadIOPSDevice":[{"major":9,"minor":1,"rate":0}]}"#;
        check(
            json,
            &now,
            &[
                ("io.max", "8:0 wbps=5", "8:0 rbps=1 wbps=max riops=max wiops=max"),
                ("io.max", "9:1 riops=max", &format!("9:1 {NO_LIMIT}")),
            ],
        );
    }

    #[test]
    fn what_version_2_does_not_have_is_refused() {
        let leaf = r#"{"weightDevice":[{"major":8,"minor":0,"leafWeight":10}]}"#;
        for json in [r#"{"weight":9}"#, r#"{"weight":1001}"#, r#"{"leafWeight":10}"#, leaf] {
            assert_eq!(planned(json, &|_| None).expect_err(json).kind, Kind::Invalid, "{json}");
        }
    }
}
