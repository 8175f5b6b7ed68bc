//! The container metrics that kubelet's /metrics/cadvisor has (cAdvisor's metrics/prometheus.go, of 0.56 and of kubelet 1.37), each with its
//! name, help, type, labels and where its value comes from. The CRI carries whole numbers, so seconds are whole ones; for the same reason
//! there is no `container_health_state`, which is -1 here. What cgroup v2 does not count for a group (merges, sectors and times of block
//! I/O, peaks of huge pages) is described, because dashboards name it, and has no value. Pure.

use super::{
    Sample, Size,
    detail::{Detail, Disk},
    network::Traffic,
};

/// What the values come from: those of a container, or those of a pod.
#[derive(Default)]
pub struct Figures<'a> {
    pub now_seconds: u64,
    pub created_seconds: u64,
    pub began_seconds: u64,
    pub sample: Option<&'a Sample>,
    pub detail: Option<&'a Detail>,
    /// The writable layer, and the file system that it is on.
    pub layer: Option<(Size, &'a Disk)>,
    pub traffic: &'a [(String, Traffic)],
}

/// Takes one value and the values of the family's own labels.
type Put<'a> = dyn FnMut(&[&str], u64) + 'a;

/// One metric, as cAdvisor names it.
pub struct Family {
    pub name: &'static str,
    pub help: &'static str,
    pub counter: bool,
    /// Labels beside those of every metric.
    pub labels: &'static [&'static str],
    read: fn(&Figures<'_>, &mut Put<'_>),
}

impl Family {
    /// Hands out each value that is known.
    pub fn values(&self, figures: &Figures<'_>, put: &mut Put<'_>) {
        (self.read)(figures, put);
    }

    const fn by(self, labels: &'static [&'static str]) -> Family {
        Family { labels, ..self }
    }
}

const fn counter(name: &'static str, help: &'static str, read: fn(&Figures<'_>, &mut Put<'_>)) -> Family {
    Family { name, help, counter: true, labels: &[], read }
}

const fn gauge(name: &'static str, help: &'static str, read: fn(&Figures<'_>, &mut Put<'_>)) -> Family {
    Family { name, help, counter: false, labels: &[], read }
}

fn one(put: &mut Put<'_>, value: Option<u64>) {
    if let Some(value) = value {
        put(&[], value);
    }
}

/// cAdvisor counts throttling only where there is a quota.
fn throttling(figures: &Figures<'_>, key: &str) -> Option<u64> {
    let detail = figures.detail.filter(|detail| detail.cpu_quota_us.is_some())?;
    detail.cpu.get(key).copied()
}

fn seconds(us: u64) -> u64 {
    us / 1_000_000
}

impl Figures<'_> {
    fn cpu(&self, key: &str) -> Option<u64> {
        self.detail?.cpu.get(key).copied()
    }

    fn memory(&self, key: &str) -> Option<u64> {
        self.detail?.memory.get(key).copied()
    }

    fn memory_event(&self, key: &str) -> Option<u64> {
        self.detail?.memory_events.get(key).copied()
    }

    fn used(&self) -> Option<super::Memory> {
        self.sample?.memory
    }

    /// A counter of each block device, divided.
    fn devices(&self, key: &str, divisor: u64, put: &mut Put<'_>) {
        for device in self.detail.iter().flat_map(|detail| &detail.devices) {
            if let Some(value) = device.counters.get(key) {
                put(&[&device.name], value / divisor);
            }
        }
    }

    fn interfaces(&self, value: fn(&Traffic) -> u64, put: &mut Put<'_>) {
        for (name, traffic) in self.traffic {
            put(&[name], value(traffic));
        }
    }

    fn disk(&self, value: fn(Size, &Disk) -> u64, put: &mut Put<'_>) {
        if let Some((size, disk)) = self.layer {
            put(&[&disk.device], value(size, disk));
        }
    }

    fn waiting(&self, of: fn(&Sample) -> Option<windlass_proto::cri::PsiStats>) -> Option<u64> {
        Some(seconds(of(self.sample?)?.some?.total))
    }

    fn stalled(&self, of: fn(&Sample) -> Option<windlass_proto::cri::PsiStats>) -> Option<u64> {
        Some(seconds(of(self.sample?)?.full?.total))
    }
}

