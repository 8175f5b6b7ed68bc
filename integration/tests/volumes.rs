//! Mount propagation: which side sees what the other side mounts below a volume, and that nothing else of it is ever seen.

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::{
    fs,
    path::{Path, PathBuf},
};
use windlass_integration::{
    client::{Client, container, host_network, pod},
    daemon::Daemon,
    leak::Snapshot,
    node,
};
use windlass_proto::cri::{self, MountPropagation};

/// A shared tmpfs, taken away at the end with all that was mounted below it.
struct Volume(PathBuf);

impl Volume {
    fn mount(at: PathBuf) -> Result<Volume> {
        fs::create_dir_all(&at)?;
        tmpfs(&at)?;
        let none: Option<&str> = None;
        mount(none, &at, none, MsFlags::MS_SHARED, none).context("share the volume")?;
        Ok(Volume(at))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

fn tmpfs(at: &Path) -> Result<()> {
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("size=64k"))
        .with_context(|| format!("mount on {}", at.display()))
}

struct Ground {
    client: Client,
    config: cri::PodSandboxConfig,
    pod: String,
}

impl Ground {
    fn run(&self, name: &str, volume: &Volume, propagation: MountPropagation) -> Result<String> {
        let mut wanted = container(&self.config, name, &["sleep", "1000"]);
        wanted.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        wanted.mounts = vec![cri::Mount {
            container_path: "/data".into(),
            host_path: volume.0.to_string_lossy().into_owned(),
            propagation: propagation.into(),
            ..Default::default()
        }];
        let id = self.client.create(&self.pod, &self.config, &wanted)?;
        self.client.start(&id)?;
        Ok(id)
    }

    fn sees(&self, id: &str, path: &str) -> Result<bool> {
        Ok(self.client.exec(id, &["test", "-e", path])?.exit_code == 0)
    }
}

/// What is mounted here; without the numbers of the peer groups, which the volume's own copies change.
fn mount_points() -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo")?;
    Ok(table.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect())
}

fn propagate(propagation: MountPropagation, into_container: bool, onto_host: bool) -> Result<()> {
    node::run(move || {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let mut config = host_network(pod(&daemon.path("logs")));
        config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        // The first pod makes what the daemon keeps.
        let warm = client.run(&config)?;
        client.remove(&warm)?;
        let before = Snapshot::take(&daemon)?;
        let volume = Volume::mount(daemon.path("volume"))?;
        let points = mount_points()?;
        let pod = client.run(&config)?;
        let ground = Ground { client, config, pod };
        let id = ground.run("main", &volume, propagation)?;
        ensure!(mount_points()? == points, "a running container changed the host's mounts");

        let (ours, theirs) = (volume.0.join("ours"), volume.0.join("theirs"));
        fs::create_dir(&ours)?;
        fs::create_dir(&theirs)?;
        tmpfs(&ours)?;
        fs::write(ours.join("mark"), "")?;
        let seen = ground.sees(&id, "/data/ours/mark")?;
        ensure!(seen == into_container, "the host's mount is seen inside: {seen}");

        let run = ground.client.exec(&id, &["sh", "-c", "mount -t tmpfs none /data/theirs && touch /data/theirs/mark"])?;
        ensure!(run.exit_code == 0, "{}", String::from_utf8_lossy(&run.stderr));
        ensure!(ground.sees(&id, "/data/theirs/mark")?);
        let seen = theirs.join("mark").exists();
        ensure!(seen == onto_host, "the container's mount is seen on the host: {seen}");

        ground.client.remove(&ground.pod)?;
        let seen = theirs.join("mark").exists();
        ensure!(seen == onto_host, "after the container's end its mount on the host: {seen}");
        umount2(&ours, MntFlags::empty()).context("nobody holds the host's mount")?;
        if onto_host {
            umount2(&theirs, MntFlags::empty()).context("nobody holds the container's mount")?;
        }
        ensure!(mount_points()? == points, "mounts are left");
        umount2(&volume.0, MntFlags::empty()).context("nobody holds the volume")?;
        drop(volume);
        before.expect_again(&daemon)
    })
}

#[test]
fn a_private_volume() -> Result<()> {
    propagate(MountPropagation::PropagationPrivate, false, false)
}

#[test]
fn a_volume_from_host_to_container() -> Result<()> {
    propagate(MountPropagation::PropagationHostToContainer, true, false)
}

#[test]
fn a_bidirectional_volume() -> Result<()> {
    propagate(MountPropagation::PropagationBidirectional, true, true)
}
