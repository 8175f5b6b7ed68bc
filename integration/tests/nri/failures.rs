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

/// What a container's creation fails with, and that it leaves nothing.
fn refused(ground: &Ground, name: &str) -> Result<tonic::Status> {
    let before = Snapshot::take(&ground.daemon)?;
    let wanted = container(&ground.config, name, &["sleep", "1000"]);
    let error = ground.client.create(&ground.pod, &ground.config, &wanted).err().context("refused")?;
    before.expect_same(&Snapshot::take(&ground.daemon)?)?;
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
        let hanging = Plugin::connect(&daemon, "10-hangs", &json!({}))?;
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
        ensure!(took >= Duration::from_millis(650) && took < Duration::from_millis(2500) * factor(), "{took:?}");
        Plugin::gone(&ground.daemon, "10-hangs")?;
        ensure!(ids.len() == 3);
        let begun = Instant::now();
        ground.start("quick", &["sleep", "1000"], |_| {})?;
        ensure!(begun.elapsed() < Duration::from_millis(500) * factor(), "{:?}", begun.elapsed());
        ground.end()
    });
}

#[test]
fn a_plugin_says_itself_what_its_failure_means() {
    run(|| {
        let daemon = Daemon::configured("[nri]\nplugin_request_timeout_ms = 300\n")?;
        let slow = json!({ "Events": "CreateContainer", "Delay": { "CreateContainer": 1500 }, "FailRequest": true, "KeepConnected": true });
        let needed = Plugin::connect(&daemon, "10-needed", &slow)?;
        let ground = Ground::on(daemon)?;
        for name in ["one", "two"] {
            let error = refused(&ground, name)?;
            ensure!(error.message().contains("NRI plugin 10-needed: CreateContainer: no answer in 300ms"), "{error}");
        }
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
        let daemon = Daemon::configured("[nri]\nplugin_registration_timeout_ms = 500\n")?;
        let ground = Ground::on(daemon)?;
        let socket = ground.daemon.state().join("nri.sock");
        let connect = || UnixStream::connect(&socket).context("connect");
        let ends = |mut stream: UnixStream| -> Result<()> {
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
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
