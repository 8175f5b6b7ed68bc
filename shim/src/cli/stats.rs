//! `windlass stats`: what pods and containers use, over a second or as it changes.

use super::{
    Place,
    client::{Client, answer},
    output::{Format, NOTHING, json, raw, row, size, table},
};
use crate::error::Result;
use clap::Args;
use serde::Serialize;
use std::{collections::HashMap, io::IsTerminal, time::Duration};
use windlass_proto::cri;

/// Clears a terminal and goes to its corner (ECMA-48).
const CLEAR: &str = "\x1b[2J\x1b[H";

/// `windlass stats ...`
#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    place: Place,
    /// Only pods whose name or id begins so; NAMESPACE/POD too
    pod: Option<String>,
    /// Again and again, until interrupted
    #[arg(short, long)]
    watch: bool,
    /// Seconds that processor time and traffic are taken over
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// How to print results; a line for each look with JSON
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// What a pod or one of its containers uses. Nothing where it is not known.
#[derive(Debug, Serialize)]
struct Use {
    pod: String,
    /// Empty for the pod as a whole.
    container: String,
    id: String,
    cpu_millicores: Option<u64>,
    memory_working_set_bytes: Option<u64>,
    /// What is left of the limit.
    memory_available_bytes: Option<u64>,
    processes: Option<u64>,
    written_bytes: Option<u64>,
    received_bytes_per_second: Option<u64>,
    sent_bytes_per_second: Option<u64>,
}

/// Counters at a moment in nanoseconds, by object: processor time in nanoseconds, bytes received, bytes sent.
type Counters = HashMap<String, (i64, [Option<u64>; 3])>;

/// Runs until the results are there, or until interrupted.
pub(super) async fn run(options: Options) -> Result<()> {
    let (_, mut client) = Client::of(options.place.clone()).await?;
    let (mut before, _) = look(&mut client, &Counters::new()).await?;
    loop {
        tokio::time::sleep(Duration::from_secs(options.interval)).await;
        let (now, mut uses) = look(&mut client, &before).await?;
        before = now;
        if let Some(wanted) = &options.pod {
            let shown: Vec<String> = uses
                .iter()
                .filter(|one| one.container.is_empty())
                .filter(|one| {
                    let name = one.pod.rsplit('/').next().unwrap_or_default();
                    one.id.starts_with(wanted) || one.pod.starts_with(wanted) || name.starts_with(wanted)
                })
                .map(|one| one.pod.clone())
                .collect();
            uses.retain(|one| shown.contains(&one.pod));
        }
        match options.format {
            Format::Json => json(&uses)?,
            Format::Text => {
                if options.watch && std::io::stdout().is_terminal() {
                    raw(CLEAR)?;
                }
                print(&uses)?;
            }
        }
        if !options.watch {
            return Ok(());
        }
    }
}

async fn look(client: &mut Client, before: &Counters) -> Result<(Counters, Vec<Use>)> {
    let mut pods = answer(client.runtime.list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default())).await?.stats;
    let name = |pod: &cri::PodSandboxStats| {
        let meta = pod.attributes.clone().unwrap_or_default().metadata.unwrap_or_default();
        format!("{}/{}", meta.namespace, meta.name)
    };
    pods.sort_by_key(name);
    let (mut now, mut uses) = (Counters::new(), Vec::new());
    for pod in pods {
        let pod_name = name(&pod);
        let (id, linux) = (pod.attributes.unwrap_or_default().id, pod.linux.unwrap_or_default());
        let mut one = of(&id, linux.cpu.as_ref(), linux.memory.as_ref(), network(linux.network.as_ref()), before, &mut now);
        one.processes = linux.process.and_then(|process| process.process_count).map(|count| count.value);
        uses.push(Use { pod: pod_name.clone(), ..one });
        for container in linux.containers {
            let attributes = container.attributes.unwrap_or_default();
            let one = of(&attributes.id, container.cpu.as_ref(), container.memory.as_ref(), [None; 2], before, &mut now);
            let written = container.writable_layer.and_then(|layer| layer.used_bytes).map(|bytes| bytes.value);
            let container = attributes.metadata.unwrap_or_default().name;
            uses.push(Use { pod: pod_name.clone(), container, written_bytes: written, ..one });
        }
    }
    Ok((now, uses))
}

