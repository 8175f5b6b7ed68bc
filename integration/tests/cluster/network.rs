//! Services through kube-proxy's nftables, and forwarded ports.

use crate::{FOREVER, eventually, pod, workload};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    process::Stdio,
    time::Instant,
};
use windlass_integration::{
    cluster::{ADDRESS, Kubectl},
    node::output_of,
};

/// Serves its own name at port 8080.
const SERVER: &str = "mkdir /www; hostname > /www/name; exec httpd -f -p 8080 -h /www";

pub(crate) fn a_service_leads_to_each_of_its_pods(kubectl: &Kubectl) -> Result<()> {
    let mut web = workload("Deployment", "web", SERVER);
    web["spec"]["replicas"] = json!(2);
    web["spec"]["template"]["spec"]["containers"][0]["readinessProbe"] =
        json!({ "httpGet": { "path": "/name", "port": 8080 }, "periodSeconds": 1 });
    kubectl.create(&web)?;
    kubectl.run(&["expose", "deployment/web", "--port=80", "--target-port=8080", "--type=NodePort"])?;
    kubectl.rolled_out("deployment/web")?;
    // What is made after the service has its address in its environment.
    kubectl.create(&pod("client", FOREVER))?;
    kubectl.ready("client")?;
    let pods = kubectl.list(&["pods", "--selector=app=web"])?;
    let names: BTreeSet<&str> = pods.iter().filter_map(|pod| pod["metadata"]["name"].as_str()).collect();
    let ask = |address: &str| {
        let get = format!("printf 'GET /name HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {address} | tail -n 1");
        format!("for i in 1 2 3 4 5 6 7 8 9 10 11 12; do {get}; done")
    };
    eventually("each pod answers for the service, to another pod", || {
        let answers = kubectl.run(&["exec", "client", "--", "sh", "-c", &ask("$WEB_SERVICE_HOST $WEB_SERVICE_PORT")])?;
        let answered: BTreeSet<&str> = answers.lines().collect();
        ensure!(answered == names, "{answered:?} of {names:?}");
        Ok(())
    })?;
    // A client that the service keeps to one pod has the same one each time.
    kubectl.run(&[
        "expose",
        "deployment/web",
        "--name=sticky",
        "--port=80",
        "--target-port=8080",
        "--session-affinity=ClientIP",
    ])?;
    let sticky = kubectl.get("service/sticky")?["spec"]["clusterIP"].as_str().context("an address")?.to_owned();
    eventually("one pod answers always", || {
        let answers = kubectl.run(&["exec", "client", "--", "sh", "-c", &ask(&format!("{sticky} 80"))])?;
        let answered: BTreeSet<&str> = answers.lines().collect();
        ensure!(answers.lines().count() == 12 && answered.len() == 1 && answered.is_subset(&names), "{answered:?}");
        Ok(())
    })?;
    // A pod that reaches itself through the service comes from the node's address.
    let server = pods.first().and_then(|pod| pod["metadata"]["name"].as_str()).context("a pod")?;
    let address = kubectl.get("service/web")?["spec"]["clusterIP"].as_str().context("an address")?.to_owned();
    let answers = kubectl.run(&["exec", server, "--", "sh", "-c", &ask(&format!("{address} 80"))])?;
    ensure!(answers.lines().count() == 12 && answers.lines().any(|name| name == server), "{server} had {answers:?}");
    let port = kubectl.get("service/web")?["spec"]["ports"][0]["nodePort"].clone();
    let answer = output_of("curl", &["-sSf", "--max-time", "5", &format!("http://{ADDRESS}:{port}/name")])?;
    ensure!(names.contains(answer.trim()), "{answer:?} of {names:?}");
    // Once there is no pod, a client is refused at once.
    kubectl.run(&["scale", "deployment/web", "--replicas=0"])?;
    eventually("a client is refused", || {
        let try_it = "nc -w 2 $WEB_SERVICE_HOST $WEB_SERVICE_PORT < /dev/null";
        let begun = Instant::now();
        let tried = kubectl.outcome(&["exec", "client", "--", "sh", "-c", try_it], b"")?;
        let said = String::from_utf8_lossy(&tried.stderr).into_owned();
        ensure!(!tried.status.success() && said.contains("refused"), "after {:?}: {said}", begun.elapsed());
        Ok(())
    })
}

