//! Namespaces as the request has them: another container's processes, the host's, and settings that need a namespace of the pod.

use anyhow::{Context, Result, ensure};
use std::fs;
use tonic::Code;
use windlass_integration::{
    client::{Client, container, host_network, pod},
    ground::begin,
    leak::Snapshot,
    node,
};
use windlass_proto::cri::{self, NamespaceMode};

fn pod_options(config: &mut cri::PodSandboxConfig) -> &mut cri::NamespaceOption {
    let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default()
}

fn options(config: &mut cri::ContainerConfig) -> &mut cri::NamespaceOption {
    let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    security.namespace_options.get_or_insert_default()
}

fn shell(client: &Client, id: &str, script: &str) -> Result<String> {
    let reply = client.exec(id, &["sh", "-c", script])?;
    ensure!(reply.exit_code == 0, "{script}: {}", String::from_utf8_lossy(&reply.stderr));
    Ok(String::from_utf8_lossy(&reply.stdout).trim().to_owned())
}

#[test]
fn a_container_that_debugs_another_sees_its_processes() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let first = client.create(&id, &config, &container(&config, "first", &["sleep", "1000"]))?;
        client.start(&first)?;
        let mut wanted = container(&config, "debugger", &["sleep", "2000"]);
        options(&mut wanted).pid = NamespaceMode::Target.into();
        options(&mut wanted).target_id = first.clone();
        let debugger = client.create(&id, &config, &wanted)?;
        client.start(&debugger)?;
        ensure!(shell(&client, &debugger, "tr '\\0' ' ' < /proc/1/cmdline")? == "sleep 1000");
        ensure!(shell(&client, &first, "ps -o args")?.contains("sleep 2000"));
        let same = "readlink /proc/self/ns/pid";
        ensure!(shell(&client, &debugger, same)? == shell(&client, &first, same)?);
        client.stop(&debugger, 0)?;
        ensure!(client.container(&first)?.state() == cri::ContainerState::ContainerRunning, "the target ended too");

        let other = pod(&daemon.path("logs-other"));
        let other_id = client.run(&other)?;
        let stranger = client.create(&other_id, &other, &container(&other, "stranger", &["sleep", "1"]))?;
        for (name, target, code) in
            [("of-another-pod", stranger.as_str(), Code::InvalidArgument), ("of-nobody", "feed", Code::NotFound)]
        {
            let mut wanted = container(&config, name, &["sleep", "1"]);
            options(&mut wanted).pid = NamespaceMode::Target.into();
            options(&mut wanted).target_id = target.into();
            let error = client.create(&id, &config, &wanted).expect_err("refused");
            ensure!(error.code() == code && error.message().contains(target), "{error:?}");
        }
        client.stop(&first, 0)?;
        let mut late = container(&config, "late", &["sleep", "1"]);
        options(&mut late).pid = NamespaceMode::Target.into();
        options(&mut late).target_id = first.clone();
        let error = client.create(&id, &config, &late).expect_err("the target has ended");
        ensure!(error.message().contains(&first), "{error:?}");
        client.remove(&other_id)?;
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn every_sane_combination_of_the_hosts_namespaces() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        for combination in 0..8u8 {
            let on = |bit: u8| combination & (1 << bit) != 0;
            let mut config = pod(&daemon.path("logs"));
            if on(0) {
                config = host_network(config);
            }
            let mode = |host: bool| if host { NamespaceMode::Node } else { NamespaceMode::Pod };
            pod_options(&mut config).ipc = mode(on(1)).into();
            pod_options(&mut config).pid = if on(2) { NamespaceMode::Node } else { NamespaceMode::Container }.into();
            let id = client.run(&config)?;
            let main = client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
            client.start(&main)?;
            for (name, expected) in
                [("net", on(0)), ("ipc", on(1)), ("pid", on(2)), ("mnt", false), ("cgroup", false), ("user", true)]
            {
                let seen = shell(&client, &main, &format!("readlink /proc/self/ns/{name}"))?;
                let host = fs::read_link(format!("/proc/thread-self/ns/{name}"))?;
                ensure!(
                    (seen == *host.to_string_lossy()) == expected,
                    "{combination:03b}: {name} is {seen}, the host's {host:?}"
                );
            }
            let status =
                client.pod_sandbox_status(cri::PodSandboxStatusRequest { pod_sandbox_id: id.clone(), verbose: false })?;
            let linux = status.status.and_then(|status| status.linux).context("linux")?;
            let told = linux.namespaces.and_then(|namespaces| namespaces.options).context("options")?;
            ensure!(told.pid() == if on(2) { NamespaceMode::Node } else { NamespaceMode::Container }, "{told:?}");
            ensure!(told.ipc() == mode(on(1)) && told.network() == mode(on(0)), "{told:?}");
            client.remove(&id)?;
        }
        before.expect_again(&daemon)
    })
}

