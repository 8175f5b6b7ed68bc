//! Plugins that refuse, hang, die or talk too much: no pod waits longer for them than it must, and nothing is left of what they stopped.

use crate::{adjusting, ground, run};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::{Duration, Instant},
};
use tonic::Code;
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    ground::Ground,
    leak::Snapshot,
    nri::{Plugin, expect},
    wait::{factor, until},
};
use windlass_proto::cri;

/// All that becomes of pods and containers, but no say in what others adjust.
const NO_VALIDATOR: &str =
    "pod,CreateContainer,PostCreateContainer,StartContainer,PostStartContainer,StopContainer,RemoveContainer";

/// What a container's creation fails with, and that it leaves nothing.
fn refused(ground: &Ground, name: &str) -> Result<tonic::Status> {
    let before = Snapshot::take(&ground.daemon)?;
    let wanted = container(&ground.config, name, &["sleep", "1000"]);
    let error = ground.client.create(&ground.pod, &ground.config, &wanted).err().context("refused")?;
    before.expect_again(&ground.daemon)?;
    let listed = ground.client.list_containers(cri::ListContainersRequest { filter: None })?.containers;
    ensure!(listed.is_empty(), "{listed:?}");
    Ok(error)
}

#[test]
fn what_a_plugin_refuses_fails_and_leaves_nothing() {
    run(|| {
        let daemon = Daemon::start(&[])?;
        let accepts = Plugin::connect(&daemon, "00-accepts", &json!({}))?;
        let ground = Ground::on(daemon)?;
        {
            let _refuses =
                Plugin::connect(&ground.daemon, "50-refuses", &json!({ "Fail": { "CreateContainer": "not this one" } }))?;
            let error = refused(&ground, "main")?;
            ensure!(error.code() == Code::FailedPrecondition, "{error}");
            ensure!(error.message() == "create container main: NRI plugin 50-refuses: CreateContainer: not this one", "{error}");
            expect(&accepts.wait_last("main", "RemoveContainer")?, &["CreateContainer", "RemoveContainer"])?;
        }
        Plugin::gone(&ground.daemon, "50-refuses")?;
        {
            let _rejects = Plugin::connect(&ground.daemon, "50-rejects", &json!({ "Reject": "no such container" }))?;
            let error = refused(&ground, "judged")?;
            ensure!(error.message().contains("NRI plugin 50-rejects rejects the adjustment: no such container"), "{error}");
        }
        Plugin::gone(&ground.daemon, "50-rejects")?;
        let unstarted = {
            let _holds = Plugin::connect(&ground.daemon, "50-holds", &json!({ "Fail": { "StartContainer": "not now" } }))?;
            let id = ground.client.create(&ground.pod, &ground.config, &container(&ground.config, "held", &["sleep", "1000"]))?;
            let error = ground.client.start(&id).err().context("refused")?;
            ensure!(error.message().contains("start container held: NRI plugin 50-holds: StartContainer: not now"), "{error}");
            let status = ground.client.container(&id)?;
            ensure!(status.reason == "StartError" && status.exit_code == 128, "{status:?}");
            id
        };
        accepts.wait_last(&unstarted, "StopContainer")?;
        Plugin::gone(&ground.daemon, "50-holds")?;
        // What ends does so whatever a plugin says.
        let says_no = json!({ "Fail": { "StopContainer": "no", "RemoveContainer": "no", "StopPodSandbox": "no", "RemovePodSandbox": "no" } });
        let _stubborn = Plugin::connect(&ground.daemon, "50-stubborn", &says_no)?;
        ground.start("main", &["sleep", "1000"], |_| {})?;
        ground.end()
    });
}

