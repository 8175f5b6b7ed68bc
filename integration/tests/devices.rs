//! Devices: what a container may open, make and see, by the kernel's own answer.

use anyhow::{Result, ensure};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    leak::Snapshot,
    node,
};
use windlass_proto::cri;

/// Runs one pod with one container, and gives every script's output of a shell in it.
fn answers(change: impl FnOnce(&mut cri::PodSandboxConfig, &mut cri::ContainerConfig), scripts: &[&str]) -> Result<Vec<String>> {
    let daemon = Daemon::start(&[])?;
    let client = Client::connect(&daemon)?;
    let mut config = pod(&daemon.path("logs"));
    let mut wanted = container(&config, "main", &["sleep", "1000"]);
    change(&mut config, &mut wanted);
    let warm = client.run(&pod(&daemon.path("logs-warm")))?;
    client.remove(&warm)?;
    let before = Snapshot::take(&daemon)?;
    let id = client.run(&config)?;
    let main = client.create(&id, &config, &wanted)?;
    client.start(&main)?;
    let mut outputs = Vec::new();
    for script in scripts {
        let reply = client.exec(&main, &["sh", "-c", &format!("({script}) 2>&1 && echo yes || echo no")])?;
        outputs.push(String::from_utf8_lossy(&reply.stdout).trim().to_owned());
    }
    client.remove(&id)?;
    before.expect_same(&Snapshot::take(&daemon)?)?;
    Ok(outputs)
}

fn context(container: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
    container.linux.get_or_insert_default().security_context.get_or_insert_default()
}

fn device(host_path: &str, container_path: &str, permissions: &str) -> cri::Device {
    cri::Device { host_path: host_path.into(), container_path: container_path.into(), permissions: permissions.into() }
}

/// 10:200 is tun, 10:229 fuse: both can be opened by root without more, so that a refusal is the filter's.
#[test]
fn only_granted_devices_can_be_opened() -> Result<()> {
    node::run(|| {
        let outputs = answers(
            |_, container| container.devices = vec![device("/dev/fuse", "/dev/granted", "r")],
            &[
                ": > /dev/null && : < /dev/urandom && : < /dev/zero",
                ": < /dev/granted",
                "mknod /made c 10 200 && echo made",
                ": < /made",
                ": <> /dev/granted",
                "mknod /disk b 254 0 && : < /disk",
                "[ -e /dev/fuse ]",
            ],
        )?;
        ensure!(outputs[..3] == ["yes", "yes", "made\nyes"], "{outputs:?}");
        for refused in &outputs[3..6] {
            ensure!(refused.contains("Operation not permitted") && refused.ends_with("no"), "{outputs:?}");
        }
        ensure!(outputs[6] == "no", "{outputs:?}");
        Ok(())
    })
}

#[test]
fn a_privileged_container_has_the_devices_of_the_host() -> Result<()> {
    node::run(|| {
        let outputs = answers(
            |pod, container| {
                pod.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
                context(container).privileged = true;
            },
            &[": <> /dev/fuse", "mknod /made c 10 200 && : <> /made", "[ -c /dev/ptmx ] && [ ! -e /dev/pts/0 ]"],
        )?;
        ensure!(outputs == ["yes", "yes", "yes"], "{outputs:?}");
        Ok(())
    })
}

#[test]
fn a_directory_of_devices_and_a_link_to_one() -> Result<()> {
    node::run(|| {
        let directory = tempfile::tempdir()?;
        std::os::unix::fs::symlink("/dev/fuse", directory.path().join("link"))?;
        let link = directory.path().join("link").to_string_lossy().into_owned();
        let outputs = answers(
            |_, container| container.devices = vec![device("/dev/net", "/dev/mine", "rwm"), device(&link, "/dev/linked", "rw")],
            &[": <> /dev/mine/tun", ": <> /dev/linked"],
        )?;
        ensure!(outputs == ["yes", "yes"], "{outputs:?}");
        Ok(())
    })
}

#[test]
fn devices_that_cannot_be_given_are_named() -> Result<()> {
    node::run(|| {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let before = Snapshot::take(&daemon)?;
        for (bad, part) in [
            (device("/dev/absent", "/dev/a", "rw"), "devices[0].host_path \"/dev/absent\""),
            (device("/dev/fuse", "/dev/a", "rx"), "devices[0].permissions \"rx\""),
            (device("/dev/fuse", "/dev/a", ""), "devices[0].permissions \"\""),
            (device("/etc/passwd", "/dev/a", "r"), "devices[0].host_path \"/etc/passwd\""),
            (device("/dev/fuse", "a/b", "r"), "devices[0].container_path \"a/b\""),
        ] {
            let mut wanted = container(&config, "main", &["true"]);
            wanted.devices = vec![bad];
            let refused = client.create(&id, &config, &wanted).expect_err(part);
            ensure!(refused.code() == tonic::Code::InvalidArgument && refused.message().contains(part), "{part}: {refused}");
        }
        before.expect_same(&Snapshot::take(&daemon)?)
    })
}