#[test]
fn settings_need_a_namespace_of_the_pods_own() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        for (name, shared, own) in [
            ("net.ipv4.ip_unprivileged_port_start", true, false),
            ("net.core.somaxconn", true, false),
            ("kernel.shm_rmid_forced", false, true),
            ("kernel.msgmax", false, true),
            ("fs.mqueue.msg_max", false, true),
        ] {
            let mut config = pod(&daemon.path("logs"));
            if shared {
                config = host_network(config);
            }
            if own {
                pod_options(&mut config).ipc = NamespaceMode::Node.into();
            }
            config.linux.get_or_insert_default().sysctls = [(name.to_owned(), "1".to_owned())].into();
            let error = client.run(&config).expect_err("the host's");
            ensure!(error.code() == Code::InvalidArgument && error.message().contains(name), "{error:?}");
        }
        let mut config = pod(&daemon.path("logs"));
        let wished =
            [("net.core.somaxconn", "77"), ("kernel.msgmax", "4242"), ("fs.mqueue.msg_max", "11"), ("net/ipv4/ip_forward", "1")];
        config.linux.get_or_insert_default().sysctls = wished.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let id = client.run(&config)?;
        let main = client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&main)?;
        let seen = shell(
            &client,
            &main,
            "cd /proc/sys; cat net/core/somaxconn kernel/msgmax fs/mqueue/msg_max net/ipv4/ip_forward | tr '\\n' ' '",
        )?;
        ensure!(seen == "77 4242 11 1", "{seen}");
        client.remove(&id)?;
        before.expect_again(&daemon)
    })
}

#[test]
fn sysctls_of_an_interface_are_written_when_it_is_there() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let with = |sysctls: &[(&str, &str)]| {
            let mut config = pod(&daemon.path("logs"));
            let sysctls = sysctls.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            config.linux.get_or_insert_default().sysctls = sysctls.collect();
            config
        };
        let config = with(&[("net.ipv4.conf.eth0.log_martians", "1"), ("net/ipv4/neigh/eth0/retrans_time_ms", "2000")]);
        let id = client.run(&config)?;
        let main = client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&main)?;
        let seen = shell(&client, &main, "cd /proc/sys/net/ipv4; cat conf/eth0/log_martians neigh/eth0/retrans_time_ms")?;
        ensure!(seen == "1\n2000", "{seen}");
        client.remove(&id)?;
        for name in ["net.ipv4.conf.eth9.log_martians", "net.ipv4.conf.eth0.no_such", "net.ipv4.no_such"] {
            let error = client.run(&with(&[(name, "1")])).expect_err("nothing of that name");
            ensure!(error.code() == Code::InvalidArgument && error.message().contains(name), "{error:?}");
        }
        before.expect_same(&Snapshot::take(&daemon)?)
    })
}

#[test]
fn a_privileged_container_sees_the_hosts_cgroups() -> Result<()> {
    node::run(|| {
        let (daemon, client, before) = begin()?;
        let mut config = pod(&daemon.path("logs"));
        config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        let id = client.run(&config)?;
        let create = |name: &str, privileged: bool| -> Result<String> {
            let mut wanted = container(&config, name, &["sleep", "1000"]);
            wanted.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = privileged;
            let created = client.create(&id, &config, &wanted)?;
            client.start(&created)?;
            Ok(created)
        };
        let (agent, plain) = (create("agent", true)?, create("plain", false)?);
        let own = "sed -n s/^0:://p /proc/1/cgroup";
        ensure!(shell(&client, &agent, own)? == format!("{}/{agent}", daemon.cgroup));
        ensure!(shell(&client, &plain, own)? == "/");
        let group = format!("/sys/fs/cgroup{}/{plain}", daemon.cgroup);
        ensure!(!shell(&client, &agent, &format!("cat {group}/cgroup.procs"))?.is_empty(), "the other container's processes");
        shell(&client, &agent, &format!("mkdir {group}/made && rmdir {group}/made"))?;
        ensure!(
            shell(&client, &agent, "readlink /proc/self/ns/cgroup")? == fs::read_link("/proc/self/ns/cgroup")?.to_string_lossy()
        );
        client.remove(&id)?;
        before.expect_same(&Snapshot::take(&daemon)?)
    })
}
