//! Pulling from a registry: what arrives, who may ask, and every way in which it goes wrong without leaving anything behind.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};
use tonic::{Code, Status};
use windlass_integration::{
    client::{Client, container, host_network, pod},
    daemon::Daemon,
    image, node,
    registry::{Added, CREDENTIALS, Fault, Guard, Registry},
};
use windlass_proto::cri;

struct Ground {
    registry: Registry,
    daemon: Daemon,
    client: Client,
    /// Name of an image that the registry has.
    name: String,
    added: Added,
}

fn config() -> Value {
    json!({ "architecture": image::ARCHITECTURE, "os": "linux", "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"] } })
}

fn ground() -> Result<Ground> {
    let registry = Registry::start()?;
    let added = registry.add("test/busybox", "v1", &image::layers()?, &config())?;
    let mut daemon = Daemon::prepare(&[])?;
    daemon.serve()?;
    let client = Client::connect(&daemon)?;
    let name = format!("{}/test/busybox:v1", registry.host());
    Ok(Ground { registry, daemon, client, name, added })
}

fn spec(name: &str) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec { image: name.into(), ..Default::default() })
}

fn pull(client: &Client, name: &str, auth: Option<cri::AuthConfig>) -> Result<String, Status> {
    client.pull_image(cri::PullImageRequest { image: spec(name), auth, sandbox_config: None }).map(|reply| reply.image_ref)
}

#[test]
fn an_image_for_an_unknown_runtime_handler_is_refused() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let of = |runtime_handler: &str| {
            let image = Some(cri::ImageSpec {
                image: ground.name.clone(),
                runtime_handler: runtime_handler.into(),
                ..Default::default()
            });
            let status = ground.client.image_status(cri::ImageStatusRequest { image: image.clone(), verbose: false }).map(drop);
            [ground.client.pull_image(cri::PullImageRequest { image, ..Default::default() }).map(drop), status]
        };
        for outcome in of("kata") {
            let error = outcome.expect_err("refused");
            ensure!(error.code() == tonic::Code::InvalidArgument, "{error:?}");
            ensure!(error.message().contains("image.runtime_handler \"kata\" is not configured"), "{error}");
        }
        ensure!(images(&ground.client)?.is_empty(), "it was pulled");
        for known in ["windlass", ""] {
            of(known).into_iter().collect::<Result<Vec<()>, Status>>()?;
        }
        Ok(())
    })
}

fn images(client: &Client) -> Result<Vec<cri::Image>> {
    Ok(client.list_images(cri::ListImagesRequest::default())?.images)
}

/// Every path below the image store.
fn stored(daemon: &Daemon) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    walk(&daemon.root().join("images"), &mut found);
    found
}

fn walk(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        found.insert(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&entry.path(), found);
        }
    }
}