#[test]
fn a_plugin_that_hangs_is_let_go_and_nobody_waits_longer_than_the_limit() {
    run(|| {
        let daemon = Daemon::configured("[nri]\nplugin_request_timeout_ms = 700\n")?;
        let hanging = Plugin::connect(&daemon, "10-hangs", &json!({ "Events": NO_VALIDATOR }))?;
        let ground = Ground::on(daemon)?;
        hanging.freeze()?;
        let begun = Instant::now();
        let ids: Vec<String> = std::thread::scope(|scope| {
            let makers: Vec<_> = ["a", "b", "c"]
                .into_iter()
                .map(|name| {
                    let ground = &ground;
                    scope.spawn(move || -> Result<String> {
                        let client = Client::connect(&ground.daemon)?;
                        let id =
                            client.create(&ground.pod, &ground.config, &container(&ground.config, name, &["sleep", "1000"]))?;
                        client.start(&id)?;
                        Ok(id)
                    })
                })
                .collect();
            makers.into_iter().map(|maker| maker.join().expect("no panic")).collect::<Result<_>>()
        })?;
        let took = begun.elapsed();
        ensure!(took >= Duration::from_millis(650) && took < Duration::from_secs(15) * factor(), "{took:?}");
        Plugin::gone(&ground.daemon, "10-hangs")?;
        ensure!(ids.len() == 3);
        let begun = Instant::now();
        ground.start("quick", &["sleep", "1000"], |_| {})?;
        ensure!(begun.elapsed() < Duration::from_secs(10) * factor(), "{:?}", begun.elapsed());
        ground.end()
    });
}

#[test]
fn a_plugin_says_itself_what_its_failure_means() {
    run(|| {
        let daemon = Daemon::configured("[nri]\nplugin_request_timeout_ms = 2000\n")?;
        let slow = json!({ "Events": "CreateContainer", "Delay": { "CreateContainer": 6000 }, "FailRequest": true, "KeepConnected": true });
        let needed = Plugin::connect(&daemon, "10-needed", &slow)?;
        let ground = Ground::on(daemon)?;
        let error = refused(&ground, "one")?;
        ensure!(error.message().contains("NRI plugin 10-needed: CreateContainer: no answer in 2s"), "{error}");
        // Until its answer has come nobody waits for it.
        let error = refused(&ground, "two")?;
        ensure!(error.message().contains("NRI plugin 10-needed: CreateContainer: "), "{error}");
        drop(needed);
        Plugin::gone(&ground.daemon, "10-needed")?;
        let dies = json!({ "Events": "CreateContainer", "Exit": { "CreateContainer": true } });
        let mut plugin = Plugin::connect(&ground.daemon, "10-dies", &dies)?;
        ground.start("main", &["sleep", "1000"], |_| {}).context("goes on without it")?;
        plugin.ended()?;
        let mut fatal = dies;
        fatal["FailRequest"] = json!(true);
        let mut plugin = Plugin::connect(&ground.daemon, "10-fatal", &fatal)?;
        let error = ground.start("other", &["sleep", "1000"], |_| {}).err().context("fails with it")?;
        ensure!(error.to_string().contains("NRI plugin 10-fatal: CreateContainer: the connection is gone"), "{error}");
        plugin.ended()?;
        ground.end()
    });
}

#[test]
fn a_plugin_that_hangs_and_is_kept_is_waited_for_once() {
    run(|| {
        let daemon = Daemon::configured("[nri]\nplugin_request_timeout_ms = 300\n")?;
        let hanging = Plugin::connect(&daemon, "10-hangs", &json!({ "Events": NO_VALIDATOR, "KeepConnected": true }))?;
        let ground = Ground::on(daemon)?;
        hanging.freeze()?;
        let id = ground.start("main", &["sleep", "1000"], |_| {})?;
        ground.client.stop(&id, 0)?;
        let said =
            |what: &str| ground.daemon.log().lines().filter(|line| line.contains("10-hangs") && line.contains(what)).count();
        ensure!(said("no answer in 300ms") == 1, "{}", ground.daemon.log());
        ensure!(said("it has not answered what it was asked before") >= 3, "{}", ground.daemon.log());
        ensure!(said("NRI plugin gone") == 0, "it is kept");
        ground.end()
    });
}

