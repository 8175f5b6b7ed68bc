//! Limits of one cgroup, from an OCI `LinuxResources`.

use super::{block_io, tree, weight_of_shares};
use crate::process::{Kind, StepError};
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Quota period where none is given, microseconds; the kernel's default.
const PERIOD_US: u64 = 100_000;

/// One file to write. `strict`: its absence is an error (the `unified` map names files, not wishes).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Write {
    pub(super) file: String,
    pub(super) value: String,
    strict: bool,
    /// What takes the write back, where that is not what the file held as a whole.
    pub(super) undo: Option<String>,
}

impl Write {
    pub(super) fn of(file: &str, value: String) -> Write {
        Write { file: file.into(), value, strict: false, undo: None }
    }

    /// The controller; for `memory.swap.max` it is `swap`, which a kernel may not count.
    fn enforcer(&self) -> &str {
        match self.file.as_str() {
            "memory.swap.max" => "swap",
            file => file.split('.').next().unwrap_or_default(),
        }
    }

    /// Absent where the kernel has no swap, and then held: none of it may be used, or all.
    fn holds_when_absent(&self) -> bool {
        self.file == "memory.swap.max" && (self.value == "0" || self.value == "max")
    }

    pub(super) fn undone_by(self, undo: String) -> Write {
        Write { undo: Some(undo), ..self }
    }
}

/// Writes what `resources` holds, all or nothing. Returns the controllers (and `swap`) whose limits this tree cannot enforce: their files
/// are not there. A controller that only `unified` names is enabled. What is not given stays as it is. A memory limit that is below what the group uses is refused, where the kernel would kill
/// for it. Device rules are [`super::restrict`]'s.
pub fn apply(cgroup: &Path, resources: &LinuxResources) -> Result<Vec<String>, StepError> {
    let mut undo: Vec<(String, String)> = Vec::new();
    let mut not_enforced: Vec<String> = Vec::new();
    for write in plan(resources, &read_from(cgroup))? {
        let path = cgroup.join(&write.file);
        let controller = write.enforcer();
        if write.strict && !path.exists() {
            tree::enable(cgroup, controller);
        }
        let before = match fs::read_to_string(&path) {
            Ok(before) => before,
            Err(_) if !write.strict && !path.exists() => {
                note_missing(&mut not_enforced, &write);
                continue;
            }
            Err(error) if write.strict && error.kind() == std::io::ErrorKind::NotFound => {
                restore(cgroup, &undo);
                return Err(StepError::because(Kind::Invalid, "set limit", &write.file, "no such file in this cgroup tree"));
            }
            // Write-only files (memory.reclaim) have nothing to restore.
            Err(_) => String::new(),
        };
        let written = check_use(cgroup, &write).and_then(|()| set(&path, &write.value).map_err(|error| refused(&write, error)));
        if let Err(error) = written {
            restore(cgroup, &undo);
            return Err(error);
        }
        undo.push((write.file, write.undo.unwrap_or(before)));
    }
    Ok(not_enforced)
}

/// The controllers of `resources` whose files this cgroup does not have. Nothing is written.
pub fn unavailable(cgroup: &Path, resources: &LinuxResources) -> Result<Vec<String>, StepError> {
    let mut missing: Vec<String> = Vec::new();
    for write in plan(resources, &read_from(cgroup))? {
        if !write.strict && !cgroup.join(&write.file).exists() {
            note_missing(&mut missing, &write);
        }
    }
    Ok(missing)
}

fn note_missing(missing: &mut Vec<String>, write: &Write) {
    let name = write.enforcer();
    if !write.holds_when_absent() && !missing.iter().any(|known| known == name) {
        missing.push(name.to_owned());
    }
}

/// A file as it is now.
fn read_from(cgroup: &Path) -> impl Fn(&str) -> Option<String> {
    move |file| fs::read_to_string(cgroup.join(file)).ok()
}

/// Without waiting for pages to be reclaimed (since 6.16; before, the kernel reclaims a bounded number of times first).
fn set(path: &Path, value: &str) -> std::io::Result<()> {
    fs::OpenOptions::new().write(true).truncate(true).custom_flags(libc::O_NONBLOCK).open(path)?.write_all(value.as_bytes())
}

