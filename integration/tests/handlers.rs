//! Pods whose containers are run by another OCI runtime: everything around them is as with the native one.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    time::{Duration, Instant},
};
use tonic::Code;
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    go,
    ground::Ground,
    node,
    streams::{SPDY, WEBSOCKET, client},
    wait::until,
};
use windlass_proto::cri::{self, NamespaceMode};

const HANDLERS: [(&str, &str); 2] = [("runc", "/usr/sbin/runc"), ("crun", "/usr/bin/crun")];

/// A daemon that has both handlers, and a pod that asks for one of them.
fn ground(handler: &str, change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Result<Ground> {
    let handlers: String = HANDLERS.iter().map(|(name, path)| format!("[handlers.{name}]\npath = {path:?}\n")).collect();
    Ground::with_handler(Daemon::configured(&handlers)?, handler, change)
}

fn life(handler: &str) -> Result<()> {
    let mut ground = ground(handler, |_| {})?;
    let listed = ground.client.status(cri::StatusRequest { verbose: false })?.runtime_handlers;
    ensure!(listed.iter().any(|listed| listed.name == handler), "{listed:?}");
    let status = ground.client.pod(&ground.pod)?;
    ensure!(status.runtime_handler == handler);
    let ip = status.network.context("network")?.ip;
    let volume = ground.daemon.path("volume");
    fs::create_dir_all(&volume)?;
    fs::write(volume.join("file"), "of the host")?;
    let id = ground.start(
        "main",
        &["sh", "-c", "trap 'exit 7' TERM; echo hello; echo bad >&2; while :; do sleep 0.05; done"],
        |config| {
            let host_path = volume.to_string_lossy().into_owned();
            config.mounts = vec![
                cri::Mount { container_path: "/ro".into(), host_path: host_path.clone(), readonly: true, ..Default::default() },
                cri::Mount { container_path: "/rw".into(), host_path, ..Default::default() },
            ];
            config.envs = vec![cri::KeyValue { key: "GREETING".into(), value: b"hello".to_vec() }];
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.run_as_user = Some(cri::Int64Value { value: 1000 });
        },
    )?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while ground.log("main").lines().count() < 2 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    let log = ground.log("main");
    ensure!(log.contains(" stdout F hello\n") && log.contains(" stderr F bad\n") && log.lines().count() == 2, "{log}");
    let seen = ground.client.shell(&id, "id -u; hostname; echo $GREETING; cat /ro/file; echo; (echo x > /ro/x) 2>/dev/null || echo kept; ip -o -4 addr show | grep -c 'eth0'")?;
    ensure!(seen == format!("1000\n{}\nhello\nof the host\nkept\n1", ground.config.hostname), "{seen}");
    ensure!(ground.client.shell(&id, "ip -o -4 addr show eth0")?.contains(&ip));
    ensure!(ground.client.exec(&id, &["sh", "-c", "exit 3"])?.exit_code == 3);
    let info = ground.client.container_status(cri::ContainerStatusRequest { container_id: id.clone(), verbose: true })?.info;
    let details: serde_json::Value = serde_json::from_str(info.get("info").context("info")?)?;
    let places = fs::read_to_string(format!("/proc/{}/cgroup", details["pid"]))?;
    ensure!(places.lines().any(|line| line.starts_with("0::") && line.ends_with(&id)), "its cgroup is the container's: {places}");
    let device = ground.start("device", &["sleep", "1000"], |config| {
        config.devices =
            vec![cri::Device { host_path: "/dev/fuse".into(), container_path: "/dev/granted".into(), permissions: "r".into() }];
    })?;
    let script = "(: < /dev/granted) && echo read; (: <> /dev/granted) 2>/dev/null || echo refused; \
                  mknod /made c 10 200 && (: < /made) 2>/dev/null || echo refused; : < /dev/null && echo null";
    ensure!(ground.client.shell(&device, script)? == "read\nrefused\nrefused\nnull");
    // The pod's shared memory, and an end without a grace.
    let other = ground.start("other", &["sleep", "1000"], |_| {})?;
    ground.client.shell(&other, "echo shared > /dev/shm/x")?;
    ensure!(ground.client.shell(&id, "cat /dev/shm/x")? == "shared");
    ground.client.stop(&other, 0)?;
    ensure!(ground.client.exited(&other)?.exit_code == 137);
    ground.daemon.kill9()?;
    ground.daemon.serve()?;
    ground.client = Client::connect(&ground.daemon)?;
    ensure!(ground.client.shell(&id, "echo alive")? == "alive");
    ground.client.stop(&id, 20)?;
    ensure!(ground.client.container(&id)?.exit_code == 7);
    for round in 0..5 {
        let short = ground.start(&format!("short-{round}"), &["sh", "-c", "exit 5"], |_| {})?;
        let status = ground.client.exited(&short)?;
        ensure!(status.exit_code == 5 && status.started_at > 0, "{status:?}");
    }
    ground.end()
}

#[test]
fn a_pod_lives_with_runc() -> Result<()> {
    node::run(|| life("runc"))
}

#[test]
fn a_pod_lives_with_crun() -> Result<()> {
    node::run(|| life("crun"))
}

#[test]
fn terminals_and_shared_processes_with_other_runtimes() -> Result<()> {
    for (handler, _) in HANDLERS {
        node::run(move || {
            let shared = |config: &mut cri::PodSandboxConfig| {
                let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
                security.namespace_options.get_or_insert_default().pid = NamespaceMode::Pod.into();
            };
            let ground = ground(handler, shared)?;
            let first = ground.start("first", &["sleep", "1000"], |_| {})?;
            let second = ground.start("second", &["sleep", "2000"], |_| {})?;
            // The start has an answer before the runtime's own process has become the container's.
            until(&format!("{handler}: processes of both containers"), || {
                let seen = ground.client.shell(&first, "ps -o args")?;
                Ok((seen.contains("sleep 1000") && seen.contains("sleep 2000")).then_some(()))
            })?;
            ground.client.stop(&second, 0)?;
            let terminal = ground
                .start("terminal", &["sh", "-c", "tty; test -t 0 && test -t 1 && echo both"], |config| config.tty = true)?;
            ground.client.exited(&terminal)?;
            let log = ground.log("terminal");
            ensure!(log.contains("both"), "{handler}: {log}");
            ground.end()
        })?;
    }
    Ok(())
}

#[test]
fn clients_are_attached_with_other_runtimes() -> Result<()> {
    // Before the node is entered, which has no network to build it with.
    go::streams()?;
    for (handler, _) in HANDLERS {
        node::run(move || {
            let ground = ground(handler, |_| {})?;
            for transport in [SPDY, WEBSOCKET] {
                let once = |config: &mut cri::ContainerConfig| (config.stdin, config.stdin_once) = (true, true);
                let name = transport.concat();
                let id = ground.start(&name, &["sh", "-c", "cat; echo over >&2"], once)?;
                let request = cri::AttachRequest {
                    container_id: id.clone(),
                    stdin: true,
                    stdout: true,
                    stderr: true,
                    ..Default::default()
                };
                let url = ground.client.attach(request)?.url;
                let flags = [transport, &["-stdin", "-stderr", "-bytes", "300000"]].concat();
                let seen = client(&flags, &["exec", &url], "")?;
                ensure!(seen["code"] == 0 && seen["stdout"]["sha256"] == seen["sent"]["sha256"], "{handler} {name}: {seen}");
                ensure!(seen["sent"]["bytes"] == 300_000 && seen["stderr"]["head"] == "over\n", "{handler} {name}: {seen}");
                ensure!(ground.client.exited(&id)?.exit_code == 0, "{handler} {name}");
                let script = "until [ \"$(stty size 2>/dev/null)\" = '43 132' ]; do sleep 0.02; done; echo sized";
                let id = ground.start(&format!("{name}-tty"), &["sh", "-c", script], |config| config.tty = true)?;
                let request = cri::AttachRequest { container_id: id.clone(), tty: true, stdout: true, ..Default::default() };
                let url = ground.client.attach(request)?.url;
                let seen = client(&[transport, &["-tty"]].concat(), &["exec", &url], "")?;
                ensure!(seen["code"] == 0 && seen["stdout"]["head"] == "sized\r\n", "{handler} {name}: {seen}");
            }
            ground.end()
        })?;
    }
    Ok(())
}

#[test]
fn what_other_runtimes_cannot_do_is_told() -> Result<()> {
    for (handler, _) in HANDLERS {
        node::run(move || {
            let ground = ground(handler, |_| {})?;
            let wanted = container(&ground.config, "missing", &["/no/such/program"]);
            let id = ground.client.create(&ground.pod, &ground.config, &wanted)?;
            let error = ground.client.start(&id).expect_err("no such program");
            ensure!(error.message().contains("/no/such/program"), "{handler}: {error}");
            let status = ground.client.container(&id)?;
            ensure!(status.exit_code == 128 && status.reason == "StartError", "{handler}: {status:?}");
            let mut both = container(&ground.config, "both", &["sleep", "1"]);
            both.mounts = vec![cri::Mount {
                container_path: "/x".into(),
                host_path: "/tmp".into(),
                propagation: cri::MountPropagation::PropagationBidirectional.into(),
                ..Default::default()
            }];
            both.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
            let error = ground.client.create(&ground.pod, &ground.config, &both).expect_err("refused");
            ensure!(error.message().contains("mounts"), "{error}");
            let mut users = pod(&ground.daemon.path("logs-users"));
            let security = users.linux.get_or_insert_default().security_context.get_or_insert_default();
            let ids = vec![cri::IdMapping { host_id: 200_000, container_id: 0, length: 65536 }];
            security.namespace_options.get_or_insert_default().userns_options =
                Some(cri::UserNamespace { mode: NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids });
            let request = cri::RunPodSandboxRequest { config: Some(users), runtime_handler: handler.into() };
            let error = ground.client.run_pod_sandbox(request).expect_err("refused");
            ensure!(error.code() == Code::Unimplemented && error.message().contains("userns_options"), "{error}");
            let unknown =
                cri::RunPodSandboxRequest { config: Some(pod(&ground.daemon.path("l"))), runtime_handler: "kata".into() };
            let error = ground.client.run_pod_sandbox(unknown).expect_err("unknown");
            ensure!(error.message().contains("kata") && error.message().contains(handler), "{error}");
            ground.end()
        })?;
    }
    Ok(())
}
