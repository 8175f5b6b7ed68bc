//! A daemon that is killed again and again while pods live their lives under clients that do what kubelet does: ask again, look what is
//! there, go on from that. Each life ends as it would have, with every line and the right exit code, and nothing is left of any.

use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};
use tonic::{Code, Status};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    leak::Snapshot,
    node,
    process::Process,
    soak,
};
use windlass_proto::cri;

/// Kills where `WINDLASS_KILLS` does not say otherwise.
const KILLS: usize = 150;

/// Pods that live at the same time.
const CLIENTS: u64 = 4;

/// Longest time between a daemon's readiness and its end, in microseconds: about a pod's life.
const DAEMON_US: u64 = 120_000;

/// After so many kills within which no pod came to its end, daemons live longer: on a machine so busy, none would get a pod to run.
const FRUITLESS: u64 = 20;

/// The same for one that is killed while it starts.
const START_US: u64 = 12_000;

/// Longest that a client asks for one thing, over as many deaths as there are.
const PATIENCE: Duration = Duration::from_secs(300);

#[test]
fn lives_of_pods_over_many_kills() -> Result<()> {
    let seed = SystemTime::UNIX_EPOCH.elapsed()?.as_nanos() as u64;
    node::run(move || lives(seed)).with_context(|| format!("seed {seed}"))
}

