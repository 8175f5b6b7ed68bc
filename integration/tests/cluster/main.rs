//! A whole cluster of one node over the daemon, driven by kubectl as a person drives it.
//!
//! One cluster serves all cases, so this is no usual test harness: cases run some at a time, each in a Kubernetes namespace of its own, and leave
//! their pods running; then come those that concern the whole node, one after the other; last, everything is deleted and nothing may be left.

mod dns;
mod images;
mod network;
mod node;
mod pods;
mod streams;
mod top;
mod volumes;
mod workloads;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use windlass_integration::{
    client::Client,
    cluster::{Cluster, Kubectl, NODE, Programs},
    daemon::Daemon,
    kubelet::container,
    leak::Snapshot,
};

/// Cases that run at the same time.
const WIDTH: usize = 5;
/// Longest wait for what a case wants to see.
const LIMIT: Duration = Duration::from_secs(240);
const PAUSE: Duration = Duration::from_millis(200);

/// The node, and what was there before the first case.
pub(crate) struct Node {
    // Dropped first: what kubelet has mounted lies in the daemon's directory.
    pub(crate) cluster: Cluster,
    pub(crate) daemon: Daemon,
    pub(crate) before: Snapshot,
}

type Case = fn(&Kubectl) -> Result<()>;
type NodeCase = fn(&mut Node) -> Result<()>;

/// A list of functions with their names.
macro_rules! named {
    ($($module:ident::$name:ident,)*) => { &[$((concat!(stringify!($module), "::", stringify!($name)), $module::$name)),*] };
}

/// Each in a namespace of its own. The first two wait for most of their time.
const CASES: &[(&str, Case)] = named![
    top::figures_are_those_of_a_known_load,
    workloads::a_cron_job_starts_a_job_each_minute,
    workloads::a_deployment_runs_and_rolls_out,
    workloads::a_daemon_set_has_a_pod_on_the_node,
    workloads::a_job_runs_to_completion_with_its_sidecar,
    workloads::a_stateful_set_keeps_its_claims,
    workloads::init_containers_and_sidecars_come_in_order,
    network::a_service_leads_to_each_of_its_pods,
    network::a_service_leads_to_no_pod_that_is_not_ready,
    network::ports_are_forwarded,
    dns::services_and_pods_have_names,
    dns::a_pod_asks_whom_its_policy_names,
    streams::a_command_has_its_input_its_outputs_and_its_code,
    streams::files_are_copied_both_ways,
    streams::an_attached_client_speaks_with_the_program,
    streams::an_attached_client_has_the_program_s_terminal,
    streams::a_log_is_followed_to_its_end,
    streams::an_ephemeral_container_sees_its_target,
    streams::a_pod_and_a_node_are_looked_into,
    volumes::what_is_projected_is_there_and_changes,
    volumes::a_service_account_s_token_is_good_at_the_apiserver,
    images::a_pull_secret_opens_a_registry,
    pods::users_of_a_pod_are_not_the_host_s,
    pods::a_runtime_class_chooses_the_handler,
    pods::a_pod_that_is_deleted_has_its_grace,
    pods::a_pod_is_evicted_when_its_budget_allows,
    pods::a_container_that_ends_is_started_again,
];

/// One after the other, on the whole node.
const NODE_CASES: &[(&str, NodeCase)] = named![
    node::the_node_is_ready_and_says_what_it_is,
    node::statistics_come_through_the_apiserver,
    node::a_daemon_that_starts_again_disturbs_no_pod,
    node::a_daemon_that_is_killed_under_load_disturbs_no_pod,
];

