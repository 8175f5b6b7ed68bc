//! Probes of every kind: what passes keeps a container, what fails restarts it or makes it not ready.

use crate::{restarts, under_kubelet, with};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use windlass_integration::{
    daemon::Daemon,
    go, image,
    kubelet::{is_ready, pod},
    wait,
};

/// The image with the answerer of gRPC health checks.
const HEALTH: &str = "localhost/health:test";

fn often(mut probe: Value) -> Value {
    for (key, value) in [("periodSeconds", 1), ("failureThreshold", 1), ("timeoutSeconds", wait::factor())] {
        if probe.get(key).is_none() {
            probe[key] = json!(value);
        }
    }
    probe
}

/// A pod with one probe as its readiness and liveness.
fn probed(name: &str, script: &str, probe: Value) -> Value {
    let patient = |mut probe: Value| {
        probe["failureThreshold"] = json!(30);
        probe
    };
    let pod = with(pod(name, script), "/spec/containers/0/readinessProbe", often(probe.clone()));
    let pod = with(pod, "/spec/containers/0/startupProbe", often(patient(probe.clone())));
    with(pod, "/spec/containers/0/livenessProbe", often(probe))
}

pub(crate) fn probes_of_every_kind_restart_what_is_ill() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        import_health(&bench.daemon)?;
        let web = "mkdir /tmp/w && echo well > /tmp/w/health && exec httpd -f -p 8080 -h /tmp/w";
        let http = json!({ "httpGet": { "path": "/health", "port": 8080 } });
        let listener = "httpd -f -p 9000 & trap 'exit 0' TERM; until test -e /tmp/ill; do sleep 0.1; done; kill $!; \
                        while :; do sleep 0.1; done";
        let tcp = json!({ "tcpSocket": { "port": 9000 } });
        let waiting = "touch /tmp/well; trap 'exit 0' TERM; while :; do sleep 0.1; done";
        let exec = json!({ "exec": { "command": ["cat", "/tmp/well"] } });
        let mut grpc = probed("grpc", "", json!({ "grpc": { "port": 9090 } }));
        grpc["spec"]["containers"][0]["image"] = json!(HEALTH);
        grpc["spec"]["containers"][0]["command"] = json!(["/health"]);
        for pod in [probed("http", web, http), probed("tcp", listener, tcp), probed("exec", waiting, exec), grpc] {
            bench.kubelet.place(&pod)?;
        }
        let names = ["http", "tcp", "exec", "grpc"];
        for name in names {
            let pod = bench.kubelet.ready(name)?;
            ensure!(restarts(&pod, "main") == 0, "{name} was restarted while it was well");
        }
        for (name, harm) in
            [("http", "rm /tmp/w/health"), ("tcp", "touch /tmp/ill"), ("exec", "rm /tmp/well"), ("grpc", "touch /tmp/ill")]
        {
            // The container may end before the command has.
            let _ = bench.kubelet.run(name, "main", harm);
        }
        for name in names {
            bench.kubelet.wait(name, "restarted and ready again", |pod| restarts(pod, "main") >= 1 && is_ready(pod))?;
        }
        bench.withdraw(&names)
    })
}

pub(crate) fn a_probe_that_hangs_fails_at_its_time_limit() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        let script = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
        let probe = json!({ "exec": { "command": ["sh", "-c", "test ! -e /tmp/hang || sleep 1000"] } });
        let pod = with(pod("hangs", script), "/spec/containers/0/readinessProbe", often(probe));
        bench.kubelet.place(&pod)?;
        bench.kubelet.ready("hangs")?;
        bench.kubelet.run("hangs", "main", "touch /tmp/hang")?;
        let pod = bench.kubelet.wait("hangs", "unready", |pod| !is_ready(pod))?;
        ensure!(restarts(&pod, "main") == 0, "a readiness probe restarted the container");
        bench.kubelet.run("hangs", "main", "rm /tmp/hang")?;
        bench.kubelet.ready("hangs")?;
        let left = bench.kubelet.run("hangs", "main", "pgrep -x -f 'sleep 1000'").unwrap_or_default();
        ensure!(left.trim().is_empty(), "processes of the probe are left: {left:?}");
        bench.withdraw(&["hangs"])
    })
}

/// Puts the image of the answerer on the node: busybox and the program.
fn import_health(daemon: &Daemon) -> Result<()> {
    let program = fs::read(go::kubernetes("health")?).context("read the answerer of health checks")?;
    let mut layers = image::layers()?.to_vec();
    layers.push(image::programs_layer(&[("health", &program)])?);
    let archive = daemon.path("health.tar");
    image::write_archive_of(&archive, HEALTH, layers)?;
    daemon.windlass(&["image", "import", &archive.to_string_lossy()])?;
    Ok(fs::remove_file(archive)?)
}