/// Removal of unfinished and unused layers goes on after the reply, for a bounded time.
fn expect_stored(daemon: &Daemon, expected: &BTreeSet<String>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let found = stored(daemon);
        if found == *expected {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "left behind: {:#?}", found.difference(expected).take(20).collect::<Vec<_>>());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A pull with the fault must fail with this code and these words, leave nothing, and succeed when the fault is gone.
fn fails(fault: Fault, code: Code, words: &str) -> Result<()> {
    let words = words.to_owned();
    node::run(move || {
        let ground = ground()?;
        let before = stored(&ground.daemon);
        ground.registry.set_fault(fault);
        let error = pull(&ground.client, &ground.name, None).expect_err("the registry is at fault");
        ensure!(error.code() == code && error.message().contains(&words), "{error:?}");
        ensure!(images(&ground.client)?.is_empty(), "an image is there after {error}");
        expect_stored(&ground.daemon, &before)?;
        ground.registry.set_fault(Fault::None);
        ensure!(pull(&ground.client, &ground.name, None)? == ground.added.config);
        Ok(())
    })
}

#[test]
fn a_pulled_image_has_one_identity_and_runs() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let empty = stored(&ground.daemon);
        let id = pull(&ground.client, &ground.name, None)?;
        ensure!(id == ground.added.config, "{id} is not the configuration's digest {}", ground.added.config);
        let listed = images(&ground.client)?;
        ensure!(listed.len() == 1 && listed[0].id == id && listed[0].repo_tags == [ground.name.clone()], "{listed:?}");
        let by_digest = format!("{}/test/busybox@{}", ground.registry.host(), ground.added.index);
        ensure!(listed[0].repo_digests == [by_digest.clone()] && listed[0].size > 0, "{listed:?}");
        for name in [&ground.name, &by_digest, &id] {
            let status = ground.client.image_status(cri::ImageStatusRequest { image: spec(name), verbose: false })?;
            ensure!(status.image.is_some_and(|image| image.id == id), "status of {name}");
        }
        let sandbox = host_network(pod(&ground.daemon.path("logs")));
        let pod_id = ground.client.run(&sandbox)?;
        let mut wanted = container(&sandbox, "main", &["sleep", "1000"]);
        wanted.image = spec(&id);
        let created = ground.client.create(&pod_id, &sandbox, &wanted)?;
        ground.client.start(&created)?;
        let status = ground.client.container(&created)?;
        ensure!(status.image_id == id, "{status:?}");
        let seen = ground.client.exec(&created, &["stat", "-c", "%a %u %h", "/tmp", "/etc/passwd"])?;
        ensure!(String::from_utf8_lossy(&seen.stdout).starts_with("1777 0 "), "{seen:?}");
        ground.client.remove(&pod_id)?;
        ground.client.remove_image(cri::RemoveImageRequest { image: spec(&ground.name) })?;
        ground.client.remove_image(cri::RemoveImageRequest { image: spec(&ground.name) })?;
        ensure!(images(&ground.client)?.is_empty());
        expect_stored(&ground.daemon, &empty)
    })
}

#[test]
fn a_layer_is_fetched_once_for_all_images() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        pull(&ground.client, &ground.name, None)?;
        let blobs = || ground.registry.requests().iter().filter(|line| line.contains("/blobs/")).count();
        ensure!(blobs() == 3, "configuration and two layers: {:?}", ground.registry.requests());
        pull(&ground.client, &ground.name, None)?;
        let [shared, _] = image::layers()?;
        let other = ground.registry.add("test/other", "v1", &[shared], &config())?;
        let before = blobs();
        let name = format!("{}/test/other:v1", ground.registry.host());
        ensure!(pull(&ground.client, &name, None)? == other.config);
        ensure!(blobs() == before + 1, "only its configuration is new: {:?}", ground.registry.requests());
        Ok(())
    })
}

#[test]
fn a_registry_that_is_sent_elsewhere() -> Result<()> {
    node::run(|| {
        let registry = Registry::start()?;
        let added = registry.add("library/busybox", "latest", &image::layers()?, &config())?;
        let hosts = tempfile::tempdir()?;
        registry.mirror(hosts.path(), "docker.io")?;
        let directory = hosts.path().to_str().context("path")?;
        let mut daemon = Daemon::prepare(&["--registry-config-dir", directory])?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        ensure!(pull(&client, "busybox", None)? == added.config);
        ensure!(images(&client)?[0].repo_tags == ["docker.io/library/busybox:latest"], "{:?}", images(&client)?);
        Ok(())
    })
}

/// Nobody, then somebody else, then the right one asks.
fn guarded(guard: Guard) -> Result<()> {
    node::run(move || {
        let ground = ground()?;
        ground.registry.set_guard(guard);
        let auth = |username: &str, password: &str| {
            Some(cri::AuthConfig { username: username.into(), password: password.into(), ..Default::default() })
        };
        for refused in [None, auth(CREDENTIALS.0, "wrong")] {
            let error = pull(&ground.client, &ground.name, refused).expect_err("not allowed");
            ensure!(error.code() == Code::PermissionDenied, "{error:?}");
            ensure!(!error.message().contains("wrong"), "a password in a message: {error}");
        }
        ensure!(pull(&ground.client, &ground.name, auth(CREDENTIALS.0, CREDENTIALS.1))? == ground.added.config);
        ensure!(!ground.daemon.log().contains(CREDENTIALS.1), "a password is in the log");
        Ok(())
    })
}

#[test]
fn basic_authentication() -> Result<()> {
    guarded(Guard::Basic)
}