fn lives(seed: u64) -> Result<()> {
    let mut daemon = Daemon::start(&[])?;
    let before = Snapshot::warm(&daemon, &Client::connect(&daemon)?)?;
    let (socket, logs) = (daemon.socket(), daemon.path("logs"));
    let (over, lived) = (AtomicBool::new(false), AtomicUsize::new(0));
    let kills = soak::number("WINDLASS_KILLS", KILLS)?;
    // Connected before the first kill: a client whose connection breaks makes a new one, but the first has to be made.
    let life = |number| -> Result<Life> { Ok(Life { client: Client::connect_to(&socket)?, dice: Dice(seed + number) }) };
    let clients: Vec<Life> = (1..=CLIENTS).map(life).collect::<Result<_>>()?;
    thread::scope(|scope| {
        let (over, lived, logs) = (&over, &lived, &logs);
        let client = |mut life: Life| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                life.live(logs)?;
                lived.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let clients: Vec<_> = clients.into_iter().map(|life| scope.spawn(move || client(life))).collect();
        let mut dice = Dice(seed);
        let mut outcome = Ok(());
        let (mut fruitless, mut ended) = (0, 0);
        for kill in 0..kills {
            let longest_us = DAEMON_US * (1 + fruitless / FRUITLESS);
            outcome = kill_once(&mut daemon, &mut dice, longest_us).with_context(|| format!("kill {kill}"));
            let before = std::mem::replace(&mut ended, lived.load(Ordering::Relaxed));
            fruitless = if ended > before { 0 } else { fruitless + 1 };
            if outcome.is_err() || clients.iter().any(thread::ScopedJoinHandle::is_finished) {
                break;
            }
        }
        over.store(true, Ordering::Relaxed);
        let ends = clients.into_iter().map(|client| client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let ends: Result<Vec<()>> = ends.collect();
        outcome.and(ends)
    })?;
    println!("{kills} kills in {} lives", lived.into_inner());
    let client = Client::connect(&daemon)?;
    ensure!(client.list_pod_sandbox(cri::ListPodSandboxRequest::default())?.items.is_empty(), "pods are left");
    ensure!(client.list_containers(cri::ListContainersRequest::default())?.containers.is_empty(), "containers are left");
    before.expect_same(&Snapshot::warm(&daemon, &client)?)
}

/// Lets the daemon serve for a while and kills it; every third time also the next one, while it starts.
fn kill_once(daemon: &mut Daemon, dice: &mut Dice, longest_us: u64) -> Result<()> {
    thread::sleep(Duration::from_micros(dice.below(longest_us)));
    daemon.kill9()?;
    if dice.below(3) == 0 {
        let starting = Process::from(daemon.command(&["serve"])?.stderr(std::process::Stdio::null()).spawn()?);
        thread::sleep(Duration::from_micros(dice.below(START_US)));
        drop(starting);
    }
    daemon.serve()
}

/// Numbers by chance (xorshift64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// A client that runs one pod after another.
struct Life {
    client: Client,
    dice: Dice,
}

impl Life {
    /// A pod, in it a container that writes lines and ends by itself and one that is stopped; then none of them.
    fn live(&mut self, logs: &Path) -> Result<()> {
        let mut config = pod(logs);
        let name = config.hostname.clone();
        let id = self.pod(&mut config)?;
        let (lines, code) = (self.dice.below(200), self.dice.below(100) as i32);
        let script = format!(
            "i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); done; sleep 0.0{}; exit {code}",
            self.dice.below(9)
        );
        let mut writer = container(&config, "writer", &["sh", "-c", &script]);
        let mut sleeper = container(&config, "sleeper", &["sleep", "1000"]);
        let writing = self.container(&id, &config, &mut writer).context("the writer")?;
        let sleeping = self.container(&id, &config, &mut sleeper).context("the sleeper")?;
        let run = asked("ExecSync", || self.client.exec(&sleeping, &["echo", "here"]));
        let run = run.with_context(|| format!("{:?}", self.client.container(&sleeping)))?;
        ensure!(run.exit_code == 0 && run.stdout == b"here\n", "{run:?}");
        let status = self.ended(&writing)?;
        ensure!(status.exit_code == code, "the writer ends with {code}: {status:?}");
        let text = fs::read_to_string(&status.log_path).with_context(|| format!("log of {status:?}"))?;
        let seen: Vec<&str> = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
        let expected: Vec<String> = (0..lines).map(|number| format!("line {number}")).collect();
        ensure!(seen == expected, "{} lines of {lines}: {seen:?}", seen.len());
        asked("StopContainer", || self.client.stop(&sleeping, 0))?;
        let status = self.ended(&sleeping)?;
        ensure!(status.exit_code == 137, "{status:?}");
        for id in self.pods(&name)?.into_iter().map(|pod| pod.id) {
            asked("removal", || self.client.remove(&id))?;
        }
        ensure!(self.pods(&name)?.is_empty(), "{name} was removed");
        Ok(())
    }

    fn pods(&self, name: &str) -> Result<Vec<cri::PodSandbox>> {
        let filter = cri::PodSandboxFilter { label_selector: [("app".to_owned(), name.to_owned())].into(), ..Default::default() };
        let request = cri::ListPodSandboxRequest { filter: Some(filter) };
        Ok(asked("ListPodSandbox", || self.client.list_pod_sandbox(request.clone()))?.items)
    }

    /// A ready pod: the one that was asked for, or else its next attempt.
    fn pod(&self, config: &mut cri::PodSandboxConfig) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.client.run(config) {
                Ok(id) => return Ok(id),
                Err(status) => cut_off("RunPodSandbox", status, deadline)?,
            }
            let there = self.pods(&config.hostname)?;
            if let Some(ready) = there.into_iter().find(|pod| pod.state() == cri::PodSandboxState::SandboxReady) {
                return Ok(ready.id);
            }
            config.metadata.as_mut().context("metadata")?.attempt += 1;
        }
    }

    /// A started container: the one that was asked for, or else its next attempt.
    fn container(&self, pod: &str, config: &cri::PodSandboxConfig, wanted: &mut cri::ContainerConfig) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        let id = loop {
            match self.client.create(pod, config, wanted) {
                Ok(id) => break id,
                Err(status) => cut_off("CreateContainer", status, deadline)?,
            }
            let filter = cri::ContainerFilter { pod_sandbox_id: pod.to_owned(), ..Default::default() };
            let request = cri::ListContainersRequest { filter: Some(filter) };
            let there = asked("ListContainers", || self.client.list_containers(request.clone()))?.containers;
            let metadata = wanted.metadata.as_mut().context("metadata")?;
            if let Some(made) = there.into_iter().find(|made| made.metadata.as_ref() == Some(&*metadata)) {
                break made.id;
            }
            metadata.attempt += 1;
        };
        loop {
            match self.client.start(&id) {
                Ok(()) => return Ok(id),
                Err(status) => cut_off("StartContainer", status, deadline)?,
            }
            let status = asked("ContainerStatus", || self.client.container(&id))?;
            if status.state() != cri::ContainerState::ContainerCreated {
                return Ok(id);
            }
        }
    }

    fn ended(&self, id: &str) -> Result<cri::ContainerStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = asked("ContainerStatus", || self.client.container(id))?;
            if status.state() == cri::ContainerState::ContainerExited {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "no end within {PATIENCE:?}: {status:?}");
            thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Asks until a daemon answers.
fn asked<T>(what: &str, mut call: impl FnMut() -> Result<T, Status>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match call() {
            Ok(reply) => return Ok(reply),
            Err(status) => cut_off(what, status, deadline)?,
        }
    }
}

/// Fails unless no daemon said this, the connection did; waits a little.
fn cut_off(what: &str, status: Status, deadline: Instant) -> Result<()> {
    // What a daemon says comes with headers.
    let of_the_connection =
        status.metadata().is_empty() && matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled);
    if !of_the_connection || Instant::now() > deadline {
        bail!("{what}: {status:?}");
    }
    thread::sleep(Duration::from_millis(1));
    Ok(())
}
