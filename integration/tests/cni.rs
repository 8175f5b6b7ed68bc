//! The pod network by CNI: Debian's plugins as they are, and a plugin of ours, a shell script, for what real ones do not do on demand.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    fs,
    io::Read,
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tonic::Code;
use windlass_integration::{
    client::{Client, pod},
    daemon::Daemon,
    go,
    leak::Snapshot,
    node, soak,
    wait::until_true,
};
use windlass_proto::cri;

/// Where Debian's package containernetworking-plugins lies.
const PLUGINS: &str = "/usr/lib/cni";
/// Pods of the soak here; `WINDLASS_CNI_SOAK_PODS` sets another number.
const SOAK_PODS: usize = 40;
/// As many of them at a time.
const SOAK_WIDTH: usize = 20;
/// A script that notes each call, and then does what a file named after the command says. Alone it gives a fixed address.
const SCRIPT: &str = r#"#!/bin/sh
input=$(cat)
echo "$CNI_COMMAND ${CNI_CONTAINERID:-none} ${CNI_NETNS:-none}" >> DIR/calls
printf '%s' "$input" > "DIR/input.$CNI_COMMAND"
printf '%s' "$CNI_ARGS" > "DIR/arguments.$CNI_COMMAND"
if [ -f "DIR/$CNI_COMMAND" ]; then . "DIR/$CNI_COMMAND"; fi
case "$input" in *'"prevResult":'*) [ "$CNI_COMMAND" = ADD ] && printf '%s' "$input" | sed 's/.*"prevResult":\(.*\),"type":"fault"}$/\1/' && exit 0;; esac
if [ "$CNI_COMMAND" = ADD ]; then
  echo '{"cniVersion":"0.4.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"version":"4","interface":0,"address":"10.66.0.2/24"}]}'
fi
"#;

/// A daemon with a configuration directory and the script, called `fault`.
struct Ground {
    daemon: Daemon,
    client: Client,
    faults: PathBuf,
}

impl Ground {
    fn start(settings: &str, network: Option<&Value>) -> Result<Ground> {
        Ground::with(Path::new(PLUGINS), settings, network)
    }

    fn with(plugins: &Path, settings: &str, network: Option<&Value>) -> Result<Ground> {
        let mut daemon = Daemon::prepare(&[])?;
        let (programs, faults) = (daemon.path("plugins"), daemon.path("faults"));
        for directory in [&programs, &faults, &daemon.path("cni")] {
            fs::create_dir_all(directory)?;
        }
        let script = programs.join("fault");
        fs::write(&script, SCRIPT.replace("DIR", &faults.to_string_lossy()))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let search = format!("{}:{}", programs.display(), plugins.display());
        daemon.configure(&format!("cni_bin_dir = {search:?}\n{settings}\n"))?;
        if let Some(network) = network {
            fs::write(daemon.path("cni/10-test.conflist"), network.to_string())?;
        }
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        Ok(Ground { daemon, client, faults })
    }

    /// What the script does at a command; `None`: nothing of its own again.
    fn fault(&self, command: &str, script: Option<&str>) -> Result<()> {
        let path = self.faults.join(command);
        match script {
            Some(script) => Ok(fs::write(path, script)?),
            None => Ok(fs::remove_file(path)?),
        }
    }

    fn calls(&self, beginning: &str) -> usize {
        let calls = fs::read_to_string(self.faults.join("calls")).unwrap_or_default();
        calls.lines().filter(|line| line.starts_with(beginning)).count()
    }

    fn input(&self, command: &str) -> Result<Value> {
        Ok(serde_json::from_slice(&fs::read(self.faults.join(format!("input.{command}")))?)?)
    }

    fn config(&self) -> cri::PodSandboxConfig {
        pod(&self.daemon.path("logs"))
    }

    fn warm(&self) -> Result<Snapshot> {
        let warm = self.client.run(&self.config())?;
        self.client.remove(&warm)?;
        self.snapshot()
    }

    fn snapshot(&self) -> Result<Snapshot> {
        Snapshot::take(&self.daemon)
    }

