//! What `manifests` has for programs of others is read by those programs, which refuse what they do not know. Its units are verified where
//! the package is installed, its classes of pods in the cluster.

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use windlass_integration::{
    daemon::Daemon,
    go,
    kubelet::{Kubelet, pod},
    node::{self, output_of, run_command},
    setup,
};

fn manifest(name: &str) -> Result<String> {
    let path = setup::workspace().join("manifests").join(name);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// The text with a letter less in the name of a field.
fn misspelt(text: &str, field: &str) -> Result<String> {
    ensure!(text.contains(field), "there is no {field}");
    Ok(text.replacen(field, &field[..field.len() - 1], 1))
}

/// An empty place that only this test's node has.
fn cover(place: &str) -> Result<()> {
    fs::create_dir_all(place).with_context(|| format!("create {place}"))?;
    mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).with_context(|| format!("cover {place}"))
}

#[test]
fn kubeadm_takes_its_configuration_and_no_unknown_field() -> Result<()> {
    let (kubeadm, scratch) = (go::kubernetes("kubeadm")?, tempfile::tempdir()?);
    let file = scratch.path().join("kubeadm.yaml");
    let validate = |text: &str| -> Result<Output> {
        fs::write(&file, text)?;
        Command::new(&kubeadm).args(["config", "validate", "--config"]).arg(&file).output().context("run kubeadm")
    };
    let own = manifest("kubeadm.yaml")?;
    let taken = validate(&own)?;
    ensure!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
    for field in ["nodeRegistration", "criSocket", "containerRuntimeEndpoint"] {
        let refused = validate(&misspelt(&own, field)?)?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(!refused.status.success() && said.contains("unknown field"), "{field} misspelt: {said}");
    }
    Ok(())
}

#[test]
fn kubelet_takes_its_configuration_and_no_unknown_field() -> Result<()> {
    let program = go::kubernetes("kubelet")?;
    node::run(move || {
        let daemon = Daemon::start(&[])?;
        // Where the packaged daemon would listen.
        cover("/run/windlass")?;
        symlink(daemon.socket(), "/run/windlass/windlass.sock")?;
        let directory = daemon.path("kubelet.conf.d");
        fs::create_dir(&directory)?;
        let (own, file) = (manifest("kubelet.yaml")?, directory.join("50-windlass.conf"));
        fs::write(&file, &own)?;
        // An empty list is lost where kubelet merges a drop-in.
        let elsewhere =
            json!({ "containerRuntimeEndpoint": "unix:///run/windlass/absent.sock", "enforceNodeAllocatable": ["none"] });
        let mut kubelet =
            Kubelet::prepare_with(&program, &daemon, elsewhere)?.with_arguments(&["--config-dir", &directory.to_string_lossy()]);
        kubelet.start()?;
        let config: Value = serde_json::from_str(&kubelet.act("GET", "/configz")?)?;
        let config = &config["kubeletconfig"];
        ensure!(config["containerRuntimeEndpoint"] == "unix:///run/windlass/windlass.sock", "{config}");
        ensure!(config["featureGates"]["PodAndContainerStatsFromCRI"] == true, "{config}");
        kubelet.place(&pod("first", "sleep 1000"))?;
        kubelet.ready("first")?;
        kubelet.stop()?;
        // A drop-in's unknown fields are overlooked, those of the file itself are not.
        for field in ["containerRuntimeEndpoint", "featureGates", "PodAndContainerStatsFromCRI"] {
            fs::write(&file, misspelt(&own, field)?)?;
            let refused =
                Command::new(&program).arg("--config").arg(&file).arg("--root-dir").arg(daemon.path("root")).output()?;
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            ensure!(said.contains("unknown field") || said.contains("unrecognized feature gate"), "{field} misspelt: {said}");
        }
        Ok(())
    })
}

/// Those that are set, and those that are only spoken of.
#[test]
fn kernel_parameters_are_those_of_a_kernel() -> Result<()> {
    let mut count = 0;
    for line in manifest("sysctl.conf")?.lines() {
        let Some((name, value)) = line.trim_start_matches("# ").split_once(" = ") else { continue };
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        let found = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        ensure!(found.trim().parse::<i64>().is_ok() && value.parse::<i64>().is_ok(), "{line}: the kernel has {found}");
        count += 1;
    }
    ensure!(count > 0, "none");
    Ok(())
}

/// By libcni and the plugins of the CNI project.
#[test]
fn the_networks_connect_a_namespace() -> Result<()> {
    let plugins = go::cni_plugins()?;
    node::run(move || {
        cover("/var/lib/cni")?;
        let folder: PathBuf = setup::workspace().join("manifests/cni");
        for entry in fs::read_dir(&folder)?.flatten() {
            let network: Value = serde_json::from_slice(&fs::read(entry.path())?)?;
            let name = network["name"].as_str().context("a name")?;
            run_command("ip", &["netns", "add", "pod"])?;
            let cnitool = |verb: &str| -> Result<()> {
                let mut command = Command::new(plugins.join("cnitool"));
                command.args([verb, name, "/run/netns/pod"]).env("NETCONFPATH", &folder).env("CNI_PATH", &plugins);
                let ports = json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
                let output = command.env("CAP_ARGS", ports.to_string()).output().context("run cnitool")?;
                ensure!(output.status.success(), "cnitool {verb} {name}: {}", String::from_utf8_lossy(&output.stderr));
                Ok(())
            };
            cnitool("add")?;
            let addresses = output_of("ip", &["-n", "pod", "-o", "address", "show", "dev", "eth0", "scope", "global"])?;
            for range in network["plugins"][0]["ipam"]["ranges"].as_array().into_iter().flatten() {
                let subnet = range[0]["subnet"].as_str().context("a subnet")?;
                let prefix = subnet.split_once("0.0/").or(subnet.split_once(":/")).context("a prefix")?.0;
                ensure!(addresses.contains(prefix), "{name}: {subnet} is not in {addresses}");
            }
            cnitool("check")?;
            cnitool("del")?;
            let left = output_of("ip", &["-n", "pod", "-o", "link"])?;
            ensure!(!left.contains("eth0"), "{name}: left: {left}");
            run_command("ip", &["netns", "delete", "pod"])?;
        }
        Ok(())
    })
}
