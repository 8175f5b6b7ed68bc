//! The daemon's own metrics: a scrape is what Prometheus reads, and counters move with what happened.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    node,
    prometheus::{self, Scrape},
};
use windlass_proto::cri;

const ADDRESS: &str = "127.0.0.1:9099";

fn daemon() -> Result<(Daemon, Client)> {
    let mut daemon = Daemon::start(&[])?;
    ensure!(TcpStream::connect(ADDRESS).is_err(), "metrics are served though nobody asked for them");
    daemon.stop()?;
    daemon.configure(&format!("[metrics]\naddress = {ADDRESS:?}\n"))?;
    daemon.serve()?;
    let client = Client::connect(&daemon)?;
    Ok((daemon, client))
}

/// Waits until a series has this value: events come a moment after the calls that cause them.
fn becomes(series: &str, value: f64) -> Result<Scrape> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let scrape = Scrape::take(ADDRESS)?;
        if scrape.value(series) == value {
            return Ok(scrape);
        }
        ensure!(Instant::now() < deadline, "{series} is {}, not {value}", scrape.value(series));
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn calls(method: &str, code: &str) -> String {
    format!("windlass_rpc_duration_seconds_count{{method=\"{method}\",code=\"{code}\"}}")
}

fn phase(name: &str) -> String {
    format!("windlass_phase_duration_seconds_count{{phase=\"{name}\"}}")
}

#[test]
fn counters_move_as_they_must() {
    node::run(|| {
        let (mut daemon, client) = daemon()?;
        let fresh = Scrape::take(ADDRESS)?;
        ensure!(fresh.value(&phase("pod")) == 0.0 && fresh.has("windlass_build_info{version=\"0.1.0\"}"));
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let created = client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&created)?;
        ensure!(client.container("ffff").is_err());
        let running = Scrape::take(ADDRESS)?;
        for (series, expected) in [
            (calls("RunPodSandbox", "Ok"), 1.0),
            (calls("CreateContainer", "Ok"), 1.0),
            (calls("ContainerStatus", "NotFound"), 1.0),
            (phase("pod"), 1.0),
            (phase("pod_monitor"), 1.0),
            (phase("pod_network"), 1.0),
            (phase("container_bundle"), 1.0),
            (phase("container_build"), 1.0),
            (phase("container_start"), 1.0),
            ("windlass_pods{state=\"ready\"}".to_owned(), 1.0),
            ("windlass_containers{state=\"running\"}".to_owned(), 1.0),
            ("windlass_monitors".to_owned(), 1.0),
            ("windlass_container_exits_total".to_owned(), 0.0),
            ("windlass_operations".to_owned(), 0.0),
            ("windlass_event_followers".to_owned(), 0.0),
        ] {
            ensure!(running.value(&series) == expected, "{series} is {}, not {expected}", running.value(&series));
        }
        let sum = |name: &str| running.value(&format!("windlass_phase_duration_seconds_sum{{phase=\"{name}\"}}"));
        ensure!(sum("pod") > 0.0 && sum("pod") >= sum("pod_monitor") + sum("pod_network"), "phases are parts of the whole");
        let pid = daemon.pid().context("it runs")?;
        let open = fs::read_dir(format!("/proc/{pid}/fd"))?.count() as f64;
        ensure!((running.value("process_open_fds") - open).abs() < 10.0, "{open} descriptors");
        ensure!(running.value("process_resident_memory_bytes") > 1e6 && running.value("process_threads") > 1.0);

        let absent = cri::ImageSpec { image: "127.0.0.1:9/none:1".into(), ..Default::default() };
        ensure!(client.pull_image(cri::PullImageRequest { image: Some(absent), ..Default::default() }).is_err());
        becomes("windlass_image_pulls_total{outcome=\"failure\"}", 1.0)?;
        client.stop(&created, 0)?;
        becomes("windlass_container_exits_total", 1.0)?;
        // A monitor that is lost is a repair, and so is one that a new daemon finds lost.
        for monitor in daemon.monitors() {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(monitor), nix::sys::signal::Signal::SIGKILL)?;
        }
        let lost = becomes("windlass_repairs_total{what=\"lost_monitor\"}", 1.0)?;
        ensure!(lost.value("windlass_monitors") == 0.0 && lost.value("windlass_repairs_total{what=\"unfinished_pod\"}") == 0.0);
        client.remove(&id)?;
        daemon.kill9()?;
        daemon.serve()?;
        let again = Scrape::take(ADDRESS)?;
        ensure!(
            again.value("windlass_repairs_total{what=\"lost_monitor\"}") == 0.0
                && again.value("windlass_pods{state=\"ready\"}") == 0.0
        );
        Ok(())
    })
    .expect("metrics of the daemon");
}

#[test]
fn the_endpoint_answers_only_what_it_should() {
    node::run(|| {
        let (mut daemon, _client) = daemon()?;
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\ncontent-length: 0\r\n\r\n", "405"),
            ("GET /metrics?x=1 HTTP/1.1\r\n\r\n", "200"),
            ("nonsense\r\n\r\n", "400"),
        ] {
            let (head, _) = prometheus::request(ADDRESS, request)?;
            ensure!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {head}");
        }
        let (head, body) = prometheus::request(ADDRESS, "HEAD /metrics HTTP/1.1\r\n\r\n")?;
        ensure!(head.starts_with("HTTP/1.1 200") && body.is_empty(), "{head}");
        let mut long = TcpStream::connect(ADDRESS)?;
        let _ = long.write_all("GET /metrics HTTP/1.1\r\n".as_bytes());
        let _ = long.write_all("x: y\r\n".repeat(5000).as_bytes());
        let mut answer = Vec::new();
        let _ = long.read_to_end(&mut answer);
        ensure!(!String::from_utf8_lossy(&answer).contains("200 OK"), "a head without end was taken");
        // Those that say nothing hold nobody up: there is room for eight, and they have their time.
        let silent: Vec<TcpStream> = (0..4).map(|_| TcpStream::connect(ADDRESS)).collect::<std::io::Result<_>>()?;
        Scrape::take(ADDRESS)?;
        drop(silent);
        daemon.stop()
    })
    .expect("the endpoint");
}
