//! One look at a cgroup. Where the v2 tree has no memory controller, memory is the sum of what the processes have resident, and says
//! that it is an estimate.

use super::{files::Files, parse};
use crate::node::now_ns;
use rustix::{
    fs::{Mode, OFlags},
    param::page_size,
};
use std::fs;
use windlass_proto::cri::PsiStats;

/// Shortest time that a rate is taken over.
const WINDOW_MIN_NS: i64 = 1_000_000_000;
/// Processes beyond which resident memory is not summed.
const SUMMED_MAX: usize = 512;

/// What a cgroup used up to `at_ns`.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    pub at_ns: i64,
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    pub swap: Option<Swap>,
    pub cpu_psi: Option<PsiStats>,
    pub memory_psi: Option<PsiStats>,
    pub io_psi: Option<PsiStats>,
    pub processes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cpu {
    pub usage_ns: u64,
    /// Nanoseconds of processor time in each second of the window.
    pub nano_cores: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    pub usage_bytes: Option<u64>,
    pub working_set_bytes: u64,
    pub rss_bytes: u64,
    /// What is left of the limit; none without a limit.
    pub available_bytes: Option<u64>,
    pub page_faults: Option<u64>,
    pub major_page_faults: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Swap {
    pub usage_bytes: u64,
    pub available_bytes: Option<u64>,
}

/// Two earlier points of the processor's time, the older of which a rate is taken from.
pub(super) struct Window {
    older: (i64, u64),
    newer: (i64, u64),
}

impl Window {
    /// The window of a group that began with nothing used.
    pub(super) fn since(at_ns: i64) -> Window {
        Window { older: (at_ns, 0), newer: (at_ns, 0) }
    }

    fn rate(&mut self, at_ns: i64, usage_ns: u64) -> Option<u64> {
        if at_ns - self.newer.0 >= WINDOW_MIN_NS {
            self.older = self.newer;
            self.newer = (at_ns, usage_ns);
        }
        let elapsed = u128::try_from(at_ns - self.older.0).ok().filter(|elapsed| *elapsed > 0)?;
        let used = usage_ns.checked_sub(self.older.1)?;
        u64::try_from(u128::from(used) * 1_000_000_000 / elapsed).ok()
    }
}

/// Reads the group; nothing when it is gone.
pub(super) fn take(files: &mut Files, window: &mut Window) -> Option<Sample> {
    let at_ns = now_ns();
    let usage_ns = files.read("cpu.stat").and_then(usage_ns)?;
    let cpu = Cpu { usage_ns, nano_cores: window.rate(at_ns, usage_ns) };
    let (memory, processes) = (memory(files), files.read("pids.current").and_then(parse::number));
    // One look at the members serves whatever no controller counts.
    let members = if memory.is_none() || processes.is_none() { members(files) } else { None };
    let count = members.as_ref().and_then(|members| u64::try_from(members.len()).ok());
    Some(Sample {
        at_ns,
        cpu: Some(cpu),
        memory: memory.or_else(|| resident(&members?)),
        swap: swap(files),
        cpu_psi: files.read("cpu.pressure").and_then(parse::pressure),
        memory_psi: files.read("memory.pressure").and_then(parse::pressure),
        io_psi: files.read("io.pressure").and_then(parse::pressure),
        processes: processes.or(count),
    })
}

/// The processor's time in cpu.stat.
pub(super) fn usage_ns(text: &str) -> Option<u64> {
    parse::keyed(text).find(|(key, _)| *key == "usage_usec").map(|(_, usage_usec)| usage_usec * 1000)
}

fn memory(files: &mut Files) -> Option<Memory> {
    let usage = parse::number(files.read("memory.current")?)?;
    let (mut inactive_file, mut memory) = (0, Memory { usage_bytes: Some(usage), ..Memory::default() });
    for (key, value) in parse::keyed(files.read("memory.stat")?) {
        match key {
            "inactive_file" => inactive_file = value,
            "anon" => memory.rss_bytes = value,
            "pgfault" => memory.page_faults = Some(value),
            "pgmajfault" => memory.major_page_faults = Some(value),
            _ => {}
        }
    }
    memory.working_set_bytes = usage.saturating_sub(inactive_file);
    let limit = files.read("memory.max").and_then(parse::number);
    memory.available_bytes = limit.map(|limit| limit.saturating_sub(memory.working_set_bytes));
    Some(memory)
}

fn swap(files: &mut Files) -> Option<Swap> {
    let usage_bytes = parse::number(files.read("memory.swap.current")?)?;
    let limit = files.read("memory.swap.max").and_then(parse::number);
    Some(Swap { usage_bytes, available_bytes: limit.map(|limit| limit.saturating_sub(usage_bytes)) })
}

/// The processes of the group and of the groups of its execs.
pub(super) fn members(files: &mut Files) -> Option<Vec<u32>> {
    let pids = |text: &str| text.lines().filter_map(|line| line.parse::<u32>().ok()).collect::<Vec<u32>>();
    let mut found = pids(files.read_list("cgroup.procs")?);
    let below = files.read("cgroup.stat").and_then(|text| parse::keyed(text).find(|(key, _)| *key == "nr_descendants"));
    if below.is_some_and(|(_, count)| count == 0) {
        return Some(found);
    }
    for entry in fs::read_dir(files.path()).ok()?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Ok(text) = fs::read_to_string(entry.path().join("cgroup.procs"))
        {
            found.extend(pids(&text));
        }
    }
    Some(found)
}