/// Refuses a memory limit that could only be met by killing. Cached pages of files can be given up, the rest cannot be counted on.
fn check_use(cgroup: &Path, write: &Write) -> Result<(), StepError> {
    if write.file != "memory.max" {
        return Ok(());
    }
    let Ok(limit) = write.value.trim().parse::<u64>() else { return Ok(()) };
    let now = read_from(cgroup);
    let Some(used) = now("memory.current").and_then(|text| text.trim().parse::<u64>().ok()) else { return Ok(()) };
    let stat = now("memory.stat").unwrap_or_default();
    let counter = |key: &str| -> u64 {
        let line = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    let kept = used.saturating_sub(counter("inactive_file") + counter("active_file"));
    if kept <= limit {
        return Ok(());
    }
    let why = format!("below the {kept} bytes that are in use and cannot be reclaimed");
    Err(StepError::because(Kind::WrongState, "set limit", format!("{}={limit}", write.file), why))
}

/// A value that the kernel does not understand is the request's fault.
fn refused(write: &Write, error: std::io::Error) -> StepError {
    let invalid = matches!(error.kind(), std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData)
        || error.raw_os_error() == Some(rustix::io::Errno::RANGE.raw_os_error());
    let step = StepError::errno("set limit", format!("{}={}", write.file, write.value), error.raw_os_error().unwrap_or_default());
    if invalid { step.kind(Kind::Invalid) } else { step }
}

/// Puts old values back, the last written first. There is nothing better to do about one that fails.
fn restore(cgroup: &Path, undo: &[(String, String)]) {
    for (file, before) in undo.iter().rev() {
        let value = before.trim_end();
        if !value.is_empty() || file.starts_with("cpuset.") {
            let _ = fs::write(cgroup.join(file), if value.is_empty() { "\n" } else { value });
        }
    }
}

/// What to write, in order. `now` reads a file as it is.
fn plan(resources: &LinuxResources, now: &dyn Fn(&str) -> Option<String>) -> Result<Vec<Write>, StepError> {
    let mut writes = Vec::new();
    if let Some(cpu) = resources.cpu() {
        plan_cpu(cpu, now, &mut writes);
    }
    if let Some(memory) = resources.memory() {
        plan_memory(memory, &mut writes)?;
    }
    if let Some(pids) = resources.pids() {
        let limit = pids.limit();
        push(&mut writes, "pids.max", if limit > 0 { limit.to_string() } else { "max".into() });
    }
    for page in resources.hugepage_limits().iter().flatten() {
        // What is mapped and not touched yet is a reservation, which has a limit of its own.
        for file in ["max", "rsvd.max"] {
            push(&mut writes, &format!("hugetlb.{}.{file}", page.page_size()), limit_text(page.limit()));
        }
    }
    if let Some(block_io) = resources.block_io() {
        writes.extend(block_io::plan(block_io, now)?);
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            return Err(StepError::because(Kind::Invalid, "set limit", file, "not a file of a controller"));
        }
        writes.push(Write { strict: true, ..Write::of(file, value.clone()) });
    }
    Ok(writes)
}

fn plan_cpu(cpu: &LinuxCpu, now: &dyn Fn(&str) -> Option<String>, writes: &mut Vec<Write>) {
    if let Some(idle) = cpu.idle() {
        push(writes, "cpu.idle", idle.to_string());
    }
    // An idle cgroup has no weight.
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0 && cpu.idle() != Some(1)) {
        push(writes, "cpu.weight", weight_of_shares(shares).to_string());
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        // One of the two alone leaves the other as it is.
        let before = now("cpu.max").unwrap_or_default();
        let mut before = before.split_whitespace();
        let (quota_before, period_before) = (before.next().unwrap_or("max"), before.next());
        let quota = quota.map_or_else(|| quota_before.to_owned(), limit_text);
        let period = period.or_else(|| period_before?.parse().ok()).unwrap_or(PERIOD_US);
        push(writes, "cpu.max", format!("{quota} {period}"));
    }
    if let Some(burst) = cpu.burst() {
        push(writes, "cpu.max.burst", burst.to_string());
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            push(writes, file, value.clone());
        }
    }
}

fn plan_memory(memory: &LinuxMemory, writes: &mut Vec<Write>) -> Result<(), StepError> {
    let limit = memory.limit().filter(|limit| *limit != 0);
    // `swap` is memory and swap together, as in v1; v2 limits swap alone.
    match (memory.swap().filter(|swap| *swap != 0), limit) {
        (Some(-1), _) => push(writes, "memory.swap.max", "max".into()),
        (Some(both), Some(limit)) if limit > 0 && both >= limit => push(writes, "memory.swap.max", (both - limit).to_string()),
        (Some(both), _) => {
            let why = "memory and swap together must not be less than a memory limit that is set";
            return Err(StepError::because(Kind::Invalid, "set limit", format!("swap {both}"), why));
        }
        (None, _) => {}
    }
    if let Some(limit) = limit {
        push(writes, "memory.max", limit_text(limit));
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        push(writes, "memory.low", limit_text(reservation));
    }
    Ok(())
}

fn push(writes: &mut Vec<Write>, file: &str, value: String) {
    writes.push(Write::of(file, value));
}

