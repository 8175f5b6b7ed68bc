//! Restarts of the daemon, of kubelet and of the machine.

use crate::{groups::all_pods, restarts, sleeper, under_kubelet};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::{fs, time::Duration};
use windlass_integration::kubelet::{container_status, is_ready};

fn container_id(pod: &Value) -> Option<String> {
    container_status(pod, "main")?["containerID"].as_str().map(str::to_owned)
}

pub(crate) fn a_daemon_or_kubelet_that_starts_again_disturbs_no_pod() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        bench.kubelet.place(&sleeper("stays"))?;
        let before = container_id(&bench.kubelet.ready("stays")?);
        bench.daemon.kill9()?;
        bench.daemon.serve()?;
        bench.kubelet.stop()?;
        bench.kubelet.start()?;
        let after = bench.kubelet.ready("stays")?;
        ensure!(container_id(&after) == before, "{:?} is another than {before:?}", container_id(&after));
        ensure!(restarts(&after, "main") == 0, "the container was started again");
        bench.daemon.stop()?;
        bench.daemon.serve()?;
        // A new pod shows that kubelet speaks with the new daemon; the old one must have stayed meanwhile.
        bench.kubelet.place(&sleeper("comes"))?;
        bench.kubelet.ready("comes")?;
        let after = bench.kubelet.ready("stays")?;
        ensure!(container_id(&after) == before && restarts(&after, "main") == 0, "disturbed: {}", after["status"]);
        bench.client = windlass_integration::client::Client::connect(&bench.daemon)?;
        bench.withdraw(&["stays", "comes"])
    })
}

pub(crate) fn pods_come_back_after_a_reboot() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        bench.kubelet.place(&sleeper("returns"))?;
        let before = container_id(&bench.kubelet.ready("returns")?);
        bench.kubelet.stop()?;
        bench.daemon.kill9()?;
        lose_everything_that_a_reboot_loses(bench)?;
        bench.daemon.serve()?;
        bench.client = windlass_integration::client::Client::connect(&bench.daemon)?;
        bench.kubelet.start()?;
        let back = |pod: &Value| is_ready(pod) && container_id(pod).is_some() && container_id(pod) != before;
        bench.kubelet.wait_within(Duration::from_secs(60), "returns", "back", back)?;
        bench.withdraw(&["returns"])
    })
}

/// Every process and cgroup of the pods, the state directory, the pins of network namespaces, the links.
fn lose_everything_that_a_reboot_loses(bench: &crate::Bench) -> Result<()> {
    for cgroup in [bench.daemon.cgroup_directory(), all_pods()].iter().filter(|cgroup| cgroup.exists()) {
        fs::write(cgroup.join("cgroup.kill"), "1")?;
    }
    for pid in bench.daemon.monitors() {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    bench.eventually("every monitor has ended", || {
        ensure!(bench.daemon.monitors().is_empty(), "monitors are left");
        Ok(())
    })?;
    for pin in fs::read_dir("/run/netns")?.flatten() {
        nix::mount::umount2(&pin.path(), nix::mount::MntFlags::MNT_DETACH)?;
        fs::remove_file(pin.path())?;
    }
    Ok(fs::remove_dir_all(bench.daemon.state())?)
}
