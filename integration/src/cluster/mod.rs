//! A cluster of one node: etcd, the control plane, kubelet, kube-proxy and kubectl of Kubernetes over the CRI socket of a runtime.
//!
//! Everything runs in the caller's mount and network namespaces and below one directory. What kubelet writes at fixed places of the host is
//! covered there.

mod addons;
mod certificates;
pub mod command;
mod kubeadm;
mod kubectl;
mod service;

pub use kubectl::Kubectl;

use crate::{
    daemon::Daemon,
    go,
    kubelet::Kubelet,
    node::{output_of, run_command},
    registry::Registry,
    wait::{self, until_within},
};
use anyhow::{Context, Result};
use certificates::Certificates;
use kubeadm::Kubeadm;
use serde_json::json;
use service::Service;
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The node's name.
pub const NODE: &str = "windlass";
/// The node's address, on a bridge of its own: kubeadm and the apiserver refuse loopback.
pub const ADDRESS: &str = "10.250.0.1";
const LINK: &str = "kube0";
/// Addresses of services and of pods.
const SERVICES: &str = "10.96.0.0/16";
const PODS: &str = "10.244.0.0/16";
/// Where kubeadm puts the service of the cluster's DNS, and the domain that it answers for.
pub const DNS: &str = "10.96.0.10";
pub const DOMAIN: &str = "cluster.local";
/// The node's own search domain, which the DNS server of the node knows: the node is in it, and nothing else is anywhere.
pub const SEARCH: &str = "node.example";
const RESOLV_CONF: &str = "resolv.conf";
const ETCD: &str = "http://127.0.0.1:2379";
/// Longest wait for the apiserver, and for the node.
const START_LIMIT: Duration = Duration::from_secs(120);

/// The programs of a cluster.
#[derive(Debug, Clone)]
pub struct Programs {
    etcd: PathBuf,
    kube_apiserver: PathBuf,
    kube_controller_manager: PathBuf,
    kube_scheduler: PathBuf,
    kube_proxy: PathBuf,
    kubeadm: PathBuf,
    kubectl: PathBuf,
    kubelet: PathBuf,
    addons: go::Addons,
}

impl Programs {
    /// Builds what is not built yet: ten minutes of two cores the first time. Needs a network; call it before a node is entered.
    pub fn build() -> Result<Programs> {
        Ok(Programs {
            etcd: go::etcd()?,
            kubelet: go::kubernetes("kubelet")?,
            kube_apiserver: go::kubernetes("kube-apiserver")?,
            kube_controller_manager: go::kubernetes("kube-controller-manager")?,
            kube_scheduler: go::kubernetes("kube-scheduler")?,
            kube_proxy: go::kubernetes("kube-proxy")?,
            kubeadm: go::kubernetes("kubeadm")?,
            kubectl: go::kubernetes("kubectl")?,
            addons: go::addons()?,
        })
    }

    /// kubeadm, for a caller of its own.
    pub fn kubeadm(&self) -> &Path {
        &self.kubeadm
    }

    /// kubectl, for a caller of its own.
    pub fn kubectl(&self) -> &Path {
        &self.kubectl
    }

    /// What is on each node.
    pub(crate) fn of_a_node(&self) -> [&Path; 3] {
        [&self.kubeadm, &self.kubectl, &self.kubelet]
    }

    /// The program that is all of the published image whose name ends so.
    pub(crate) fn of_image(&self, name: &str) -> Option<&Path> {
        match name {
            "etcd" => Some(&self.etcd),
            "kube-apiserver" => Some(&self.kube_apiserver),
            "kube-controller-manager" => Some(&self.kube_controller_manager),
            "kube-scheduler" => Some(&self.kube_scheduler),
            "kube-proxy" => Some(&self.kube_proxy),
            _ => None,
        }
    }

    /// For a kubelet that the caller prepares.
    pub fn kubelet(&self) -> &Path {
        &self.kubelet
    }
}

/// A running cluster. Dropping it ends its programs; pods stay with the runtime.
pub struct Cluster {
    /// As a user who may do everything.
    pub kubectl: Kubectl,
    pub kubelet: Kubelet,
    proxy: Option<Service>,
    control_plane: Vec<Service>,
    parts: Parts,
    /// How long it took to be there: from nothing to an apiserver, and from there to a node that is ready.
    pub took: (Duration, Duration),
}

struct Parts {
    programs: Programs,
    directory: PathBuf,
    kubeadm: Kubeadm,
    certificates: Certificates,
    /// Has the images of addons.
    registry: Registry,
}

impl Cluster {
    /// Starts everything over a daemon and waits until the node is ready.
    pub fn start(programs: &Programs, daemon: &Daemon) -> Result<Cluster> {
        let kubelet = |mut fields: serde_json::Value| {
            // Otherwise kubelet looks at cgroups itself, and knows the pods of containerd and CRI-O only.
            fields["featureGates"] = json!({ "PodAndContainerStatsFromCRI": true });
            Kubelet::prepare_with(&programs.kubelet, daemon, fields)
        };
        Cluster::start_over(programs, &daemon.path("cluster"), &daemon.socket(), kubelet)
    }