    /// Attachments on record and addresses that host-local holds.
    fn held(&self) -> Vec<String> {
        let mut held = Vec::new();
        let addresses = self.daemon.path("addresses/test");
        for directory in [self.daemon.root().join("network/cni"), addresses] {
            let names = fs::read_dir(directory).into_iter().flatten().flatten();
            held.extend(names.filter_map(|entry| entry.file_name().into_string().ok()));
        }
        held.retain(|name| !name.starts_with("last_reserved_ip") && name != "lock");
        held
    }

    fn ready(&self) -> Result<(bool, String)> {
        let status = self.client.status(cri::StatusRequest { verbose: false })?.status.context("status")?;
        let network = status.conditions.iter().find(|condition| condition.r#type == "NetworkReady").context("NetworkReady")?;
        Ok((network.status, network.message.clone()))
    }

    fn stop(&self, pod: &str) -> Result<(), tonic::Status> {
        self.client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: pod.into() }).map(drop)
    }
}

const LONG: Duration = Duration::from_secs(60);

/// A chain of Debian's plugins with both families, and `more` after them.
fn real(daemon: &Daemon, more: &[Value]) -> Value {
    let ranges = json!([[{ "subnet": "10.88.0.0/24" }], [{ "subnet": "fd00:88::/64" }]]);
    let routes = json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]);
    let mut plugins = vec![
        json!({ "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
            "ipam": { "type": "host-local", "dataDir": daemon.path("addresses"), "ranges": ranges, "routes": routes } }),
        json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" } }),
        json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
        json!({ "type": "firewall" }),
    ];
    plugins.extend_from_slice(more);
    json!({ "name": "test", "cniVersion": "1.0.0", "plugins": plugins })
}

/// The script alone.
fn scripted(version: &str) -> Value {
    json!({ "name": "test", "cniVersion": version, "plugins": [{ "type": "fault" }] })
}

/// A ground whose network is made of real plugins; the file is written when the daemon's directory is known.
fn real_ground(settings: &str, more: &[Value]) -> Result<Ground> {
    let ground = Ground::start(&format!("mode = \"cni\"\n{settings}"), None)?;
    fs::write(ground.daemon.path("cni/10-test.conflist"), real(&ground.daemon, more).to_string())?;
    until_true("NetworkReady", || Ok(ground.ready()?.0))?;
    Ok(ground)
}

fn netns_of(pod: &str) -> String {
    format!("windlass-{}", &pod[..32])
}

#[test]
fn a_sysctl_of_the_request_holds_against_a_plugins() -> Result<()> {
    node::run(|| {
        let ground = real_ground("", &[])?;
        let before = ground.warm()?;
        let mut config = ground.config();
        config.linux.get_or_insert_default().sysctls = [("net.core.somaxconn".to_owned(), "600".to_owned())].into();
        let id = ground.client.run(&config)?;
        let file = ["netns", "exec", &netns_of(&id), "cat", "/proc/sys/net/core/somaxconn"];
        let seen = node::output_of("ip", &file)?;
        ensure!(seen.trim() == "600", "{seen}");
        ground.client.remove(&id)?;
        before.expect_same(&ground.snapshot()?)
    })
}

