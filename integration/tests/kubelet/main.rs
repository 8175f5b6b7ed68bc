//! A real kubelet drives the daemon: static pods of every kind, on this host as it is, and in the guest what needs the whole of cgroup v2.

mod ends;
mod guest;
mod images;
mod kinds;
mod logs;
mod probes;
mod restarts;
mod volumes;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use windlass_integration::{
    client::Client,
    daemon::Daemon,
    go,
    kubelet::{Kubelet, NODE, pod},
    leak::Snapshot,
    node,
};
use windlass_proto::cri;

/// A daemon under a kubelet, and what was there before kubelet's first pod.
struct Bench {
    // Dropped first: what it has mounted lies in the daemon's directory.
    kubelet: Kubelet,
    daemon: Daemon,
    client: Client,
    before: Snapshot,
}

/// Runs `body` with a daemon and a kubelet of its own; afterwards nothing may be left of its pods.
fn under_kubelet(fields: Value, body: impl FnOnce(&mut Bench) -> Result<()> + Send + 'static) {
    let run = move || {
        let mut bench = Bench::begin(fields)?;
        body(&mut bench)?;
        bench.end()
    };
    built();
    node::run(run).expect("pods under a kubelet");
}

/// Builds what the tests run while the network is still there.
fn built() {
    for name in ["kubelet", "health"] {
        go::kubernetes(name).expect("a program of Kubernetes");
    }
}

impl Bench {
    fn begin(fields: Value) -> Result<Bench> {
        Bench::over(Daemon::start(&[])?, fields)
    }

    fn over(daemon: Daemon, fields: Value) -> Result<Bench> {
        let client = Client::connect(&daemon)?;
        let mut kubelet = Kubelet::prepare(&daemon, fields)?;
        // The first pod makes what the daemon keeps: bridge, rules, parent cgroup.
        let first = windlass_integration::client::pod(&daemon.path("logs"));
        let id = client.run(&first)?;
        client.remove(&id)?;
        kubelet.start()?;
        let before = Snapshot::take(&daemon)?;
        Ok(Bench { daemon, client, kubelet, before })
    }

    /// Fails if a pod of the body still runs, or a trace of one is left by the daemon. Pods that have ended are removed here: kubelet
    /// collects them once a minute.
    fn end(&self) -> Result<()> {
        for pod in self.client.list_pod_sandbox(Default::default())?.items {
            ensure!(pod.state() != cri::PodSandboxState::SandboxReady, "pod {:?} runs", pod.metadata);
            self.client.remove(&pod.id)?;
        }
        self.eventually("every trace is gone", || self.before.expect_same(&Snapshot::take(&self.daemon)?))
    }

    /// Repeats `check` until it succeeds; at the deadline its last error is the result.
    fn eventually<T>(&self, what: &str, check: impl Fn() -> Result<T>) -> Result<T> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match check() {
                Ok(done) => return Ok(done),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("{what}: not within 60 s\n{}", self.kubelet.log()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
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