    /// The same over any runtime's socket, with a kubelet that `prepare` makes of the fields of its configuration.
    pub fn start_over(
        programs: &Programs,
        directory: &Path,
        socket: &Path,
        prepare: impl FnOnce(serde_json::Value) -> Result<Kubelet>,
    ) -> Result<Cluster> {
        let begun = Instant::now();
        fs::create_dir_all(directory)?;
        run_command("ip", &["link", "add", LINK, "type", "bridge"])?;
        run_command("ip", &["address", "add", &format!("{ADDRESS}/24"), "dev", LINK])?;
        run_command("ip", &["link", "set", LINK, "up"])?;
        // As nodes have one: a service without pods is refused only where a packet to it would be forwarded.
        run_command("ip", &["route", "add", "default", "dev", LINK])?;
        fs::write(directory.join(RESOLV_CONF), format!("search {SEARCH}\nnameserver {ADDRESS}\n"))?;
        let registry = Registry::start()?;
        let kubeadm = Kubeadm::new(&programs.kubeadm, directory, socket, &registry.host())?;
        let certificates = Certificates::make(&kubeadm, directory)?;
        let kubeconfig = certificates.kubeconfig("super-admin");
        let kubectl = Kubectl::new(&programs.kubectl, Path::new(&kubeconfig), &directory.join("kubectl-cache"));
        let parts = Parts { programs: programs.clone(), directory: directory.to_owned(), kubeadm, certificates, registry };
        let mut control_plane = vec![parts.etcd()?, parts.apiserver()?];
        until_within(START_LIMIT, "the apiserver answers", || {
            wait::pause();
            control_plane.iter_mut().try_for_each(Service::expect_running)?;
            Ok(output_of("curl", &["-sSfk", "--max-time", "5", "https://127.0.0.1:6443/readyz"]).ok())
        })?;
        let up = begun.elapsed();
        control_plane.extend([parts.controller_manager()?, parts.scheduler()?]);
        // Before kubelet is there, which remembers for half a minute that it refused the apiserver.
        let user = "--user=kube-apiserver-kubelet-client";
        kubectl.run(&["create", "clusterrolebinding", "apiserver-kubelet", "--clusterrole=system:kubelet-api-admin", user])?;
        let mut kubelet = prepare(parts.kubelet_fields())?.with_arguments(&[
            "--kubeconfig",
            &parts.certificates.kubeconfig("kubelet"),
            "--hostname-override",
            NODE,
            "--node-ip",
            ADDRESS,
        ]);
        kubelet.start()?;
        let mut cluster = Cluster { kubectl, kubelet, proxy: None, control_plane, parts, took: (up, Duration::ZERO) };
        cluster.wait_for_node().with_context(|| cluster.logs())?;
        cluster.took.1 = begun.elapsed() - up;
        Ok(cluster)
    }

    fn wait_for_node(&self) -> Result<()> {
        let node = format!("node/{NODE}");
        self.kubectl.wait(&node, "create")?;
        self.kubectl.wait(&node, "condition=Ready")?;
        // Without it no pod is admitted.
        self.kubectl.wait("serviceaccount/default", "create")
    }

    /// A new namespace, ready for pods.
    pub fn namespace(&self, name: &str) -> Result<Kubectl> {
        self.kubectl.run(&["create", "namespace", name])?;
        let inside = self.kubectl.within(name);
        inside.wait("serviceaccount/default", "create")?;
        inside.wait("configmap/kube-root-ca.crt", "create")?;
        Ok(inside)
    }

    /// Starts kube-proxy, which leads connections to services.
    pub fn start_proxy(&mut self) -> Result<()> {
        self.proxy = Some(self.parts.proxy()?);
        Ok(())
    }

    /// Ends kube-proxy and removes its rules.
    pub fn stop_proxy(&mut self) -> Result<()> {
        drop(self.proxy.take());
        run_command(&self.parts.programs.kube_proxy.to_string_lossy(), &["--cleanup"])
    }

    /// The ends of the logs of all parts.
    pub fn logs(&self) -> String {
        let services = self.control_plane.iter().chain(&self.proxy);
        let logs: Vec<String> = services.map(|service| format!("--- {service:?}\n{}", service.log())).collect();
        format!("{}\n--- kubelet\n{}", logs.join("\n"), self.kubelet.log())
    }

    /// The kubeconfig of a user who may do everything.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubectl.kubeconfig
    }
}

impl Parts {
    fn start(&self, name: &'static str, program: &Path, arguments: &[String]) -> Result<Service> {
        Service::start(name, program, arguments, &self.directory)
    }

    fn etcd(&self) -> Result<Service> {
        let (peers, data) = ("http://127.0.0.1:2380", self.directory.join("etcd"));
        let arguments = [
            format!("--data-dir={}", data.display()),
            format!("--listen-client-urls={ETCD}"),
            format!("--advertise-client-urls={ETCD}"),
            format!("--listen-peer-urls={peers}"),
            format!("--initial-advertise-peer-urls={peers}"),
            format!("--initial-cluster=default={peers}"),
            // The cluster is thrown away with this machine's next power loss anyway.
            "--unsafe-no-fsync".into(),
            "--log-level=warn".into(),
        ];
        self.start("etcd", &self.programs.etcd, &arguments)
    }

