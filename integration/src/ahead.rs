//! What tests run beside the programs of this workspace (tools of others, the guest's kernel, an older Windlass), built while tests run
//! that need none of it: in the background, of the processors only what nobody else wants. A test that comes to a tool first waits
//! for it, and lets it have both of them by that; whatever fails here fails, or succeeds, once more in the test that needs it.

use crate::{cluster, criu, debian, go, guest, kind, process::Process, setup, upgrade};
use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use std::{
    fs::{self, File},
    process::{Command, Stdio},
};

/// Runs its argument so that it ends with this process and yields to all others: a session of its own is a group of its own to the
/// scheduler (sched(7)), which would have its share of the processors whatever is in it.
const YIELDING: &str = "echo 19 >/proc/self/autogroup
exec setpriv --pdeathsig KILL chrt --idle 0 ionice --class idle \"$0\" build-ahead";

/// Something to be built ahead, and the test programs that need it.
struct Tool {
    name: &'static str,
    build: fn() -> Result<()>,
    tests: &'static [&'static str],
}

/// In the order in which they are built, and in which the tests that need them come: what takes long, last.
const TOOLS: [Tool; 14] = [
    Tool { name: "a client of streams", build: || go::streams().map(drop), tests: &["streams", "handlers", "streaming_codec"] },
    Tool { name: "a collector of traces", build: || go::collector().map(drop), tests: &["traces"] },
    Tool { name: "a registry", build: || go::registry().map(drop), tests: &["registries"] },
    Tool { name: "plugins of CNI", build: || go::cni_plugins().map(drop), tests: &["cni"] },
    Tool { name: "crictl, critest", build: || go::tools().map(drop), tests: &["crictl", "sessions", "critest"] },
    Tool {
        name: "a plugin of NRI, and the critest that knows NRI",
        build: || go::nri_plugin().and_then(|_| go::earlier_nri_plugin()).and_then(|_| go::critest_with_nri()).map(drop),
        tests: &["nri"],
    },
    Tool { name: "CRIU", build: || criu::program().map(drop), tests: &["checkpoint"] },
    Tool { name: "the validation suite of OCI", build: || go::validation().map(drop), tests: &["oci_validation"] },
    Tool {
        name: "the guest's kernel",
        build: || guest::kernel().map(drop),
        tests: &["guest", "guest_critest", "guest_selinux", "power_cut"],
    },
    Tool {
        name: "a Debian to install into",
        build: || debian::Debian::prepare().and_then(|()| go::kind().map(drop)),
        tests: &["package", "kind"],
    },
    Tool { name: "an older Windlass", build: || upgrade::earlier_programs().map(drop), tests: &["upgrade"] },
    Tool {
        name: "Kubernetes",
        build: || cluster::Programs::build().and_then(|_| go::kubernetes("health")).map(drop),
        tests: &["kubelet", "cluster", "manifests"],
    },
    Tool { name: "what a node of kind has", build: kind::Node::prepare, tests: &["kubeadm"] },
    Tool { name: "Kubernetes' own suite", build: || go::end_to_end().map(drop), tests: &["e2e"] },
];

/// When a test program has its turn: the greater, the later.
pub fn turn(test: &str) -> usize {
    TOOLS.iter().position(|tool| tool.tests.contains(&test)).map_or(0, |place| place + 1)
}

/// Builds all of them, in order, and goes on after a failure. True if none failed.
pub fn build() -> bool {
    let mut good = true;
    for tool in TOOLS {
        println!("==> {}", tool.name);
        if let Err(error) = (tool.build)() {
            println!("{}: {error:#}", tool.name);
            good = false;
        }
    }
    good
}

/// A process that runs [`build`], and all that it has started. They end with the value.
pub struct Ahead(Process);

impl Ahead {
    /// Starts it. What it prints is in a file.
    pub fn start() -> Result<Ahead> {
        let directory = setup::target().join("windlass-tools");
        fs::create_dir_all(&directory)?;
        let path = directory.join("ahead.log");
        let log = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", YIELDING]).arg(std::env::current_exe()?);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        println!("==> tools that later tests need are built in the background: {}", path.display());
        command.spawn().map(|child| Ahead(child.into())).context("run setsid (Debian package util-linux)")
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGKILL);
    }
}
