//! What the metrics of a cgroup need beside its [`Sample`](super::Sample): read only when metrics are asked for. Files that are
//! seldom read are not kept open. What the kernel does not tell is absent, never zero.

use super::{files::Files, parse, sample::members};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// Processes of a container that are looked at one by one, at most.
const PROCESSES_MAX: usize = 512;
/// Descriptors and threads that are looked at one by one, at most, each for one container.
const LOOKS_MAX: usize = 4096;

/// Lines of `key number`.
pub(super) type Counters = BTreeMap<String, u64>;

/// The further figures of one cgroup.
#[derive(Debug, Clone, Default)]
pub struct Detail {
    /// cpu.stat
    pub cpu: Counters,
    /// cpu.max: microseconds in each period, if they are limited.
    pub cpu_quota_us: Option<u64>,
    pub cpu_period_us: Option<u64>,
    pub cpu_weight: Option<u64>,
    /// memory.stat
    pub memory: Counters,
    /// memory.events
    pub memory_events: Counters,
    pub memory_peak_bytes: Option<u64>,
    /// Limits: zero is none, as cAdvisor has it.
    pub memory_limit_bytes: Option<u64>,
    pub memory_min_bytes: Option<u64>,
    pub swap_limit_bytes: Option<u64>,
    pub threads: Option<u64>,
    pub threads_max: Option<u64>,
    pub devices: Vec<Device>,
    pub huge_pages: Vec<HugePages>,
    /// Of a container alone.
    pub processes: Option<Processes>,
}

/// What one block device did for the cgroup: a line of io.stat.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Device {
    pub name: String,
    pub major: String,
    pub minor: String,
    pub counters: Counters,
}

/// Huge pages of one size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HugePages {
    /// `2MB`
    pub size: String,
    pub usage_bytes: u64,
    pub failures: Option<u64>,
}

/// What the processes of a container have, as /proc tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Processes {
    pub count: u64,
    pub descriptors: u64,
    /// Absent when there are too many descriptors to look at.
    pub sockets: Option<u64>,
    /// Soft limit of open files of the first process.
    pub open_files_max: Option<u64>,
    /// Threads by cAdvisor's name of their state; absent when there are too many to look at.
    pub states: Option<[(&'static str, u64); 4]>,
}

/// The file system that writable layers are on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Disk {
    pub device: String,
    pub size_bytes: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

impl Disk {
    pub fn of(directory: &Path) -> Option<Disk> {
        let found = rustix::fs::statvfs(directory).ok()?;
        let device = rustix::fs::stat(directory).ok()?.st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        Some(Disk {
            device: device_name(&major.to_string(), &minor.to_string()),
            size_bytes: found.f_blocks * found.f_frsize,
            inodes: found.f_files,
            inodes_free: found.f_ffree,
        })
    }
}

/// Reads them. `init` is the first process of a container, nothing for the cgroup of a pod.
pub(super) fn take(files: &mut Files, init: Option<i32>) -> Detail {
    let (cpu_quota_us, cpu_period_us) = files.glance("cpu.max").map_or((None, None), |text| cpu_max(&text));
    let processes = init.and_then(|init| processes(files, init));
    Detail {
        cpu: counters(files.read("cpu.stat")),
        cpu_quota_us,
        cpu_period_us,
        cpu_weight: files.glance("cpu.weight").and_then(|text| parse::number(&text)),
        memory: counters(files.read("memory.stat")),
        memory_events: counters(files.glance("memory.events").as_deref()),
        memory_peak_bytes: files.glance("memory.peak").and_then(|text| parse::number(&text)),
        memory_limit_bytes: limit(files.glance("memory.max")),
        memory_min_bytes: limit(files.glance("memory.min")),
        swap_limit_bytes: limit(files.glance("memory.swap.max")),
        threads: files.read("pids.current").and_then(parse::number),
        threads_max: limit(files.glance("pids.max")),
        devices: files.glance("io.stat").map(|text| devices(&text)).unwrap_or_default(),
        huge_pages: huge_pages(files),
        processes,
    }
}

fn counters(text: Option<&str>) -> Counters {
    text.map(|text| parse::keyed(text).map(|(key, value)| (key.to_owned(), value)).collect()).unwrap_or_default()
}

/// A limit, whose file says `max` for none.
fn limit(text: Option<String>) -> Option<u64> {
    text.map(|text| parse::number(&text).unwrap_or(0))
}

/// Quota and period.
fn cpu_max(text: &str) -> (Option<u64>, Option<u64>) {
    let mut words = text.split_whitespace();
    (words.next().and_then(parse::number), words.next().and_then(parse::number))
}

/// io.stat. The kernel writes a device whose counters are all zero without an end of line behind it.
fn devices(text: &str) -> Vec<Device> {
    let mut found: Vec<Device> = Vec::new();
    for word in text.split_whitespace() {
        if let Some((key, value)) = word.split_once('=') {
            if let (Some(device), Ok(value)) = (found.last_mut(), value.parse()) {
                device.counters.insert(key.to_owned(), value);
            }
        } else if let Some((major, minor)) = word.split_once(':') {
            let name = device_name(major, minor);
            found.push(Device { name, major: major.to_owned(), minor: minor.to_owned(), counters: Counters::new() });
        }
    }
    found.retain(|device| !device.counters.is_empty());
    found
}

/// `/dev/sda`, or the numbers where the kernel has no name for them.
fn device_name(major: &str, minor: &str) -> String {
    let event = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).unwrap_or_default();
    let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    name.map_or_else(|| format!("{major}:{minor}"), |name| format!("/dev/{name}"))
}

