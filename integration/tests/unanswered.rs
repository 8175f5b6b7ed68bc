//! Volumes whose file system does not answer: their containers fail and say why, and nothing else of the node waits for them.

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    fs::{self, File},
    io::{Read, Write},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};
use tonic::Code;
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    ground::Ground,
    leak::Snapshot,
    node,
    wait::until,
};
use windlass_proto::cri;

/// Opcodes of FUSE (linux/fuse.h).
const LOOKUP: u32 = 1;
const INIT: u32 = 26;
/// Lookups in one directory at the same time.
const PARALLEL_DIROPS: u32 = 1 << 18;
const REQUEST_BYTES_MAX: usize = 1 << 17;
/// How often it is looked whether the server shall end.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// What the callers of the stuck requests wait; the daemon keeps some of it.
const PATIENCE: Duration = Duration::from_secs(25);

/// A FUSE file system that answers no request. Its end ends them.
struct Silent {
    at: PathBuf,
    device: Option<File>,
    asked: Arc<AtomicUsize>,
    ending: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Silent {
    /// One that takes every request: whoever waits for its answer cannot be killed.
    fn mount(at: PathBuf) -> Result<Silent> {
        let mut silent = Silent::deaf(at)?;
        let device = silent.device.as_ref().context("a device")?.try_clone()?;
        let (asked, ending) = (silent.asked.clone(), silent.ending.clone());
        silent.server = Some(std::thread::spawn(move || swallow(device, &asked, &ending)));
        Ok(silent)
    }

    /// One that takes none.
    fn deaf(at: PathBuf) -> Result<Silent> {
        fs::create_dir(&at)?;
        let mut device = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        mount(Some("silent"), &at, Some("fuse"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str()))?;
        let (asked, ending) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let outcome = greet(&mut device);
        let silent = Silent { at, device: Some(device), asked, ending, server: None };
        outcome.map(|()| silent)
    }

    /// Whether a request waits to be taken.
    fn is_asked(&self) -> Result<bool> {
        let device = self.device.as_ref().context("a device")?;
        Ok(poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&Timespec::default()))? > 0)
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        // With its descriptor the connection goes, and each request gets an error.
        self.server.take().map(JoinHandle::join);
        drop(self.device.take());
        let _ = umount2(&self.at, MntFlags::MNT_DETACH);
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Answers INIT with the kernel's own version.
fn greet(device: &mut File) -> Result<()> {
    let mut request = vec![0; REQUEST_BYTES_MAX];
    let count = device.read(&mut request)?;
    ensure!(count >= 48 && word(&request, 4) == INIT, "the first request is INIT");
    let mut reply = [0u8; 16 + 64];
    let mut put = |at: usize, value: u32| reply[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    put(0, 16 + 64);
    put(8, word(&request, 8));
    put(12, word(&request, 12));
    put(16, word(&request, 40));
    put(20, word(&request, 44));
    put(28, PARALLEL_DIROPS);
    put(36, 4096);
    device.write_all(&reply).context("answer INIT")
}

fn swallow(mut device: File, asked: &AtomicUsize, ending: &AtomicBool) {
    let mut request = vec![0; REQUEST_BYTES_MAX];
    while !ending.load(Ordering::Relaxed) {
        let mut ready = [PollFd::new(&device, PollFlags::IN)];
        if poll(&mut ready, Some(&LOOK_AGAIN)).unwrap_or(0) == 0 {
            continue;
        }
        let Ok(count) = device.read(&mut request) else { return };
        if count >= 8 && word(&request, 4) == LOOKUP {
            asked.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn with_volume(config: &cri::PodSandboxConfig, name: &str, volume: &Path) -> cri::ContainerConfig {
    let mut wanted = container(config, name, &["sleep", "1000"]);
    wanted.mounts = vec![cri::Mount {
        container_path: "/data".into(),
        host_path: volume.to_string_lossy().into_owned(),
        ..Default::default()
    }];
    wanted
}

#[test]
fn containers_of_a_file_system_that_does_not_answer_keep_nothing_else_waiting() -> Result<()> {
    node::run(|| {
        let ground = Ground::on(Daemon::start(&[])?)?;
        let beside = pod(&ground.daemon.path("logs"));
        let other = ground.client.run(&beside)?;
        let before = Snapshot::take(&ground.daemon)?;
        let silent = Silent::mount(ground.daemon.path("silent"))?;
        let names = ["one", "two", "three", "four"];
        let stuck = names.map(|name| {
            let (socket, pod, config) = (ground.daemon.socket(), ground.pod.clone(), ground.config.clone());
            let wanted = with_volume(&config, name, &silent.at.join(name));
            std::thread::spawn(move || Ok::<_, anyhow::Error>(Client::within(&socket, PATIENCE)?.create(&pod, &config, &wanted)))
        });
        until("four lookups", || Ok((silent.asked() == names.len()).then_some(())))?;

        let bystander = Client::within(&ground.daemon.socket(), Duration::from_secs(20))?;
        bystander.version(cri::VersionRequest::default())?;
        ensure!(bystander.list_pod_sandbox(cri::ListPodSandboxRequest::default())?.items.len() == 2);
        let id = bystander.create(&other, &beside, &container(&beside, "main", &["sleep", "1000"]))?;
        bystander.start(&id)?;
        ensure!(bystander.container(&id)?.state() == cri::ContainerState::ContainerRunning);
        ensure!(bystander.list_containers(cri::ListContainersRequest::default())?.containers.len() == 1);
        bystander.stop(&id, 0)?;
        bystander.remove_container(cri::RemoveContainerRequest { container_id: id })?;

        for (name, waiting) in names.iter().zip(stuck) {
            let refused = waiting.join().ok().context("a client")??.expect_err("nobody answers");
            let path = silent.at.join(name);
            ensure!(refused.code() == Code::DeadlineExceeded, "{refused:?}");
            for part in ["config.mounts: host_path", &path.to_string_lossy(), "/data", "its file system does not answer"] {
                ensure!(refused.message().contains(part), "{part:?} in {:?}", refused.message());
            }
        }
        let again = with_volume(&ground.config, "one", &silent.at.join("one"));
        let refused = ground.client.create(&ground.pod, &ground.config, &again).expect_err("still nobody answers");
        ensure!(refused.message().contains("an earlier request still waits"), "{refused:?}");
        ensure!(silent.asked() == names.len(), "it was asked again");
        drop(silent);
        before.expect_again(&ground.daemon)?;

        let id =
            until("the path without that file system", || Ok(ground.client.create(&ground.pod, &ground.config, &again).ok()))?;
        ground.client.start(&id)?;
        ground.client.remove(&other)?;
        ground.end()
    })
}

#[test]
fn a_daemon_ends_whatever_its_lookups_wait_for() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::on(Daemon::start(&[])?)?;
        let silent = Silent::deaf(ground.daemon.path("silent"))?;
        let wanted = with_volume(&ground.config, "main", &silent.at.join("volume"));
        let (client, pod, config) = (Client::connect(&ground.daemon)?, ground.pod.clone(), ground.config.clone());
        let waiting = std::thread::spawn(move || client.create(&pod, &config, &wanted));
        until("a lookup", || Ok(silent.is_asked()?.then_some(())))?;
        ground.daemon.stop()?;
        ensure!(waiting.join().ok().context("a client")?.is_err(), "created");
        drop(silent);
        ground.daemon.serve()?;
        ground.client = Client::connect(&ground.daemon)?;
        ground.end()
    })
}
