//! Names, by the cluster's DNS in a pod.

use crate::{FOREVER, eventually, pod, workload};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use windlass_integration::cluster::{ADDRESS, DNS, DOMAIN, Kubectl, NODE, SEARCH};

fn text<'a>(object: &'a Value, path: &str) -> Result<&'a str> {
    object.pointer(path).and_then(Value::as_str).with_context(|| format!("{path} of {object}"))
}

/// What a program prints in a pod, once it succeeds: CoreDNS may be about to start.
pub(crate) fn said(kubectl: &Kubectl, pod: &str, words: &[&str]) -> Result<String> {
    eventually(&words.join(" "), || kubectl.run(&[&["exec", pod, "--", "/probe"], words].concat()))
}

pub(crate) fn services_and_pods_have_names(kubectl: &Kubectl) -> Result<()> {
    let namespace = kubectl.namespace();
    let mut web = workload("Deployment", "web", FOREVER);
    web["spec"]["replicas"] = json!(2);
    kubectl.create(&web)?;
    kubectl.run(&["expose", "deployment/web", "--port=80", "--name=web"])?;
    kubectl.create(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "peers" },
        "spec": { "clusterIP": "None", "selector": { "app": "web" }, "ports": [{ "name": "http", "port": 80 }] },
    }))?;
    let mut named = pod("client", FOREVER);
    named["metadata"]["labels"] = json!({ "app": "web" });
    named["spec"]["hostname"] = json!("one");
    named["spec"]["subdomain"] = json!("peers");
    kubectl.create(&named)?;
    kubectl.rolled_out("deployment/web")?;
    kubectl.ready("client")?;
    let own = kubectl.get("pod/client")?;
    let own = text(&own, "/status/podIP")?;
    let service = kubectl.get("service/web")?;
    let service = text(&service, "/spec/clusterIP")?;
    let pods = kubectl.list(&["pods", "--selector=app=web"])?;
    let mut addresses = pods.iter().map(|pod| text(pod, "/status/podIP")).collect::<Result<Vec<_>>>()?;
    addresses.sort_unstable();
    let full = |name: &str| format!("{name}.{namespace}.svc.{DOMAIN}");
    let resolves = |name: &str, to: &str| {
        eventually(name, || {
            let found = kubectl.run(&["exec", "client", "--", "/probe", "resolve", name])?;
            ensure!(found.trim_end() == to, "{name} is {found:?}, not {to}");
            Ok(())
        })
    };
    for name in ["web".to_owned(), format!("web.{namespace}"), format!("web.{namespace}.svc"), full("web"), full("web") + "."] {
        resolves(&name, service)?;
    }
    resolves("kubernetes.default", "10.96.0.1")?;
    resolves("peers", &addresses.join(" "))?;
    resolves("one.peers", own)?;
    resolves(&format!("{}.{namespace}.pod.{DOMAIN}", own.replace('.', "-")), own)?;
    ensure!(kubectl.run(&["exec", "client", "--", "hostname", "-f"])?.trim() == full("one.peers"), "its own name is another");
    let absent = kubectl.outcome(&["exec", "client", "--", "/probe", "resolve", &full("absent")], b"")?;
    ensure!(!absent.status.success(), "a name that is not there: {absent:?}");
    let reverse: Vec<&str> = service.split('.').rev().collect();
    for transport in ["udp", "tcp"] {
        for (kind, name, answer) in [
            ("A", full("web"), "code 0 records 1"),
            ("A", full("absent"), "code 3 records 0"),
            ("SRV", full("_http._tcp.peers"), "code 0 records 3"),
            ("PTR", format!("{}.in-addr.arpa", reverse.join(".")), "code 0 records 1"),
        ] {
            let found = said(kubectl, "client", &["query", transport, DNS, kind, &name])?;
            ensure!(found.trim_end() == answer, "{transport}: {kind} {name}: {found:?}");
        }
    }
    Ok(())
}

pub(crate) fn a_pod_asks_whom_its_policy_names(kubectl: &Kubectl) -> Result<()> {
    let namespace = kubectl.namespace();
    let cluster = format!("search {namespace}.svc.{DOMAIN} svc.{DOMAIN} {DOMAIN} {SEARCH}\nnameserver {DNS}\noptions ndots:5\n");
    let node = format!("search {SEARCH}\nnameserver {ADDRESS}\n");
    let own = format!("search default.svc.{DOMAIN} else.example\nnameserver {DNS}\nnameserver 192.0.2.1\noptions ndots:1\n");
    let config = json!({
        "nameservers": [DNS, "192.0.2.1"], "searches": [format!("default.svc.{DOMAIN}"), "else.example"],
        "options": [{ "name": "ndots", "value": "1" }],
    });
    // The pod's fields; the file that it has; which of these names it knows: the node's, the apiserver's, and the latter without its namespace.
    let names = [(NODE, ADDRESS), ("kubernetes.default", "10.96.0.1"), ("kubernetes", "10.96.0.1")];
    let policies = [
        ("cluster-first", json!({}), &cluster, [true, true, false]),
        ("cluster-first-on-host", json!({ "hostNetwork": true }), &node, [true, false, false]),
        ("with-host-net", json!({ "hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet" }), &cluster, [true, true, false]),
        ("default", json!({ "dnsPolicy": "Default" }), &node, [true, false, false]),
        ("none", json!({ "dnsPolicy": "None", "dnsConfig": config }), &own, [false, false, true]),
    ];
    for (name, fields, ..) in &policies {
        let mut wanted = pod(name, FOREVER);
        for (key, value) in fields.as_object().into_iter().flatten() {
            wanted["spec"][key] = value.clone();
        }
        kubectl.create(&wanted)?;
    }
    for (name, _, file, known) in policies {
        kubectl.ready(name)?;
        let found = kubectl.run(&["exec", name, "--", "cat", "/etc/resolv.conf"])?;
        ensure!(&found == file, "{name}: {found:?}, not {file:?}");
        for ((asked, address), known) in names.into_iter().zip(known) {
            if known {
                let found = said(kubectl, name, &["resolve", asked])?;
                ensure!(found.trim_end() == address, "{name}: {asked} is {found:?}");
            } else {
                let outcome = kubectl.outcome(&["exec", name, "--", "/probe", "resolve", asked], b"")?;
                let said = String::from_utf8_lossy(&outcome.stderr).into_owned();
                ensure!(!outcome.status.success() && said.contains("Name does not resolve"), "{name}: {asked}: {outcome:?}");
            }
        }
    }
    Ok(())
}
