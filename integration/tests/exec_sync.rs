//! ExecSync within its bounds: of output, of time, and of what a command leaves behind.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};
use tonic::Code;
use windlass_integration::{
    daemon::{Daemon, command_lines},
    ground::Ground,
    leak::Snapshot,
    node, wait,
};
use windlass_proto::cri;

/// Far more than anything here takes on a busy machine, and far less than what is not waited for would.
const LONG: Duration = Duration::from_secs(20);

/// A container that sleeps, and what is there while it does.
struct Sleeper {
    ground: Ground,
    container: String,
    leaf: PathBuf,
    running: Snapshot,
}

impl Sleeper {
    fn start() -> Result<Sleeper> {
        let ground = Ground::on(Daemon::start(&[])?)?;
        let container = ground.start("main", &["sleep", "1000"], |_| {})?;
        let leaf = ground.daemon.cgroup_directory().join(&container);
        let running = Snapshot::take(&ground.daemon)?;
        Ok(Sleeper { ground, container, leaf, running })
    }

    fn exec(&self, script: &str, timeout: i64) -> Result<cri::ExecSyncResponse, tonic::Status> {
        let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
        self.ground.client.exec_sync(cri::ExecSyncRequest { container_id: self.container.clone(), cmd, timeout })
    }

    /// The container comes to have its own process alone, no exec has a cgroup, and the daemon has what it had before.
    fn end(self) -> Result<()> {
        let execs = || -> Result<usize> { Ok(fs::read_dir(&self.leaf)?.flatten().filter(|entry| entry.path().is_dir()).count()) };
        wait::until_true("the end of every exec", || Ok(command_lines(&self.leaf) == ["sleep 1000"] && execs()? == 0))
            .with_context(|| format!("processes: {:?}", command_lines(&self.leaf)))?;
        self.running.expect_again(&self.ground.daemon)?;
        self.ground.end()
    }
}

#[test]
fn output_over_the_limit_is_thrown_away_while_the_command_runs_on() -> Result<()> {
    node::run(|| {
        let sleeper = Sleeper::start()?;
        let flood = "head -c 20000000 /dev/zero | tr '\\0' a";
        for (script, name) in [
            (format!("{flood} & {flood} >&2; wait; : > /dev/shm/both; exit 7"), "both"),
            (format!("{flood}; : > /dev/shm/one; exit 7"), "one"),
        ] {
            // The client takes 16 MiB with the framing, as kubelet does.
            let reply = sleeper.exec(&script, 60)?;
            ensure!(reply.exit_code == 7, "{name}: {}", reply.exit_code);
            let total = reply.stdout.len() + reply.stderr.len();
            ensure!(total == 15 << 20, "{name}: {total} bytes");
            ensure!(reply.stdout.iter().chain(&reply.stderr).all(|byte| *byte == b'a'), "{name}");
            let ended = sleeper.exec(&format!("test -e /dev/shm/{name}"), 10)?;
            ensure!(ended.exit_code == 0, "{name}: the command did not come to its end");
        }
        sleeper.end()
    })
}

#[test]
fn a_time_limit_ends_all_that_the_command_has_started() -> Result<()> {
    node::run(|| {
        let sleeper = Sleeper::start()?;
        // Grandchildren whose parent has gone, one of them in a session of its own.
        let script =
            "(setsid sh -c 'sleep 777 & exec sleep 778' &); (sleep 779 &); echo started; trap '' TERM; sleep 780; sleep 781";
        let begun = Instant::now();
        let error = sleeper.exec(script, 1).expect_err("it takes longer");
        let (took, left) = (begun.elapsed(), command_lines(&sleeper.leaf));
        ensure!(error.code() == Code::DeadlineExceeded, "{error}");
        ensure!(!left.iter().any(|line| line.contains("sleep 781")), "the command lives when it is said to be killed: {left:?}");
        ensure!(took >= Duration::from_secs(1) && took < LONG, "{took:?}");
        sleeper.end()
    })
}

#[test]
fn what_a_command_leaves_in_the_background_holds_up_nothing() -> Result<()> {
    node::run(|| {
        let sleeper = Sleeper::start()?;
        // It holds the pipes and is silent, or it never ceases to write.
        for (script, left) in
            [("echo out; echo err >&2; sleep 777 & exit 3", true), ("echo out; echo err >&2; yes & exit 3", false)]
        {
            for timeout in [0, 60] {
                let begun = Instant::now();
                let reply = sleeper.exec(script, timeout)?;
                let took = begun.elapsed();
                ensure!(took < LONG, "{script}: {took:?}");
                ensure!(
                    reply.exit_code == 3 && reply.stdout.starts_with(b"out\n") && reply.stderr == b"err\n",
                    "{script}: {reply:?}"
                );
                if left {
                    // It executes its program a moment after the shell has gone.
                    let kept = || Ok(command_lines(&sleeper.leaf).contains(&"sleep 777".to_owned()).then_some(()));
                    wait::until("what it put into the background lives on", kept)?;
                    // Once the process has ended, nothing of the exec is left in the daemon.
                    let after = Snapshot::take(&sleeper.ground.daemon)?.without("cgroup");
                    sleeper.running.clone().without("cgroup").expect_same(&after)?;
                    // The container's own process is the first of its namespace, which ignores the signal.
                    ensure!(sleeper.exec("killall sleep", 10)?.exit_code == 0);
                }
            }
        }
        sleeper.end()
    })
}
