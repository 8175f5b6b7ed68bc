//! Traces of a pod's life, as a collector with OpenTelemetry's own types takes them, and pods that run although no collector does.

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use tonic::transport::Endpoint;
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    go, node,
    process::Process,
    prometheus::Scrape,
    wait::until,
};
use windlass_proto::cri::{self, runtime_service_client::RuntimeServiceClient};

const COLLECTOR: &str = "127.0.0.1:4317";
const METRICS: &str = "127.0.0.1:9099";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

/// A span as the collector wrote it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Span {
    trace: String,
    #[serde(rename = "ID")]
    id: String,
    parent: String,
    name: String,
    kind: String,
    error: String,
    begin: u64,
    end: u64,
    attributes: Map<String, Value>,
    resource: Map<String, Value>,
}

/// Ends with its value.
struct Collector {
    _process: Process,
    file: PathBuf,
}

impl Collector {
    fn start(program: &Path, file: PathBuf) -> Result<Collector> {
        let process =
            Command::new(program).arg(COLLECTOR).arg(&file).stdin(Stdio::null()).spawn().context("start the collector")?;
        let collector = Collector { _process: process.into(), file };
        until("the collector listens", || Ok(TcpStream::connect(COLLECTOR).ok()))?;
        Ok(collector)
    }

    fn spans(&self) -> Result<Vec<Span>> {
        let text = fs::read_to_string(&self.file)?;
        // The last line may not be whole yet.
        text.split_inclusive('\n').filter(|line| line.ends_with('\n')).map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Waits until a span of this name is there; gives all.
    fn with(&self, name: &str) -> Result<Vec<Span>> {
        until(name, || Ok(Some(self.spans()?).filter(|spans| spans.iter().any(|span| span.name == name))))
    }
}

fn one<'a>(spans: &'a [Span], name: &str) -> Result<&'a Span> {
    let found: Vec<&Span> = spans.iter().filter(|span| span.name == name).collect();
    let [span] = found[..] else { anyhow::bail!("{} spans are named {name:?}: {spans:#?}", found.len()) };
    Ok(span)
}

fn daemon(tracing: &str) -> Result<Daemon> {
    let tracing = format!("[tracing]\notlp_endpoint = \"http://{COLLECTOR}\"\n{tracing}");
    Daemon::configured(&format!("[metrics]\naddress = {METRICS:?}\n{tracing}"))
}

/// Runs a pod as a caller does who traces; returns its id.
fn run_traced(daemon: &Daemon, config: &cri::PodSandboxConfig, flags: &str) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let endpoint = Endpoint::from_shared(format!("unix://{}", daemon.socket().display()))?;
    runtime.block_on(async {
        let mut client = RuntimeServiceClient::new(endpoint.connect().await?);
        let run = cri::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let mut request = tonic::Request::new(run);
        request.metadata_mut().insert("traceparent", format!("00-{TRACE}-{CALLER}-{flags}").parse()?);
        Ok(client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id)
    })
}

fn pull_absent(client: &Client) {
    let absent = cri::ImageSpec { image: "127.0.0.1:9/none:1".into(), ..Default::default() };
    let _ = client.pull_image(cri::PullImageRequest { image: Some(absent), ..Default::default() });
}

#[test]
fn a_pods_life_is_a_tree_of_spans() {
    let program = go::collector().expect("a collector");
    node::run(move || {
        let mut daemon = daemon("")?;
        let collector = Collector::start(&program, daemon.path("spans"))?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = run_traced(&daemon, &config, "01")?;
        let created = client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&created)?;
        client.stop(&created, 1)?;
        pull_absent(&client);
        client.remove(&id)?;
        let spans = collector.with("RemovePodSandbox")?;

        let called = one(&spans, "RunPodSandbox")?;
        ensure!(called.trace == TRACE && called.parent == CALLER && called.kind == "SPAN_KIND_SERVER", "{called:?}");
        ensure!(called.attributes["rpc.method"] == "runtime.v1.RuntimeService/RunPodSandbox", "{called:?}");
        ensure!(called.attributes["rpc.grpc.status_code"] == 0 && called.error.is_empty(), "{called:?}");
        ensure!(called.resource["service.name"] == "windlass", "{called:?}");
        let run = one(&spans, "run")?;
        let name = config.metadata.clone().context("metadata")?.name;
        ensure!(run.attributes["windlass.pod.id"] == id.as_str() && run.attributes["k8s.pod.name"] == name.as_str(), "{run:?}");
        ensure!(run.attributes["k8s.namespace.name"] == "test", "{run:?}");
        let set_up = one(&spans, "monitor: set up")?;
        for (below, above) in [
            ("run", "RunPodSandbox"),
            ("pod", "run"),
            ("pod_monitor", "run"),
            ("pod_network", "run"),
            ("monitor: set up", "run"),
            ("create", "CreateContainer"),
            ("container_bundle", "create"),
            ("container_build", "create"),
            ("monitor: create", "create"),
            ("container_start", "StartContainer"),
            ("monitor: start", "StartContainer"),
            ("wait for the end", "StopContainer"),
            ("pull", "PullImage"),
            ("resolve", "pull"),
        ] {
            let (below, above) = (one(&spans, below)?, one(&spans, above)?);
            ensure!(below.parent == above.id && below.trace == above.trace, "{} is not below {}", below.name, above.name);
            ensure!(above.begin <= below.begin && below.begin <= below.end && below.end <= above.end, "{below:?} in {above:?}");
        }
        ensure!(set_up.trace == TRACE, "{set_up:?}");
        // A caller without a trace begins one.
        let create = one(&spans, "CreateContainer")?;
        ensure!(create.parent.is_empty() && create.trace != TRACE, "{create:?}");
        let (pulled, pull) = (one(&spans, "PullImage")?, one(&spans, "pull")?);
        ensure!(
            pulled.error.starts_with("STATUS_CODE_ERROR") && pull.attributes["image"] == "127.0.0.1:9/none:1",
            "{pulled:?} {pull:?}"
        );

        // Who sends a trace has decided about it, and the log mentions no span that only traces want.
        let other = pod(&daemon.path("logs"));
        let second = run_traced(&daemon, &other, "00")?;
        client.remove(&second)?;
        until("the second removal", || {
            Ok((collector.spans()?.iter().filter(|span| span.name == "RemovePodSandbox").count() == 2).then_some(()))
        })?;
        one(&collector.spans()?, "RunPodSandbox")?;
        ensure!(!daemon.log().contains("rpc{") && !daemon.log().contains("traceparent"), "{}", daemon.log());
        let scrape = Scrape::take(METRICS)?;
        let (exported, dropped) = (scrape.value(&spans_of("exported")), scrape.value(&spans_of("dropped")));
        ensure!(exported >= spans.len() as f64 && dropped == 0.0, "{exported} exported, {dropped} dropped");
        daemon.stop()
    })
    .expect("spans of a pod's life");
}

