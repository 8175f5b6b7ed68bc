//! `cargo xtask upgrade`: pods that an older build started, under the daemon of this one. The older programs are built from this
//! repository's history.

use crate::{
    build,
    client::{Client, container, pod},
    daemon::Daemon,
    go, node, setup,
    wait::until,
};
use anyhow::{Context, Result, ensure};
use nix::{sys::signal, unistd::Pid};
use std::{
    fs,
    path::{Path, PathBuf},
};
use windlass_proto::cri::{self, ContainerState};

/// The revision that is tried unless another is named: the first one whose daemon takes the configuration of the tests.
pub const EARLIER: &str = "7c4f9df";

/// The programs of [`EARLIER`]. A checkout whose history does not reach back so far has none: there it is today's that are restarted.
pub fn earlier_programs() -> Result<PathBuf> {
    match git(&["cat-file", "-e", &format!("{EARLIER}^{{commit}}")]) {
        Ok(_) => programs_of(EARLIER),
        Err(error) => {
            println!("{EARLIER} is not in this checkout's history, today's daemon follows today's: {error:#}");
            setup::programs()
        }
    }
}

/// What git says in this workspace, whoever owns it.
fn git(words: &[&str]) -> Result<String> {
    let workspace = setup::workspace().canonicalize()?;
    node::output_of("git", &[&["-c", "safe.directory=*", "-C", &workspace.to_string_lossy()], words].concat())
}

const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";

/// Builds today's programs, and for each revision its own; says what was seen.
pub fn run(revisions: &[String]) -> Result<()> {
    build::all()?;
    for revision in revisions {
        let programs = programs_of(revision)?;
        let seen = node::run(move || replace_the_daemon(&programs))?;
        println!("==> from {revision}");
        for line in seen {
            println!("    {line}");
        }
    }
    Ok(())
}

/// The folder with `windlass` and `windlass-monitor` of a revision, built unless `<target>/windlass-tools/older` has them.
pub fn programs_of(revision: &str) -> Result<PathBuf> {
    let id = git(&["rev-parse", "--verify", &format!("{revision}^{{commit}}")]);
    let id = id.with_context(|| format!("find revision {revision}: the whole history is needed, a shallow clone has none"))?;
    let directory = setup::target().join("windlass-tools/older").join(&id[..12]);
    let products = [directory.join("windlass"), directory.join("windlass-monitor")];
    go::unless_stamped(&directory, &["2"], &products.each_ref().map(PathBuf::as_path), || {
        let place = tempfile::Builder::new().prefix("build-").tempdir_in(&directory)?;
        let place = place.path().canonicalize()?;
        let (source, target) = (place.join("source"), place.join("target"));
        fs::create_dir(&source)?;
        let archive = place.join("source.tar");
        git(&["archive", "--output", &archive.to_string_lossy(), id.trim()])?;
        node::run_command("tar", &["-C", &source.to_string_lossy(), "-xf", &archive.to_string_lossy()])?;
        for profile in ["debug", "x86_64-unknown-linux-musl/monitor", "monitor"] {
            lend_dependencies(&setup::target().join(profile), &target.join(profile))?;
        }
        let daemon = ["build", "--quiet", "-p", "windlass", "--bin", "windlass"];
        let monitor = ["build", "--quiet", "--profile", "monitor", "--target", STATIC_TARGET, "-p", "windlass-runtime"];
        build::step(
            &format!("build windlass of {revision}"),
            build::cargo().args(daemon).arg("--target-dir").arg(&target).current_dir(&source),
        )?;
        build::step(
            &format!("build windlass-monitor of {revision}"),
            build::cargo().args(monitor).arg("--target-dir").arg(&target).current_dir(&source),
        )?;
        let built = [target.join("debug/windlass"), target.join(STATIC_TARGET).join("monitor/windlass-monitor")];
        for (built, product) in built.iter().zip(&products) {
            fs::copy(built, product).with_context(|| format!("copy {}", built.display()))?;
        }
        Ok(())
    })?;
    directory.canonicalize().context("find the older programs")
}