    fn apiserver(&self) -> Result<Service> {
        let pki = |name: &str| self.certificates.pki(name);
        let arguments = [
            format!("--etcd-servers={ETCD}"),
            "--bind-address=0.0.0.0".into(),
            format!("--advertise-address={ADDRESS}"),
            "--secure-port=6443".into(),
            format!("--client-ca-file={}", pki("ca.crt")),
            format!("--tls-cert-file={}", pki("apiserver.crt")),
            format!("--tls-private-key-file={}", pki("apiserver.key")),
            format!("--kubelet-client-certificate={}", pki("apiserver-kubelet-client.crt")),
            format!("--kubelet-client-key={}", pki("apiserver-kubelet-client.key")),
            "--kubelet-preferred-address-types=InternalIP".into(),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--service-account-key-file={}", pki("sa.pub")),
            format!("--service-account-signing-key-file={}", pki("sa.key")),
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            format!("--service-cluster-ip-range={SERVICES}"),
            "--allow-privileged=true".into(),
            // As kubeadm has them: an apiserver of others, as that of metrics, knows by this who asks.
            format!("--requestheader-client-ca-file={}", pki("front-proxy-ca.crt")),
            "--requestheader-allowed-names=front-proxy-client".into(),
            "--requestheader-username-headers=X-Remote-User".into(),
            "--requestheader-group-headers=X-Remote-Group".into(),
            "--requestheader-extra-headers-prefix=X-Remote-Extra-".into(),
            format!("--proxy-client-cert-file={}", pki("front-proxy-client.crt")),
            format!("--proxy-client-key-file={}", pki("front-proxy-client.key")),
        ];
        self.start("kube-apiserver", &self.programs.kube_apiserver, &arguments)
    }

    /// What makes a part a client of the apiserver, and keeps its own server on loopback.
    fn client(&self, part: &str) -> Vec<String> {
        let kubeconfig = self.certificates.kubeconfig(part);
        let mut arguments: Vec<String> = ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"]
            .iter()
            .map(|flag| format!("--{flag}={kubeconfig}"))
            .collect();
        arguments.extend(["--bind-address=127.0.0.1".into(), "--leader-elect=false".into()]);
        arguments
    }

    fn controller_manager(&self) -> Result<Service> {
        let pki = |name: &str| self.certificates.pki(name);
        let mut arguments = self.client("controller-manager");
        arguments.extend([
            format!("--root-ca-file={}", pki("ca.crt")),
            format!("--client-ca-file={}", pki("ca.crt")),
            format!("--cluster-signing-cert-file={}", pki("ca.crt")),
            format!("--cluster-signing-key-file={}", pki("ca.key")),
            format!("--service-account-private-key-file={}", pki("sa.key")),
            "--use-service-account-credentials".into(),
            "--allocate-node-cidrs".into(),
            format!("--cluster-cidr={PODS}"),
        ]);
        self.start("kube-controller-manager", &self.programs.kube_controller_manager, &arguments)
    }

    fn scheduler(&self) -> Result<Service> {
        self.start("kube-scheduler", &self.programs.kube_scheduler, &self.client("scheduler"))
    }

    fn proxy(&self) -> Result<Service> {
        let arguments = [
            format!("--kubeconfig={}", self.certificates.kubeconfig("super-admin")),
            "--proxy-mode=nftables".into(),
            format!("--hostname-override={NODE}"),
            format!("--cluster-cidr={PODS}"),
            // The machine's own limits stay.
            "--conntrack-max-per-core=0".into(),
        ];
        self.start("kube-proxy", &self.programs.kube_proxy, &arguments)
    }

    fn node_dns(&self) -> Result<Service> {
        let (zone, file) = (self.directory.join("zone"), self.directory.join("Corefile"));
        let records = format!("@ 60 SOA {NODE} root 1 60 60 60 60\n@ 60 NS {NODE}\n{NODE} 60 A {ADDRESS}\n");
        fs::write(&zone, format!("$ORIGIN {SEARCH}.\n{records}"))?;
        let known = format!("{SEARCH} {{\nbind {ADDRESS}\nfile {}\n}}\n", zone.display());
        let nothing = format!(". {{\nbind {ADDRESS}\ntemplate ANY ANY {{\nrcode NXDOMAIN\n}}\n}}\n");
        fs::write(&file, known + &nothing)?;
        self.start("node-dns", &self.programs.addons.coredns, &["-conf".into(), file.to_string_lossy().into_owned()])
    }

    fn kubelet_fields(&self) -> serde_json::Value {
        json!({
            "address": "0.0.0.0",
            "authentication": {
                "anonymous": { "enabled": false }, "webhook": { "enabled": true },
                "x509": { "clientCAFile": self.certificates.pki("ca.crt") },
            },
            "authorization": { "mode": "Webhook" },
            "clusterDNS": [DNS], "clusterDomain": DOMAIN, "resolvConf": self.directory.join(RESOLV_CONF),
        })
    }
}
