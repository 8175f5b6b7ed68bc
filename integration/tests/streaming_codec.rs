//! The streaming server under the clients of Kubernetes, client-go's, by SPDY and by WebSocket. What the streams lead to is the test's own.

use anyhow::{Context, Result, ensure};
use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};
use windlass::{
    config::StreamingConfig,
    error::Error,
    streaming::{Ending, Handler, Server, Streams, Target, Wanted},
};
use windlass_integration::{
    go,
    streams::{SPDY, WEBSOCKET, client},
};

/// Longest wait for handlers to see that their client has gone.
const GONE_LIMIT: Duration = Duration::from_secs(60);

const WEBSOCKET_V4: &[&str] = &["-transport", "websocket", "-protocol", "v4.channel.k8s.io"];

/// Commands that are nothing but their streams, and one port that echoes.
#[derive(Default)]
struct Echo {
    running: AtomicUsize,
    port: u16,
}

impl Echo {
    async fn command(&self, command: &[&str], mut streams: Streams) -> std::io::Result<Ending> {
        match command {
            ["cat"] => {
                if let (Some(mut stdin), Some(mut stdout)) = (streams.stdin.take(), streams.stdout.take()) {
                    let mut buffer = vec![0; 64 << 10];
                    loop {
                        let count = stdin.read(&mut buffer).await?;
                        if count == 0 {
                            break;
                        }
                        stdout.write_all(&buffer[..count]).await?;
                    }
                    stdout.shutdown().await?;
                }
            }
            ["say", code] => {
                for (output, text) in [(&mut streams.stdout, "out"), (&mut streams.stderr, "err")] {
                    if let Some(output) = output {
                        output.write_all(text.as_bytes()).await?;
                    }
                }
                return Ok(Ending::Exited(code.parse().unwrap_or(-1)));
            }
            ["size"] => {
                let size = match &mut streams.resize {
                    Some(sizes) => sizes.recv().await,
                    None => None,
                };
                if let (Some(size), Some(stdout)) = (size, &mut streams.stdout) {
                    stdout.write_all(format!("{}x{}", size.width, size.height).as_bytes()).await?;
                }
            }
            ["wait"] => {
                streams.gone.cancelled().await;
                return Ok(Ending::Detached);
            }
            other => return Ok(Ending::Failed(Error::not_found(format!("start {other:?}: no such program")))),
        }
        Ok(Ending::Exited(0))
    }
}

#[tonic::async_trait]
impl Handler for Echo {
    async fn exec(&self, _: &str, command: Vec<String>, _: bool, streams: Streams) -> Ending {
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        self.running.fetch_add(1, SeqCst);
        let ending = self.command(&command, streams).await;
        self.running.fetch_sub(1, SeqCst);
        ending.unwrap_or_else(|error| Ending::Failed(Error::io("copy", error)))
    }

    async fn attach(&self, _: &str, _: bool, mut streams: Streams) -> Ending {
        if let Some(stdout) = &mut streams.stdout {
            let _ = stdout.write_all(b"attached").await;
        }
        Ending::Detached
    }

    async fn dial(&self, _: &str, port: u16) -> windlass::error::Result<TcpStream> {
        let failed = |error| Error::io(format_args!("connect to port {port}"), error);
        // Port 7 is that of the echo service.
        TcpStream::connect(("127.0.0.1", if port == 7 { self.port } else { 1 })).await.map_err(failed)
    }
}

async fn echo(mut socket: TcpStream) {
    let (mut input, mut output) = socket.split();
    let _ = copy(&mut input, &mut output).await;
    let _ = output.shutdown().await;
}

struct Harness {
    runtime: Runtime,
    server: Server,
    handler: Arc<Echo>,
}

impl Harness {
    fn start(config: StreamingConfig) -> Result<Harness> {
        // Before there is a URL, which is good for a minute.
        go::streams()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let (server, handler) = runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let handler = Arc::new(Echo { running: AtomicUsize::new(0), port: listener.local_addr()?.port() });
            tokio::spawn(async move {
                while let Ok((socket, _)) = listener.accept().await {
                    tokio::spawn(echo(socket));
                }
            });
            anyhow::Ok((Server::start(&config, handler.clone()).await?, handler))
        })?;
        Ok(Harness { runtime, server, handler })
    }

    fn exec(&self, command: &[&str], wanted: Wanted) -> Result<String> {
        let command = command.iter().map(|&word| word.to_owned()).collect();
        Ok(self.server.url(Target::Exec { container_id: "c".into(), command, wanted })?)
    }

    fn forward(&self) -> Result<String> {
        Ok(self.server.url(Target::PortForward { pod_id: "p".into(), ports: Vec::new() })?)
    }

    /// Waits until no handler runs.
    fn idle(&self) -> Result<()> {
        let deadline = Instant::now() + GONE_LIMIT;
        while self.handler.running.load(SeqCst) > 0 {
            ensure!(Instant::now() < deadline, "{} handlers still run", self.handler.running.load(SeqCst));
            self.runtime.block_on(tokio::task::yield_now());
            std::thread::yield_now();
        }
        Ok(())
    }
}

const OUT: Wanted = Wanted { stdin: false, stdout: true, stderr: false, tty: false };