#[test]
fn token_authentication() -> Result<()> {
    guarded(Guard::Token)
}

#[test]
fn a_corrupted_layer() -> Result<()> {
    fails(Fault::Corrupt, Code::DataLoss, "sha256:")
}

#[test]
fn the_bytes_of_another_layer() -> Result<()> {
    fails(Fault::Other, Code::DataLoss, "sha256:")
}

#[test]
fn a_registry_that_hangs_up() -> Result<()> {
    fails(Fault::Cut, Code::Unknown, "RegistryUnavailable: ")
}

#[test]
fn a_registry_that_fails() -> Result<()> {
    fails(Fault::Unavailable, Code::Unknown, "RegistryUnavailable: ")
}

#[test]
fn a_connection_cut_once_is_taken_up_again() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        ground.registry.set_fault(Fault::CutOnce);
        ensure!(pull(&ground.client, &ground.name, None)? == ground.added.config);
        Ok(())
    })
}

#[test]
fn names_that_cannot_be_pulled() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let host = ground.registry.host();
        let closed = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        for (name, code) in [
            (format!("{host}/test/busybox:v2"), Code::NotFound),
            (format!("{host}/test/nothing:v1"), Code::NotFound),
            (format!("{host}/test/busybox@sha256:{}", "0".repeat(64)), Code::NotFound),
            (format!("{host}/Test/Busybox:v1"), Code::InvalidArgument),
            (format!("{host}/test/busybox:"), Code::InvalidArgument),
            (String::new(), Code::InvalidArgument),
            (format!("{closed}/test/busybox:v1"), Code::Unknown),
        ] {
            let error = pull(&ground.client, &name, None).expect_err("cannot be pulled");
            ensure!(error.code() == code, "{name:?}: {error:?}");
            ensure!(code != Code::Unknown || error.message().starts_with("RegistryUnavailable: "), "{name:?}: {error:?}");
        }
        ensure!(images(&ground.client)?.is_empty());
        Ok(())
    })
}

/// Kubelet reads both the code and the beginning of the message.
#[test]
fn a_policy_that_does_not_let_an_image_in() -> Result<()> {
    node::run(|| {
        let registry = Registry::start()?;
        registry.add("test/busybox", "v1", &image::layers()?, &config())?;
        let mut daemon = Daemon::prepare(&[])?;
        let (policy, policies) = (daemon.path("policy.json"), daemon.path("policies"));
        daemon.configure(&format!("[images]\npolicy = {policy:?}\npolicy_dir = {policies:?}\n"))?;
        fs::create_dir(&policies)?;
        let accept = json!({ "default": [{ "type": "insecureAcceptAnything" }] }).to_string();
        fs::write(policies.join("system.json"), &accept)?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        let name = format!("{}/test/busybox:v1", registry.host());
        let before = stored(&daemon);
        let refused = |why: &str| -> Result<()> {
            let status = pull(&client, &name, None).expect_err(why);
            ensure!(status.code() == Code::Unknown, "{status:?}");
            ensure!(status.message().starts_with("SignatureValidationFailed: ") && status.message().contains(why), "{status:?}");
            expect_stored(&daemon, &before)
        };
        refused("policy.json")?;
        fs::write(&policy, json!({ "default": [{ "type": "reject" }] }).to_string())?;
        refused("are rejected")?;
        let mut sandbox = pod(&daemon.path("logs"));
        sandbox.metadata.get_or_insert_default().namespace = "system".into();
        let request = cri::PullImageRequest { image: spec(&name), auth: None, sandbox_config: Some(sandbox) };
        client.pull_image(request).context("the namespace's own policy")?;
        refused_again(&client, &name)?;
        fs::write(&policy, &accept)?;
        pull(&client, &name, None)?;
        Ok(())
    })
}

/// An image that is here already is looked at again.
fn refused_again(client: &Client, name: &str) -> Result<()> {
    let status = pull(client, name, None).expect_err("still rejected");
    ensure!(status.message().starts_with("SignatureValidationFailed: "), "{status:?}");
    ensure!(images(client)?.len() == 1, "what is here stays");
    Ok(())
}
