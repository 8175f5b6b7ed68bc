//! Limits that plugins change: of a container that is updated, of others, by themselves; and containers that they end.

use crate::{ground, run};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use windlass_integration::{client::Client, nri::Plugin};
use windlass_proto::cri;

fn shares_of(client: &Client, id: &str) -> Result<i64> {
    let resources = client.container(id)?.resources.context("resources")?;
    Ok(resources.linux.context("linux")?.cpu_shares)
}

fn shares(id: &str, value: u64) -> Value {
    json!({ "container_id": id, "linux": { "resources": { "cpu": { "shares": { "value": value } } } } })
}

fn update(client: &Client, id: &str, value: i64) -> Result<(), tonic::Status> {
    let linux = Some(cri::LinuxContainerResources { cpu_shares: value, ..Default::default() });
    client
        .update_container_resources(cri::UpdateContainerResourcesRequest { container_id: id.into(), linux, ..Default::default() })
        .map(drop)
}

#[test]
fn a_plugin_changes_an_update_and_other_containers() {
    run(|| {
        let (ground, mut plugin) = ground(&json!({ "Events": "PostUpdateContainer" }))?;
        let bystander = ground.start("bystander", &["sleep", "1000"], |_| {})?;
        let main = ground.start("main", &["sleep", "1000"], |_| {})?;
        update(&ground.client, &main, 300)?;
        ensure!(shares_of(&ground.client, &main)? == 300);
        let told = plugin.wait("PostUpdateContainer")?;
        ensure!(told["container"]["linux"]["resources"]["cpu"]["shares"]["value"] == "300", "{told}");
        // What the CRI has no field for is shown from then on.
        let pids = json!({ "container_id": main, "linux": { "resources": { "pids": { "limit": "50" } } } });
        ensure!(plugin.update(&json!([pids]))?["failed"] == json!([]));
        update(&ground.client, &main, 301)?;
        let told = plugin.wait("PostUpdateContainer")?;
        ensure!(told["container"]["linux"]["resources"]["pids"]["limit"] == "50", "{told}");
        let behaviour =
            json!({ "Events": "UpdateContainer", "Update": { "UpdateContainer": [shares("", 700), shares(&bystander, 99)] } });
        {
            let changes = Plugin::connect(&ground.daemon, "20-changes", &behaviour)?;
            update(&ground.client, &main, 400)?;
            ensure!(shares_of(&ground.client, &main)? == 700 && shares_of(&ground.client, &bystander)? == 99);
            let asked = changes.wait("UpdateContainer")?;
            ensure!(asked["resources"]["cpu"]["shares"]["value"] == "400", "{asked}");
        }
        Plugin::gone(&ground.daemon, "20-changes")?;
        // One that refuses, and one whose update cannot be made.
        {
            let _refuses = Plugin::connect(&ground.daemon, "20-refuses", &json!({ "Fail": { "UpdateContainer": "enough" } }))?;
            let error = update(&ground.client, &main, 500).err().context("refused")?;
            ensure!(error.message().contains("NRI plugin 20-refuses: UpdateContainer: enough"), "{error}");
        }
        Plugin::gone(&ground.daemon, "20-refuses")?;
        let behaviour = json!({ "Update": { "UpdateContainer": [shares("no-such-container", 1)] } });
        let _fails = Plugin::connect(&ground.daemon, "20-fails", &behaviour)?;
        let error = update(&ground.client, &main, 500).err().context("failed")?;
        ensure!(error.message().contains("no-such-container"), "{error}");
        ensure!(shares_of(&ground.client, &main)? == 700, "all or nothing");
        ground.end()
    });
}

#[test]
fn a_plugin_updates_containers_by_itself_at_any_time() {
    run(|| {
        let (ground, mut plugin) = ground(&json!({ "Events": "StartContainer", "Delay": { "StartContainer": 300 } }))?;
        let main = ground.start("main", &["sleep", "1000"], |_| {})?;
        let mut ignored = shares("no-such-container", 5);
        ignored["ignore_failure"] = json!(true);
        let answer = plugin.update(&json!([shares(&main, 222), ignored]))?;
        ensure!(answer["failed"] == json!(["no-such-container"]) && answer["error"].is_null(), "{answer}");
        ensure!(shares_of(&ground.client, &main)? == 222);
        // A shortened id is the name of no container.
        let short = &main[..20];
        let answer = plugin.update(&json!([shares(short, 223)]))?;
        ensure!(answer["failed"] == json!([short]) && shares_of(&ground.client, &main)? == 222, "{answer}");
        {
            let joins = json!({ "Update": { "Synchronize": [shares(&main, 224)] } });
            let _joins = Plugin::connect(&ground.daemon, "20-joins", &joins)?;
            windlass_integration::wait::until("the update of a plugin that joins", || {
                Ok((shares_of(&ground.client, &main)? == 224).then_some(()))
            })?;
        }
        Plugin::gone(&ground.daemon, "20-joins")?;
        let answer =
            plugin.update(&json!([{ "container_id": main, "linux": { "resources": { "rdt_class": { "value": "x" } } } }]))?;
        ensure!(answer["failed"] == json!([main.clone()]), "{answer}");
        // In the middle of the start that it is asked about.
        let id = ground.client.create(
            &ground.pod,
            &ground.config,
            &windlass_integration::client::container(&ground.config, "other", &["sleep", "1000"]),
        )?;
        std::thread::scope(|scope| -> Result<()> {
            let client = Client::connect(&ground.daemon)?;
            let started = scope.spawn({
                let id = id.clone();
                move || client.start(&id)
            });
            windlass_integration::wait::until("the start", || {
                Ok(plugin.events_of(&id)?.contains(&"StartContainer".into()).then_some(()))
            })?;
            let answer = plugin.update(&json!([shares(&id, 333)]))?;
            ensure!(answer["failed"] == json!([]), "{answer}");
            started.join().expect("no panic")?;
            Ok(())
        })?;
        ensure!(shares_of(&ground.client, &id)? == 333);
        ensure!(ground.daemon.log().lines().all(|line| !line.contains("let go")), "the plugin was in time");
        ground.end()
    });
}