/// `bytes` through `cat` come back the same.
fn passes(harness: &Harness, transport: &[&str], bytes: u64) -> Result<()> {
    let url = harness.exec(&["cat"], Wanted { stdin: true, ..OUT })?;
    let found = client(&[transport, &["-stdin", "-bytes", &bytes.to_string()]].concat(), &["exec", &url], "")?;
    ensure!(found["code"] == 0 && found["sent"]["bytes"] == bytes, "{transport:?}: {found}");
    for name in ["bytes", "sha256"] {
        ensure!(found["sent"][name] == found["stdout"][name], "{transport:?}: {found}");
    }
    println!("{transport:?}: {:.0} MB/s each way", bytes as f64 / 1e6 / found["seconds"].as_f64().unwrap_or(f64::NAN));
    harness.idle()
}

#[test]
fn a_gigabyte_goes_through_and_comes_back_the_same() -> Result<()> {
    let harness = Harness::start(StreamingConfig::default())?;
    passes(&harness, SPDY, 1 << 30)?;
    passes(&harness, WEBSOCKET, 256 << 20)?;
    passes(&harness, WEBSOCKET, 0)
}

#[test]
fn bytes_pass_over_tls() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=node", "-addext", "subjectAltName=IP:127.0.0.1", "-out"])
        .arg(at("certificate"))
        .arg("-keyout")
        .arg(at("key"))
        .output()
        .context("run openssl")?;
    ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
    let config = StreamingConfig { tls_certificate: at("certificate"), tls_key: at("key"), ..StreamingConfig::default() };
    let harness = Harness::start(config)?;
    ensure!(harness.forward()?.starts_with("https://127.0.0.1:"));
    for transport in [SPDY, WEBSOCKET] {
        passes(&harness, &[transport, &["-insecure"]].concat(), 16 << 20)?;
    }
    Ok(())
}

#[test]
fn endings_outputs_and_sizes_arrive() -> Result<()> {
    let harness = Harness::start(StreamingConfig::default())?;
    for transport in [SPDY, WEBSOCKET, WEBSOCKET_V4] {
        for code in ["0", "7", "255"] {
            let url = harness.exec(&["say", code], Wanted { stderr: true, ..OUT })?;
            let found = client(&[transport, &["-stderr"]].concat(), &["exec", &url], "")?;
            ensure!(found["code"] == code.parse::<i32>()?, "{transport:?}: {found}");
            ensure!(found["stdout"]["head"] == "out" && found["stderr"]["head"] == "err", "{transport:?}: {found}");
        }
        let found = client(transport, &["exec", &harness.exec(&["absent"], OUT)?], "")?;
        ensure!(found["error"].as_str().is_some_and(|error| error.contains("no such program")), "{transport:?}: {found}");
        let url = harness.exec(&["size"], Wanted { tty: true, ..OUT })?;
        let found = client(&[transport, &["-tty"]].concat(), &["exec", &url], "")?;
        ensure!(found["stdout"]["head"] == "132x43", "{transport:?}: {found}");
        let url = harness.server.url(Target::Attach { container_id: "c".into(), wanted: OUT })?;
        let found = client(transport, &["exec", &url], "")?;
        ensure!(found["stdout"]["head"] == "attached" && found["code"] == 0, "{transport:?}: {found}");
        let again = client(transport, &["exec", &url], "")?;
        ensure!(again["code"] == -1, "a URL was used twice: {again}");
    }
    harness.idle()
}

#[test]
fn a_thousand_short_execs_all_end_well() -> Result<()> {
    let harness = Harness::start(StreamingConfig::default())?;
    for transport in [SPDY, WEBSOCKET] {
        let urls: Result<Vec<String>> = (0..500).map(|_| harness.exec(&["say", "3"], OUT)).collect();
        let found = client(&[transport, &["-parallel", "16"]].concat(), &["execs"], &urls?.join("\n"))?;
        ensure!(found["codes"]["3"] == 500 && found["outputs"]["out"] == 500, "{transport:?}: {found}");
        println!("{transport:?}: {} s for 500 execs", found["seconds"]);
    }
    harness.idle()
}

#[test]
fn connections_that_are_cut_leave_nothing_running() -> Result<()> {
    let harness = Harness::start(StreamingConfig::default())?;
    for transport in [SPDY, WEBSOCKET] {
        for (command, stdin) in [(["wait"], false), (["cat"], true)] {
            let urls: Result<Vec<String>> = (0..100).map(|_| harness.exec(&command, Wanted { stdin, ..OUT })).collect();
            let endless: &[&str] = if stdin { &["-stdin", "-bytes", "1000000000000"] } else { &[] };
            let flags = [transport, &["-parallel", "16"], endless].concat();
            // Over SPDY client-go does not tell a cut connection from an end that was well.
            client(&flags, &["cut"], &urls?.join("\n"))?;
            harness.idle()?;
        }
    }
    Ok(())
}

#[test]
fn two_hundred_connections_are_forwarded_at_once() -> Result<()> {
    let harness = Harness::start(StreamingConfig::default())?;
    for transport in [SPDY, WEBSOCKET] {
        let flags = [transport, &["-port", "7", "-connections", "200", "-bytes", "300000"]].concat();
        let found = client(&flags, &["forward", &harness.forward()?], "")?;
        ensure!(found["same"] == 200 && found["said"] == "", "{transport:?}: {found}");
        println!("{transport:?}: {} s for 200 connections", found["seconds"]);
        let found = client(&[transport, &["-port", "9", "-error"]].concat(), &["forward", &harness.forward()?], "")?;
        ensure!(found["said"].as_str().is_some_and(|said| said.contains("connect to port 9")), "{transport:?}: {found}");
    }
    Ok(())
}