fn limit_text(limit: i64) -> String {
    if limit < 0 { "max".into() } else { limit.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).expect("valid resources")
    }

    fn check(json: &str, expected: &[(&str, &str)]) {
        let plan = plan(&resources(json), &|_| None).expect(json);
        let written: Vec<_> = plan.iter().map(|write| (write.file.as_str(), write.value.as_str())).collect();
        assert_eq!(written, expected, "{json}");
    }

    #[test]
    fn resources_become_writes() {
        check(r#"{"cpu":{"shares":1024,"quota":50000}}"#, &[("cpu.weight", "100"), ("cpu.max", "50000 100000")]);
        check(r#"{"cpu":{"quota":-1,"period":20000}}"#, &[("cpu.max", "max 20000")]);
        check(r#"{"cpu":{"shares":0,"quota":0,"period":0,"cpus":""}}"#, &[]);
        check(
            r#"{"memory":{"limit":1000,"swap":1500,"reservation":500}}"#,
            &[("memory.swap.max", "500"), ("memory.max", "1000"), ("memory.low", "500")],
        );
        check(
            r#"{"memory":{"limit":-1,"swap":-1},"pids":{"limit":-1}}"#,
            &[("memory.swap.max", "max"), ("memory.max", "max"), ("pids.max", "max")],
        );
    }

    #[test]
    fn huge_pages_are_limited_as_reservations_too() {
        let json = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#;
        check(json, &[("hugetlb.2MB.max", "4194304"), ("hugetlb.2MB.rsvd.max", "4194304")]);
        let directory = tempfile::tempdir().expect("temporary directory");
        let file = |name: &str| directory.path().join(name);
        assert_eq!(apply(directory.path(), &resources(json)).expect("applied"), ["hugetlb"]);
        for name in ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"] {
            fs::write(file(name), "max\n").expect("file");
        }
        assert!(apply(directory.path(), &resources(json)).expect("applied").is_empty());
        for name in ["hugetlb.2MB.max", "hugetlb.2MB.rsvd.max"] {
            assert_eq!(fs::read_to_string(file(name)).expect("file"), "4194304", "{name}");
        }
    }

    #[test]
    fn swap_that_is_not_counted_is_named_and_no_swap_holds_without() {
        let directory = tempfile::tempdir().expect("temporary directory");
        fs::write(directory.path().join("memory.max"), "max\n").expect("file");
        for (json, expected) in [
            (r#"{"memory":{"limit":9,"swap":9}}"#, &[] as &[&str]),
            (r#"{"memory":{"limit":9,"swap":-1}}"#, &[]),
            (r#"{"memory":{"limit":9,"swap":19}}"#, &["swap"]),
        ] {
            assert_eq!(unavailable(directory.path(), &resources(json)).expect("known"), expected, "{json}");
            assert_eq!(apply(directory.path(), &resources(json)).expect("applied"), expected, "{json}");
        }
    }

    #[test]
    fn a_quota_or_a_period_alone_leaves_the_other() {
        let now = |file: &str| (file == "cpu.max").then(|| "30000 50000\n".to_owned());
        for (json, expected) in [
            (r#"{"cpu":{"quota":20000}}"#, "20000 50000"),
            (r#"{"cpu":{"period":60000}}"#, "30000 60000"),
            (r#"{"cpu":{"quota":-1}}"#, "max 50000"),
        ] {
            let plan = plan(&resources(json), &now).expect(json);
            assert_eq!(plan.iter().map(|write| write.value.as_str()).collect::<Vec<_>>(), [expected], "{json}");
        }
    }

    #[test]
    fn a_memory_limit_below_what_is_in_use_is_refused_and_what_was_written_is_put_back() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let file = |name: &str| directory.path().join(name);
        for (name, text) in [
            ("cpu.weight", "100\n"),
            ("memory.max", "max\n"),
            ("memory.current", "1000\n"),
            ("memory.stat", "anon 600\ninactive_file 200\nactive_file 100\n"),
        ] {
            fs::write(file(name), text).expect("file");
        }
        let error = apply(directory.path(), &resources(r#"{"cpu":{"shares":2},"memory":{"limit":699}}"#)).expect_err("in use");
        assert_eq!((error.kind, error.object.as_str()), (Kind::WrongState, "memory.max=699"));
        assert!(error.to_string().contains("700 bytes"), "{error}");
        assert_eq!(fs::read_to_string(file("cpu.weight")).expect("file").trim_end(), "100");
        assert_eq!(fs::read_to_string(file("memory.max")).expect("file"), "max\n");
        apply(directory.path(), &resources(r#"{"memory":{"limit":700}}"#)).expect("cached pages can go");
    }

    #[test]
    fn swap_without_memory_and_escaping_files_are_refused() {
        for json in [r#"{"memory":{"swap":5}}"#, r#"{"unified":{"../x.y":"1"}}"#, r#"{"unified":{"cgroup.procs":"1"}}"#] {
            assert_eq!(plan(&resources(json), &|_| None).expect_err(json).kind, Kind::Invalid, "{json}");
        }
    }

    #[test]
    fn a_failure_restores_what_was_written_and_absent_controllers_are_reported() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let file = |name: &str| directory.path().join(name);
        fs::write(file("pids.max"), "7\n").expect("file");
        let error =
            apply(directory.path(), &resources(r#"{"pids":{"limit":9},"unified":{"no.such":"1"}}"#)).expect_err("unknown");
        assert_eq!((error.kind, error.object.as_str()), (Kind::Invalid, "no.such"));
        assert_eq!(fs::read_to_string(file("pids.max")).expect("file"), "7");
        let missing = apply(directory.path(), &resources(r#"{"memory":{"limit":9},"pids":{"limit":9}}"#)).expect("applied");
        assert_eq!(missing, ["memory"]);
        assert_eq!(fs::read_to_string(file("pids.max")).expect("file"), "9");
    }
}