fn huge_pages(files: &Files) -> Vec<HugePages> {
    let Ok(listing) = fs::read_dir("/sys/kernel/mm/hugepages") else { return Vec::new() };
    let mut sizes: Vec<u64> = listing
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok())
        .collect();
    sizes.sort_unstable();
    let read = |kibibytes: u64| {
        let size = match kibibytes {
            0..1024 => format!("{kibibytes}KB"),
            1024..1_048_576 => format!("{}MB", kibibytes / 1024),
            _ => format!("{}GB", kibibytes / 1_048_576),
        };
        let usage_bytes = parse::number(&files.glance(&format!("hugetlb.{size}.current"))?)?;
        let events = counters(files.glance(&format!("hugetlb.{size}.events")).as_deref());
        Some(HugePages { failures: events.get("max").copied(), usage_bytes, size })
    };
    sizes.into_iter().filter_map(read).collect()
}

fn processes(files: &mut Files, init: i32) -> Option<Processes> {
    let members = members(files).filter(|members| members.len() <= PROCESSES_MAX)?;
    let mut found = Processes {
        count: u64::try_from(members.len()).ok()?,
        open_files_max: fs::read_to_string(format!("/proc/{init}/limits")).ok().and_then(|text| open_files(&text)),
        ..Processes::default()
    };
    let (mut descriptors_left, mut threads_left) = (Some(LOOKS_MAX), Some(LOOKS_MAX));
    let (mut sockets, mut states) = (0, [("sleeping", 0), ("running", 0), ("stopped", 0), ("uninterruptible", 0)]);
    for pid in members {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        // Since 6.2 the size of this directory is the number of its entries.
        found.descriptors += fs::metadata(proc.join("fd")).map_or(0, |metadata| metadata.len());
        look(&proc.join("fd"), &mut descriptors_left, |entry| {
            sockets +=
                u64::from(fs::read_link(entry).is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"socket:")));
        });
        look(&proc.join("task"), &mut threads_left, |entry| {
            if let Some(index) = fs::read_to_string(entry.join("stat")).ok().and_then(|text| state(&text))
                && let Some((_, count)) = states.get_mut(index)
            {
                *count += 1;
            }
        });
    }
    found.sockets = descriptors_left.map(|_| sockets);
    found.states = threads_left.map(|_| states);
    Some(found)
}

/// Shows each entry of a directory, as long as some are left to look at.
fn look(directory: &Path, left: &mut Option<usize>, mut show: impl FnMut(&Path)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let Some(rest) = left.and_then(|left| left.checked_sub(1)) else {
            *left = None;
            return;
        };
        *left = Some(rest);
        show(&entry.path());
    }
}

/// Which of cAdvisor's states a thread is in: the letter behind its name in proc_pid_stat(5).
fn state(stat: &str) -> Option<usize> {
    match stat.rsplit_once(") ")?.1.chars().next()? {
        'S' | 'I' => Some(0),
        'R' => Some(1),
        'T' | 't' => Some(2),
        'D' => Some(3),
        _ => None,
    }
}

/// The soft limit of open files in proc_pid_limits(5); `unlimited` is none.
fn open_files(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_devices_even_when_the_kernel_forgets_to_end_them() {
        let found = devices("7:1 7:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n254:900 wbytes=12 cost.usage=5\n");
        let name = |device: &Device| (device.major.clone(), device.minor.clone(), device.counters.len());
        assert_eq!(found.iter().map(name).collect::<Vec<_>>(), [("7".into(), "0".into(), 6), ("254".into(), "900".into(), 2)]);
        assert_eq!(found[1].name, "254:900", "no such device here");
        assert_eq!((found[0].counters["rbytes"], found[1].counters["cost.usage"]), (4096, 5));
    }

    #[test]
    fn limits_and_what_is_none() {
        assert_eq!(cpu_max("max 100000\n"), (None, Some(100_000)));
        assert_eq!(cpu_max("25000 50000\n"), (Some(25_000), Some(50_000)));
        assert_eq!((limit(Some("max\n".into())), limit(Some("5\n".into())), limit(None)), (Some(0), Some(5), None));
        let text = "Limit   Soft Limit  Hard Limit  Units\nMax open files            1024    524288   files\nMax locked memory 8 8 bytes\n";
        assert_eq!((open_files(text), open_files("Max open files  unlimited unlimited files\n")), (Some(1024), None));
    }

    #[test]
    fn a_name_with_brackets_hides_no_state() {
        assert_eq!((state("12 (a) R) S 1 1"), state("12 (x) Z 1"), state("nonsense")), (Some(0), None, None));
    }

    #[test]
    fn own_processes_are_counted() {
        let _socket = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
        let folder = tempfile::tempdir().expect("a folder");
        let own = std::process::id();
        fs::write(folder.path().join("cgroup.procs"), format!("{own}\n")).expect("write");
        let mut files = Files::open(folder.path().to_owned()).expect("open");
        let found = processes(&mut files, i32::try_from(own).expect("a pid")).expect("found");
        assert!(found.count == 1 && found.descriptors >= 4 && found.sockets >= Some(1), "{found:?}");
        assert!(
            found.open_files_max.is_some() && found.states.is_some_and(|states| states.iter().any(|state| state.1 > 0)),
            "{found:?}"
        );
        let disk = Disk::of(folder.path()).expect("a file system");
        assert!(disk.size_bytes > 0 && !disk.device.is_empty(), "{disk:?}");
    }
}