/// Pages that several processes share are counted for each of them, so this is at least what the group uses.
fn resident(members: &[u32]) -> Option<Memory> {
    if members.len() > SUMMED_MAX {
        return None;
    }
    let pages = members.iter().filter_map(|pid| resident_pages(*pid)).sum::<u64>();
    let rss_bytes = pages * u64::try_from(page_size()).ok()?;
    Some(Memory { working_set_bytes: rss_bytes, rss_bytes, ..Memory::default() })
}

/// The second number of /proc/pid/statm, which costs the kernel a fraction of what the words of its status do.
fn resident_pages(pid: u32) -> Option<u64> {
    let file = rustix::fs::open(format!("/proc/{pid}/statm"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let mut buffer = [0; 256];
    let length = rustix::io::read(&file, &mut buffer).ok()?;
    std::str::from_utf8(buffer.get(..length)?).ok()?.split(' ').nth(1)?.parse().ok()
}

/// Use of a pod that has no group of its own, from that of its parts and from the processor's time of parts that have ended. Pressure has no
/// sum: two halves that wait at once are not two waits, so it is absent.
pub fn sum(parts: &[Sample], ended_ns: u64) -> Sample {
    let add = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a + b);
    let mut whole = Sample { at_ns: now_ns(), cpu: Some(Cpu::default()), processes: Some(0), ..Sample::default() };
    for (position, part) in parts.iter().enumerate() {
        let first = position == 0;
        whole.cpu = whole.cpu.zip(part.cpu).map(|(a, b)| Cpu {
            usage_ns: a.usage_ns + b.usage_ns,
            nano_cores: if first { b.nano_cores } else { add(a.nano_cores, b.nano_cores) },
        });
        whole.processes = add(whole.processes, part.processes);
        whole.memory = if first { part.memory } else { whole.memory.zip(part.memory).map(|(a, b)| plus(a, b)) };
        whole.swap = if first { part.swap } else { whole.swap.zip(part.swap).map(|(a, b)| swap_plus(a, b)) };
    }
    if let Some(cpu) = &mut whole.cpu {
        cpu.usage_ns += ended_ns;
    }
    whole
}

fn plus(a: Memory, b: Memory) -> Memory {
    let add = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a + b);
    Memory {
        usage_bytes: add(a.usage_bytes, b.usage_bytes),
        working_set_bytes: a.working_set_bytes + b.working_set_bytes,
        rss_bytes: a.rss_bytes + b.rss_bytes,
        available_bytes: add(a.available_bytes, b.available_bytes),
        page_faults: add(a.page_faults, b.page_faults),
        major_page_faults: add(a.major_page_faults, b.major_page_faults),
    }
}

fn swap_plus(a: Swap, b: Swap) -> Swap {
    let available_bytes = a.available_bytes.zip(b.available_bytes).map(|(a, b)| a + b);
    Swap { usage_bytes: a.usage_bytes + b.usage_bytes, available_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_NS: i64 = 1_000_000_000;

    #[test]
    fn a_rate_is_of_the_last_window_of_a_second_or_more() {
        let mut window = Window::since(0);
        assert_eq!(window.rate(SECOND_NS / 2, 250_000_000), Some(500_000_000), "since its beginning");
        assert_eq!(window.rate(2 * SECOND_NS, 2_000_000_000), Some(1_000_000_000));
        assert_eq!(window.rate(4 * SECOND_NS, 2_000_000_000), Some(0), "idle since");
        assert_eq!(window.rate(4 * SECOND_NS + 1, 2_000_000_000), Some(0), "too soon for a new window");
    }

    #[test]
    fn what_is_resident_is_what_the_kernel_says() {
        let status = fs::read_to_string("/proc/self/status").expect("a status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").trim().parse().expect("a number");
        let found = resident(&[std::process::id()]).expect("resident").rss_bytes / 1024;
        // Other tests of this program allocate meanwhile, and the two are counted by the kernel in different ways.
        assert!(found.abs_diff(kibibytes) < 32 << 10, "{found} KiB, not {kibibytes}");
        assert!(found > 1024);
    }

    #[test]
    fn a_sum_leaves_out_what_one_part_does_not_tell() {
        let part = |usage_ns, usage_bytes| Sample {
            cpu: Some(Cpu { usage_ns, nano_cores: Some(usage_ns) }),
            memory: Some(Memory { usage_bytes, rss_bytes: 5, working_set_bytes: 6, ..Memory::default() }),
            processes: Some(2),
            ..Sample::default()
        };
        let whole = sum(&[part(1, Some(10)), part(2, Some(20))], 7);
        assert_eq!(whole.cpu, Some(Cpu { usage_ns: 10, nano_cores: Some(3) }), "what has ended used time, and has no rate");
        assert!(whole.cpu_psi.is_none());
        assert_eq!((whole.processes, whole.memory.and_then(|m| m.usage_bytes)), (Some(4), Some(30)));
        let whole = sum(&[part(1, Some(10)), part(2, None)], 0);
        assert_eq!(whole.memory.map(|m| (m.usage_bytes, m.rss_bytes)), Some((None, 10)));
        assert!(sum(&[], 0).memory.is_none());
    }
}