#[test]
fn real_plugins_give_both_families_a_host_port_and_take_all_back() -> Result<()> {
    node::run(|| {
        let ground = real_ground("", &[])?;
        node::run_command("ip", &["link", "add", "host0", "type", "bridge"])?;
        node::run_command("ip", &["address", "add", "192.0.2.1/24", "dev", "host0"])?;
        node::run_command("ip", &["link", "set", "host0", "up"])?;
        let mut config = ground.config();
        let mapping = cri::PortMapping { protocol: 0, container_port: 80, host_port: 8080, host_ip: String::new() };
        config.port_mappings.push(mapping);
        // The first pod leaves the plugins' own chains, as theirs do everywhere.
        let warm = ground.client.run(&config)?;
        ground.client.remove(&warm)?;
        let before = ground.snapshot()?;

        let id = ground.client.run(&config)?;
        let network = ground.client.pod(&id)?.network.context("network")?;
        let second: Vec<&str> = network.additional_ips.iter().map(|ip| ip.ip.as_str()).collect();
        ensure!(network.ip.starts_with("10.88.0.") && second.len() == 1 && second[0].starts_with("fd00:88::"), "{network:?}");
        let netns = netns_of(&id);
        let inside = node::output_of("ip", &["netns", "exec", &netns, "ip", "-o", "address"])?;
        ensure!(inside.contains(&network.ip) && inside.contains(second[0]) && inside.contains("127.0.0.1/8"), "{inside}");
        let sysctl = node::output_of("ip", &["netns", "exec", &netns, "cat", "/proc/sys/net/core/somaxconn"])?;
        ensure!(sysctl.trim() == "500", "{sysctl}");
        let mut server = std::process::Command::new("ip")
            .args(["netns", "exec", &netns, "busybox", "nc", "-l", "-p", "80", "-e", "echo", "hello"])
            .spawn()?;
        let mut heard = String::new();
        let reached = until_true("the host port", || match TcpStream::connect("192.0.2.1:8080") {
            Ok(mut stream) => {
                stream.set_read_timeout(Some(LONG))?;
                Ok(stream.read_to_string(&mut heard).is_ok() && heard == "hello\n")
            }
            Err(_) => Ok(false),
        });
        let _ = server.kill();
        server.wait()?;
        reached?;
        let request = cri::StatusRequest { verbose: true };
        let info = ground.client.status(request)?.info.get("network").context("network")?.clone();
        ensure!(info.contains("10-test.conflist") && info.contains("portmap"), "{info}");

        ground.client.remove(&id)?;
        ensure!(ground.held().is_empty(), "{:?}", ground.held());
        before.expect_same(&ground.snapshot()?)
    })
}

#[test]
fn a_failing_plugin_of_a_chain_leaves_nothing_and_its_words_in_the_error() -> Result<()> {
    node::run(|| {
        let ground = real_ground("cni_timeout_seconds = 12", &[json!({ "type": "fault" })])?;
        let before = ground.warm()?;
        let reported =
            r#"echo '{"cniVersion":"1.0.0","code":123,"msg":"no room","details":"rack 7"}'; echo "a hint" >&2; exit 1"#;
        for (script, words) in [
            (reported, &["plugin \"fault\"", "no room; rack 7 (code 123)", "a hint"][..]),
            ("echo garbage; exit 0", &["plugin \"fault\"", "not JSON"][..]),
            ("echo garbage; exit 3", &["plugin \"fault\"", "garbage", "3"][..]),
            ("exit 1", &["plugin \"fault\"", "without a word"][..]),
            ("yes; sleep 1000", &["plugin \"fault\"", "more than 1048576 bytes"][..]),
            ("sleep 12345 & sleep 12345", &["plugin \"fault\"", "not done in time"][..]),
        ] {
            ground.fault("ADD", Some(script))?;
            let begun = Instant::now();
            let error = ground.client.run(&ground.config()).expect_err(script);
            for word in words {
                ensure!(error.message().contains(word), "{script}: {error}");
            }
            ensure!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
            ensure!(ground.held().is_empty(), "{script}: {:?}", ground.held());
            ensure!(node::output_of("pgrep", &["-f", "sleep 12345"]).is_err(), "the plugin's children live");
        }
        ground.fault("ADD", None)?;
        let id = ground.client.run(&ground.config())?;
        ensure!(ground.input("ADD")?["prevResult"]["ips"].as_array().is_some_and(|ips| ips.len() == 2), "no result before it");
        ground.client.remove(&id)?;
        before.expect_same(&ground.snapshot()?)
    })
}

