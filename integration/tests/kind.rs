//! kind's own code against a node with Windlass: what it asks of `containerd`, `ctr` and `crictl` is answered by `manifests/kind`.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use windlass_integration::{
    client::{container, host_network, pod},
    debian::{Debian, DebianNode},
    go, image, node,
    node::output_of,
    setup,
};

/// A Debian system laid out as `manifests/kind/install.sh` lays out a node.
fn node_of_kind(crictl: &Path) -> Result<DebianNode> {
    let node = DebianNode::start("kind")?;
    let manifests = setup::workspace().join("manifests");
    let programs = setup::programs()?;
    let place = |from: PathBuf, to: &str, mode: u32| -> Result<()> {
        let to = node.system.path(to);
        fs::create_dir_all(to.parent().context("a folder")?)?;
        fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
        Ok(fs::set_permissions(to, fs::Permissions::from_mode(mode))?)
    };
    place(programs.join("windlass"), "/usr/bin/windlass", 0o755)?;
    place(programs.join("windlass-monitor"), "/usr/libexec/windlass/windlass-monitor", 0o755)?;
    place(crictl.to_owned(), "/usr/local/bin/crictl", 0o755)?;
    for name in ["ctr", "containerd"] {
        place(manifests.join("kind/bin").join(name), &format!("/usr/local/bin/{name}"), 0o755)?;
    }
    place(manifests.join("crictl.yaml"), "/etc/crictl.yaml", 0o644)?;
    place(manifests.join("kind/containerd.toml"), "/etc/containerd/config.toml", 0o644)?;
    let own = fs::read_to_string(manifests.join("kind/config.toml"))?;
    fs::create_dir_all(node.system.path("/etc/windlass"))?;
    fs::write(node.system.path("/etc/windlass/config.toml"), format!("{own}\n[cgroup]\nparent = {:?}\n", node.cgroup))?;
    fs::create_dir_all(node.system.path("/kind"))?;
    fs::write(node.system.path("/kind/version"), "v1.37.2\n")?;
    Ok(node)
}

#[test]
fn kinds_own_code_loads_names_and_finds_images() -> Result<()> {
    Debian::prepare()?;
    let (kind, crictl) = (go::kind()?.canonicalize()?, go::tools()?.crictl.canonicalize()?);
    node::run(move || calls(&kind.to_string_lossy(), &crictl))
}

fn calls(program: &str, crictl: &Path) -> Result<()> {
    let mut node = node_of_kind(crictl)?;
    let client = node.serve()?;
    let pid = node.system.pid().to_string();
    let kind = |words: &[&str]| output_of(program, &[&[pid.as_str()], words].concat());
    let scratch = tempfile::tempdir()?;
    let archive = scratch.path().join("image.tar");
    image::write_archive(&archive)?;

    ensure!(kind(&["version"])?.trim() == "v1.37.2");
    ensure!(kind(&["id", image::BUSYBOX]).is_err(), "an image that is not there yet");
    kind(&["load", &archive.to_string_lossy()])?;
    // docker calls an image by the digest of its configuration: kind compares that with what the node says.
    let id = kind(&["id", image::BUSYBOX])?.trim().to_owned();
    let config = archived_config(&archive)?;
    ensure!(id == config, "the node says {id}, the archive has {config}");
    kind(&["tag", &id, "registry.example/own:2"])?;
    ensure!(kind(&["tags", &id])? == format!("{}\nregistry.example/own:2\n", image::BUSYBOX));
    kind(&["load", &archive.to_string_lossy()])?;
    ensure!(fs::read_dir(node.system.path("/var/tmp"))?.next().is_none(), "an archive is left");

    // The calls of `kind build node-image`.
    let listed = node.system.run(&["/usr/local/bin/ctr", "--namespace=k8s.io", "images", "list", "-q"])?;
    ensure!(listed.lines().any(|line| line == "registry.example/own:2"), "{listed}");
    node.system.run(&["/usr/local/bin/ctr", "info"])?;
    let refused = node.system.output(&["/usr/local/bin/ctr", "run", "--rm", "x", "y"])?;
    ensure!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("windlass image"), "{refused:?}");

    let config = host_network(pod(Path::new("/tmp/logs")));
    let pod = client.run(&config)?;
    let mut wanted = container(&config, "main", &["sleep", "1000"]);
    wanted.image.get_or_insert_default().image = "registry.example/own:2".into();
    let created = client.create(&pod, &config, &wanted)?;
    client.start(&created)?;
    ensure!(client.shell(&created, "echo here")? == "here");
    client.remove(&pod)?;
    node.stop()
}

/// The digest of the configuration in an archive of `docker save`.
fn archived_config(archive: &Path) -> Result<String> {
    let text = output_of("tar", &["-xOf", &archive.to_string_lossy(), "config.json"])?;
    let _: Value = serde_json::from_str(&text)?;
    Ok(windlass_integration::standin::digest(text.as_bytes()))
}

#[test]
fn the_clusters_configuration_is_what_kind_reads() -> Result<()> {
    let kind = go::kind()?;
    let cluster = setup::workspace().join("manifests/kind/cluster.yaml");
    let patches = output_of(&kind.to_string_lossy(), &["-", "cluster", &cluster.to_string_lossy()])?;
    ensure!(patches == "InitConfiguration\nJoinConfiguration\nKubeletConfiguration\n", "{patches}");
    Ok(())
}
