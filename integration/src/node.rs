//! Namespaces of a test's own, so that nothing a test does meets the machine or another test.

use anyhow::{Context, Result, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use std::{path::Path, process::Command};

/// Runs `body` on a thread in new mount and network namespaces, which everything that it starts inherits. Mounts stay private, loopback
/// is up, and `/run/netns` is empty. A panic of the body is the caller's.
pub fn run<T: Send + 'static>(body: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let thread = std::thread::Builder::new().name("node".into()).spawn(move || {
        enter()?;
        body()
    })?;
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .context("unshare mount and network namespaces (root is needed)")?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
    forget_mounts_of_others()?;
    std::fs::create_dir_all("/run/netns").context("create /run/netns")?;
    mount(Some("tmpfs"), "/run/netns", Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=755")).context("mount /run/netns")?;
    run_command("ip", &["link", "set", "lo", "up"])
}

/// Drops the mounts that tests beside this one have among temporary files: the copies here would go at any moment, with the directories
/// below them.
fn forget_mounts_of_others() -> Result<()> {
    let temporary = std::env::temp_dir();
    let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").context("read the mounts")?;
    // What was mounted last lies on top.
    for path in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
        if path.starts_with(&temporary) && path != temporary {
            // One that is gone by itself is no matter.
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
    }
    Ok(())
}

/// What kubelet and containers mount in this node has to reach each other, and a runtime in a mount namespace of its own.
pub fn share_mounts() -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).context("share mounts")
}

/// Runs a program to its end; an error carries its output.
pub fn run_command(program: &str, arguments: &[&str]) -> Result<()> {
    output_of(program, arguments).map(drop)
}

/// Standard output of a program that must succeed.
pub fn output_of(program: &str, arguments: &[&str]) -> Result<String> {
    succeed(&format!("{program} {}", arguments.join(" ")), Command::new(program).args(arguments))
}

/// Standard output of a command that must succeed; an error has both of its outputs below this title.
pub fn succeed(title: &str, command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("run {title}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    ensure!(output.status.success(), "{title}: {}\n{}{}", output.status, text(&output.stdout), text(&output.stderr));
    Ok(text(&output.stdout))
}