#[test]
fn a_stop_fails_only_if_add_succeeded_and_del_did_not_and_del_is_tried_until_it_does() -> Result<()> {
    node::run(|| {
        let ground = Ground::start("", Some(&scripted("0.4.0")))?;
        let before = ground.warm()?;
        let id = ground.client.run(&ground.config())?;
        let arguments = fs::read_to_string(ground.faults.join("arguments.ADD"))?;
        ensure!(
            arguments.contains("K8S_POD_NAMESPACE=test;") && arguments.contains(&format!("INFRA_CONTAINER_ID={id};")),
            "{arguments}"
        );
        let failing = "n=$(cat DIR/count 2>/dev/null || echo 0); n=$((n+1)); echo $n > DIR/count; [ $n -gt 3 ] || { echo busy >&2; exit 1; }";
        ground.fault("DEL", Some(&failing.replace("DIR", &ground.faults.to_string_lossy())))?;
        let error = ground.stop(&id).expect_err("DEL fails");
        ensure!(error.message().contains("DEL: plugin \"fault\"") && error.message().contains("busy"), "{error}");
        ensure!(ground.input("DEL")?["prevResult"]["ips"][0]["address"] == "10.66.0.2/24", "no result");
        until_true("the owed DEL", || Ok(ground.held().is_empty()))?;
        ensure!(ground.calls(&format!("DEL {id}")) == 4, "{}", ground.calls("DEL"));
        ground.client.remove(&id)?;

        fs::remove_file(ground.faults.join("count"))?;
        ground.fault("ADD", Some("exit 1"))?;
        ground.client.run(&ground.config()).expect_err("ADD fails");
        until_true("the owed DEL of a failed ADD", || Ok(ground.held().is_empty()))?;
        before.expect_same(&ground.snapshot()?)
    })
}

#[test]
fn a_daemon_killed_in_an_add_takes_it_back_when_it_starts_again() -> Result<()> {
    node::run(|| {
        let mut ground = real_ground("", &[json!({ "type": "fault" })])?;
        let before = ground.warm()?;
        ground.fault("ADD", Some("sleep 54321"))?;
        let (config, client) = (ground.config(), Client::connect(&ground.daemon)?);
        let calls = ground.calls("ADD");
        let running = std::thread::spawn(move || client.run(&config));
        until_true("the ADD", || Ok(ground.calls("ADD") > calls))?;
        ensure!(!ground.held().is_empty(), "nothing was recorded");
        ground.daemon.kill9()?;
        ensure!(running.join().ok().context("the caller")?.is_err());
        ground.daemon.serve()?;
        ground.client = Client::connect(&ground.daemon)?;
        until_true("all is taken back", || Ok(ground.held().is_empty()))?;
        ensure!(node::output_of("pgrep", &["-f", "sleep 54321"]).is_err(), "the plugin lives");
        ground.fault("ADD", None)?;
        before.expect_same(&ground.warm()?)
    })
}

#[test]
fn after_a_reboot_addresses_come_back_though_the_namespaces_are_gone() -> Result<()> {
    node::run(|| {
        let mut ground = real_ground("", &[json!({ "type": "fault" })])?;
        let before = ground.warm()?;
        let ids = [ground.client.run(&ground.config())?, ground.client.run(&ground.config())?];
        ensure!(ground.held().len() == 6, "{:?}", ground.held());
        ground.daemon.kill9()?;
        for monitor in ground.daemon.monitors() {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(monitor), nix::sys::signal::Signal::SIGKILL)?;
        }
        until_true("the monitors' end", || Ok(ground.daemon.monitors().is_empty()))?;
        for id in &ids {
            let pin = Path::new("/run/netns").join(netns_of(id));
            node::run_command("umount", &[&pin.to_string_lossy()])?;
            fs::remove_file(pin)?;
        }
        fs::remove_dir_all(ground.daemon.state())?;
        ground.daemon.serve()?;
        ground.client = Client::connect(&ground.daemon)?;
        until_true("the addresses", || Ok(ground.held().is_empty()))?;
        for id in &ids {
            ensure!(ground.calls(&format!("DEL {id} none")) >= 1, "no DEL without a namespace");
            ensure!(ground.client.pod(id)?.state() == cri::PodSandboxState::SandboxNotready);
            ground.client.remove(id)?;
        }
        // Links go with their namespaces, which the kernel ends when it likes. What the bridge plugin masqueraded stays until it is asked
        // with a namespace, or the kernel's rules are gone as after a true reboot.
        let links = |text: &str| text.lines().filter(|line| line.contains("veth")).count();
        until_true("the links", || Ok(links(&node::output_of("ip", &["-o", "link"])?) == 0))?;
        drop(before);
        Ok(())
    })
}

