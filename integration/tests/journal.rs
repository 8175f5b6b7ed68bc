//! The log in systemd's journal: a real journald, which keeps its files in this test's own mount namespace, and what `journalctl` finds in it
//! by the fields of a pod.

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use serde_json::Value;
use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::Path,
    process::{Command, Stdio},
};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    node::{self, output_of},
    process::Process,
    wait::until,
};

const JOURNALD: &str = "/lib/systemd/systemd-journald";

/// Covers the places of the host's journal, and starts one in them.
fn journald() -> Result<Process> {
    for place in ["/run/systemd", "/run/log"] {
        fs::create_dir_all(place)?;
        mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))
            .with_context(|| format!("cover {place}"))?;
    }
    fs::create_dir_all("/run/systemd/journal")?;
    let id = Path::new("/run/systemd/machine-id");
    fs::write(id, "0123456789abcdef0123456789abcdef\n")?;
    if !Path::new("/etc/machine-id").exists() {
        File::create("/etc/machine-id")?;
    }
    mount(Some(id), "/etc/machine-id", None::<&str>, MsFlags::MS_BIND, None::<&str>).context("give the machine an id")?;
    let process = Command::new(JOURNALD).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let journald = Process::from(process.context("start systemd-journald (Debian package systemd)")?);
    until("the journal's socket", || Ok(Path::new("/run/systemd/journal/socket").exists().then_some(())))?;
    Ok(journald)
}

/// Entries with these fields.
fn entries(matches: &[&str]) -> Result<Vec<Value>> {
    let mut words = vec!["--directory", "/run/log/journal", "--output", "json", "--all"];
    words.extend(matches);
    let text = output_of("journalctl", &words)?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("read {line:?}"))).collect()
}

/// What a daemon must find in its environment to take its standard error, a file here, for the journal's stream.
fn stream(daemon: &Daemon) -> Result<String> {
    let log = fs::metadata(daemon.path("log"))?;
    Ok(format!("{}:{}", log.dev(), log.ino()))
}

#[test]
fn the_journal_has_the_fields_of_pods_and_containers() {
    node::run(|| {
        let _journald = journald()?;
        let mut daemon = Daemon::start(&[])?;
        daemon.stop()?;
        let plain = daemon.log();
        ensure!(
            plain.contains("serving") && entries(&["SYSLOG_IDENTIFIER=windlass"])?.is_empty(),
            "without the variable: {plain}"
        );
        daemon.environment = vec![("JOURNAL_STREAM", stream(&daemon)?)];
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let created = client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&created)?;
        client.stop(&created, 0)?;
        client.remove(&id)?;
        let name = config.metadata.clone().context("metadata")?.name;
        let by_id = until("the pod's entries", || {
            let found = entries(&[&format!("POD_ID={id}")])?;
            Ok(found.iter().any(|entry| entry["MESSAGE"] == "pod removed").then_some(found))
        })?;
        for entry in &by_id {
            ensure!(entry["SYSLOG_IDENTIFIER"] == "windlass" && entry["_TRANSPORT"] == "journal", "{entry}");
            ensure!(entry["PRIORITY"].as_str().is_some_and(|priority| ["4", "6"].contains(&priority)), "{entry}");
            ensure!(entry["POD"] == name.as_str() && entry["NAMESPACE"] == "test", "{entry}");
            ensure!(entry["CODE_FILE"].as_str().is_some_and(|file| file.starts_with("shim/src/")), "{entry}");
        }
        // The entry is of a span that has the id.
        ensure!(by_id.iter().any(|entry| entry["MESSAGE"] == "pod is ready"), "{by_id:?}");
        let of_container = entries(&[&format!("CONTAINER_ID={created}"), "CONTAINER_NAME=main", "NAMESPACE=test"])?;
        for message in ["container created", "container started", "container exited"] {
            ensure!(of_container.iter().any(|entry| entry["MESSAGE"] == message), "no {message:?} in {of_container:?}");
        }
        ensure!(daemon.log() == plain, "what is in the journal is on standard error, too");
        // Another file than the variable names: a line again.
        daemon.stop()?;
        daemon.environment = vec![("JOURNAL_STREAM", "1:1".into())];
        daemon.serve()?;
        until("a word on standard error", || Ok((daemon.log().len() > plain.len()).then_some(())))?;
        daemon.stop()
    })
    .expect("the journal");
}

#[test]
fn a_journal_that_hangs_or_is_gone_holds_up_nothing() {
    node::run(|| {
        let journald = journald()?;
        let mut daemon = Daemon::prepare(&[])?;
        File::create(daemon.path("log"))?;
        daemon.environment = vec![("JOURNAL_STREAM", stream(&daemon)?)];
        let mut daemon = daemon.with_images()?;
        let client = Client::connect(&daemon)?;
        let pid = nix::unistd::Pid::from_raw(journald.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
        let lives = |count: usize| -> Result<()> {
            for _ in 0..count {
                let id = client.run(&pod(&daemon.path("logs")))?;
                client.remove(&id)?;
            }
            Ok(())
        };
        // More entries than the socket's queue has room for.
        let room: usize = fs::read_to_string("/proc/sys/net/unix/max_dgram_qlen")?.trim().parse()?;
        let began = std::time::Instant::now();
        lives(room.min(100) / 2 + 5)?;
        ensure!(began.elapsed().as_secs() < 30, "it took {:?}", began.elapsed());
        drop(journald);
        lives(1)?;
        let text = daemon.log();
        ensure!(text.contains("pod is ready (journal:"), "without a journal, lines go to standard error: {text:?}");
        daemon.stop()
    })
    .expect("pods without a journal");
}
