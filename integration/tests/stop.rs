//! The end of a container: which signal it gets, how long it has, and what is true when the reply comes.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{
    fs,
    time::{Duration, Instant},
};
use windlass_integration::{client::Client, daemon::Daemon, ground::Ground, image, node, wait::until};
use windlass_proto::cri;

/// An image whose own stop signal is SIGRTMIN+5.
const QUITTING: &str = "localhost/quitting:test";

fn ground() -> Result<Ground> {
    let layers = || image::layers().map(|layers| layers.to_vec());
    let images = vec![(image::BUSYBOX, layers()?, json!({})), (QUITTING, layers()?, json!({ "StopSignal": "SIGRTMIN+5" }))];
    Ground::on(Daemon::start_with(images)?)
}

/// Containers that are to end.
trait Ends {
    /// A running shell that has executed `script` up to its line `ready`.
    fn shell(&self, name: &str, script: &str, change: impl FnOnce(&mut cri::ContainerConfig)) -> Result<String>;

    /// The exit code, which must be there without any wait.
    fn code(&self, id: &str) -> Result<i32>;
}

impl Ends for Ground {
    fn shell(&self, name: &str, script: &str, change: impl FnOnce(&mut cri::ContainerConfig)) -> Result<String> {
        let script = format!("{script}; echo ready; while :; do sleep 0.05; done");
        let id = self.start(name, &["sh", "-c", &script], change)?;
        until("the line ready", || Ok(self.log(name).contains("ready").then_some(())))?;
        Ok(id)
    }

    fn code(&self, id: &str) -> Result<i32> {
        let status = self.client.container(id)?;
        ensure!(status.state() == cri::ContainerState::ContainerExited, "the reply came before the end: {status:?}");
        ensure!(status.finished_at > 0, "{status:?}");
        Ok(status.exit_code)
    }
}

#[test]
fn the_signal_is_the_requests_then_the_images_then_term() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let traps = "trap 'exit 41' USR1; trap 'exit 42' TERM; trap 'exit 43' 37; trap 'exit 44' 39";
        let quitting = |config: &mut cri::ContainerConfig| {
            config.image = Some(cri::ImageSpec { image: QUITTING.into(), ..Default::default() });
        };
        let asked = |signal: cri::Signal| move |config: &mut cri::ContainerConfig| config.stop_signal = signal.into();
        let both = |config: &mut cri::ContainerConfig| {
            quitting(config);
            config.stop_signal = cri::Signal::Sigusr1.into();
        };
        let mut seen = Vec::new();
        for id in [
            ground.shell("default", traps, |_| {})?,
            ground.shell("asked", traps, asked(cri::Signal::Sigusr1))?,
            ground.shell("real-time", traps, asked(cri::Signal::Sigrtminplus3))?,
            ground.shell("image", traps, quitting)?,
            ground.shell("both", traps, both)?,
        ] {
            let signal = ground.client.container(&id)?.stop_signal().as_str_name();
            ground.client.stop(&id, 20)?;
            seen.push((signal, ground.code(&id)?));
        }
        let expected = [
            ("SIGNAL_SIGTERM", 42),
            ("SIGNAL_SIGUSR1", 41),
            ("SIGNAL_SIGRTMINPLUS3", 43),
            ("SIGNAL_SIGRTMINPLUS5", 44),
            ("SIGNAL_SIGUSR1", 41),
        ];
        ensure!(seen == expected, "{seen:?}");
        ground.end()
    })
}

#[test]
fn a_shorter_stop_shortens_the_wait_of_a_longer_one() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let id = ground.shell("stubborn", "trap '' TERM", |_| {})?;
        let begun = Instant::now();
        let long = Client::connect(&ground.daemon)?;
        let waiting = {
            let id = id.clone();
            std::thread::spawn(move || long.stop(&id, 120))
        };
        std::thread::sleep(Duration::from_millis(300));
        ensure!(ground.client.container(&id)?.state() == cri::ContainerState::ContainerRunning, "TERM was to be ignored");
        ground.client.stop(&id, 1)?;
        ensure!(ground.code(&id)? == 137);
        waiting.join().ok().context("the first stop")??;
        ensure!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        ground.client.stop(&id, 1)?;
        ground.end()
    })
}

#[test]
fn the_signal_is_sent_once_whoever_stops_it_again() -> Result<()> {
    node::run(|| {
        let mut ground = ground()?;
        let id = ground.shell("counting", "trap 'echo told' TERM", |_| {})?;
        let signals = |ground: &Ground| ground.log("counting").lines().filter(|line| line.ends_with("told")).count();
        let record = ground.daemon.root().join("containers").join(&id).join("record.json");
        let first = Client::connect(&ground.daemon)?;
        let waiting = {
            let id = id.clone();
            std::thread::spawn(move || first.stop(&id, 120))
        };
        until("the signal", || Ok((signals(&ground) == 1).then_some(())))?;
        until("the record of it", || Ok(fs::read_to_string(&record)?.contains("\"stop_signal_sent\":true").then_some(())))?;
        ground.daemon.kill9()?;
        ensure!(waiting.join().ok().context("the first stop")?.is_err(), "the daemon is gone");
        ground.daemon.serve()?;
        ground.client = Client::connect(&ground.daemon)?;
        ground.client.stop(&id, 2)?;
        ensure!(ground.code(&id)? == 137);
        ensure!(signals(&ground) == 1, "{}", ground.log("counting"));
        ground.end()
    })
}

#[test]
fn a_frozen_container_is_thawed_and_obeys() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        for (name, timeout, expected) in [("thawed", 20, 45), ("killed", 0, 137)] {
            let id = ground.shell(name, "trap 'exit 45' TERM", |_| {})?;
            let request = cri::ContainerStatusRequest { container_id: id.clone(), verbose: true };
            let info = ground.client.container_status(request)?.info;
            let details: serde_json::Value = serde_json::from_str(info.get("info").context("info")?)?;
            let places = fs::read_to_string(format!("/proc/{}/cgroup", details["pid"]))?;
            let place = places.lines().find_map(|line| line.strip_prefix("0::")).context("cgroup v2")?;
            let own = place.strip_prefix(&ground.daemon.cgroup).context("the daemon's cgroup")?;
            let directory = ground.daemon.cgroup_directory().join(own.trim_start_matches('/'));
            fs::write(directory.join("cgroup.freeze"), "1")?;
            let deadline = Instant::now() + Duration::from_secs(60);
            while !fs::read_to_string(directory.join("cgroup.events"))?.contains("frozen 1") {
                ensure!(Instant::now() < deadline, "it does not freeze");
            }
            let begun = Instant::now();
            ground.client.stop(&id, timeout)?;
            let code = ground.code(&id)?;
            ensure!(code == expected && begun.elapsed() < Duration::from_secs(60), "{name}: {code} {:?}", begun.elapsed());
        }
        ground.end()
    })
}

#[test]
fn a_pods_containers_end_together() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let ids = ["one", "two", "three"]
            .map(|name| ground.shell(name, "trap '' TERM HUP INT", |_| {}))
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        let begun = Instant::now();
        ground.client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: ground.pod.clone() })?;
        ensure!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
        for id in &ids {
            ensure!(ground.code(id)? == 137);
        }
        ground.end()
    })
}
