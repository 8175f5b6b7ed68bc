//! What tools read of pods and containers in the verbose forms of their statuses: where containerd has it, and true.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{collections::BTreeMap, fs};
use windlass_integration::{client::Client, daemon::Daemon, ground::Ground, node};
use windlass_proto::cri;

fn of_container(client: &Client, id: &str) -> Result<Value> {
    let info = client.container_status(cri::ContainerStatusRequest { container_id: id.into(), verbose: true })?.info;
    Ok(serde_json::from_str(info.get("info").context("info")?)?)
}

fn of_pod(client: &Client, id: &str) -> Result<Value> {
    let info = client.pod_sandbox_status(cri::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true })?.info;
    Ok(serde_json::from_str(info.get("info").context("info")?)?)
}

fn namespace<'a>(spec: &'a Value, typ: &str) -> Result<&'a Value> {
    let mut listed = spec["linux"]["namespaces"].as_array().context("namespaces")?.iter();
    listed.find(|namespace| namespace["type"] == typ).with_context(|| format!("{typ} in {spec}"))
}

#[test]
fn pods_and_containers_tell_their_runtime_s_configuration() -> Result<()> {
    node::run(|| {
        let ground = Ground::with_handler(Daemon::start(&[])?, "", |config| {
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.namespace_options.get_or_insert_default().pid = cri::NamespaceMode::Pod.into();
        })?;
        let volume = ground.daemon.path("volume");
        fs::create_dir(&volume)?;
        let id = ground.start("main", &["sleep", "1000"], |config| {
            let host_path = volume.to_string_lossy().into_owned();
            config.mounts = vec![cri::Mount { container_path: "/data".into(), host_path, ..Default::default() }];
        })?;
        let own = of_container(&ground.client, &id)?;
        let spec = &own["runtimeSpec"];
        ensure!(own["sandboxID"] == ground.pod.as_str() && own["runtimeType"] == "windlass", "{own}");
        ensure!(spec["process"]["args"] == serde_json::json!(["sleep", "1000"]), "{spec}");
        let mounts = spec["mounts"].as_array().context("mounts")?;
        let data = mounts.iter().find(|mount| mount["destination"] == "/data").context("the volume")?;
        ensure!(data["source"] == volume.canonicalize()?.to_string_lossy().as_ref(), "{data}");
        let place = spec["linux"]["cgroupsPath"].as_str().context("cgroupsPath")?;
        let entry = fs::read_to_string(format!("/proc/{}/cgroup", own["pid"]))?;
        ensure!(entry.lines().any(|line| line.starts_with("0::") && line.ends_with(place)), "{place}: {entry}");

        let pod = of_pod(&ground.client, &ground.pod)?;
        let spec = &pod["runtimeSpec"];
        ensure!(spec["hostname"] == ground.config.hostname.as_str() && pod["runtimeHandler"] == "", "{pod}");
        let pid_of = |pid: &Value, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}"));
        let path = namespace(spec, "pid")?["path"].as_str().context("the pid namespace's path")?.to_owned();
        ensure!(fs::read_link(&path)? == pid_of(&own["pid"], "pid")? && path == format!("/proc/{}/ns/pid", pod["pid"]), "{path}");
        let netns = namespace(spec, "network")?["path"].as_str().context("the network namespace's path")?.to_owned();
        let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&netns)?);
        ensure!(pid_of(&own["pid"], "net")?.to_string_lossy().contains(&inode.to_string()), "{netns}");
        let cgroup = spec["linux"]["cgroupsPath"].as_str().context("cgroupsPath")?;
        ensure!(cgroup.ends_with(&ground.pod), "{cgroup}");
        ensure!(spec["annotations"]["io.kubernetes.cri.container-type"] == "sandbox", "{spec}");
        ground.end()
    })
}

#[test]
fn bundles_have_the_annotations_that_their_handler_is_configured_with() -> Result<()> {
    node::run(|| {
        let config = "[containers]\npod_annotations = [\"native.example/*\"]\n\
             [handlers.runc]\npath = \"/usr/sbin/runc\"\npod_annotations = [\"run.example.*\"]\ncontainer_annotations = [\"own/[a-b]\"]\n";
        let given = |pairs: &[&str]| pairs.iter().map(|key| ((*key).to_owned(), format!("of {key}"))).collect();
        let annotate = |config: &mut cri::PodSandboxConfig| {
            config.annotations = given(&["native.example/x", "run.example.x", "run.example.x/y", "io.kubernetes.cri.sandbox-id"]);
        };
        let ground = Ground::with_handler(Daemon::configured(config)?, "", annotate)?;
        let mut other = windlass_integration::client::pod(&ground.daemon.path("other-logs"));
        annotate(&mut other);
        let request = cri::RunPodSandboxRequest { config: Some(other.clone()), runtime_handler: "runc".into() };
        let with_runc = ground.client.run_pod_sandbox(request)?.pod_sandbox_id;
        for (pod, config, expected) in [
            (&ground.pod, &ground.config, ["native.example/x", "own/a", "own/c", "plain"].as_slice()),
            (&with_runc, &other, &["own/a", "run.example.x"]),
        ] {
            let mut wanted = windlass_integration::client::container(config, "main", &["sleep", "1000"]);
            wanted.annotations = given(&["own/a", "own/c", "plain", "io.kubernetes.cri.container-name"]);
            let id = ground.client.create(pod, config, &wanted)?;
            let meta = config.metadata.clone().unwrap_or_default();
            let spec = &of_container(&ground.client, &id)?["runtimeSpec"];
            let found: BTreeMap<String, String> = serde_json::from_value(spec["annotations"].clone())?;
            for (name, value) in [
                ("container-type", "container"),
                ("sandbox-id", pod.as_str()),
                ("sandbox-name", &meta.name),
                ("sandbox-namespace", "test"),
                ("sandbox-uid", &meta.uid),
                ("container-name", "main"),
                ("image-name", windlass_integration::image::BUSYBOX),
            ] {
                ensure!(found.get(&format!("io.kubernetes.cri.{name}")).is_some_and(|found| found == value), "{name}: {found:?}");
            }
            let others: Vec<&str> =
                found.keys().map(String::as_str).filter(|key| !key.starts_with("io.kubernetes.cri.")).collect();
            ensure!(others == expected, "{others:?}");
        }
        ground.client.remove(&with_runc)?;
        ground.end()
    })
}
