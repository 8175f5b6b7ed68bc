//! What plugins are told of the lives of pods and containers.

use crate::{ground, remove, run};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use windlass_integration::{
    client::{Client, pod},
    daemon::Daemon,
    go,
    ground::Ground,
    leak::Snapshot,
    nri::{Plugin, expect, installed},
    process::Process,
    wait::until,
};
use windlass_proto::cri;

#[test]
fn a_plugin_is_told_of_every_step_in_order() {
    run(|| {
        let (ground, plugin) = ground(&json!({}))?;
        let configured = plugin.wait("Configure")?;
        ensure!(configured["runtime"] == "windlass" && configured["version"] == env!("CARGO_PKG_VERSION"), "{configured}");
        ensure!(configured["registration"] == 5000 && configured["request"] == 2000, "{configured}");
        ensure!(configured["nri"] == "v0.12.5", "{configured}");

        let id = ground.start("main", &["sleep", "1000"], |config| {
            config.labels = [("tier".to_owned(), "web".to_owned())].into();
            config.annotations = [("note".to_owned(), "x".to_owned())].into();
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.run_as_user = Some(cri::Int64Value { value: 1000 });
            security.run_as_group = Some(cri::Int64Value { value: 1001 });
        })?;
        let limits = cri::LinuxContainerResources { cpu_shares: 512, ..Default::default() };
        ground.client.update_container_resources(cri::UpdateContainerResourcesRequest {
            container_id: id.clone(),
            linux: Some(limits.clone()),
            ..Default::default()
        })?;
        ground.client.update_pod_sandbox_resources(cri::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: ground.pod.clone(),
            overhead: None,
            resources: Some(limits),
        })?;
        full(&plugin.wait("PostStartContainer")?, &ground, &id)?;
        ground.client.stop(&id, 0)?;
        ground.client.remove_container(cri::RemoveContainerRequest { container_id: id.clone() })?;
        let container = plugin.wait_last(&id, "RemoveContainer")?;
        expect(
            &container,
            &[
                "CreateContainer",
                "PostCreateContainer",
                "StartContainer",
                "PostStartContainer",
                "UpdateContainer",
                "PostUpdateContainer",
                "StopContainer",
                "RemoveContainer",
            ],
        )?;
        // One that ends by itself, and one that does not start, end too: once.
        let short = ground.start("short", &["sh", "-c", "exit 3"], |_| {})?;
        ground.client.exited(&short)?;
        plugin.wait_last(&short, "StopContainer")?;
        ground.client.stop(&short, 1)?;
        ground.client.stop(&short, 1)?;
        let lost = ground.start("lost", &["/no/such/program"], |_| {}).err().context("a program that is not there")?;
        ensure!(lost.to_string().contains("/no/such/program"), "{lost}");
        until("the end of the one that did not start", || {
            let events = plugin.events_of("lost")?;
            Ok(events.last().is_some_and(|event| event == "StopContainer").then_some(()))
        })?;
        let (told, id_of_pod) = (plugin.told()?, ground.pod.clone());
        let one = |event: &str, name: &str| {
            let found = told.iter().find(|line| line["event"] == event && line["container"]["name"] == name);
            found.with_context(|| format!("{event} of {name}"))
        };
        ensure!(one("StopContainer", "short")?["container"]["exit_code"] == 3);
        ensure!(one("StopContainer", "lost")?["container"]["status_reason"] == "StartError");

        ground.client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id_of_pod.clone() })?;
        ground.client.stop_pod_sandbox(cri::StopPodSandboxRequest { pod_sandbox_id: id_of_pod.clone() })?;
        let _daemon = remove(ground)?;
        let pod = plugin.wait_last(&id_of_pod, "RemovePodSandbox")?;
        expect(&pod, &["RunPodSandbox", "UpdatePodSandbox", "PostUpdatePodSandbox", "StopPodSandbox", "RemovePodSandbox"])?;
        let all = plugin.told()?;
        let at = |event: &str, id: &str| all.iter().position(|line| line["event"] == event && line["container"]["id"] == id);
        let stopped = all.iter().position(|line| line["event"] == "StopPodSandbox" && line["pod"]["id"] == id_of_pod.as_str());
        ensure!(at("StopContainer", &short) < stopped, "containers end before their pod");
        expect(
            &plugin.events_of(&short)?,
            &[
                "CreateContainer",
                "PostCreateContainer",
                "StartContainer",
                "PostStartContainer",
                "StopContainer",
                "RemoveContainer",
            ],
        )
    });
}