pub(crate) fn a_service_leads_to_no_pod_that_is_not_ready(kubectl: &Kubectl) -> Result<()> {
    let mut slow = pod("slow", SERVER);
    slow["spec"]["containers"][0]["readinessProbe"] =
        json!({ "exec": { "command": ["test", "-e", "/tmp/ready"] }, "periodSeconds": 1 });
    kubectl.create(&slow)?;
    kubectl.run(&["expose", "pod/slow", "--port=80", "--target-port=8080"])?;
    kubectl.run(&["expose", "pod/slow", "--name=early", "--port=80", "--target-port=8080"])?;
    kubectl.run(&["patch", "service/early", "--patch", r#"{"spec":{"publishNotReadyAddresses":true}}"#])?;
    let ask = |service: &str| {
        let address = kubectl.get(&format!("service/{service}"))?["spec"]["clusterIP"].as_str().context("an address")?.to_owned();
        output_of("curl", &["-sSf", "--max-time", "5", &format!("http://{address}/name")])
    };
    let led = |service: &str| {
        eventually("the service leads to the pod", || {
            let answer = ask(service)?;
            ensure!(answer == "slow\n", "{answer:?}");
            Ok(())
        })
    };
    let refused = || {
        eventually("the service leads nowhere", || {
            let refused = ask("slow").is_err_and(|error| format!("{error:#}").contains("curl: (7)"));
            ensure!(refused, "it is not refused");
            Ok(())
        })
    };
    led("early")?;
    refused()?;
    kubectl.run(&["exec", "slow", "--", "touch", "/tmp/ready"])?;
    led("slow")?;
    kubectl.run(&["exec", "slow", "--", "rm", "/tmp/ready"])?;
    refused()?;
    // Cases that look at all pods want them ready.
    kubectl.run(&["exec", "slow", "--", "touch", "/tmp/ready"])?;
    kubectl.ready("slow")
}

pub(crate) fn ports_are_forwarded(kubectl: &Kubectl) -> Result<()> {
    let script = "mkdir /www; echo small > /www/small; head -c 5000000 /dev/zero > /www/large; exec httpd -f -p 8080 -h /www";
    let mut web = pod("web", script);
    // kubectl ends with the first connection that is refused.
    web["spec"]["containers"][0]["readinessProbe"] = json!({ "httpGet": { "path": "/small", "port": 8080 }, "periodSeconds": 1 });
    kubectl.create(&web)?;
    kubectl.ready("web")?;
    // Over WebSocket, then over SPDY.
    for switch in ["true", "false"] {
        let mut command = kubectl.command(&["port-forward", "pod/web", ":8080"]);
        command.env("KUBECTL_PORT_FORWARD_WEBSOCKETS", switch).stdout(Stdio::piped());
        let mut forward = command.spawn().context("start kubectl")?;
        let mut line = String::new();
        // Kept: kubectl says something about each connection.
        let mut said = BufReader::new(forward.stdout.take().context("an output")?);
        said.read_line(&mut line)?;
        let checked = line.split_whitespace().nth(2).context(format!("kubectl said {line:?}")).and_then(|at| {
            let fetch = |path: &str| output_of("curl", &["-sSf", "--max-time", "20", &format!("http://{at}/{path}")]);
            ensure!(fetch("small")? == "small\n", "another answer");
            let large = fetch("large")?;
            ensure!(large.len() == 5_000_000, "{} bytes of 5,000,000", large.len());
            Ok(())
        });
        forward.kill()?;
        forward.wait()?;
        checked.with_context(|| format!("WebSocket: {switch}"))?;
    }
    Ok(())
}
