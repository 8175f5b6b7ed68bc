//! `cargo xtask up` and `down`: a cluster for people to try, in namespaces of its own, and its end without a trace.
//!
//! A keeper in the background owns everything: it holds a lock as long as it lives, serves the apiserver on the host's loopback, and ends
//! the cluster when a file says so: a signal mask would be inherited by all that it starts.

use super::{ADDRESS, Cluster, Programs};
use crate::{build, client::Client, daemon::Daemon, image::BUSYBOX, node, setup, wait::until_within};
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, Shutdown, TcpListener, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// Longest wait for a cluster, and for its end.
const UP_LIMIT: Duration = Duration::from_secs(300);
const DOWN_LIMIT: Duration = Duration::from_secs(60);
/// How often the keeper looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// The file that says so, and the keeper's last word.
const END: &str = "end";
const ENDED: &str = "every pod is removed, every program has ended";

/// Files that the keeper and the commands share.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Place> {
        let directory = setup::target().join("windlass-up");
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        Ok(Place(directory.canonicalize()?))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The lock that a keeper holds; none if another one does.
    fn lock(&self) -> Result<Option<File>> {
        let file = File::options().create(true).truncate(false).write(true).open(self.path("lock"))?;
        Ok(file.try_lock().is_ok().then_some(file))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

/// Builds everything, starts a cluster in the background, and says how to use it.
///
/// # Errors
/// Where one is up already, a build fails or the node does not become ready.
pub fn up() -> Result<()> {
    let place = Place::new()?;
    ensure!(place.lock()?.is_some(), "a cluster is up: {}", place.path("kubeconfig").display());
    build::all()?;
    let programs = Programs::build()?;
    for name in ["ready", END] {
        let _ = fs::remove_file(place.path(name));
    }
    println!("==> start the cluster");
    let log = File::create(place.path("log"))?;
    let mut keeper = Command::new(std::env::current_exe()?);
    keeper.arg("keep-cluster").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    let mut keeper = keeper.spawn().context("start the keeper")?;
    until_within(UP_LIMIT, "the cluster is up", || {
        if let Some(status) = keeper.try_wait()? {
            bail!("the cluster ended with {status}:\n{}", place.log());
        }
        Ok(place.path("ready").exists().then_some(()))
    })?;
    let (kubectl, kubeconfig) = (programs.kubectl.display(), place.path("kubeconfig"));
    println!("    {}", fs::read_to_string(place.path("ready"))?.trim());
    println!("\nexport KUBECONFIG={}", kubeconfig.display());
    println!("alias kubectl={kubectl}\n");
    println!("kubectl get nodes -o wide");
    println!("kubectl run first --image={BUSYBOX} --image-pull-policy=Never -- sh -c 'while :; do date; sleep 1; done'");
    println!("kubectl logs -f first");
    println!("kubectl top pods --containers    # figures come within a minute");
    println!(
        "\nThe node has that one image and those of its addons; registries of the host's loopback and beyond are out of its reach, for it has a network of its own."
    );
    println!("`cargo xtask down` ends the cluster and removes all of it.");
    Ok(())
}

/// Ends the cluster that is up, if there is one, and waits until nothing of it is left.
///
/// # Errors
/// Where it does not end.
pub fn down() -> Result<()> {
    let place = Place::new()?;
    if place.lock()?.is_none() {
        File::create(place.path(END)).context("ask the keeper to end")?;
        until_within(DOWN_LIMIT, "the cluster ends", || Ok(place.lock()?.map(drop)))?;
        ensure!(place.log().ends_with(&format!("{ENDED}\n")), "the cluster did not end well:\n{}", place.log());
        println!("{ENDED}");
    }
    fs::remove_dir_all(&place.0).with_context(|| format!("remove {}", place.0.display()))
}

/// Keeps a cluster until [`down`]. Started by [`up`].
///
/// # Errors
/// Where the cluster does not start, or something of it is left at its end.
pub fn keep() -> Result<()> {
    let place = Place::new()?;
    let _lock = place.lock()?.context("another cluster is up")?;
    let programs = Programs::build()?;
    let door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen on loopback")?;
    node::run(move || {
        let mut daemon = Daemon::start(&[])?;
        let mut cluster = Cluster::start(&programs, &daemon)?;
        cluster.start_proxy()?;
        cluster.start_dns()?;
        cluster.start_metrics()?;
        cluster.wait_for_dns()?;
        open(&door, cluster.kubeconfig(), &place.path("kubeconfig"))?;
        let (up, ready) = cluster.took;
        let took = format!("the apiserver answers after {up:.1?}, the node is ready {ready:.1?} later\n");
        fs::write(place.path("ready.new"), took)?;
        fs::rename(place.path("ready.new"), place.path("ready"))?;
        while !place.path(END).exists() {
            std::thread::sleep(LOOK);
        }
        drop(cluster);
        let client = Client::connect(&daemon)?;
        for pod in client.list_pod_sandbox(Default::default())?.items {
            client.remove(&pod.id)?;
        }
        drop(client);
        daemon.stop()?;
        println!("{ENDED}");
        Ok(())
    })
}

/// Serves the apiserver of this thread's network namespace at `door`, which is of another, and writes a kubeconfig that leads there.
fn open(door: &TcpListener, inside: &Path, outside: &Path) -> Result<()> {
    let text = fs::read_to_string(inside)?;
    let text = text.replace(&format!("https://{ADDRESS}:6443"), &format!("https://{}", door.local_addr()?));
    fs::write(outside, text).with_context(|| format!("write {}", outside.display()))?;
    let door = door.try_clone()?;
    std::thread::Builder::new().name("door".into()).spawn(move || {
        for stream in door.incoming().flatten() {
            std::thread::spawn(move || {
                // A client may go away at any time.
                let _ = join(&stream);
            });
        }
    })?;
    Ok(())
}

fn join(client: &TcpStream) -> io::Result<()> {
    let server = TcpStream::connect((ADDRESS, 6443))?;
    std::thread::scope(|scope| {
        scope.spawn(|| pass(client, &server));
        pass(&server, client)
    })
}

fn pass(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    io::copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)
}
