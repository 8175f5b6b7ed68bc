//! A real kubelet drives the daemon: static pods of every kind. A case is the same on all its grounds: this host as it is, the guest, which
//! has the whole of cgroup v2, and the guest whose first process is systemd.

mod cadvisor;
mod ends;
mod eviction;
mod figures;
mod groups;
mod images;
mod in_a_cluster;
mod kinds;
mod limits;
mod logs;
mod probes;
mod resize;
mod restarts;
mod volumes;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::{path::Path, time::Duration};
use windlass_integration::{
    client::Client,
    cluster::Programs,
    daemon::Daemon,
    go,
    guest_tests::{GuestTests, under_systemd},
    kubelet::{Kubelet, NODE, pod},
    leak::Snapshot,
    node, wait,
};
use windlass_proto::cri;

/// Longest run of all cases in a guest.
const GUEST_LIMIT: Duration = Duration::from_secs(2400);
/// Longest wait for what a case wants to see.
const LIMIT: Duration = Duration::from_secs(180);

static GUEST: GuestTests = GuestTests::some(GUEST_LIMIT, "::guest", prepare);
static SYSTEMD: GuestTests = GuestTests::some(GUEST_LIMIT, "::systemd", prepare).under_systemd();

/// Makes a test of each case on each of its grounds.
macro_rules! cases {
    ($([$($ground:ident)*] $module:ident::$case:ident,)*) => {
        $(mod $case {
            $(#[test]
            fn $ground() -> anyhow::Result<()> {
                crate::$ground(stringify!($case), crate::$module::$case)
            })*
        })*
    };
}

cases! {
    [here guest systemd] kinds::pods_of_every_class_run_under_a_kubelet,
    [here guest systemd] kinds::init_containers_come_one_by_one_and_sidecars_stay,
    [here guest systemd] probes::probes_of_every_kind_restart_what_is_ill,
    [here guest] probes::a_probe_that_hangs_fails_at_its_time_limit,
    [here guest systemd] ends::what_a_container_leaves_is_its_termination_message,
    [here guest] ends::a_container_that_fails_again_and_again_is_held_back,
    [here guest systemd] ends::a_pod_has_its_hook_and_its_time_to_end,
    [here guest] logs::a_log_is_rotated_and_no_line_is_lost,
    [here guest] volumes::volumes_of_every_kind_are_where_the_pod_wants_them,
    [here guest systemd] volumes::a_pod_with_users_of_its_own_runs_under_a_kubelet,
    [here guest] images::images_are_pulled_by_policy_and_removed_when_the_disk_is_full,
    [here guest systemd] restarts::a_daemon_or_kubelet_that_starts_again_disturbs_no_pod,
    [here guest systemd] restarts::pods_come_back_after_a_reboot,
    [guest systemd] limits::limits_hold_in_kubelets_own_groups,
    [guest] figures::statistics_through_kubelet_are_complete,
    [guest] figures::kubelet_finds_the_pod_that_fills_the_disk_by_our_figures,
    [guest systemd] cadvisor::a_kubelet_with_its_own_cadvisor_shows_labels,
    [systemd] in_a_cluster::pods_of_a_cluster_are_resized_in_place_and_evicted,
}

type Case = fn() -> Result<()>;

/// On this host as it is.
fn here(_: &str, case: Case) -> Result<()> {
    built()?;
    node::run(case)
}

/// In the guest, where the whole of cgroup v2 is.
fn guest(name: &str, case: Case) -> Result<()> {
    GUEST.test(name, || node::run(case))
}

/// In the guest whose first process is systemd.
fn systemd(name: &str, case: Case) -> Result<()> {
    SYSTEMD.test(name, || node::run(case))
}

/// Builds what the cases run, while the network is still there.
fn built() -> Result<()> {
    go::kubernetes("kubelet")?;
    go::kubernetes("health").map(drop)
}

fn prepare(directory: &Path) -> Result<()> {
    built()?;
    Programs::build()?;
    images::prepare(directory)
}

/// A daemon as this ground has it, with more of a configuration.
fn daemon(configuration: &str) -> Result<Daemon> {
    let daemon = Daemon::configured(configuration)?;
    Ok(if under_systemd() { daemon.in_its_slice() } else { daemon })
}