#[test]
fn a_network_that_appears_later_takes_over_and_a_broken_file_changes_nothing() -> Result<()> {
    node::run(|| {
        let ground = Ground::start("", None)?;
        ensure!(ground.ready()?.0, "the built-in bridge serves");
        let bridged = ground.client.run(&ground.config())?;
        ensure!(ground.client.pod(&bridged)?.network.context("network")?.ip.starts_with("10.57."));
        let file = ground.daemon.path("cni/20-late.conflist");
        let attaches = |kind: &str| -> Result<bool> {
            let info = ground.client.status(cri::StatusRequest { verbose: true })?.info;
            let network: Value = serde_json::from_str(info.get("network").context("network")?)?;
            Ok(network["attaches"] == kind)
        };
        fs::write(&file, scripted("1.0.0").to_string())?;
        ensure!(attaches("cni")?, "the next request sees it");
        let by_cni = ground.client.run(&ground.config())?;
        ensure!(ground.client.pod(&by_cni)?.network.context("network")?.ip == "10.66.0.2");

        fs::write(ground.daemon.path("cni/10-broken.conflist"), r#"{"name":"x","cniVersion":"1.0.0","plugins":[{}]}"#)?;
        let told = "10-broken.conflist: plugins[0].type: is missing";
        let info = ground.client.status(cri::StatusRequest { verbose: true })?.info;
        ensure!(ground.daemon.log().contains("10-broken"), "the complaint");
        ensure!(info.get("network").is_some_and(|text| text.contains(told)), "{info:?}");
        ensure!(ground.ready()?.0, "{:?}", ground.ready()?);
        fs::write(&file, "{")?;
        let another = ground.client.run(&ground.config())?;
        ensure!(ground.daemon.log().contains("20-late.conflist why"), "the second complaint");

        for id in [&bridged, &by_cni, &another] {
            ground.client.remove(id)?;
        }
        ensure!(ground.calls(&format!("DEL {bridged}")) == 0 && ground.calls(&format!("DEL {by_cni}")) == 1, "each by its own");
        until_true("the bridge is gone", || Ok(!node::output_of("ip", &["-o", "link"])?.contains("wlt")))?;
        fs::remove_file(&file)?;
        until_true("not ready", || Ok(!ground.ready()?.0))?;
        let error = ground.client.run(&ground.config()).expect_err("no network");
        ensure!(error.message().contains(told), "{error}");
        Ok(())
    })
}

#[test]
fn a_removal_comes_to_its_end_though_its_caller_has_gone() -> Result<()> {
    node::run(|| {
        let ground = Ground::start("mode = \"cni\"", Some(&scripted("1.0.0")))?;
        let id = ground.client.run(&ground.config())?;
        let hasty = Client::within(&ground.daemon.socket(), Duration::from_secs(1))?;
        let go = ground.daemon.path("go");
        ground.fault("DEL", Some(&format!("until test -e '{}'; do sleep 0.02; done", go.display())))?;
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.clone() };
        let error = hasty.remove_pod_sandbox(request).expect_err("the network is not given back");
        ensure!(error.code() == Code::DeadlineExceeded, "{error:?}");
        until_true("DEL", || Ok(ground.calls(&format!("DEL {id}")) > 0))?;
        ensure!(ground.client.pod(&id)?.state() == cri::PodSandboxState::SandboxNotready, "its processes have ended");
        fs::write(&go, "")?;
        let gone = || Ok(ground.client.pod(&id).is_err_and(|status| status.code() == Code::NotFound));
        until_true("the pod's removal, which nobody asks for again", gone)?;
        ensure!(ground.held().is_empty(), "{:?}", ground.held());
        Ok(())
    })
}