/// Links what cargo made of other projects' crates into another target folder, so that it is not made again. Nothing of this workspace's
/// own: cargo would take it for the older revision's, whose crates have the same names and paths.
fn lend_dependencies(from: &Path, to: &Path) -> Result<()> {
    for (name, how) in [("deps", "-al"), ("build", "-al"), (".fingerprint", "-a")] {
        if !from.join(name).is_dir() {
            continue;
        }
        fs::create_dir_all(to)?;
        node::run_command("cp", &[how, &from.join(name).to_string_lossy(), &to.to_string_lossy()])?;
        for entry in fs::read_dir(to.join(name))?.flatten() {
            let own = entry.file_name().to_string_lossy().trim_start_matches("lib").starts_with("windlass");
            if own && entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else if own {
                fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

/// A container that counts into its log, and ends with 7 when it is asked to.
const COUNT: &str = "trap 'exit 7' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done";

/// Starts pods with the programs of `older`, kills their daemon, starts this build's, and checks what a kubelet would ask. Returns what was
/// seen. The caller is in namespaces of its own.
pub fn replace_the_daemon(older: &Path) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    let mut daemon = Daemon::prepare(&[])?;
    daemon.programs = Some(older.to_owned());
    let mut daemon = daemon.with_images()?;
    let client = Client::connect(&daemon)?;
    let config = pod(&daemon.path("logs"));
    let id = client.run(&config)?;
    let monitors = daemon.monitors();
    ensure!(monitors.len() == 1, "{monitors:?}");
    let start = |client: &Client, name: &str| -> Result<String> {
        let created = client.create(&id, &config, &container(&config, name, &["sh", "-c", COUNT]))?;
        client.start(&created)?;
        Ok(created)
    };
    let (main, ended) = (start(&client, "main")?, start(&client, "ended")?);
    let waiting = client.create(&id, &config, &container(&config, "waiting", &["sh", "-c", COUNT]))?;
    let (before, address) = (client.container(&main)?, client.pod(&id)?.network);
    let ended_pid = pid(&client, &ended)?;
    let main_pid = pid(&client, &main)?;

    daemon.kill9()?;
    // Ends while no daemon is there.
    signal::kill(Pid::from_raw(ended_pid), signal::Signal::SIGTERM)?;
    until("the end of a process", || Ok((!Path::new(&format!("/proc/{ended_pid}")).exists()).then_some(())))?;
    daemon.programs = None;
    daemon.serve()?;
    let client = Client::connect(&daemon)?;

    ensure!(daemon.monitors().contains(&monitors[0]), "{monitors:?} became {:?}", daemon.monitors());
    ensure!(client.pod(&id)?.network == address && address.is_some(), "another address");
    let after = client.container(&main)?;
    ensure!(after.state() == ContainerState::ContainerRunning && pid(&client, &main)? == main_pid, "{after:?}");
    ensure!((after.created_at, after.started_at) == (before.created_at, before.started_at), "{before:?} became {after:?}");
    seen.push("the pod has its monitor, its address and its running container, with the same process and times".into());

    let status = client.container(&ended)?;
    ensure!(status.state() == ContainerState::ContainerExited && status.exit_code == 7, "{status:?}");
    seen.push("a container that ended in between has its exit code".into());
    client.start(&waiting)?;
    ensure!(client.container(&waiting)?.state() == ContainerState::ContainerRunning);
    seen.push("a container that was created before is started".into());
    seen.push(looked_into(&client, &main)?);
    seen.push(counted(&client, &main, &Path::new(&config.log_directory).join("main.log"))?);

    client.stop(&main, 10)?;
    let status = client.container(&main)?;
    ensure!(status.exit_code == 7, "{status:?}");
    client.remove_container(cri::RemoveContainerRequest { container_id: main.clone() })?;
    let mut again = container(&config, "main", &["sh", "-c", COUNT]);
    again.metadata.get_or_insert_default().attempt = 1;
    let again = client.create(&id, &config, &again)?;
    client.start(&again)?;
    seen.push(
        looked_into(&client, &again)?
            .replace("execs", "the container, stopped with its own exit code and made again by the old monitor: execs"),
    );

    let other = client.run(&pod(&daemon.path("logs")))?;
    let newer: Vec<i32> = daemon.monitors().into_iter().filter(|pid| !monitors.contains(pid)).collect();
    let program = |pid: i32| fs::read_link(format!("/proc/{pid}/exe"));
    ensure!(newer.len() == 1 && program(newer[0])? == setup::programs()?.join("windlass-monitor"), "{newer:?}");
    ensure!(program(monitors[0])? == older.join("windlass-monitor"), "the old pod's monitor is another program");
    seen.push("a new pod has the new monitor beside it".into());

    client.remove(&other)?;
    client.remove(&id)?;
    ensure!(daemon.monitors().is_empty(), "monitors are left");
    daemon.stop()?;
    ensure!(!daemon.cgroup_directory().exists(), "a cgroup is left");
    ensure!(fs::read_dir("/run/netns")?.next().is_none(), "a network namespace is left");
    seen.push("all of it is gone at the end".into());
    Ok(seen)
}

/// The process of a running container.
fn pid(client: &Client, container: &str) -> Result<i32> {
    let reply = client.container_status(cri::ContainerStatusRequest { container_id: container.into(), verbose: true })?;
    let info: serde_json::Value = serde_json::from_str(reply.info.get("info").context("verbose information")?)?;
    info["pid"].as_i64().and_then(|pid| pid.try_into().ok()).context("its process")
}

/// Execs with their exit codes, statistics and the limits of an update.
fn looked_into(client: &Client, container: &str) -> Result<String> {
    ensure!(client.shell(container, "echo here")? == "here");
    ensure!(client.exec(container, &["sh", "-c", "exit 3"])?.exit_code == 3);
    let stats = client.container_stats(cri::ContainerStatsRequest { container_id: container.into() })?.stats.context("stats")?;
    let memory = stats.memory.and_then(|memory| memory.working_set_bytes).map_or(0, |bytes| bytes.value);
    ensure!(memory > 0 && stats.cpu.is_some() && stats.writable_layer.is_some(), "statistics miss what was asked for");
    Ok(format!("execs give their output and exit code, statistics say {} KiB", memory / 1024))
}

/// The log has every number once, over the change of daemons and a rotation.
fn counted(client: &Client, container: &str, log: &Path) -> Result<String> {
    let rotated = log.with_extension("old");
    fs::rename(log, &rotated)?;
    client.reopen_container_log(cri::ReopenContainerLogRequest { container_id: container.into() })?;
    until("a line after the rotation", || Ok(fs::read_to_string(log).is_ok_and(|text| text.contains('\n')).then_some(())))?;
    let text = fs::read_to_string(&rotated)? + &fs::read_to_string(log)?;
    let numbers: Vec<&str> = text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).collect();
    let whole = numbers.iter().enumerate().all(|(index, number)| *number == index.to_string());
    ensure!(whole, "the log has not every number once: {numbers:?}");
    Ok(format!("the log has all of its {} lines, over the change and a rotation", numbers.len()))
}
