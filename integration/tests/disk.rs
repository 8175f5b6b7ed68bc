//! A disk without room: the request fails with its own code, what it made is taken back, and removal still works.

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use std::{
    fs,
    io::Write,
    path::PathBuf,
    time::{Duration, Instant},
};
use tonic::Code;
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    image,
    leak::Snapshot,
    node,
    registry::Registry,
};
use windlass_proto::cri;

/// A small tmpfs, taken away at the end.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf, size: &str) -> Result<Disk> {
        fs::create_dir_all(&at)?;
        let options = format!("size={size}");
        mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).context("mount a small tmpfs")?;
        Ok(Disk(at))
    }

    /// Takes all room that is left; gives it back when the file is removed.
    fn fill(&self) -> Result<PathBuf> {
        let path = self.0.join("filler");
        let mut file = fs::File::create(&path)?;
        for chunk in [1 << 16, 1 << 12, 1] {
            let bytes = vec![0u8; chunk];
            while file.write_all(&bytes).is_ok() {}
        }
        Ok(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: after a failure the daemon still has files open on it.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn pull(client: &Client, name: &str) -> Result<String, tonic::Status> {
    let image = Some(cri::ImageSpec { image: name.into(), ..Default::default() });
    client.pull_image(cri::PullImageRequest { image, ..Default::default() }).map(|reply| reply.image_ref)
}

fn registry() -> Result<(Registry, String)> {
    let registry = Registry::start()?;
    let config = json!({ "architecture": image::ARCHITECTURE, "os": "linux", "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"] } });
    registry.add("test/busybox", "v1", &image::layers()?, &config)?;
    let name = format!("{}/test/busybox:v1", registry.host());
    Ok((registry, name))
}

#[test]
fn a_pull_onto_a_full_disk() -> Result<()> {
    node::run(|| {
        let (_registry, name) = registry()?;
        let mut daemon = Daemon::prepare(&[])?;
        let disk = Disk::mount(daemon.root(), "1m")?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        let used = |disk: &Disk| nix::sys::statvfs::statvfs(&disk.0).map(|stat| stat.blocks() - stat.blocks_free());
        let before = used(&disk)?;
        let error = pull(&client, &name).expect_err("no room");
        ensure!(error.code() == Code::ResourceExhausted, "{error:?}");
        ensure!(client.list_images(cri::ListImagesRequest::default())?.images.is_empty());
        // What was unpacked already is removed beside the reply.
        let until = Instant::now() + Duration::from_secs(60);
        while used(&disk)? != before {
            ensure!(Instant::now() < until, "{} blocks before, {} after", before, used(&disk)?);
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(client);
        daemon.stop()
    })
}

#[test]
fn pods_and_containers_on_a_full_disk() -> Result<()> {
    node::run(|| {
        let (_registry, name) = registry()?;
        let mut daemon = Daemon::prepare(&[])?;
        let disk = Disk::mount(daemon.root(), "32m")?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        let image = pull(&client, &name)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let mut wanted = container(&config, "main", &["sleep", "1000"]);
        wanted.image = Some(cri::ImageSpec { image, ..Default::default() });
        let running = client.create(&id, &config, &wanted)?;
        client.start(&running)?;
        let before = Snapshot::take(&daemon)?;

        let filler = disk.fill()?;
        if let Some(metadata) = wanted.metadata.as_mut() {
            metadata.name = "second".into();
        }
        let error = client.create(&id, &config, &wanted).expect_err("no room for a container");
        ensure!(error.code() == Code::ResourceExhausted, "{error:?}");
        let error = client.run(&pod(&daemon.path("logs"))).expect_err("no room for a pod");
        ensure!(error.code() == Code::ResourceExhausted, "{error:?}");
        before.expect_again(&daemon)?;
        ensure!(client.exec(&running, &["true"])?.exit_code == 0, "what runs goes on");

        client.stop(&running, 5)?;
        client.remove(&id).context("removal needs no room")?;
        ensure!(client.list_pod_sandbox(cri::ListPodSandboxRequest::default())?.items.is_empty());
        fs::remove_file(filler)?;
        let again = client.run(&config)?;
        client.remove(&again)?;
        drop(client);
        daemon.stop()
    })
}
