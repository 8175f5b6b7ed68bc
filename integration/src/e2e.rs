//! Kubernetes' own suite of tests in a cluster of one node, with images that are stand-ins on loopback. Which specs are chosen and how a run
//! of them goes; the cluster over a runtime other than Windlass is the caller's.

use crate::{
    cluster::{Cluster, Programs},
    ginkgo::{self, Outcomes},
    go::{self, EndToEnd},
    node,
    standin::Images,
    standin_registry::StandinRegistry,
};
use anyhow::{Context, Result};
use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

/// What of the suite says something about a runtime: everything of the node and of volumes that every node has to pass, and of what every
/// cluster has to pass the parts that run pods: networks, workloads and kubectl's streams. The API's own machinery, authorization and
/// scheduling run none, or would say the same with any.
const CHOSEN: &str = "(sig-node || sig-storage || sig-network || sig-apps || sig-cli) && (Conformance || NodeConformance)";
/// What needs a cluster of its own or half an hour, and what this ground lacks.
const LEFT_OUT: &str = "Slow || Serial || Disruptive || Flaky || /^Feature:/";
/// Bounds the whole suite.
const LIMIT: &str = "--timeout=3h";

/// What to run of it, and how.
#[derive(Debug, Clone, Default)]
pub struct Choice {
    /// Regular expressions of the names of chosen specs; empty for all.
    pub focus: Vec<String>,
    /// A regular expression of those that are left out; empty for none.
    pub skip: String,
    /// Specs at a time.
    pub processes: usize,
}

/// What runs need, built where the network is.
#[derive(Clone)]
pub struct Prepared {
    suite: EndToEnd,
    pub programs: Programs,
    pub images: Images,
}

impl Prepared {
    /// Builds what is missing.
    pub fn new() -> Result<Prepared> {
        let suite = go::end_to_end()?;
        let images = Images::build_for_e2e(&suite)?;
        Ok(Prepared { suite, programs: Programs::build()?, images })
    }

    /// Runs the choice in a cluster over Windlass; logs and the report are left in `output`.
    pub fn over_windlass(&self, choice: &Choice, output: &Path) -> Result<Outcomes> {
        let (prepared, choice, output) = (self.clone(), choice.clone(), output.to_owned());
        node::run(move || {
            node::share_mounts()?;
            let registry = StandinRegistry::start(prepared.images.clone())?;
            let daemon = registry.daemon(&output.join("certs.d"))?;
            let mut cluster = Cluster::start(&prepared.programs, &daemon)?;
            let outcomes = prepared.over(&mut cluster, &choice, &output);
            fs::write(output.join("daemon.log"), daemon.log())?;
            outcomes
        })
    }

    /// The same in a cluster of the caller's node. A failed spec is no error here.
    pub fn over(&self, cluster: &mut Cluster, choice: &Choice, output: &Path) -> Result<Outcomes> {
        cluster.start_proxy()?;
        cluster.start_dns()?;
        cluster.wait_for_dns()?;
        let log = fs::File::create(output.join("e2e.log")).context("create the suite's log")?;
        let mut command = Command::new(&self.suite.ginkgo);
        command
            .args(["--no-color", "--silence-skips", "--json-report=e2e.json", LIMIT])
            .arg(format!("--output-dir={}", output.display()))
            .arg(format!("--procs={}", choice.processes))
            .arg(format!("--label-filter={CHOSEN} && !({LEFT_OUT})"));
        command.args(choice.focus.iter().map(|name| format!("--focus={name}")));
        if !choice.skip.is_empty() {
            command.arg(format!("--skip={}", choice.skip));
        }
        let status = command
            .arg(&self.suite.suite)
            .args(["--", "--provider=skeleton", "--disable-log-dump", "--allowed-not-ready-nodes=0"])
            .arg(format!("--kubeconfig={}", cluster.kubeconfig().display()))
            .arg(format!("--kubectl-path={}", cluster.kubectl.program().display()))
            .current_dir(output)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .status()
            .context("run ginkgo")?;
        fs::write(output.join("cluster.log"), cluster.logs())?;
        let report = fs::read(output.join("e2e.json"))
            .with_context(|| format!("ginkgo ended with {status} and left no report; its log is in {}", output.display()))?;
        let mut outcomes = ginkgo::outcomes(&report)?;
        // Those that were not chosen are skipped without a reason.
        outcomes.retain(|_, outcome| outcome.state != "skipped" || !outcome.message.is_empty());
        Ok(outcomes)
    }
}