#[test]
fn status_is_asked_in_the_background_and_gc_is_told_what_counts() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::start("mode = \"cni\"", Some(&scripted("1.1.0")))?;
        until_true("NetworkReady", || Ok(ground.ready()?.0))?;
        for _ in 0..50 {
            ground.ready()?;
        }
        ensure!(ground.calls("STATUS") == 1, "{} STATUS calls", ground.calls("STATUS"));
        let id = ground.client.run(&ground.config())?;
        ground.daemon.kill9()?;
        ground.fault("STATUS", Some(r#"echo '{"cniVersion":"1.1.0","code":50,"msg":"the agent is away"}'; exit 1"#))?;
        let collected = ground.calls("GC");
        ground.daemon.serve()?;
        ground.client = Client::connect(&ground.daemon)?;
        until_true("GC", || Ok(ground.calls("GC") > collected && ground.input("GC").is_ok()))?;
        let expected = json!([{ "containerID": id, "ifname": "eth0" }]);
        ensure!(ground.input("GC")?["cni.dev/valid-attachments"] == expected, "{}", ground.input("GC")?);
        until_true("CHECK", || Ok(ground.calls(&format!("CHECK {id}")) == 1))?;
        until_true("not ready", || Ok(ground.ready()?.1.contains("the agent is away")))?;
        ground.fault("STATUS", None)?;
        until_true("ready again", || Ok(ground.ready()?.0))?;
        ground.client.remove(&id)?;
        ensure!(ground.held().is_empty(), "{:?}", ground.held());
        Ok(())
    })
}

#[test]
fn the_newest_plugins_and_their_status_limits_and_user_namespaces() -> Result<()> {
    let plugins = go::cni_plugins()?;
    node::run(move || {
        let bandwidth = json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } });
        let ground = Ground::with(&plugins, "mode = \"cni\"", None)?;
        let mut network = real(&ground.daemon, &[bandwidth]);
        network["cniVersion"] = json!("1.1.0");
        fs::write(ground.daemon.path("cni/10-test.conflist"), network.to_string())?;
        until_true("NetworkReady", || Ok(ground.ready()?.0))?;
        let mut config = ground.config();
        config.port_mappings.push(cri::PortMapping { container_port: 80, host_port: 8080, ..Default::default() });
        for direction in ["ingress", "egress"] {
            config.annotations.insert(format!("kubernetes.io/{direction}-bandwidth"), "24M".into());
        }
        let mut users = ground.config();
        let ids = vec![cri::IdMapping { host_id: 0x2000_0000, container_id: 0, length: 65536 }];
        let security = users.linux.as_mut().and_then(|linux| linux.security_context.as_mut()).context("security")?;
        security.namespace_options.get_or_insert_default().userns_options =
            Some(cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids });
        for warm in [&config, &users] {
            let warm = ground.client.run(warm)?;
            ground.client.remove(&warm)?;
        }
        let before = ground.snapshot()?;

        let id = ground.client.run(&config)?;
        let other = ground.client.run(&users)?;
        let limits = node::output_of("tc", &["qdisc", "show"])?;
        ensure!(limits.matches("tbf").count() == 2 && limits.contains("rate 24Mbit"), "{limits}");
        for id in [&id, &other] {
            let network = ground.client.pod(id)?.network.context("network")?;
            ensure!(network.ip.starts_with("10.88.0.") && network.additional_ips.len() == 1, "{network:?}");
            node::run_command("/bin/busybox", &["ping", "-c", "1", "-W", "3", &network.ip])?;
        }
        let info = ground.client.status(cri::StatusRequest { verbose: true })?.info;
        let network: Value = serde_json::from_str(info.get("network").context("network")?)?;
        ensure!(network["cni"]["lastStatus"]["secondsAgo"].is_u64(), "STATUS was not asked: {network}");
        ground.client.remove(&id)?;
        ground.client.remove(&other)?;
        ensure!(ground.held().is_empty(), "{:?}", ground.held());
        before.expect_same(&ground.snapshot()?)
    })
}

