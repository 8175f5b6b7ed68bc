//! `cargo xtask kind`: the node image, Docker, kind and a guest that has what Docker's privileged containers want.

use super::{Node, inside};
use crate::{build, cluster::Programs, go, guest, image};
use anyhow::{Result, ensure};
use std::{
    fs::File,
    io::{Read, Write, stdout},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// Longest run of the guest.
const LIMIT: Duration = Duration::from_secs(1500);
/// The guest's memory.
const MEMORY: &str = "mem=6G";
/// Its disk, for Docker: layers in one file each are not mounted from a tmpfs. Takes of the host what is written.
const DISK_BYTES: u64 = 16 << 30;
/// How often the guest's output is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Builds what is missing, makes the node image, and has kind make a cluster of it in a guest.
///
/// # Errors
/// Where a step fails; what the guest said is printed before that.
pub fn run() -> Result<()> {
    build::all()?;
    let begun = Instant::now();
    made()?;
    println!("==> kind has made, used and deleted a cluster with Windlass inside: {:.0} s", begun.elapsed().as_secs_f64());
    Ok(())
}

/// The same without a build of Windlass.
fn made() -> Result<()> {
    let programs = Programs::build()?;
    let kind = go::kind_command()?;
    let docker = docker()?;
    println!("==> make the node's root");
    let node = Node::make(&programs)?;
    println!("    {} MiB", node.size_mib()?);
    let shared = guest::scratch()?;
    node.write_archive(&shared.path().join(inside::NODE))?;
    image::write_archive(&shared.path().join(inside::IMAGE))?;
    inside::Setting { docker, kind, kubectl: programs.kubectl().to_owned() }.write(shared.path())?;
    let disk = shared.path().join("disk");
    File::create(&disk)?.set_len(DISK_BYTES)?;
    // Thrown away with the guest: no journal.
    let mut format = Command::new("mkfs.ext4");
    build::step("make the guest's disk", format.args(["-q", "-F", "-O", "^has_journal"]).arg(&disk))?;
    println!("==> start the guest");
    let program = std::env::current_exe()?;
    let words = [program.to_string_lossy(), "kind-inside".into(), shared.path().to_string_lossy()];
    let words = words.each_ref().map(AsRef::as_ref);
    let more = [MEMORY, &format!("ubda={}", disk.display())];
    let outcome = following(&shared.path().join("output"), || guest::run_with(shared.path(), &words, &[], LIMIT, &more))?;
    ensure!(outcome.code == 0, "in the guest: exit code {}", outcome.code);
    Ok(())
}

/// Debian's Docker, unpacked once into `<target>/windlass-tools`.
fn docker() -> Result<PathBuf> {
    build::unpacked("docker", &["docker.io", "containerd", "libdevmapper1.02.1"], "usr/sbin/dockerd")
}

/// Calls `body` and prints what meanwhile comes into a file.
fn following<T>(file: &Path, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut open = None;
            loop {
                // Looked at before the file, so that its end is seen too.
                let last = ended.load(Ordering::Acquire);
                if open.is_none() {
                    open = File::open(file).ok();
                }
                let mut text = Vec::new();
                if let Some(file) = &mut open
                    && file.read_to_end(&mut text).is_ok()
                {
                    let _ = stdout().write_all(&text).and_then(|()| stdout().flush());
                }
                if last {
                    break;
                }
                std::thread::sleep(LOOK);
            }
        });
        let result = body();
        ended.store(true, Ordering::Release);
        result
    })
}
