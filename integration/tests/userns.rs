//! Pods with users of their own: root inside is nobody outside, and every kind of mount, terminal, exec and namespace works there.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    os::unix::fs::{MetadataExt, chown},
};
use tonic::Code;
use windlass_integration::{
    client::{Client, container, host_network, pod},
    daemon::Daemon,
    ground::begin,
    image, node,
};
use windlass_proto::cri;

const FIRST: u32 = 200_000;

fn ids() -> Vec<cri::IdMapping> {
    vec![cri::IdMapping { host_id: FIRST, container_id: 0, length: 65536 }]
}

fn with_users(mut config: cri::PodSandboxConfig) -> cri::PodSandboxConfig {
    let options = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut()?.namespace_options.as_mut());
    if let Some(options) = options {
        options.userns_options = Some(cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids: ids(), gids: ids() });
    }
    config
}

fn options(config: &mut cri::PodSandboxConfig) -> Result<&mut cri::NamespaceOption> {
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    security.and_then(|security| security.namespace_options.as_mut()).context("namespace options")
}

fn shell(client: &Client, id: &str, script: &str) -> Result<String> {
    let run = client.exec(id, &["sh", "-c", script])?;
    ensure!(run.exit_code == 0, "{script}: {}", String::from_utf8_lossy(&run.stderr));
    Ok(String::from_utf8_lossy(&run.stdout).trim().to_owned())
}

fn volume(daemon: &Daemon) -> Result<std::path::PathBuf> {
    let path = daemon.path("volume");
    fs::create_dir(&path)?;
    fs::write(path.join("root"), "")?;
    fs::write(path.join("user"), "")?;
    chown(path.join("user"), Some(1000), Some(1000))?;
    Ok(path)
}

#[test]
fn root_of_a_pod_with_users_of_its_own_is_nobody_outside() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let mut config = with_users(pod(&daemon.path("logs")));
        config.linux.get_or_insert_default().sysctls =
            [("kernel.shm_rmid_forced", "1"), ("net.ipv4.ip_unprivileged_port_start", "77")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into();
        let id = client.run(&config)?;
        let path = volume(&daemon)?;
        let mut wanted = container(&config, "main", &["sh", "-c", "echo said > /dev/stdout; id -u; exec sleep 1000"]);
        let bind = |target: &str| cri::Mount {
            container_path: target.into(),
            host_path: path.to_string_lossy().into_owned(),
            ..Default::default()
        };
        wanted.mounts = vec![
            cri::Mount { uid_mappings: ids(), gid_mappings: ids(), ..bind("/mapped") },
            cri::Mount { uid_mappings: ids(), gid_mappings: ids(), readonly: true, recursive_read_only: true, ..bind("/ro") },
            bind("/plain"),
            cri::Mount {
                container_path: "/image".into(),
                image: Some(cri::ImageSpec { image: image::BUSYBOX.into(), ..Default::default() }),
                image_sub_path: "etc".into(),
                readonly: true,
                ..Default::default()
            },
        ];
        let created = client.create(&id, &config, &wanted)?;
        client.start(&created)?;
        let run = |script: &str| shell(&client, &created, script);
        ensure!(run("cat /proc/self/uid_map")?.split_whitespace().collect::<Vec<_>>() == ["0", &FIRST.to_string(), "65536"]);
        ensure!(run("stat -c %u /bin/sh /etc/passwd /etc/hosts /dev /dev/shm /image/passwd")? == ["0"; 6].join("\n"));
        ensure!(run("stat -c %u /mapped/root /mapped/user /plain/root")? == "0\n1000\n65534");
        run(
            "echo made > /mapped/new && echo changed > /etc/hosts && echo > /new && chown 7 /new && rm /etc/group && echo > /dev/shm/x",
        )?;
        let new = fs::metadata(path.join("new"))?;
        ensure!(new.uid() == 0, "the volume's new file is {}'s", new.uid());
        run("! echo > /ro/x 2>/dev/null && ! echo > /image/x 2>/dev/null && ! echo > /plain/root 2>/dev/null")?;
        run("echo > /dev/null && head -c 1 /dev/urandom > /dev/null && ls /dev/pts /dev/mqueue /sys/class/net > /dev/null")?;
        ensure!(run("cat /proc/1/comm")? == "sleep");
        ensure!(run("cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start")? == "1\n77");
        ensure!(run("hostname")? == config.hostname);
        let log = fs::read_to_string(std::path::Path::new(&config.log_directory).join("main.log"))?;
        ensure!(log.contains(" said") && log.lines().count() == 2, "{log}");
        let info = client.container_status(cri::ContainerStatusRequest { container_id: created.clone(), verbose: true })?.info;
        let details: serde_json::Value = serde_json::from_str(info.get("info").context("info")?)?;
        let owner = fs::metadata(format!("/proc/{}", details["pid"]))?.uid();
        ensure!(owner == FIRST, "the process is {owner}'s on the host");
        client.stop(&created, 1)?;
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn users_of_its_own_on_the_hosts_network_and_with_a_terminal() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config = with_users(host_network(pod(&daemon.path("logs"))));
        let id = client.run(&config)?;
        let mut wanted = container(&config, "main", &["sh", "-c", "tty; id -u; exec sleep 1000"]);
        wanted.tty = true;
        let created = client.create(&id, &config, &wanted)?;
        client.start(&created)?;
        let seen = shell(&client, &created, "readlink /proc/self/ns/net; ls /sys/class > /dev/null; cat /proc/self/uid_map")?;
        let host = fs::read_link("/proc/thread-self/ns/net")?;
        ensure!(seen.starts_with(&*host.to_string_lossy()) && seen.contains(&FIRST.to_string()), "{seen}");
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn containers_of_a_pod_with_users_may_share_their_processes() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let mut config = with_users(pod(&daemon.path("logs")));
        options(&mut config)?.pid = cri::NamespaceMode::Pod.into();
        let id = client.run(&config)?;
        let mut created = Vec::new();
        for (name, seconds) in [("first", "1000"), ("second", "2000")] {
            let one = client.create(&id, &config, &container(&config, name, &["sleep", seconds]))?;
            client.start(&one)?;
            created.push(one);
        }
        let seen = shell(&client, &created[0], "ps -o user,args")?;
        ensure!(seen.contains("sleep 1000") && seen.contains("sleep 2000"), "{seen}");
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn users_that_cannot_be_served_are_refused_by_name() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let plain = with_users(pod(&daemon.path("logs")));
        for word in ["pid", "ipc"] {
            let mut config = plain.clone();
            let options = options(&mut config)?;
            *(if word == "pid" { &mut options.pid } else { &mut options.ipc }) = cri::NamespaceMode::Node.into();
            let error = client.run(&config).expect_err("refused");
            ensure!(error.code() == Code::InvalidArgument && error.message().contains(word), "{error}");
        }
        let id = client.run(&plain)?;
        let mut other = container(&plain, "other", &["sleep", "1"]);
        let security = other.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.namespace_options.get_or_insert_default().userns_options = None;
        let error = client.create(&id, &plain, &other).expect_err("not the pod's");
        ensure!(error.code() == Code::InvalidArgument && error.message().contains("userns_options"), "{error}");
        let mut high = container(&plain, "high", &["sleep", "1"]);
        let security = high.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.run_as_user = Some(cri::Int64Value { value: 70_000 });
        let error = client.create(&id, &plain, &high).expect_err("not mapped");
        ensure!(error.code() == Code::InvalidArgument && error.message().contains("70000"), "{error}");
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}
