//! Sudden deaths: of the daemon, which must disturb nobody, and of a monitor, which must end its pod cleanly.

use anyhow::{Context, Result, ensure};
use std::{fs, path::Path, time::Duration};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    leak::Snapshot,
    node,
    wait::until_true,
};
use windlass_proto::cri;

#[test]
fn a_killed_daemon_loses_no_pod_no_line_and_no_exit_code() -> Result<()> {
    node::run(|| {
        let mut daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let mut pods = Vec::new();
        for command in [&["/probe", "lines", "3000", "1000"][..], &["sh", "-c", "sleep 1; exit 42"], &["sleep", "1000"]] {
            let config = pod(&daemon.path("logs"));
            let id = client.run(&config)?;
            let created = client.create(&id, &config, &container(&config, "main", command))?;
            client.start(&created)?;
            let address = client.pod(&id)?.network.context("network")?.ip;
            pods.push((config, id, created, address));
        }
        std::thread::sleep(Duration::from_millis(300));
        daemon.kill9()?;
        // The second container ends while nobody watches.
        std::thread::sleep(Duration::from_millis(1500));
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        for (_, id, _, address) in &pods {
            let status = client.pod(id)?;
            ensure!(status.state() == cri::PodSandboxState::SandboxReady, "{status:?}");
            ensure!(status.network.context("network")?.ip == *address, "the address is kept");
        }
        let ended = client.container(&pods[1].2)?;
        ensure!(ended.state() == cri::ContainerState::ContainerExited && ended.exit_code == 42, "{ended:?}");
        ensure!(client.exec(&pods[2].2, &["true"])?.exit_code == 0);
        until_true("the writer ends", || Ok(client.container(&pods[0].2)?.state() == cri::ContainerState::ContainerExited))?;
        let text = fs::read_to_string(Path::new(&pods[0].0.log_directory).join("main.log"))?;
        let seen: Vec<&str> = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
        let expected: Vec<String> = (0..3000).map(|number| format!("line {number}")).collect();
        ensure!(seen == expected, "{} lines of 3000", seen.len());

        let config = pod(&daemon.path("logs"));
        let fresh = client.run(&config)?;
        client.remove(&fresh)?;
        for (_, id, ..) in &pods {
            client.remove(id)?;
        }
        ensure!(daemon.monitors().is_empty(), "monitors are left");
        daemon.stop()?;
        ensure!(!daemon.cgroup_directory().exists(), "cgroup is left");
        let links = node::output_of("ip", &["-o", "link"])?;
        ensure!(links.lines().count() == 1, "links are left: {links}");
        ensure!(node::output_of("nft", &["list", "ruleset"])?.is_empty(), "rules are left");
        ensure!(fs::read_dir("/run/netns")?.next().is_none(), "network namespaces are left");
        Ok(())
    })
}

#[test]
fn a_killed_monitor_ends_its_pod_before_any_status_says_so() -> Result<()> {
    node::run(|| {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let before = Snapshot::warm(&daemon, &client)?;
        let mut config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let created =
            client.create(&id, &config, &container(&config, "main", &["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"]))?;
        client.start(&created)?;
        let monitors = daemon.monitors();
        ensure!(monitors.len() == 1, "{monitors:?}");
        let leaf = daemon.cgroup_directory().join(&created);
        ensure!(leaf.exists());
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(monitors[0]), nix::sys::signal::Signal::SIGKILL)?;
        until_true("the container is said to have ended", || {
            let status = client.container(&created)?;
            if status.state() != cri::ContainerState::ContainerExited {
                return Ok(false);
            }
            ensure!(
                !fs::read_to_string(leaf.join("cgroup.events")).is_ok_and(|text| text.contains("populated 1")),
                "it still runs"
            );
            ensure!(status.exit_code == 255, "{status:?}");
            Ok(true)
        })?;
        until_true("NotReady", || Ok(client.pod(&id)?.state() == cri::PodSandboxState::SandboxNotready))?;
        // What kubelet does next: the same pod, one attempt later.
        if let Some(meta) = config.metadata.as_mut() {
            meta.attempt += 1;
        }
        let next = client.run(&config)?;
        client.remove(&next)?;
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn two_daemons_side_by_side_do_not_meet() -> Result<()> {
    node::run(|| {
        let (one, two) = (Daemon::start(&[])?, Daemon::start(&[])?);
        let (first, second) = (Client::connect(&one)?, Client::connect(&two)?);
        let config = host_pod(&one);
        let id = first.run(&config)?;
        ensure!(second.list_pod_sandbox(cri::ListPodSandboxRequest::default())?.items.is_empty());
        let other = host_pod(&two);
        let other_id = second.run(&other)?;
        first.remove(&id)?;
        ensure!(second.pod(&other_id)?.state() == cri::PodSandboxState::SandboxReady);
        second.remove(&other_id)?;
        let elsewhere = one.path("elsewhere.sock");
        let words = ["image", "--socket", &elsewhere.to_string_lossy(), "ls"];
        let third = one.windlass(&words).expect_err("the root is in use");
        ensure!(third.to_string().contains("in use by another windlass"), "{third}");
        Ok(())
    })
}

fn host_pod(daemon: &Daemon) -> cri::PodSandboxConfig {
    windlass_integration::client::host_network(pod(&daemon.path("logs")))
}