/// What no file of cgroup v2 tells.
fn untold(_: &Figures<'_>, _: &mut Put<'_>) {}

/// The shares that give this weight, on the curve that the OCI runtimes share (of 2026; cAdvisor 0.56 reads the straight line before it).
fn shares(weight: u64) -> u64 {
    let power = (weight.clamp(1, 10_000) as f64).log10() + 7.0 / 34.0;
    let exponent = ((125.0f64 * 125.0 + 4.0 * 612.0 * power).sqrt() - 125.0) / 2.0;
    exponent.exp2().round() as u64
}

/// All of them.
pub static FAMILIES: [Family; 84] = [
    gauge("container_last_seen", "Last time a container was seen by the exporter", |f, put| put(&[], f.now_seconds)),
    gauge("container_creation_time_seconds", "Container creation time since unix epoch in seconds.", |f, put| {
        put(&[], f.created_seconds);
    }),
    gauge("container_start_time_seconds", "Start time of the container since unix epoch in seconds.", |f, put| {
        put(&[], f.began_seconds);
    }),
    // Processor.
    counter("container_cpu_user_seconds_total", "Cumulative user cpu time consumed in seconds.", |f, put| {
        one(put, f.cpu("user_usec").map(seconds));
    }),
    counter("container_cpu_system_seconds_total", "Cumulative system cpu time consumed in seconds.", |f, put| {
        one(put, f.cpu("system_usec").map(seconds));
    }),
    counter("container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.", |f, put| {
        if let Some(usage) = f.cpu("usage_usec") {
            put(&["total"], seconds(usage));
        }
    })
    .by(&["cpu"]),
    counter("container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals.", |f, put| {
        one(put, throttling(f, "nr_periods"));
    }),
    counter("container_cpu_cfs_throttled_periods_total", "Number of throttled period intervals.", |f, put| {
        one(put, throttling(f, "nr_throttled"));
    }),
    counter("container_cpu_cfs_throttled_seconds_total", "Total time duration the container has been throttled.", |f, put| {
        one(put, throttling(f, "throttled_usec").map(seconds));
    }),
    counter("container_cpu_cfs_burst_periods_total", "Number of periods when burst occurs.", |f, put| {
        one(put, throttling(f, "nr_bursts"));
    }),
    counter("container_cpu_cfs_burst_seconds_total", "Total time duration the container has been bursted.", |f, put| {
        one(put, throttling(f, "burst_usec").map(seconds));
    }),
    gauge("container_tasks_state", "Number of tasks in given state", |f, put| {
        let processes = f.detail.and_then(|detail| detail.processes.as_ref());
        for (state, count) in processes.and_then(|processes| processes.states).iter().flatten() {
            put(&[state], *count);
        }
    })
    .by(&["state"]),
    // What was asked for.
    gauge("container_spec_cpu_period", "CPU period of the container.", |f, put| {
        one(put, f.detail.and_then(|detail| detail.cpu_period_us));
    }),
    gauge("container_spec_cpu_quota", "CPU quota of the container.", |f, put| {
        one(put, f.detail.and_then(|detail| detail.cpu_quota_us));
    }),
    gauge("container_spec_cpu_shares", "CPU share of the container.", |f, put| {
        one(put, f.detail.and_then(|detail| detail.cpu_weight).map(shares));
    }),
    gauge("container_spec_memory_limit_bytes", "Memory limit for the container.", |f, put| {
        one(put, f.detail.and_then(|detail| detail.memory_limit_bytes));
    }),
    gauge("container_spec_memory_swap_limit_bytes", "Memory swap limit for the container.", |f, put| {
        one(put, f.detail.and_then(|detail| detail.swap_limit_bytes));
    }),
    gauge("container_spec_memory_reservation_limit_bytes", "Memory reservation limit for the container.", |f, put| {
        one(put, f.detail.and_then(|detail| detail.memory_min_bytes));
    }),
    // Huge pages.
    counter("container_hugetlb_failcnt", "Number of hugepage usage hits limits", |f, put| {
        for pages in f.detail.iter().flat_map(|detail| &detail.huge_pages) {
            if let Some(failures) = pages.failures {
                put(&[&pages.size], failures);
            }
        }
    })
    .by(&["pagesize"]),
    gauge("container_hugetlb_usage_bytes", "Current hugepage usage in bytes", |f, put| {
        for pages in f.detail.iter().flat_map(|detail| &detail.huge_pages) {
            put(&[&pages.size], pages.usage_bytes);
        }
    })
    .by(&["pagesize"]),
    gauge("container_hugetlb_max_usage_bytes", "Maximum hugepage usage recorded in bytes", untold).by(&["pagesize"]),
    // Memory.
    gauge("container_memory_cache", "Number of bytes of page cache memory.", |f, put| one(put, f.memory("file"))),
    gauge("container_memory_rss", "Size of RSS in bytes.", |f, put| one(put, f.used().map(|memory| memory.rss_bytes))),
    gauge("container_memory_kernel_usage", "Size of kernel memory allocated in bytes.", |f, put| one(put, f.memory("kernel"))),
    gauge("container_memory_mapped_file", "Size of memory mapped files in bytes.", |f, put| one(put, f.memory("file_mapped"))),
    gauge("container_memory_swap", "Container swap usage in bytes.", |f, put| {
        one(put, f.sample.and_then(|sample| sample.swap).map(|swap| swap.usage_bytes));
    }),
    counter("container_memory_failcnt", "Number of memory usage hits limits", |f, put| one(put, f.memory_event("max"))),
    gauge(
        "container_memory_usage_bytes",
        "Current memory usage in bytes, including all memory regardless of when it was accessed",
        |f, put| one(put, f.used().and_then(|memory| memory.usage_bytes)),
    ),
    gauge("container_memory_max_usage_bytes", "Maximum memory usage recorded in bytes", |f, put| {
        one(put, f.detail.and_then(|detail| detail.memory_peak_bytes));
    }),
    gauge("container_memory_working_set_bytes", "Current working set in bytes.", |f, put| {
        one(put, f.used().map(|memory| memory.working_set_bytes));
    }),
    gauge("container_memory_total_active_file_bytes", "Current total active file in bytes.", |f, put| {
        one(put, f.memory("active_file"));
    }),
    gauge("container_memory_total_inactive_file_bytes", "Current total inactive file in bytes.", |f, put| {
        one(put, f.memory("inactive_file"));
    }),
    counter("container_memory_failures_total", "Cumulative count of memory allocation failures.", |f, put| {
        for scope in ["container", "hierarchy"] {
            for kind in ["pgfault", "pgmajfault"] {
                if let Some(count) = f.memory(kind) {
                    put(&[kind, scope], count);
                }
            }
        }
    })
    .by(&["failure_type", "scope"]),
    counter(
        "container_memory_events_high_total",
        "Cumulative count of memory.high throttle events for the container",
        |f, put| one(put, f.memory_event("high")),
    ),
    counter(
        "container_memory_events_max_total",
        "Cumulative count of memory.max limit hit events for the container",
        |f, put| one(put, f.memory_event("max")),
    ),
    gauge(
        "container_memory_file_dirty_bytes",
        "Number of bytes of file cache that has been modified but not yet written back to disk.",
        |f, put| one(put, f.memory("file_dirty")),
    ),
    gauge(
        "container_memory_file_writeback_bytes",
        "Number of bytes of file cache that is currently being written back to disk.",
        |f, put| one(put, f.memory("file_writeback")),
    ),
    counter("container_memory_pgscan_total", "Cumulative number of pages scanned by the page reclaim algorithm.", |f, put| {
        one(put, f.memory("pgscan"));
    }),
    counter("container_memory_pgsteal_total", "Cumulative number of pages reclaimed by the page reclaim algorithm.", |f, put| {
        one(put, f.memory("pgsteal"));
    }),
    counter(
        "container_memory_workingset_refault_file_total",
        "Cumulative number of refaults of previously evicted file pages.",
        |f, put| one(put, f.memory("workingset_refault_file")),
    ),
    counter(
        "container_memory_workingset_refault_anon_total",
        "Cumulative number of refaults of previously evicted anonymous pages.",
        |f, put| one(put, f.memory("workingset_refault_anon")),
    ),
    counter("container_oom_events_total", "Count of out of memory events observed for the container", |f, put| {
        one(put, f.memory_event("oom_kill"));
    }),
    // Disks.
    gauge("container_fs_inodes_free", "Number of available Inodes", |f, put| f.disk(|_, disk| disk.inodes_free, put))
        .by(&["device"]),
    gauge("container_fs_inodes_total", "Number of Inodes", |f, put| f.disk(|_, disk| disk.inodes, put)).by(&["device"]),
    gauge("container_fs_limit_bytes", "Number of bytes that can be consumed by the container on this filesystem.", |f, put| {
        f.disk(|_, disk| disk.size_bytes, put)
    })
    .by(&["device"]),
    gauge("container_fs_usage_bytes", "Number of bytes that are consumed by the container on this filesystem.", |f, put| {
        f.disk(|size, _| size.bytes, put)
    })
    .by(&["device"]),
    counter("container_fs_reads_bytes_total", "Cumulative count of bytes read", |f, put| f.devices("rbytes", 1, put))
        .by(&["device"]),
    counter("container_fs_reads_total", "Cumulative count of reads completed", |f, put| f.devices("rios", 1, put))
        .by(&["device"]),
    counter("container_fs_sector_reads_total", "Cumulative count of sector reads completed", untold).by(&["device"]),
    counter("container_fs_reads_merged_total", "Cumulative count of reads merged", untold).by(&["device"]),
    counter("container_fs_read_seconds_total", "Cumulative count of seconds spent reading", untold).by(&["device"]),
    counter("container_fs_writes_bytes_total", "Cumulative count of bytes written", |f, put| f.devices("wbytes", 1, put))
        .by(&["device"]),
    counter("container_fs_writes_total", "Cumulative count of writes completed", |f, put| f.devices("wios", 1, put))
        .by(&["device"]),
    counter("container_fs_sector_writes_total", "Cumulative count of sector writes completed", untold).by(&["device"]),
    counter("container_fs_writes_merged_total", "Cumulative count of writes merged", untold).by(&["device"]),
    counter("container_fs_write_seconds_total", "Cumulative count of seconds spent writing", untold).by(&["device"]),
    gauge("container_fs_io_current", "Number of I/Os currently in progress", untold).by(&["device"]),
    counter("container_fs_io_time_seconds_total", "Cumulative count of seconds spent doing I/Os", untold).by(&["device"]),
    counter("container_fs_io_time_weighted_seconds_total", "Cumulative weighted I/O time in seconds", untold).by(&["device"]),
    counter("container_fs_io_cost_usage_seconds_total", "Cumulative IOCost usage in seconds", |f, put| {
        f.devices("cost.usage", 1_000_000, put);
    })
    .by(&["device"]),
    counter("container_fs_io_cost_wait_seconds_total", "Cumulative IOCost wait in seconds", |f, put| {
        f.devices("cost.wait", 1_000_000, put);
    })
    .by(&["device"]),
    counter("container_fs_io_cost_indebt_seconds_total", "Cumulative IOCost debt in seconds", |f, put| {
        f.devices("cost.indebt", 1_000_000, put);
    })
    .by(&["device"]),
    counter("container_fs_io_cost_indelay_seconds_total", "Cumulative IOCost delay in seconds", |f, put| {
        f.devices("cost.indelay", 1_000_000, put);
    })
    .by(&["device"]),
    counter("container_blkio_device_usage_total", "Blkio Device bytes usage", |f, put| {
        for device in f.detail.iter().flat_map(|detail| &detail.devices) {
            for (operation, key) in [("Read", "rbytes"), ("Write", "wbytes")] {
                if let Some(bytes) = device.counters.get(key) {
                    put(&[&device.name, &device.major, &device.minor, operation], *bytes);
                }
            }
        }
    })
    .by(&["device", "major", "minor", "operation"]),
    // Network, of the pod.
    counter("container_network_receive_bytes_total", "Cumulative count of bytes received", |f, put| {
        f.interfaces(|traffic| traffic.rx_bytes, put);
    })
    .by(&["interface"]),
    counter("container_network_receive_packets_total", "Cumulative count of packets received", |f, put| {
        f.interfaces(|traffic| traffic.rx_packets, put);
    })
    .by(&["interface"]),
    counter(
        "container_network_receive_packets_dropped_total",
        "Cumulative count of packets dropped while receiving",
        |f, put| f.interfaces(|traffic| traffic.rx_dropped, put),
    )
    .by(&["interface"]),
    counter("container_network_receive_errors_total", "Cumulative count of errors encountered while receiving", |f, put| {
        f.interfaces(|traffic| traffic.rx_errors, put);
    })
    .by(&["interface"]),
    counter("container_network_transmit_bytes_total", "Cumulative count of bytes transmitted", |f, put| {
        f.interfaces(|traffic| traffic.tx_bytes, put);
    })
    .by(&["interface"]),
    counter("container_network_transmit_packets_total", "Cumulative count of packets transmitted", |f, put| {
        f.interfaces(|traffic| traffic.tx_packets, put);
    })
    .by(&["interface"]),
    counter(
        "container_network_transmit_packets_dropped_total",
        "Cumulative count of packets dropped while transmitting",
        |f, put| f.interfaces(|traffic| traffic.tx_dropped, put),
    )
    .by(&["interface"]),
    counter("container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting", |f, put| {
        f.interfaces(|traffic| traffic.tx_errors, put);
    })
    .by(&["interface"]),
    // Processes.
    gauge("container_processes", "Number of processes running inside the container.", |f, put| {
        one(put, f.detail.and_then(|detail| detail.processes.as_ref()).map(|processes| processes.count));
    }),
    gauge("container_file_descriptors", "Number of open file descriptors for the container.", |f, put| {
        one(put, f.detail.and_then(|detail| detail.processes.as_ref()).map(|processes| processes.descriptors));
    }),
    gauge("container_sockets", "Number of open sockets for the container.", |f, put| {
        one(put, f.detail.and_then(|detail| detail.processes.as_ref()).and_then(|processes| processes.sockets));
    }),
    gauge(
        "container_threads_max",
        "Maximum number of threads allowed inside the container, infinity if value is zero",
        |f, put| one(put, f.detail.and_then(|detail| detail.threads_max)),
    ),
    gauge("container_threads", "Number of threads running inside the container", |f, put| {
        one(put, f.detail.and_then(|detail| detail.threads));
    }),
    gauge(
        "container_ulimits_soft",
        "Soft ulimit values for the container root process. Unlimited if -1, except priority and nice",
        |f, put| {
            let processes = f.detail.and_then(|detail| detail.processes.as_ref());
            if let Some(limit) = processes.and_then(|processes| processes.open_files_max) {
                put(&["max_open_files"], limit);
            }
        },
    )
    .by(&["ulimit"]),
    // Pressure.
    counter(
        "container_pressure_cpu_stalled_seconds_total",
        "Total time duration no tasks in the container could make progress due to CPU congestion.",
        |f, put| one(put, f.stalled(|sample| sample.cpu_psi)),
    ),
    counter(
        "container_pressure_cpu_waiting_seconds_total",
        "Total time duration tasks in the container have waited due to CPU congestion.",
        |f, put| one(put, f.waiting(|sample| sample.cpu_psi)),
    ),
    counter(
        "container_pressure_memory_stalled_seconds_total",
        "Total time duration no tasks in the container could make progress due to memory congestion.",
        |f, put| one(put, f.stalled(|sample| sample.memory_psi)),
    ),
    counter(
        "container_pressure_memory_waiting_seconds_total",
        "Total time duration tasks in the container have waited due to memory congestion.",
        |f, put| one(put, f.waiting(|sample| sample.memory_psi)),
    ),
    counter(
        "container_pressure_io_stalled_seconds_total",
        "Total time duration no tasks in the container could make progress due to IO congestion.",
        |f, put| one(put, f.stalled(|sample| sample.io_psi)),
    ),
    counter(
        "container_pressure_io_waiting_seconds_total",
        "Total time duration tasks in the container have waited due to IO congestion.",
        |f, put| one(put, f.waiting(|sample| sample.io_psi)),
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::detail::{Counters, Device};

    fn of(name: &str, figures: &Figures<'_>) -> Vec<(Vec<String>, u64)> {
        let family = FAMILIES.iter().find(|family| family.name == name).expect(name);
        let mut found = Vec::new();
        family.values(figures, &mut |labels, value| {
            assert_eq!(labels.len(), family.labels.len(), "{name}");
            found.push((labels.iter().map(|label| (*label).to_owned()).collect(), value));
        });
        found
    }

    #[test]
    fn names_are_told_once_and_say_what_they_are() {
        let mut names: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FAMILIES.len());
        for family in &FAMILIES {
            assert!(!family.help.is_empty() && family.name.starts_with("container_"), "{}", family.name);
            let named_so = family.name.ends_with("_total") && family.name != "container_fs_inodes_total";
            assert!(family.counter || !named_so, "{}", family.name);
        }
    }

    #[test]
    fn throttling_is_told_only_under_a_quota() {
        let cpu: Counters = [("nr_periods", 9), ("usage_usec", 2_500_000)].map(|(key, value)| (key.to_owned(), value)).into();
        let mut detail = Detail { cpu, ..Detail::default() };
        let figures = Figures { detail: Some(&detail), ..Figures::default() };
        assert!(of("container_cpu_cfs_periods_total", &figures).is_empty());
        assert_eq!(of("container_cpu_usage_seconds_total", &figures), [(vec!["total".to_owned()], 2)]);
        assert!(of("container_spec_cpu_quota", &figures).is_empty());
        detail.cpu_quota_us = Some(5000);
        let figures = Figures { detail: Some(&detail), ..Figures::default() };
        assert_eq!(of("container_cpu_cfs_periods_total", &figures), [(vec![], 9)]);
    }

    #[test]
    fn devices_and_interfaces_are_labels() {
        let counters: Counters = [("rbytes", 7), ("wbytes", 8)].map(|(key, value)| (key.to_owned(), value)).into();
        let device = Device { name: "/dev/sda".into(), major: "8".into(), minor: "0".into(), counters };
        let detail = Detail { devices: vec![device], ..Detail::default() };
        let traffic = [("eth0".to_owned(), Traffic { tx_bytes: 5, ..Traffic::default() })];
        let figures = Figures { detail: Some(&detail), traffic: &traffic, ..Figures::default() };
        let usage = of("container_blkio_device_usage_total", &figures);
        assert_eq!(usage[1], (["/dev/sda", "8", "0", "Write"].map(str::to_owned).to_vec(), 8));
        assert_eq!(of("container_network_transmit_bytes_total", &figures), [(vec!["eth0".to_owned()], 5)]);
        assert_eq!([1, 100, 10_000].map(shares), [2, 1024, 262_144], "the curve's fixed points");
    }
}
