//! Exec and port-forward by the clients of Kubernetes, client-go's, against a real daemon and real containers; what is left afterwards.

use anyhow::{Result, ensure};
use std::time::{Duration, Instant};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    go,
    leak::Snapshot,
    node,
    streams::{SPDY, WEBSOCKET, client},
};
use windlass_proto::cri;

/// Longest wait for what a client left to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(60);

struct Running {
    daemon: Daemon,
    client: Client,
    pod: String,
    container: String,
}

impl Running {
    fn start() -> Result<Running> {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let container = client.create(&id, &config, &container(&config, "main", &["/probe", "echo", "80"]))?;
        client.start(&container)?;
        // Listens as soon as its log says so.
        let deadline = Instant::now() + GONE_LIMIT;
        let log = std::path::Path::new(&config.log_directory).join("main.log");
        while !std::fs::read_to_string(&log).unwrap_or_default().contains("listening") {
            ensure!(Instant::now() < deadline, "the container does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Running { daemon, client, pod: id, container })
    }

    fn exec(&self, command: &[&str], stdin: bool) -> Result<String> {
        let request = cri::ExecRequest {
            container_id: self.container.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            stdin,
            stdout: true,
            ..Default::default()
        };
        Ok(self.client.exec_url(request)?)
    }

    fn execs(&self, count: usize, command: &[&str], stdin: bool) -> Result<String> {
        let urls: Result<Vec<String>> = (0..count).map(|_| self.exec(command, stdin)).collect();
        Ok(urls?.join("\n"))
    }

    fn forward(&self) -> Result<String> {
        let request = cri::PortForwardRequest { pod_sandbox_id: self.pod.clone(), port: vec![80] };
        Ok(self.client.port_forward(request)?.url)
    }

    /// What the daemon has must become what it was.
    fn becomes(&self, before: &Snapshot) -> Result<()> {
        let deadline = Instant::now() + GONE_LIMIT;
        loop {
            let same = before.expect_again(&self.daemon);
            let processes = self.client.exec(&self.container, &["sh", "-c", "ls -d /proc/[0-9]* | wc -l"])?;
            let alone = String::from_utf8_lossy(&processes.stdout).trim() == "4";
            if same.is_ok() && alone {
                return Ok(());
            }
            if Instant::now() > deadline {
                same?;
                ensure!(alone, "processes in the container: {}", String::from_utf8_lossy(&processes.stdout));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn end(mut self) -> Result<()> {
        self.client.remove(&self.pod)?;
        drop(self.client);
        self.daemon.stop()
    }
}

#[test]
fn a_gigabyte_through_an_exec_is_the_same_at_each_end() -> Result<()> {
    go::streams()?;
    node::run(|| {
        let running = Running::start()?;
        let before = Snapshot::take(&running.daemon)?;
        for (transport, bytes) in [(SPDY, 1u64 << 30), (WEBSOCKET, 256 << 20)] {
            let size = bytes.to_string();
            let flags = [transport, &["-stdin", "-bytes", &size]].concat();
            let there = client(&flags, &["exec", &running.exec(&["sha256sum"], true)?], "")?;
            let sum = there["sent"]["sha256"].as_str().unwrap_or_default();
            ensure!(there["sent"]["bytes"] == bytes && there["code"] == 0, "{transport:?}: {there}");
            ensure!(there["stdout"]["head"] == format!("{sum}  -\n"), "{transport:?}: {there}");
            let both = client(&flags, &["exec", &running.exec(&["cat"], true)?], "")?;
            ensure!(both["sent"] == there["sent"] && both["stdout"]["sha256"] == sum, "{transport:?}: {both}");
            println!("{transport:?}: {bytes} bytes to sha256sum in {} s, through cat in {} s", there["seconds"], both["seconds"]);
        }
        running.becomes(&before)?;
        running.end()
    })
}

#[test]
fn a_thousand_execs_and_cut_connections_leave_nothing() -> Result<()> {
    go::streams()?;
    node::run(|| {
        let running = Running::start()?;
        let before = Snapshot::take(&running.daemon)?;
        for transport in [SPDY, WEBSOCKET] {
            let urls = running.execs(500, &["sh", "-c", "echo out; exit 3"], false)?;
            let found = client(&[transport, &["-parallel", "8"]].concat(), &["execs"], &urls)?;
            ensure!(found["codes"]["3"] == 500 && found["outputs"]["out\n"] == 500, "{transport:?}: {found}");
            println!("{transport:?}: 500 execs in {} s", found["seconds"]);
            // The second never reads, so that its client's end comes behind bytes that nobody takes.
            for (command, stdin) in [("sleep 1000", false), ("sleep 1001", true), ("cat", true), ("yes", false)] {
                let endless: &[&str] = if stdin { &["-stdin", "-bytes", "1000000000000"] } else { &[] };
                let command: Vec<&str> = command.split(' ').collect();
                let urls = running.execs(30, &command, stdin)?;
                // Over SPDY client-go does not tell a cut connection from an end that was well.
                client(&[transport, &["-parallel", "8"], endless].concat(), &["cut"], &urls)?;
                running.becomes(&before)?;
            }
        }
        running.end()
    })
}

#[test]
fn two_hundred_forwarded_connections_carry_what_they_should() -> Result<()> {
    go::streams()?;
    node::run(|| {
        let running = Running::start()?;
        let before = Snapshot::take(&running.daemon)?;
        for transport in [SPDY, WEBSOCKET] {
            let flags = [transport, &["-port", "80", "-connections", "200", "-bytes", "300000"]].concat();
            let found = client(&flags, &["forward", &running.forward()?], "")?;
            ensure!(found["same"] == 200 && found["said"] == "", "{transport:?}: {found}");
            println!("{transport:?}: 200 connections in {} s", found["seconds"]);
            let found = client(&[transport, &["-port", "81", "-error"]].concat(), &["forward", &running.forward()?], "")?;
            ensure!(found["said"].as_str().is_some_and(|said| said.contains("refused")), "{transport:?}: {found}");
        }
        running.becomes(&before)?;
        running.end()
    })
}
