//! The daemon under a service manager, whose part the test plays: readiness, the watchdog, and a socket that is passed. And what it does
//! when nobody asks for anything.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixDatagram, UnixListener},
        },
    },
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    node,
    process::Process,
    wait::until_within,
};
use windlass_proto::cri::VersionRequest;

/// What the manager asks for: a sign of life at least so often.
const WATCHDOG: Duration = Duration::from_secs(6);
/// Longest wait for what the daemon is expected to say.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was told within `limit`; an empty text if nothing was.
fn told(manager: &UnixDatagram, limit: Duration) -> Result<String> {
    let mut bytes = [0; 512];
    manager.set_read_timeout(Some(limit))?;
    Ok(manager.recv(&mut bytes).map(|length| String::from_utf8_lossy(&bytes[..length]).trim().to_owned()).unwrap_or_default())
}

#[test]
fn the_watchdog_hears_of_a_daemon_only_while_it_answers() -> Result<()> {
    node::run(|| {
        let mut daemon = Daemon::prepare(&[])?;
        let address = daemon.path("notify");
        let manager = UnixDatagram::bind(&address)?;
        daemon.environment =
            vec![("NOTIFY_SOCKET", address.to_string_lossy().into_owned()), ("WATCHDOG_USEC", WATCHDOG.as_micros().to_string())];
        daemon.serve()?;
        ensure!(told(&manager, PATIENCE)? == "READY=1");
        let start = Instant::now();
        for _ in 0..4 {
            let said = told(&manager, WATCHDOG)?;
            ensure!(said == "WATCHDOG=1", "{said:?} within the limit\n{}", daemon.log());
        }
        ensure!(start.elapsed() > WATCHDOG, "signs of life without pause");

        // It lives, but nobody can reach it.
        let away = daemon.path("away");
        fs::rename(daemon.socket(), &away)?;
        let start = Instant::now();
        while !told(&manager, WATCHDOG)?.is_empty() {
            ensure!(start.elapsed() < PATIENCE, "a daemon that does not answer says that it lives");
        }
        until_within(PATIENCE, "the log", || Ok(daemon.log().contains("does not answer itself").then_some(())))?;
        fs::rename(&away, daemon.socket())?;
        ensure!(told(&manager, PATIENCE)? == "WATCHDOG=1");

        daemon.stop()?;
        let mut said = told(&manager, WATCHDOG)?;
        while said == "WATCHDOG=1" {
            said = told(&manager, WATCHDOG)?;
        }
        ensure!(said == "STOPPING=1", "{said:?}");
        Ok(())
    })
}

/// Starts the daemon with `listener` as systemd would pass it: descriptor 3, and the daemon's own process id.
fn serve_passed(daemon: &Daemon, listener: &UnixListener) -> Result<Process> {
    let serve = daemon.command(&["serve"])?;
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec 3<&0 0</dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$@\"", "sh"]);
    shell.arg(serve.get_program()).args(serve.get_args());
    let log = fs::File::options().create(true).append(true).open(daemon.path("log"))?;
    shell.stdin(Stdio::from(OwnedFd::from(listener.try_clone()?))).stdout(Stdio::null()).stderr(log);
    Ok(shell.spawn().context("start windlass with a socket")?.into())
}

#[test]
fn a_socket_that_is_passed_outlives_the_daemon() -> Result<()> {
    node::run(|| {
        let daemon = Daemon::prepare(&[])?;
        fs::create_dir_all(daemon.state())?;
        let listener = UnixListener::bind(daemon.socket())?;
        fs::set_permissions(daemon.socket(), fs::Permissions::from_mode(0o660))?;
        // The first call comes before there is a daemon, and waits for it.
        for round in 1..=2 {
            let mut process = serve_passed(&daemon, &listener)?;
            let answered = Client::connect(&daemon).and_then(|client| Ok(client.version(VersionRequest::default())?));
            let status = process.terminate(PATIENCE)?;
            answered.with_context(|| format!("round {round}\n{}", daemon.log()))?;
            ensure!(status.success(), "ended with {status}\n{}", daemon.log());
            ensure!(daemon.socket().exists(), "the manager's socket was removed");
        }
        Ok(())
    })
}

/// How often the threads of a process have gone to sleep (proc_pid_status(5)): once for each time that one of them was woken.
fn sleeps(process: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).context("a count")?;
        sum += count.trim().parse::<u64>()?;
    }
    Ok(sum)
}

#[test]
fn a_node_at_rest_does_nothing() -> Result<()> {
    const REST: Duration = Duration::from_secs(2);
    node::run(|| {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let main = client.create(&id, &config, &container(&config, "main", &["sleep", "100000"]))?;
        client.start(&main)?;
        // Its connection would have a ping now and then.
        drop(client);
        let mut processes: Vec<u32> = daemon.monitors().into_iter().map(i32::cast_unsigned).collect();
        processes.extend(daemon.pid());
        ensure!(processes.len() == 2, "{processes:?}");
        let look = || processes.iter().map(|process| sleeps(*process)).collect::<Result<Vec<_>>>();
        let mut woken = Vec::new();
        let rested = until_within(Duration::from_secs(60), "two seconds in which nothing wakes", || {
            let before = look()?;
            std::thread::sleep(REST);
            woken = look()?.into_iter().zip(before).map(|(after, before)| after - before).collect();
            Ok(woken.iter().all(|count| *count == 0).then_some(()))
        });
        rested.with_context(|| format!("woken so often, monitor and daemon: {woken:?}"))?;
        Ok(Client::connect(&daemon)?.remove(&id)?)
    })
}