#[test]
fn plugins_that_connect_otherwise_than_by_a_bridge_serve_too() -> Result<()> {
    let plugins = go::cni_plugins()?;
    node::run(move || {
        node::run_command("ip", &["link", "add", "host0", "type", "bridge"])?;
        node::run_command("ip", &["address", "add", "192.0.2.1/24", "dev", "host0"])?;
        node::run_command("ip", &["link", "set", "host0", "up"])?;
        let ground = Ground::with(&plugins, "mode = \"cni\"", None)?;
        let ipam = |subnet: &str| {
            json!({ "type": "host-local", "dataDir": ground.daemon.path("addresses"), "ranges": [[{ "subnet": subnet }]],
            "routes": [{ "dst": "0.0.0.0/0" }] })
        };
        for (kind, subnet, reachable) in [
            (json!({ "type": "ptp", "ipMasq": true, "ipam": ipam("10.89.0.0/24") }), "10.89.0.", true),
            // A parent link does not hear its own macvlan links.
            (json!({ "type": "macvlan", "master": "host0", "mode": "bridge", "ipam": ipam("10.90.0.0/24") }), "10.90.0.", false),
        ] {
            let network = json!({ "name": "test", "cniVersion": "1.1.0", "plugins": [kind] });
            let name = network["plugins"][0]["type"].as_str().unwrap_or_default().to_owned();
            fs::write(ground.daemon.path("cni/10-test.conflist"), network.to_string())?;
            until_true("the network", || {
                let info = ground.client.status(cri::StatusRequest { verbose: true })?.info;
                Ok(ground.ready()?.0 && info.get("network").is_some_and(|text| text.contains(&format!("[\"{name}\"]"))))
            })?;
            let before = ground.warm()?;
            let id = ground.client.run(&ground.config())?;
            let address = ground.client.pod(&id)?.network.context("network")?.ip;
            ensure!(address.starts_with(subnet), "{name}: {address}");
            let inside = node::output_of("ip", &["netns", "exec", &netns_of(&id), "ip", "-br", "address", "show", "eth0"])?;
            ensure!(inside.contains(&address) && inside.contains("UP"), "{name}: {inside}");
            if reachable {
                node::run_command("/bin/busybox", &["ping", "-c", "1", "-W", "3", &address])?;
            }
            ground.client.remove(&id)?;
            ensure!(ground.held().is_empty(), "{name}: {:?}", ground.held());
            before.expect_same(&ground.snapshot()?).with_context(|| name)?;
        }
        Ok(())
    })
}

#[test]
fn assigned_subnets_reach_plugins_that_ask_for_them() -> Result<()> {
    node::run(|| {
        let plugin = json!({ "type": "fault", "capabilities": { "ipRanges": true } });
        let network = json!({ "name": "test", "cniVersion": "1.0.0", "plugins": [plugin] });
        let mut ground = Ground::start("mode = \"cni\"", Some(&network))?;
        until_true("NetworkReady", || Ok(ground.ready()?.0))?;
        let network_config = Some(cri::NetworkConfig { pod_cidr: "10.244.5.0/24,fd44:5::/64".into() });
        let runtime_config = Some(cri::RuntimeConfig { network_config });
        ground.client.update_runtime_config(cri::UpdateRuntimeConfigRequest { runtime_config })?;
        let expected = json!([[{ "subnet": "10.244.5.0/24" }], [{ "subnet": "fd44:5::/64" }]]);
        for round in ["told", "after a restart"] {
            let id = ground.client.run(&ground.config())?;
            let input = ground.input("ADD")?;
            ensure!(input["runtimeConfig"]["ipRanges"] == expected, "{round}: {input}");
            ground.client.remove(&id)?;
            ground.daemon.kill9()?;
            ground.daemon.serve()?;
            ground.client = Client::connect(&ground.daemon)?;
        }
        ensure!(!node::output_of("ip", &["-o", "link"])?.contains("wlt"), "no bridge is made for them");
        Ok(())
    })
}

#[test]
fn many_pods_at_a_time_leave_nothing() -> Result<()> {
    node::run(|| {
        let ground = real_ground("", &[])?;
        let before = ground.warm()?;
        let logs = ground.daemon.path("logs");
        let clients = (0..SOAK_WIDTH).map(|_| Client::connect(&ground.daemon)).collect::<Result<Vec<_>>>()?;
        let report = soak::run(clients, soak::number("WINDLASS_CNI_SOAK_PODS", SOAK_PODS)?, || pod(&logs))?;
        println!("{report}");
        ensure!(ground.held().is_empty(), "{:?}", ground.held());
        before.expect_same(&ground.snapshot()?)
    })
}
