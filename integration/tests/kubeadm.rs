//! `kubeadm init` with `manifests/kubeadm.yaml`, as a user of a node with Windlass calls it, in the root of a kind node and in namespaces of
//! its own: kubelet runs the control plane over Windlass, the node becomes ready by its network's pods, and a deployment runs.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};
use windlass_integration::{
    cluster::{Kubectl, Programs},
    debian::{Debian, DebianNode},
    image,
    kind::Node,
    node::{self, run_command},
    process::Process,
    setup,
    wait::until,
};

/// The node's address, which kubeadm finds by the default route.
const ADDRESS: &str = "10.250.0.1";
const PODS: &str = "10.244.0.0/16";

/// Stands in for systemd: starts kubelet as the drop-in of its unit does, when kubeadm has written what it reads.
const KUBELET: &str = r#"
while [ ! -e /var/lib/kubelet/config.yaml ] || [ ! -e /var/lib/kubelet/kubeadm-flags.env ]; do sleep 0.1; done
. /var/lib/kubelet/kubeadm-flags.env
exec kubelet --bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf \
    --config=/var/lib/kubelet/config.yaml $KUBELET_KUBEADM_ARGS"#;

/// What this machine needs besides: its cgroup v2 tree may have no controllers, its disk little room, and it reaches no other machine.
const MORE: &str = "
failCgroupV1: false
failSwapOn: false
cgroupsPerQOS: false
enforceNodeAllocatable: [none]
evictionHard: { memory.available: 50Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1% }
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: VERSION
networking: { podSubnet: PODS }
---
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
conntrack: { maxPerCore: 0 }
";

#[test]
fn kubeadm_makes_a_cluster_of_our_configuration() -> Result<()> {
    let programs = Programs::build()?;
    let root = Node::make(&programs)?;
    node::run(move || {
        run_command("ip", &["link", "add", "kube0", "type", "bridge"])?;
        run_command("ip", &["address", "add", &format!("{ADDRESS}/24"), "dev", "kube0"])?;
        run_command("ip", &["link", "set", "kube0", "up"])?;
        run_command("ip", &["route", "add", "default", "dev", "kube0"])?;
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        let mut node = DebianNode::of(Debian::of(root.root())?, "kubeadm");
        node.system.run(&["mount", "--make-rshared", "/"])?;
        // Its own name: there is nobody to ask, and kubelet asks for each pod until the node is registered.
        let name = fs::read_to_string("/proc/sys/kernel/hostname")?;
        fs::write(node.system.path("/etc/hosts"), format!("127.0.0.1 localhost\n{ADDRESS} {name}"))?;
        let own = format!("\n[cgroup]\nparent = {:?}\n", node.cgroup);
        fs::File::options().append(true).open(node.system.path("/etc/windlass/config.toml"))?.write_all(own.as_bytes())?;
        let client = node.serve()?;
        let kubelet = kubelet(&node.system)?;
        let made = init(&node.system, programs.kubectl());
        drop(kubelet);
        let log = || fs::read_to_string(node.system.path("/var/log/kubelet")).unwrap_or_default();
        made.with_context(|| {
            format!("{}\n--- kubelet\n{}", node.log(), log().lines().rev().take(40).collect::<Vec<_>>().join("\n"))
        })?;
        for pod in client.list_pod_sandbox(Default::default())?.items {
            client.remove(&pod.id)?;
        }
        node.stop()
    })
}

fn kubelet(system: &Debian) -> Result<Process> {
    let log = fs::File::create(system.path("/var/log/kubelet"))?;
    let mut command = system.command(&["sh", "-ec", KUBELET]);
    let command: &mut Command = command.stdout(Stdio::null()).stderr(log);
    Ok(command.spawn().context("start kubelet")?.into())
}

fn init(system: &Debian, kubectl: &Path) -> Result<()> {
    let own = fs::read_to_string(setup::workspace().join("manifests/kubeadm.yaml"))?;
    ensure!(own.trim_end().contains("kind: KubeletConfiguration"), "the last part is not kubelet's:\n{own}");
    let version = fs::read_to_string(system.path("/kind/version"))?;
    let more = MORE.replace("VERSION", version.trim()).replace("PODS", PODS);
    fs::write(system.path("/tmp/kubeadm.yaml"), own.trim_end().to_owned() + &more)?;
    // What it looks at of the machine is not what is tested here.
    system.run(&["kubeadm", "init", "--config", "/tmp/kubeadm.yaml", "--ignore-preflight-errors", "all"])?;

    let kubectl = Kubectl::new(kubectl, &system.path("/etc/kubernetes/admin.conf"), &system.path("/tmp/kubectl-cache"));
    let network = fs::read_to_string(system.path("/kind/manifests/default-cni.yaml"))?.replace("{{ .PodSubnet }}", PODS);
    kubectl.within("kube-system").feed(&["apply", "-f", "-"], network.as_bytes())?;
    let nodes = kubectl.list(&["nodes"])?;
    let name = nodes.first().and_then(|node| node["metadata"]["name"].as_str()).context("a node")?;
    kubectl.wait(&format!("node/{name}"), "condition=Ready")?;
    kubectl.run(&["taint", "nodes", "--all", "node-role.kubernetes.io/control-plane-"])?;
    for what in ["daemonset/kindnet", "daemonset/kube-proxy", "deployment/coredns"] {
        kubectl.within("kube-system").rolled_out(what)?;
    }
    let node = kubectl.get(&format!("node/{name}"))?;
    let runtime = node["status"]["nodeInfo"]["containerRuntimeVersion"].as_str().unwrap_or_default();
    ensure!(runtime.starts_with("windlass://"), "the node's runtime is {runtime:?}");
    for part in ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler"] {
        kubectl.within("kube-system").ready(&format!("{part}-{name}"))?;
    }

    let archive = system.path("/tmp/image.tar");
    image::write_archive(&archive)?;
    system.run(&["windlass", "image", "import", "/tmp/image.tar"])?;
    kubectl.wait("serviceaccount/default", "create")?;
    let container = json!({ "name": "main", "image": image::BUSYBOX, "imagePullPolicy": "Never", "command": ["sleep", "1000"] });
    kubectl.create(&json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
        "spec": {
            "replicas": 2, "selector": { "matchLabels": { "app": "web" } },
            "template": { "metadata": { "labels": { "app": "web" } }, "spec": { "containers": [container] } },
        },
    }))?;
    kubectl.rolled_out("deployment/web")?;
    // By the name of a service, which CoreDNS knows, and its address, which kube-proxy's rules lead to the apiserver.
    let script = "nc -w 5 kubernetes.default.svc.cluster.local 443 </dev/null && echo reached";
    until("the apiserver answers at its service's name", || {
        Ok(kubectl.run(&["exec", "deployment/web", "--", "sh", "-c", script]).ok().filter(|said| said == "reached\n"))
    })
    .map(drop)
}