fn spans_of(outcome: &str) -> String {
    format!("windlass_trace_spans_total{{outcome=\"{outcome}\"}}")
}

#[test]
fn a_collector_that_is_absent_or_hangs_holds_up_nothing() {
    let program = go::collector().expect("a collector");
    node::run(move || {
        let mut daemon = daemon("")?;
        let client = Client::connect(&daemon)?;
        let life = || -> Result<Duration> {
            let began = Instant::now();
            let id = client.run(&pod(&daemon.path("logs")))?;
            client.remove(&id)?;
            Ok(began.elapsed())
        };
        let dropped = |least: f64| {
            until("spans are dropped and counted", || {
                Ok(Some(Scrape::take(METRICS)?.value(&spans_of("dropped"))).filter(|count| *count >= least))
            })
        };
        life()?;
        let absent = dropped(1.0)?;
        ensure!(daemon.log().matches("spans not exported").count() == 1, "{}", daemon.log());
        // One that takes the connection and says nothing. More calls than the queue has room for.
        let silent = TcpListener::bind(COLLECTOR)?;
        let took = life()?;
        ensure!(took < Duration::from_secs(60), "a pod took {took:?}");
        for _ in 0..3000 {
            client.version(cri::VersionRequest::default())?;
        }
        dropped(absent + 500.0)?;
        drop(silent);
        // A collector that comes is found, after the call that hangs.
        let collector = Collector::start(&program, daemon.path("spans"))?;
        until("spans of a collector that came late", || {
            client.version(cri::VersionRequest::default())?;
            std::thread::sleep(Duration::from_millis(50));
            Ok(collector.spans()?.iter().any(|span| span.name == "Version").then_some(()))
        })?;
        drop(collector);
        let began = Instant::now();
        daemon.stop()?;
        ensure!(began.elapsed() < Duration::from_secs(60), "the end took {:?}", began.elapsed());
        Ok(())
    })
    .expect("pods without a collector");
}

#[test]
fn a_ratio_samples_and_wrong_settings_are_named() {
    let program = go::collector().expect("a collector");
    node::run(move || {
        let mut daemon = daemon("sampling_ratio = 0.25\n")?;
        let collector = Collector::start(&program, daemon.path("spans"))?;
        let client = Client::connect(&daemon)?;
        for _ in 0..400 {
            client.version(cri::VersionRequest::default())?;
        }
        daemon.stop()?;
        let count = collector.spans()?.len();
        ensure!((50..160).contains(&count), "{count} of 400");
        let path = daemon.path("config.toml");
        let config = fs::read_to_string(&path)?;
        for (wrong, what) in
            [("sampling_ratio = 2.0", "sampling_ratio: 2 is not from 0 to 1"), ("sampling_ratio = \"x\"", "sampling_ratio")]
        {
            fs::write(&path, config.replace("sampling_ratio = 0.25", wrong))?;
            let refused = daemon.serve().err().context("it serves")?;
            ensure!(format!("{refused:#}").contains(what), "{refused:#}");
        }
        fs::write(&path, config.replace("http://", "https://"))?;
        let refused = daemon.serve().err().context("it serves")?;
        ensure!(format!("{refused:#}").contains("tracing.otlp_endpoint \"https://"), "{refused:#}");
        Ok(())
    })
    .expect("settings of traces");
}