/// Every field that a plugin goes by.
fn full(line: &serde_json::Value, ground: &Ground, id: &str) -> Result<()> {
    let (pod, container) = (&line["pod"], &line["container"]);
    let meta = ground.config.metadata.clone().context("metadata")?;
    ensure!(pod["id"] == ground.pod.as_str() && pod["name"] == meta.name.as_str() && pod["uid"] == meta.uid.as_str(), "{pod}");
    ensure!(pod["namespace"] == "test" && pod["labels"]["app"] == meta.name.as_str(), "{pod}");
    let ip = ground.client.pod(&ground.pod)?.network.context("network")?.ip;
    ensure!(pod["ips"][0] == ip.as_str(), "{pod}");
    let netns = pod["linux"]["namespaces"][0]["path"].as_str().context("a network namespace")?;
    ensure!(pod["linux"]["namespaces"][0]["type"] == "network" && std::path::Path::new(netns).exists(), "{pod}");
    ensure!(container["id"] == id && container["pod_sandbox_id"] == ground.pod.as_str(), "{container}");
    ensure!(container["state"] == "CONTAINER_RUNNING" && container["labels"]["tier"] == "web", "{container}");
    ensure!(container["annotations"]["note"] == "x" && container["args"] == json!(["sleep", "1000"]), "{container}");
    let pid = container["pid"].as_i64().context("pid")?;
    ensure!(std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?.starts_with("sleep"), "{pid}");
    ensure!(container["user"]["uid"] == 1000 && container["user"]["gid"] == 1001, "{container}");
    let set = |list: &str, what: &str| {
        container[list].as_array().is_some_and(|list| list.iter().any(|one| one.to_string().contains(what)))
    };
    ensure!(set("env", "PATH=") && set("mounts", "/etc/hosts") && set("rlimits", "RLIMIT_NOFILE"), "{container}");
    let cgroup = container["linux"]["cgroups_path"].as_str().context("cgroup")?;
    let own = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(own.lines().any(|line| line == format!("0::{cgroup}")), "{cgroup} is not in {own}");
    ensure!(container["linux"]["namespaces"].as_array().is_some_and(|list| list.iter().any(|one| one["type"] == "mount")));
    ensure!(container["image"]["name"].as_str().is_some_and(|name| name.contains("busybox")), "{container}");
    ensure!(container["image"]["config_digest"].as_str().is_some_and(|digest| digest.starts_with("sha256:")), "{container}");
    let times =
        ["created_at", "started_at"].map(|key| container[key].as_str().and_then(|ns| ns.parse::<i64>().ok()).unwrap_or(0));
    ensure!(times[0] > 0 && times[1] >= times[0], "{times:?}");
    Ok(())
}

#[test]
fn a_plugin_that_comes_later_and_one_that_comes_again_are_told_of_what_there_is() {
    run(|| {
        let mut ground = Ground::on(Daemon::start(&[])?)?;
        let running = ground.start("running", &["sleep", "1000"], |_| {})?;
        let ended = ground.start("ended", &["true"], |_| {})?;
        ground.client.exited(&ended)?;
        let told = |plugin: &Plugin| -> Result<()> {
            let all = plugin.wait("Synchronize")?;
            let ids = |list: &serde_json::Value| -> Vec<String> {
                list.as_array().into_iter().flatten().filter_map(|one| Some(one["id"].as_str()?.to_owned())).collect()
            };
            ensure!(ids(&all["pods"]) == [ground_pod(&all)?] && ids(&all["containers"]) == [running.clone()], "{all}");
            ensure!(all["containers"][0]["state"] == "CONTAINER_RUNNING");
            Ok(())
        };
        let plugin = Plugin::connect(&ground.daemon, "10-first", &json!({}))?;
        told(&plugin)?;
        // A daemon that was killed: its plugins end with it, and are told of everything when they come again.
        ground.daemon.kill9()?;
        let mut plugin = plugin;
        plugin.ended()?;
        ground.daemon.serve()?;
        ground.client = Client::connect(&ground.daemon)?;
        let plugin = Plugin::connect(&ground.daemon, "10-second", &json!({}))?;
        told(&plugin)?;
        ground.client.stop(&running, 0)?;
        plugin.wait_last(&running, "StopContainer")?;
        ensure!(plugin.events_of(&ended)?.is_empty(), "its end was before the plugin");
        remove(ground).map(drop)
    });
}

#[test]
fn what_ends_while_a_plugin_takes_in_what_there_is_is_told_after() {
    run(|| {
        let ground = Ground::on(Daemon::start(&[])?)?;
        let ids = ["one", "two"].map(|name| ground.start(name, &["sleep", "1000"], |_| {}));
        let [one, two] = ids.map(|id| id.expect("a container"));
        let slow = Plugin::connecting(&ground.daemon, "10-slow", &json!({ "Delay": { "Synchronized": 2000 } }))?;
        let all = slow.wait("Synchronize")?;
        ensure!(all["containers"].as_array().is_some_and(|all| all.len() == 2), "{all}");
        std::thread::scope(|scope| -> Result<()> {
            let client = Client::connect(&ground.daemon)?;
            let stopping = scope.spawn({
                let two = two.clone();
                move || client.stop(&two, 0)
            });
            ground.client.remove_container(cri::RemoveContainerRequest { container_id: one.clone() })?;
            stopping.join().expect("no panic")?;
            Ok(())
        })?;
        expect(&slow.wait_last(&one, "RemoveContainer")?, &["StopContainer", "RemoveContainer"])?;
        expect(&slow.wait_last(&two, "StopContainer")?, &["StopContainer"])?;
        remove(ground).map(drop)
    });
}