/// Always the last.
const END: (&str, NodeCase) =
    ("node::namespaces_that_are_deleted_leave_nothing", node::namespaces_that_are_deleted_leave_nothing);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let after_flag = |at: usize| at > 0 && words[at - 1] == "--test-threads";
    let filters: Vec<&str> = words
        .iter()
        .enumerate()
        .filter(|(at, word)| !word.starts_with('-') && !after_flag(*at))
        .map(|(_, word)| word.as_str())
        .collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter));
    let cases: Vec<_> = CASES.iter().filter(|(name, _)| wanted(name)).copied().collect();
    let node_cases: Vec<_> = NODE_CASES.iter().filter(|(name, _)| wanted(name)).copied().collect();
    if words.iter().any(|word| word == "--list") {
        cases
            .iter()
            .map(|(name, _)| name)
            .chain(node_cases.iter().map(|(name, _)| name))
            .for_each(|name| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    if cases.is_empty() && node_cases.is_empty() && !wanted(END.0) {
        return ExitCode::SUCCESS;
    }
    let result =
        Programs::build().and_then(|programs| windlass_integration::node::run(move || run(&programs, &cases, &node_cases)));
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("the cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything passed.
fn run(programs: &Programs, cases: &[(&str, Case)], node_cases: &[(&str, NodeCase)]) -> Result<bool> {
    let daemon = Daemon::start(&[])?;
    let mut cluster = Cluster::start(programs, &daemon).with_context(|| daemon.log())?;
    println!("the apiserver answers after {:.1?}, the node is ready {:.1?} later", cluster.took.0, cluster.took.1);
    let before = eventually("the daemon has the node's range of addresses", || {
        let range = cluster.kubectl.get(&format!("node/{NODE}"))?["spec"]["podCIDR"].as_str().unwrap_or_default().to_owned();
        let client = Client::connect(&daemon)?;
        let snapshot = Snapshot::warm(&daemon, &client)?;
        ensure!(!range.is_empty() && snapshot.names(&range), "the range is {range:?}");
        // The range may have come between this pod's start and its end, and a first look of kubelet's as well.
        snapshot.expect_same(&Snapshot::warm(&daemon, &client)?)?;
        Ok(snapshot)
    })?;
    cluster.start_proxy()?;
    cluster.start_dns()?;
    cluster.start_metrics()?;
    let mut node = Node { daemon, cluster, before };
    let mut good = together(&node.cluster, cases);
    for (name, case) in node_cases.iter().chain([&END]) {
        good &= report(name, || case(&mut node));
    }
    Ok(good)
}

fn together(cluster: &Cluster, cases: &[(&str, Case)]) -> bool {
    let (next, good) = (AtomicUsize::new(0), Mutex::new(true));
    let work = || {
        while let Some((name, case)) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            let namespace = name.rsplit("::").next().unwrap_or(name).replace('_', "-");
            let passed = report(name, || case(&cluster.namespace(&namespace)?));
            *good.lock().unwrap_or_else(PoisonError::into_inner) &= passed;
        }
    };
    std::thread::scope(|scope| (0..WIDTH).for_each(|_| drop(scope.spawn(work))));
    good.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a case and prints its outcome as the usual harness does.
fn report(name: &str, case: impl FnOnce() -> Result<()>) -> bool {
    let begun = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(case)).unwrap_or_else(|_| bail!("panicked"));
    match &result {
        Ok(()) => println!("test {name} ... ok\n    {:.1?}", begun.elapsed()),
        Err(error) => println!("test {name} ... FAILED\n{error:#}"),
    }
    result.is_ok()
}

/// Repeats `check` until it succeeds; at the deadline its last error is the result.
pub(crate) fn eventually<T>(what: &str, check: impl Fn() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match check() {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("{what}: not within {LIMIT:?}"));
            }
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// A pod of the test image with one container that runs this script of the shell.
pub(crate) fn pod(name: &str, script: &str) -> Value {
    windlass_integration::kubelet::pod(name, script)
}

/// What goes on until it is asked to end.
pub(crate) const FOREVER: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

/// A workload of the kind whose pods run this script.
pub(crate) fn workload(kind: &str, name: &str, script: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": kind, "metadata": { "name": name },
        "spec": {
            "selector": { "matchLabels": { "app": name } },
            "template": {
                "metadata": { "labels": { "app": name } },
                "spec": { "terminationGracePeriodSeconds": 3, "containers": [container("main", script)] },
            },
        },
    })
}