/// Bytes received and sent over all interfaces.
fn network(usage: Option<&cri::NetworkUsage>) -> [Option<u64>; 2] {
    let Some(usage) = usage else { return [None; 2] };
    let all = || usage.default_interface.iter().chain(&usage.interfaces);
    // The default interface is one of the list, where there is one.
    let of = |bytes: fn(&cri::NetworkInterfaceUsage) -> Option<u64>| match usage.interfaces.is_empty() {
        true => all().map(bytes).sum::<Option<u64>>(),
        false => usage.interfaces.iter().map(bytes).sum(),
    };
    [of(|one| one.rx_bytes.map(|bytes| bytes.value)), of(|one| one.tx_bytes.map(|bytes| bytes.value))]
}

fn of(
    id: &str,
    cpu: Option<&cri::CpuUsage>,
    memory: Option<&cri::MemoryUsage>,
    traffic: [Option<u64>; 2],
    before: &Counters,
    now: &mut Counters,
) -> Use {
    let at_ns = cpu.map_or(0, |cpu| cpu.timestamp);
    let used = cpu.and_then(|cpu| cpu.usage_core_nano_seconds.as_ref()).map(|used| used.value);
    let counters = [used, traffic[0], traffic[1]];
    let rates = rates(before.get(id), at_ns, counters);
    now.insert(id.to_owned(), (at_ns, counters));
    let bytes = |field: fn(&cri::MemoryUsage) -> Option<cri::UInt64Value>| memory.and_then(field).map(|bytes| bytes.value);
    Use {
        pod: String::new(),
        container: String::new(),
        id: id.to_owned(),
        cpu_millicores: rates[0].map(|nano_cores| nano_cores / 1_000_000),
        memory_working_set_bytes: bytes(|memory| memory.working_set_bytes),
        memory_available_bytes: bytes(|memory| memory.available_bytes),
        processes: None,
        written_bytes: None,
        received_bytes_per_second: rates[1],
        sent_bytes_per_second: rates[2],
    }
}

/// What the counters grew by in each second since the last look.
fn rates(before: Option<&(i64, [Option<u64>; 3])>, at_ns: i64, counters: [Option<u64>; 3]) -> [Option<u64>; 3] {
    let Some((then_ns, then)) = before else { return [None; 3] };
    let Ok(ns @ 1..) = u64::try_from(at_ns.saturating_sub(*then_ns)) else { return [None; 3] };
    std::array::from_fn(|index| {
        let grown = counters[index]?.saturating_sub(then[index]?);
        u64::try_from(u128::from(grown) * 1_000_000_000 / u128::from(ns)).ok()
    })
}

fn print(uses: &[Use]) -> Result<()> {
    let mut rows =
        vec![row(["POD / CONTAINER", "CPU", "MEMORY", "LEFT OF LIMIT", "PROCESSES", "WRITTEN", "RECEIVED/S", "SENT/S"])];
    let bytes = |value: Option<u64>| value.map_or_else(|| NOTHING.to_owned(), size);
    let number = |value: Option<u64>, unit: &str| value.map_or_else(|| NOTHING.to_owned(), |value| format!("{value}{unit}"));
    for one in uses {
        rows.push(vec![
            if one.container.is_empty() { one.pod.clone() } else { format!("  {}", one.container) },
            number(one.cpu_millicores, "m"),
            bytes(one.memory_working_set_bytes),
            bytes(one.memory_available_bytes),
            number(one.processes, ""),
            bytes(one.written_bytes),
            bytes(one.received_bytes_per_second),
            bytes(one.sent_bytes_per_second),
        ]);
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_taken_between_two_looks() {
        let second = 1_000_000_000;
        assert_eq!(rates(None, 5, [Some(1); 3]), [None; 3]);
        let before = (second, [Some(0), Some(100), None]);
        let counters = [Some(500_000_000), Some(50), Some(7)];
        assert_eq!(rates(Some(&before), 3 * second, counters), [Some(250_000_000), Some(0), None]);
        assert_eq!(rates(Some(&before), second, counters), [None; 3]);
    }
}