#[test]
fn a_validator_that_is_gone_has_not_said_yes() {
    run(|| {
        let events = "CreateContainer,ValidateContainerAdjustment";
        let dies = json!({ "Events": events, "Exit": { "CreateContainer": true } });
        let daemon = Daemon::configured("[nri.validator]\nenable = true\nrequired_plugins = [\"needed\"]\n")?;
        let mut needed =
            Plugin::connect(&daemon, "10-needed", &json!({ "Events": "CreateContainer", "Exit": { "CreateContainer": true } }))?;
        let ground = Ground::on(daemon)?;
        let error = refused(&ground, "one")?;
        ensure!(error.message().contains("required plugins are not there: needed"), "{error}");
        needed.ended()?;
        Plugin::gone(&ground.daemon, "10-needed")?;
        let _needed = Plugin::connect(&ground.daemon, "20-needed", &json!({ "Events": "CreateContainer" }))?;
        let mut validator = Plugin::connect(&ground.daemon, "10-judge", &dies)?;
        let error = refused(&ground, "two")?;
        ensure!(error.message().contains("NRI plugin 10-judge: ValidateContainerAdjustment: the connection is gone"), "{error}");
        validator.ended()?;
        Plugin::gone(&ground.daemon, "10-judge")?;
        ground.start("three", &["sleep", "1000"], |_| {})?;
        ground.end()
    });
}

#[test]
fn nobody_avoids_a_plugin_by_the_size_of_what_it_would_be_shown() {
    run(|| {
        let (ground, plugin) = ground(&json!({ "Events": "CreateContainer,StopContainer" }))?;
        let mut wanted = container(&ground.config, "large", &["sleep", "1000"]);
        wanted.annotations = (0..5).map(|n| (format!("large-{n}"), "x".repeat(1 << 20))).collect();
        let error = ground.client.create(&ground.pod, &ground.config, &wanted).err().context("refused")?;
        ensure!(error.message().contains("NRI plugin 10-test: CreateContainer: a request of "), "{error}");
        let id = ground.start("main", &["sleep", "1000"], |_| {}).context("it is there as before")?;
        plugin.wait_last(&id, "CreateContainer")?;
        ground.end()
    });
}

#[test]
fn a_plugin_joins_beside_nothing_that_it_would_not_be_told_of() {
    run(|| {
        let config = "[nri]\nplugin_registration_timeout_ms = 2000\nplugin_request_timeout_ms = 60000\n";
        let daemon = Daemon::configured(config)?;
        let slow = json!({ "Events": "CreateContainer", "Delay": { "CreateContainer": 60000 } });
        let first = Plugin::connect(&daemon, "10-first", &slow)?;
        let ground = Ground::on(daemon)?;
        std::thread::scope(|scope| -> Result<()> {
            let client = Client::connect(&ground.daemon)?;
            let wanted = container(&ground.config, "main", &["sleep", "1000"]);
            let making = scope.spawn({
                let (pod, config) = (ground.pod.clone(), ground.config.clone());
                move || client.create(&pod, &config, &wanted)
            });
            first.wait("CreateContainer")?;
            let mut second = Plugin::connecting(&ground.daemon, "20-second", &json!({}))?;
            second.ended()?;
            ensure!(ground.daemon.log().contains("have been on their way for 2s"), "{}", ground.daemon.log());
            ensure!(second.told()?.iter().all(|line| line["event"] != "Synchronize"), "it has not joined");
            drop(first);
            let id = making.join().expect("no panic")?;
            let again = Plugin::connect(&ground.daemon, "20-second", &json!({}))?;
            let all = again.wait("Synchronize")?;
            ensure!(all["containers"][0]["id"] == id.as_str(), "{all}");
            Ok(())
        })?;
        ground.end()
    });
}

#[test]
fn a_pod_that_no_plugin_has_heard_of_is_not_removed_for_them() {
    run(|| {
        let (ground, plugin) = ground(&json!({}))?;
        let file = ground.daemon.path("a-file");
        std::fs::write(&file, "")?;
        let unmade = pod(&file.join("logs"));
        let error = ground.client.run(&unmade).err().context("a directory in a file")?;
        ensure!(error.message().contains("log_directory") || error.message().contains("log directory"), "{error}");
        let id = ground.client.run(&pod(&ground.daemon.path("logs")))?;
        ground.client.remove(&id)?;
        plugin.wait_last(&id, "RemovePodSandbox")?;
        let name = unmade.metadata.context("metadata")?.name;
        ensure!(plugin.events_of(&name)?.is_empty(), "{:?}", plugin.events_of(&name)?);
        ground.end()
    });
}