/// The only pod of a Synchronize.
fn ground_pod(all: &serde_json::Value) -> Result<String> {
    Ok(all["pods"][0]["id"].as_str().context("a pod")?.to_owned())
}

#[test]
fn installed_plugins_are_launched_with_their_configuration_and_asked_in_order() {
    run(|| {
        let mut daemon = Daemon::start(&[])?;
        daemon.stop()?;
        daemon.configure(&installed(&daemon))?;
        let fail = json!({ "Fail": { "RunPodSandbox": "no pods today" } });
        let last = Plugin::install(&daemon, "90-last", &json!({}))?;
        let second = Plugin::install(&daemon, "20-second", &fail)?;
        let first = Plugin::install(&daemon, "05-first", &json!({ "Events": "pod" }))?;
        std::fs::write(daemon.path("nri-plugins").join("README"), "no plugin: not executable")?;
        daemon.serve()?;
        let environment = first.wait("Configure")?["environment"].clone();
        for variable in ["NRI_PLUGIN_NAME=first", "NRI_PLUGIN_IDX=05", "NRI_PLUGIN_SOCKET=3"] {
            ensure!(environment.as_array().is_some_and(|all| all.iter().any(|one| one == variable)), "{environment}");
        }
        let client = Client::connect(&daemon)?;
        let before = Snapshot::take(&daemon)?;
        let info = client.status(cri::StatusRequest { verbose: true })?.info;
        ensure!(info["nri"] == r#"["05-first","20-second","90-last"]"#, "{info:?}");
        let config = pod(&daemon.path("logs"));
        let error = client.run(&config).err().context("a plugin that refuses")?;
        ensure!(error.message().contains("NRI plugin 20-second: RunPodSandbox: no pods today"), "{error}");
        ensure!(error.code() == tonic::Code::FailedPrecondition, "{error}");
        let name = config.metadata.context("metadata")?.name;
        expect(&first.wait_last(&name, "RemovePodSandbox")?, &["RunPodSandbox", "RemovePodSandbox"])?;
        expect(&second.wait_last(&name, "RemovePodSandbox")?, &["RunPodSandbox", "RemovePodSandbox"])?;
        expect(&last.wait_last(&name, "RemovePodSandbox")?, &["RemovePodSandbox"])?;
        ensure!(client.list_pod_sandbox(cri::ListPodSandboxRequest { filter: None })?.items.is_empty());
        // What the daemon itself keeps is made for the first pod, whatever becomes of it.
        let of_pods = |all: Snapshot| ["link", "nft", "cgroup", "descriptor"].into_iter().fold(all, Snapshot::without);
        of_pods(before).expect_same(&of_pods(Snapshot::take(&daemon)?))?;
        daemon.stop()?;
        for plugin in [&first, &second, &last] {
            plugin.wait("Shutdown")?;
        }
        Ok(())
    });
}

#[test]
fn a_plugin_of_an_earlier_interface_is_told_of_changes_of_state() {
    run(|| {
        let daemon = Daemon::start(&[])?;
        let notes = daemon.path("notes");
        let told = || std::fs::read_to_string(&notes).unwrap_or_default();
        let mut command = std::process::Command::new(go::earlier_nri_plugin()?);
        command.arg(daemon.state().join("nri.sock")).arg(&notes).stderr(std::process::Stdio::null());
        let _plugin = Process::from(command.spawn()?);
        until("Synchronize", || Ok(told().contains("Synchronize").then_some(())))?;
        let ground = Ground::on(daemon)?;
        let pod = ground.pod.clone();
        let id = ground.start("main", &["sleep", "1000"], |_| {})?;
        let _daemon = remove(ground)?;
        let events = |id: &str| -> Vec<String> {
            told().lines().filter_map(|line| line.strip_suffix(&format!(" {id}")).map(str::to_owned)).collect()
        };
        expect(&events(&pod), &["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"])?;
        expect(&events(&id), &["CreateContainer", "StartContainer", "PostStartContainer", "StopContainer", "RemoveContainer"])
    });
}

#[test]
fn without_plugins_there_is_a_socket_and_no_other_daemon_takes_it() {
    run(|| {
        let daemon = Daemon::start(&[])?;
        let socket = daemon.state().join("nri.sock");
        ensure!(socket.exists());
        let mut other = Daemon::prepare(&[])?;
        other.configure(&format!("[nri]\nsocket_path = {socket:?}\n"))?;
        other.serve()?;
        until("a word of it", || Ok(other.log().contains("another program serves NRI there").then_some(())))?;
        other.stop()?;
        Plugin::connect(&daemon, "10-test", &json!({})).context("the first one's is as it was")?;
        let mut off = Daemon::prepare(&[])?;
        off.configure("[nri]\nenable = false\n")?;
        off.serve()?;
        ensure!(!off.state().join("nri.sock").exists());
        let mut closed = Daemon::prepare(&[])?;
        closed.configure("[nri]\ndisable_connections = true\n")?;
        closed.serve()?;
        ensure!(!closed.state().join("nri.sock").exists());
        Ok(())
    });
}
