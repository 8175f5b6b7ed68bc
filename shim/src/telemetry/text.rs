//! All that is counted, as Prometheus' text format (version 0.0.4).

use super::{
    CALLS, EXITS, LOG_ENTRIES_DROPPED, OOM_KILLS, PHASE_TIMES, PHASES, POISON, PULL_TIMES, PULLED_BYTES, PULLS, PULLS_FAILED,
    REPAIRED, REPAIRS, SPANS_DROPPED, SPANS_EXPORTED, process,
};
use crate::{
    container::{self, State},
    node::Node,
    pod,
};
use std::fmt::{Display, Write};

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn single(text: &mut String, name: &str, kind: &str, help: &str, value: impl Display) {
    head(text, name, kind, help);
    let _ = writeln!(text, "{name} {value}");
}

fn labelled<'a>(
    text: &mut String,
    name: &str,
    kind: &str,
    help: &str,
    label: &str,
    values: impl IntoIterator<Item = (&'a str, u64)>,
) {
    head(text, name, kind, help);
    for (key, value) in values {
        let _ = writeln!(text, "{name}{{{label}=\"{key}\"}} {value}");
    }
}

/// Everything there is to tell.
pub(super) fn write(node: &Node) -> String {
    let mut text = String::with_capacity(64 << 10);
    head(&mut text, "windlass_build_info", "gauge", "Always 1; the label is the version of the daemon.");
    let _ = writeln!(text, "windlass_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
    latencies(&mut text);
    counts(&mut text);
    states(&mut text, node);
    for (name, help, counter, value) in process::figures() {
        single(&mut text, name, if counter { "counter" } else { "gauge" }, help, value);
    }
    text
}

fn latencies(text: &mut String) {
    let name = "windlass_rpc_duration_seconds";
    head(text, name, "histogram", "Time of RPCs by method and gRPC code, up to the first message of a stream.");
    for ((method, code), histogram) in CALLS.lock().expect(POISON).iter() {
        // Names of methods are identifiers; what is no identifier was counted as another.
        let method: String = method.chars().filter(char::is_ascii_alphanumeric).collect();
        histogram.write(text, name, &format!("method=\"{method}\",code=\"{:?}\",", tonic::Code::from_i32(*code)));
    }
    let name = "windlass_phase_duration_seconds";
    head(text, name, "histogram", "Time of the phases of pod and container starts that succeeded.");
    for ((_, phase), histogram) in PHASES.iter().zip(&PHASE_TIMES) {
        histogram.write(text, name, &format!("phase=\"{phase}\","));
    }
    let name = "windlass_image_pull_duration_seconds";
    head(text, name, "histogram", "Time of pulls that succeeded.");
    PULL_TIMES.write(text, name, "");
}

fn counts(text: &mut String) {
    let outcomes = [("success", PULLS.value()), ("failure", PULLS_FAILED.value())];
    labelled(text, "windlass_image_pulls_total", "counter", "Pulls by how they ended.", "outcome", outcomes);
    let help = "Bytes of layers that came from registries.";
    single(text, "windlass_image_pulled_bytes_total", "counter", help, PULLED_BYTES.value());
    single(text, "windlass_container_exits_total", "counter", "Containers that have ended.", EXITS.value());
    let help = "Kills for memory: containers that ended so, and processes of containers that went on.";
    single(text, "windlass_oom_kills_total", "counter", help, OOM_KILLS.value());
    let help = "Entries of the log that systemd's journal had no room for.";
    single(text, "windlass_log_entries_dropped_total", "counter", help, LOG_ENTRIES_DROPPED.value());
    let spans = [("exported", SPANS_EXPORTED.value()), ("dropped", SPANS_DROPPED.value())];
    labelled(text, "windlass_trace_spans_total", "counter", "Spans by what became of them.", "outcome", spans);
    let repairs = REPAIRS.iter().zip(&REPAIRED).map(|((_, name), counter)| (*name, counter.value()));
    let help = "What a crash, a lost process or a failed step left, and was put in order.";
    labelled(text, "windlass_repairs_total", "counter", help, "what", repairs);
}

fn states(text: &mut String, node: &Node) {
    let pods = node.pods();
    let phases = [("creating", pod::Phase::Creating), ("ready", pod::Phase::Ready), ("notready", pod::Phase::NotReady)];
    let count = |wanted| pods.iter().filter(|pod| pod.phase() == wanted).count() as u64;
    let counted = phases.map(|(name, phase)| (name, count(phase)));
    labelled(text, "windlass_pods", "gauge", "Pods by state.", "state", counted);
    let monitors = pods.iter().filter(|pod| pod.monitor().is_ok()).count();
    single(text, "windlass_monitors", "gauge", "Monitors that this daemon is connected to.", monitors);
    let mut containers = [("created", 0), ("running", 0), ("exited", 0)];
    for container in node.containers() {
        let index = container.look(|record: &container::Record| match record.state {
            State::Created { .. } => 0,
            State::Running { .. } => 1,
            State::Exited { .. } => 2,
        });
        if let Some((_, count)) = containers.get_mut(index) {
            *count += 1;
        }
    }
    labelled(text, "windlass_containers", "gauge", "Containers by state.", "state", containers);
    single(text, "windlass_images", "gauge", "Images on this node.", node.images.list().len());
    let (followers, waiting) = node.events.waiting();
    single(text, "windlass_event_followers", "gauge", "Clients that follow events.", followers);
    let help = "Events that wait for the follower that is furthest behind.";
    single(text, "windlass_event_queue_length", "gauge", help, waiting);
    let help = "Creations of pods and containers that are under way; retries join them.";
    single(text, "windlass_operations", "gauge", help, node.operations());
}
