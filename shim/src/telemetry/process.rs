//! The figures of this process, by the names that Prometheus has for those of any process.

use std::fs;

/// Clock ticks in a second (sysconf(3): 100 on every architecture that Linux shows them on).
const TICKS: f64 = 100.0;

/// Name, help, whether it only grows, and value.
pub(super) fn figures() -> Vec<(&'static str, &'static str, bool, f64)> {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may hold anything; the state is the first.
    let fields: Vec<&str> = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect()).unwrap_or_default();
    let field = |number: usize| fields.get(number - 3).and_then(|text| text.parse::<f64>().ok());
    let limits = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let found = [
        (
            "process_cpu_seconds_total",
            "Processor time of the daemon in seconds.",
            true,
            field(14).zip(field(15)).map(|(user, system)| (user + system) / TICKS),
        ),
        ("process_threads", "Threads of the daemon.", false, field(20)),
        (
            "process_start_time_seconds",
            "When the daemon started, in seconds since the epoch.",
            false,
            field(22).and_then(started),
        ),
        ("process_virtual_memory_bytes", "Address space of the daemon.", false, field(23)),
        ("process_resident_memory_bytes", "Resident memory of the daemon.", false, resident_bytes()),
        (
            "process_open_fds",
            "Open file descriptors of the daemon.",
            false,
            fs::metadata("/proc/self/fd").ok().map(|metadata| metadata.len() as f64),
        ),
        ("process_max_fds", "Most open file descriptors of the daemon.", false, limits.current.map(|limit| limit as f64)),
    ];
    found.into_iter().filter_map(|(name, help, counter, value)| Some((name, help, counter, value?))).collect()
}

fn resident_bytes() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kibibytes = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    kibibytes.map(|kibibytes| kibibytes * 1024.0)
}

/// From ticks since the machine started.
fn started(ticks: f64) -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = stat.lines().find_map(|line| line.strip_prefix("btime "))?.parse().ok()?;
    Some(boot + ticks / TICKS)
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_figure_is_there_and_plausible() {
        let figures = super::figures();
        assert_eq!(figures.len(), 7, "{figures:?}");
        let value = |name: &str| figures.iter().find(|figure| figure.0 == name).map(|figure| figure.3).expect(name);
        assert!(value("process_resident_memory_bytes") > 1e6 && value("process_open_fds") >= 3.0);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after the epoch").as_secs_f64();
        assert!((now - value("process_start_time_seconds")).abs() < 3600.0, "{figures:?}");
    }
}
