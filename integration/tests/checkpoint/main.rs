//! Checkpoints with the real CRIU: what a container was goes on in another one, and what fails leaves the container running and no trace.

mod container;
mod failures;
mod pod;

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use windlass_integration::{
    client::{Client, container},
    criu,
    daemon::Daemon,
    go,
    ground::Ground,
    node,
    wait::until,
};
use windlass_proto::cri;

/// Counts in its memory, a line and a file for each number, and ends with code 7 when it is asked to.
const COUNTER: &str =
    "trap 'echo asked at $n; exit 7' TERM; n=0; while :; do n=$((n+1)); echo line $n; echo $n > /counter; sleep 0.02; done";

/// Runs `body` in namespaces of its own. What a test is built from is fetched before: there is no network inside.
fn with_criu(body: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    criu::program()?;
    go::tools()?;
    node::run(body)
}

/// A daemon whose CRIU is `program`, or the real one.
fn daemon(program: Option<&Path>) -> Result<Daemon> {
    let program = program.map_or_else(criu::program, |program| Ok(program.to_owned()))?;
    Daemon::configured(&format!("[checkpoint]\ncriu = {program:?}\n"))
}

/// A pod on a daemon with the real CRIU.
fn ground() -> Result<Ground> {
    Ground::on(daemon(None)?)
}

/// A program in CRIU's place: a script of the shell, in which `$CRIU` is the real one.
fn standing_in(directory: &Path, script: &str) -> Result<PathBuf> {
    let path = directory.join("criu");
    fs::write(&path, format!("#!/bin/sh\nCRIU={}\n{script}\n", criu::program()?.display()))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// The numbers of a counter's lines in its log.
fn numbers(log: &str) -> Result<Vec<u64>> {
    let number = |line: &str| line.split(" line ").nth(1).context("a number")?.parse::<u64>().context("a number");
    log.lines().filter(|line| line.contains(" line ")).map(number).collect()
}

/// Waits until a counter has come beyond `number`; its lines so far.
fn beyond(ground: &Ground, name: &str, number: u64) -> Result<Vec<u64>> {
    until(&format!("{name} counts beyond {number}"), || {
        let found = numbers(&ground.log(name))?;
        Ok(found.last().is_some_and(|last| *last > number).then_some(found))
    })
}

/// Fails unless the counter of that name still counts, and has left out nothing.
fn counts_on(ground: &Ground, name: &str) -> Result<()> {
    let before = numbers(&ground.log(name))?.last().copied().unwrap_or(0);
    let all = beyond(ground, name, before + 3)?;
    ensure!(all.windows(2).all(|pair| pair[1] == pair[0] + 1), "{name} has left out a number: {all:?}");
    Ok(())
}

fn checkpoint(client: &Client, id: &str, location: &Path, timeout: i64) -> Result<(), tonic::Status> {
    let location = location.to_string_lossy().into_owned();
    client.checkpoint_container(cri::CheckpointContainerRequest { container_id: id.into(), location, timeout }).map(drop)
}

/// The configuration of a container that an archive becomes.
fn restored(pod: &cri::PodSandboxConfig, name: &str, archive: &Path) -> cri::ContainerConfig {
    let mut config = container(pod, name, &[]);
    config.image = Some(cri::ImageSpec { image: archive.to_string_lossy().into_owned(), ..Default::default() });
    config
}

/// Names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