/// A daemon under a kubelet, and what was there before kubelet's first pod.
struct Bench {
    // Dropped first: what it has mounted lies in the daemon's directory.
    kubelet: Kubelet,
    daemon: Daemon,
    client: Client,
    before: Snapshot,
}

/// Runs `body` with a daemon and a kubelet of its own; afterwards nothing may be left of its pods.
fn under_kubelet(fields: Value, body: impl FnOnce(&mut Bench) -> Result<()>) -> Result<()> {
    let mut bench = Bench::over(daemon("")?, fields)?;
    body(&mut bench)?;
    bench.end()
}

impl Bench {
    fn over(daemon: Daemon, fields: Value) -> Result<Bench> {
        let client = Client::connect(&daemon)?;
        let mut kubelet = Kubelet::prepare(&daemon, fields)?;
        // The first pod makes what the daemon keeps: bridge, rules, parent cgroup.
        let first = windlass_integration::client::pod(&daemon.path("logs"));
        let id = client.run(&first)?;
        client.remove(&id)?;
        kubelet.start()?;
        // It answers before it has done this.
        let mut last = None;
        let before = wait::until("kubelet has mounted its directory on itself, and nothing changes any more", || {
            let snapshot = Snapshot::take(&daemon)?;
            let same = last.replace(snapshot.clone()).is_some_and(|last| last == snapshot);
            wait::pause();
            Ok((same && snapshot.names("/kubelet/root ")).then_some(snapshot))
        })?;
        Ok(Bench { daemon, client, kubelet, before })
    }

    /// Fails if a pod of the body still runs, or a trace of one is left by the daemon. Pods that have ended are removed here: kubelet
    /// collects them once a minute.
    fn end(&self) -> Result<()> {
        for pod in self.client.list_pod_sandbox(Default::default())?.items {
            ensure!(pod.state() != cri::PodSandboxState::SandboxReady, "pod {:?} runs", pod.metadata);
            self.client.remove(&pod.id)?;
        }
        self.eventually("every trace is gone", || self.before.expect_again(&self.daemon))?;
        if !under_systemd() {
            return Ok(());
        }
        self.eventually("every unit is gone", || {
            let left = node::output_of("systemctl", &["list-units", "--all", "--plain", "--no-legend", "windlass-*.scope"])?;
            ensure!(left.is_empty(), "{left}");
            Ok(())
        })
    }

    /// Repeats `check` until it succeeds; at the deadline its last error is the result.
    fn eventually<T>(&self, what: &str, check: impl Fn() -> Result<T>) -> Result<T> {
        wait::until_ok(LIMIT, what, || self.kubelet.log(), check)
    }

    /// Takes the pods away and waits until nothing of them runs: kubelet lists them no more long before.
    fn withdraw(&self, names: &[&str]) -> Result<()> {
        names.iter().try_for_each(|name| self.kubelet.withdraw(name))?;
        self.eventually("the pods have ended", || {
            for pod in self.client.list_pod_sandbox(Default::default())?.items {
                let name = pod.labels.get("io.kubernetes.pod.name").map(String::as_str).unwrap_or_default();
                let withdrawn = names.iter().any(|wanted| name.strip_suffix(NODE).is_some_and(|n| n == format!("{wanted}-")));
                ensure!(!withdrawn || pod.state() != cri::PodSandboxState::SandboxReady, "{name} runs");
            }
            Ok(())
        })
    }
}

/// Puts `value` at a JSON pointer of the pod; what lies above it must be there.
fn with(mut pod: Value, pointer: &str, value: Value) -> Value {
    let (above, key) = pointer.rsplit_once('/').expect("a pointer");
    let parent = pod.pointer_mut(above).unwrap_or_else(|| panic!("{above} is not in the pod"));
    match (parent, key.parse::<usize>()) {
        (Value::Array(list), Ok(at)) => list.insert(at, value),
        (parent, _) => parent[key] = value,
    }
    pod
}

/// How often the container has been started again.
fn restarts(pod: &Value, container: &str) -> u64 {
    windlass_integration::kubelet::container_status(pod, container).and_then(|s| s["restartCount"].as_u64()).unwrap_or_default()
}

fn sleeper(name: &str) -> Value {
    with(pod(name, "trap 'exit 0' TERM; while :; do sleep 0.1; done"), "/spec/restartPolicy", json!("Always"))
}