#[test]
fn plugins_that_want_the_same_are_a_conflict() {
    run(|| {
        let (ground, _first) = ground(&adjusting("main", json!({ "env": [{ "key": "WHO", "value": "first" }] })))?;
        let behaviour = adjusting("main", json!({ "env": [{ "key": "WHO", "value": "second" }] }));
        {
            let _second = Plugin::connect(&ground.daemon, "20-second", &behaviour)?;
            let error = refused(&ground, "main")?;
            ensure!(error.message().contains("NRI plugins 10-test and 20-second both set Env \"WHO\""), "{error}");
        }
        Plugin::gone(&ground.daemon, "20-second")?;
        let replaces = adjusting("main", json!({ "env": [{ "key": "-WHO" }, { "key": "WHO", "value": "third" }] }));
        let _third = Plugin::connect(&ground.daemon, "30-third", &replaces)?;
        let id = ground.start("main", &["sleep", "1000"], |_| {})?;
        ensure!(ground.client.shell(&id, "echo $WHO")? == "third");
        ground.end()
    });
}

#[test]
fn the_validator_that_is_built_in_holds_what_it_says() {
    run(|| {
        let config = "[nri.validator]\nenable = true\nreject_oci_hook_adjustment = true\nrequired_plugins = [\"test\"]\n\
                      tolerate_missing_plugins_annotation = \"tolerate.example\"\n";
        let daemon = Daemon::configured(config)?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let wanted = container(&config, "main", &["sleep", "1000"]);
        let error = client.create(&id, &config, &wanted).err().context("a plugin is missing")?;
        ensure!(error.message().contains("NRI validation: required plugins are not there: test"), "{error}");
        let mut tolerant = pod(&daemon.path("logs"));
        tolerant.annotations = [("tolerate.example/pod".to_owned(), "true".to_owned())].into();
        let other = client.run(&tolerant)?;
        client.create(&other, &tolerant, &wanted)?;
        let hook = json!({ "hooks": { "create_runtime": [{ "path": "/bin/true", "args": ["true"] }] } });
        let _plugin = Plugin::connect(&daemon, "10-test", &adjusting("hooked", hook))?;
        client.create(&id, &config, &wanted)?;
        let error = client.create(&id, &config, &container(&config, "hooked", &["true"])).err().context("a hook")?;
        ensure!(error.message().contains("adjustment of OCI hooks is not allowed: plugin 10-test"), "{error}");
        client.remove(&id)?;
        Ok(client.remove(&other)?)
    });
}

#[test]
fn strangers_at_the_socket_are_bounded() {
    run(|| {
        let daemon = Daemon::configured("[nri]\nplugin_registration_timeout_ms = 2000\n")?;
        let ground = Ground::on(daemon)?;
        let socket = ground.daemon.state().join("nri.sock");
        let connect = || UnixStream::connect(&socket).context("connect");
        let ends = |mut stream: UnixStream| -> Result<()> {
            stream.set_read_timeout(Some(Duration::from_secs(60)))?;
            let mut rest = Vec::new();
            stream.read_to_end(&mut rest).context("its end")?;
            Ok(())
        };
        // One that says nothing, one that promises four gigabytes, one that talks nonsense.
        ends(connect()?)?;
        let mut greedy = connect()?;
        greedy.write_all(&[0, 0, 0, 2, 0xff, 0xff, 0xff, 0xff])?;
        ends(greedy)?;
        let mut nonsense = connect()?;
        nonsense.write_all(&[0, 0, 0, 2, 0, 0, 0, 12, 0, 0, 0, 2, 0, 0, 0, 1, 1, 0, 0xff, 0xff])?;
        ends(nonsense)?;
        // More than there is room for, all silent.
        let crowd: Vec<_> = (0..100).map(|_| connect()).collect::<Result<_>>()?;
        until("a word of it", || Ok(ground.daemon.log().contains("there are 64 plugins already").then_some(())))?;
        ground.start("main", &["sleep", "1000"], |_| {}).context("nobody waits for them")?;
        crowd.into_iter().try_for_each(ends)?;
        Plugin::connect(&ground.daemon, "10-test", &json!({})).context("there is room again")?;
        ground.end()
    });
}
