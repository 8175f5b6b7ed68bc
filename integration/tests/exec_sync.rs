//! ExecSync within its bounds: of output, of time, and of what a command leaves behind.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tonic::Code;
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    leak::Snapshot,
    node,
};
use windlass_proto::cri;

const LIMIT: Duration = Duration::from_secs(20);

struct Ground {
    daemon: Daemon,
    client: Client,
    pod: String,
    container: String,
    leaf: PathBuf,
    before: Snapshot,
}

impl Ground {
    fn start() -> Result<Ground> {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let warm = client.run(&config)?;
        client.remove(&warm)?;
        let before = Snapshot::take(&daemon)?;
        let pod = client.run(&config)?;
        let container = client.create(&pod, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&container)?;
        let leaf = daemon.cgroup_directory().join(&container);
        Ok(Ground { daemon, client, pod, container, leaf, before })
    }

    fn exec(&self, script: &str, timeout: i64) -> Result<cri::ExecSyncResponse, tonic::Status> {
        let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
        self.client.exec_sync(cri::ExecSyncRequest { container_id: self.container.clone(), cmd, timeout })
    }

    /// Waits until the container has its own process alone, and no exec has a cgroup.
    fn alone(&self) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let found = command_lines(&self.leaf);
            let execs = fs::read_dir(&self.leaf)?.flatten().filter(|entry| entry.path().is_dir()).count();
            if found == ["sleep 1000"] && execs == 0 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{execs} cgroups of execs, processes: {found:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn end(self) -> Result<()> {
        self.client.remove(&self.pod)?;
        self.before.expect_same(&Snapshot::take(&self.daemon)?)
    }
}

/// The command lines of the processes in a cgroup and below it.
fn command_lines(cgroup: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for pid in fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default().lines() {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        found.push(String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " "));
    }
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        found.extend(command_lines(&entry.path()));
    }
    found
}

#[test]
fn output_over_the_limit_is_thrown_away_while_the_command_runs_on() -> Result<()> {
    node::run(|| {
        let ground = Ground::start()?;
        let running = Snapshot::take(&ground.daemon)?;
        let flood = "head -c 20000000 /dev/zero | tr '\\0' a";
        for (script, name) in [
            (format!("{flood} & {flood} >&2; wait; : > /dev/shm/both; exit 7"), "both"),
            (format!("{flood}; : > /dev/shm/one; exit 7"), "one"),
        ] {
            // The client takes 16 MiB with the framing, as kubelet does.
            let reply = ground.exec(&script, 60)?;
            ensure!(reply.exit_code == 7, "{name}: {}", reply.exit_code);
            let total = reply.stdout.len() + reply.stderr.len();
            ensure!(total == 15 << 20, "{name}: {total} bytes");
            ensure!(reply.stdout.iter().chain(&reply.stderr).all(|byte| *byte == b'a'), "{name}");
            let ended = ground.exec(&format!("test -e /dev/shm/{name}"), 10)?;
            ensure!(ended.exit_code == 0, "{name}: the command did not come to its end");
        }
        ground.alone()?;
        running.expect_same(&Snapshot::take(&ground.daemon)?)?;
        ground.end()
    })
}

#[test]
fn a_time_limit_ends_all_that_the_command_has_started() -> Result<()> {
    node::run(|| {
        let ground = Ground::start()?;
        let running = Snapshot::take(&ground.daemon)?;
        // Grandchildren whose parent has gone, one of them in a session of its own.
        let script =
            "(setsid sh -c 'sleep 777 & exec sleep 778' &); (sleep 779 &); echo started; trap '' TERM; sleep 780; sleep 781";
        let begun = Instant::now();
        let error = ground.exec(script, 1).expect_err("it takes longer");
        let took = begun.elapsed();
        ensure!(error.code() == Code::DeadlineExceeded, "{error}");
        ensure!(took >= Duration::from_secs(1) && took < Duration::from_secs(4), "{took:?}");
        ground.alone()?;
        running.expect_same(&Snapshot::take(&ground.daemon)?)?;
        ground.end()
    })
}

#[test]
fn what_a_command_leaves_in_the_background_holds_up_nothing() -> Result<()> {
    node::run(|| {
        let ground = Ground::start()?;
        let running = Snapshot::take(&ground.daemon)?;
        // It holds the pipes and is silent, or it never ceases to write.
        for (script, left) in
            [("echo out; echo err >&2; sleep 777 & exit 3", true), ("echo out; echo err >&2; yes & exit 3", false)]
        {
            for timeout in [0, 60] {
                let begun = Instant::now();
                let reply = ground.exec(script, timeout)?;
                let took = begun.elapsed();
                ensure!(took < Duration::from_secs(4), "{script}: {took:?}");
                ensure!(
                    reply.exit_code == 3 && reply.stdout.starts_with(b"out\n") && reply.stderr == b"err\n",
                    "{script}: {reply:?}"
                );
                if left {
                    let found = command_lines(&ground.leaf);
                    let kept = found.iter().position(|line| line == "sleep 777");
                    kept.with_context(|| format!("what it put into the background lives on: {found:?}"))?;
                    // Once the process has ended, nothing of the exec is left in the daemon.
                    let after = Snapshot::take(&ground.daemon)?.without("cgroup");
                    running.clone().without("cgroup").expect_same(&after)?;
                    // The container's own process is the first of its namespace, which ignores the signal.
                    ensure!(ground.exec("killall sleep", 10)?.exit_code == 0);
                }
            }
        }
        ground.alone()?;
        running.expect_same(&Snapshot::take(&ground.daemon)?)?;
        ground.end()
    })
}
