//! A pod's life on the real kernel: address, log, exec, end; and nothing left behind.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{fs, path::Path, time::Duration};
use windlass_integration::{
    client::{container, host_network, pod},
    ground::begin,
    node,
    wait::until,
};
use windlass_proto::cri;

/// Contents of a log, each line checked against the CRI format.
fn log_lines(path: &Path) -> Result<Vec<(String, String)>> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    text.lines()
        .map(|line| {
            let mut fields = line.splitn(4, ' ');
            let (time, stream) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
            let (tag, content) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
            ensure!(time.len() == 30 && time.ends_with('Z'), "time of {line:?}");
            ensure!(matches!(tag, "F" | "P"), "tag of {line:?}");
            Ok((stream.to_owned(), content.to_owned()))
        })
        .collect()
}

fn log_of(config: &cri::PodSandboxConfig, name: &str) -> std::path::PathBuf {
    Path::new(&config.log_directory).join(format!("{name}.log"))
}

#[test]
fn a_pod_has_an_address_a_log_an_exec_and_an_end() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let status = client.pod(&id)?;
        let address = status.network.context("network")?.ip;
        ensure!(address.starts_with("10."), "address {address:?}");
        node::run_command("/bin/busybox", &["ping", "-c", "1", "-W", "3", &address])?;

        let script = "echo out; echo err >&2; cat /etc/hostname; trap 'exit 143' TERM; sleep 1000 & wait";
        let created = client.create(&id, &config, &container(&config, "main", &["sh", "-c", script]))?;
        ensure!(client.container(&created)?.state() == cri::ContainerState::ContainerCreated);
        ensure!(log_lines(&log_of(&config, "main"))?.is_empty(), "the entrypoint ran before start");
        client.start(&created)?;
        ensure!(client.container(&created)?.state() == cri::ContainerState::ContainerRunning);
        let lines = until("three log lines", || {
            let lines = log_lines(&log_of(&config, "main"))?;
            Ok((lines.len() == 3).then_some(lines))
        })?;
        for expected in [("stdout", "out"), ("stderr", "err"), ("stdout", config.hostname.as_str())] {
            ensure!(lines.iter().any(|(stream, text)| (stream.as_str(), text.as_str()) == expected), "{expected:?} in {lines:?}");
        }

        let run = client.exec(&created, &["sh", "-c", "echo seen; echo oops >&2; exit 7"])?;
        ensure!((run.exit_code, run.stdout.as_slice(), run.stderr.as_slice()) == (7, &b"seen\n"[..], &b"oops\n"[..]), "{run:?}");
        let missing = client.exec(&created, &["/no/such/program"]).expect_err("no such program");
        ensure!(missing.message().contains("/no/such/program"), "{missing}");
        let slow = client
            .exec_sync(cri::ExecSyncRequest { container_id: created.clone(), cmd: vec!["sleep".into(), "60".into()], timeout: 1 })
            .expect_err("times out");
        ensure!(slow.code() == tonic::Code::DeadlineExceeded, "{slow}");
        let processes = client.exec(&created, &["ps", "-o", "args"])?;
        let text = String::from_utf8_lossy(&processes.stdout).into_owned();
        ensure!(text.contains("sleep 1000") && !text.contains("sleep 60"), "the timed-out exec lives: {text}");

        client.stop(&created, 5)?;
        let ended = client.container(&created)?;
        ensure!(ended.state() == cri::ContainerState::ContainerExited && ended.exit_code == 143, "{ended:?}");
        ensure!(ended.finished_at >= ended.started_at && ended.started_at >= ended.created_at, "{ended:?}");
        client.remove(&id)?;
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn a_container_sees_what_the_specification_says() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let mut wanted = container(&config, "probe", &["/probe"]);
        wanted.envs = vec![cri::KeyValue { key: "GREETING".into(), value: b"hello".to_vec() }];
        wanted.working_dir = "/tmp".into();
        let security = wanted.linux.as_mut().and_then(|linux| linux.security_context.as_mut()).context("security")?;
        security.run_as_user = Some(cri::Int64Value { value: 1000 });
        security.no_new_privs = true;
        let created = client.create(&id, &config, &wanted)?;
        client.start(&created)?;
        let ended = client.exited(&created)?;
        ensure!(ended.exit_code == 0 && ended.reason == "Completed", "{ended:?}");
        let lines = log_lines(&log_of(&config, "probe"))?;
        let text: String = lines.iter().map(|(_, text)| text.as_str()).collect();
        let seen: Value = serde_json::from_str(&text).context("the probe's report")?;
        let status = &seen["status"];
        for (key, expected) in [
            ("Pid", "1"),
            ("Uid", "1000 1000 1000 1000"),
            ("Gid", "1000 1000 1000 1000"),
            ("Groups", "1000 50000"),
            ("NoNewPrivs", "1"),
            ("CapEff", "0000000000000000"),
            ("CapBnd", "00000000a80425fb"),
            ("SigIgn", "0000000000001000"),
            ("SigBlk", "0000000000000000"),
            ("Umask", "0022"),
        ] {
            // SIGPIPE is ignored by the probe itself, as Rust programs do.
            ensure!(status[key] == expected, "{key} is {}, not {expected}", status[key]);
        }
        ensure!(
            seen["cwd"] == "/tmp" && seen["environment"]["GREETING"] == "hello" && seen["environment"]["HOME"] == "/home/user"
        );
        ensure!(seen["hostname"] == config.hostname.as_str(), "hostname {}", seen["hostname"]);
        ensure!(seen["cgroup"].as_str().is_some_and(|line| line.ends_with("0::/")), "cgroup {}", seen["cgroup"]);
        let descriptors = seen["descriptors"].as_object().context("descriptors")?;
        // 0, 1, 2 and the directory that the probe itself reads.
        ensure!(descriptors.len() <= 4, "inherited descriptors: {descriptors:?}");
        for name in ["mnt", "pid", "net", "ipc", "uts", "cgroup"] {
            let host = fs::read_link(format!("/proc/thread-self/ns/{name}"))?;
            ensure!(seen["namespaces"][name] != host.to_string_lossy().as_ref(), "namespace {name} is the host's");
        }
        let mounts = seen["mounts"].to_string();
        ensure!(!mounts.contains("/run/netns"), "host mounts are visible: {mounts}");
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn host_network_pods_share_the_network_and_nothing_else() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config = host_network(pod(&daemon.path("logs")));
        let id = client.run(&config)?;
        ensure!(client.pod(&id)?.network.is_none_or(|network| network.ip.is_empty()));
        let created = client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&created)?;
        let seen = client.exec(&created, &["readlink", "/proc/self/ns/net"])?;
        let host = fs::read_link("/proc/thread-self/ns/net")?;
        ensure!(String::from_utf8_lossy(&seen.stdout).trim() == host.to_string_lossy(), "{seen:?}");
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn a_shared_pid_namespace_has_an_init_of_its_own() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let mut config = pod(&daemon.path("logs"));
        if let Some(options) = config.linux.as_mut().and_then(|l| l.security_context.as_mut()?.namespace_options.as_mut()) {
            options.pid = cri::NamespaceMode::Pod.into();
        }
        let id = client.run(&config)?;
        let first = client.create(&id, &config, &container(&config, "first", &["sleep", "1000"]))?;
        let second = client.create(&id, &config, &container(&config, "second", &["sleep", "2000"]))?;
        client.start(&first)?;
        client.start(&second)?;
        let seen = client.exec(&first, &["ps"])?;
        let text = String::from_utf8_lossy(&seen.stdout).into_owned();
        ensure!(text.contains("sleep 1000") && text.contains("sleep 2000"), "{text}");
        client.stop(&first, 0)?;
        ensure!(client.container(&second)?.state() == cri::ContainerState::ContainerRunning);
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn logs_are_reopened_without_losing_or_doubling_a_line() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let created = client.create(&id, &config, &container(&config, "main", &["/probe", "lines", "8000", "1000"]))?;
        client.start(&created)?;
        let log = log_of(&config, "main");
        let mut parts = Vec::new();
        for number in 0..5 {
            std::thread::sleep(Duration::from_millis(150));
            let old = log.with_extension(format!("log.{number}"));
            fs::rename(&log, &old)?;
            client.reopen_container_log(cri::ReopenContainerLogRequest { container_id: created.clone() })?;
            parts.push(old);
        }
        client.exited(&created)?;
        parts.push(log);
        let mut seen = Vec::new();
        for part in &parts {
            seen.extend(log_lines(part)?.into_iter().map(|(_, text)| text));
        }
        let expected: Vec<String> = (0..8000).map(|number| format!("line {number}")).collect();
        ensure!(seen == expected, "{} lines in {} files, in order: {}", seen.len(), parts.len(), seen.is_sorted());
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn ids_may_be_prefixes_and_lists_are_filtered() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let (one, two) = (pod(&daemon.path("logs")), pod(&daemon.path("logs")));
        let (first, second) = (client.run(&one)?, client.run(&two)?);
        ensure!(client.run(&one)? == first, "a retry with the same metadata gets the pod that runs");
        ensure!(client.pod(&first[..20])?.id == first);
        let filter = cri::PodSandboxFilter { label_selector: two.labels.clone(), ..Default::default() };
        let listed = client.list_pod_sandbox(cri::ListPodSandboxRequest { filter: Some(filter) })?.items;
        ensure!(listed.iter().map(|pod| &pod.id).eq([&second]), "{listed:?}");
        let filter = cri::PodSandboxFilter { id: "f".repeat(64), ..Default::default() };
        ensure!(client.list_pod_sandbox(cri::ListPodSandboxRequest { filter: Some(filter) })?.items.is_empty());
        client.remove(&first)?;
        client.remove(&second)?;
        before.expect_again(&daemon)
    })
}
