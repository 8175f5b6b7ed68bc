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
    let before = Snapshot::warm(&daemon, &client)?;
    let id = client.run(&config)?;
    let main = client.create(&id, &config, &wanted)?;
    client.start(&main)?;
    let mut outputs = Vec::new();
    for script in scripts {
        let reply = client.exec(&main, &["sh", "-c", &format!("({script}) 2>&1 && echo yes || echo no")])?;
        outputs.push(String::from_utf8_lossy(&reply.stdout).trim().to_owned());
    }
    client.remove(&id)?;
    before.expect_again(&daemon)?;
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
        before.expect_again(&daemon)
    })
}

fn cdi(name: &str) -> cri::CdiDevice {
    cri::CdiDevice { name: name.into() }
}

/// A file of a vendor whose device brings a node, a mount, a variable, a group and a hook, and one that brings a fault.
fn vendor(heard: &std::path::Path, mounted: &std::path::Path, value: &str) -> String {
    format!(
        "cdiVersion: 0.6.0
kind: example.com/card
containerEdits:
  env: [CARDS=all]
devices:
- name: one
  containerEdits:
    env: [\"CARD={value}\"]
    deviceNodes:
    - {{path: /dev/card, hostPath: /dev/fuse, permissions: r}}
    mounts:
    - {{hostPath: {mounted:?}, containerPath: /opt/card, options: [ro]}}
    hooks:
    - {{hookName: createRuntime, path: /bin/sh, args: [sh, -c, 'cat > {heard}']}}
    additionalGids: [4242]
- name: lost
  containerEdits:
    deviceNodes:
    - path: /dev/that-is-not-there
- name: classes
  containerEdits:
    intelRdt: {{closID: x}}
",
        heard = heard.display()
    )
}

#[test]
fn cdi_devices_bring_what_their_files_say() -> Result<()> {
    node::run(|| {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let (heard, mounted) = (daemon.path("heard"), daemon.path("mounted"));
        std::fs::create_dir(&mounted)?;
        std::fs::write(mounted.join("file"), "of the vendor")?;
        let config = pod(&daemon.path("logs"));
        let before = Snapshot::warm(&daemon, &client)?;
        let id = client.run(&config)?;
        let mut wanted = container(&config, "main", &["sleep", "1000"]);
        wanted.cdi_devices = vec![cdi("example.com/card=one")];
        let error = client.create(&id, &config, &wanted).expect_err("no file yet");
        ensure!(error.code() == tonic::Code::InvalidArgument && error.message().contains("CDI_devices"), "{error}");
        std::fs::create_dir(daemon.path("cdi"))?;
        for value in ["first", "second"] {
            std::fs::write(daemon.path("cdi").join("card.yaml"), vendor(&heard, &mounted, value))?;
            let main = client.create(&id, &config, &wanted)?;
            client.start(&main)?;
            let script = "echo $CARDS $CARD; cat /opt/card/file; id -G; (: < /dev/card) && echo opened; \
                          (: <> /dev/card) || echo refused; (echo > /opt/card/new) || echo kept";
            let reply = client.exec(&main, &["sh", "-c", &format!("({script}) 2>/dev/null")])?;
            let seen = String::from_utf8_lossy(&reply.stdout).into_owned();
            ensure!(seen == format!("all {value}\nof the vendor0 4242\nopened\nrefused\nkept\n"), "{seen:?}");
            let state: serde_json::Value = serde_json::from_slice(&std::fs::read(&heard)?)?;
            ensure!(state["id"] == main.as_str(), "{state}");
            std::fs::remove_file(&heard)?;
            client.stop(&main, 0)?;
            client.remove_container(cri::RemoveContainerRequest { container_id: main })?;
        }
        for (name, part) in [("lost", "that-is-not-there"), ("classes", "intelRdt"), ("none", "card=none")] {
            wanted.cdi_devices = vec![cdi(&format!("example.com/card={name}"))];
            let error = client.create(&id, &config, &wanted).expect_err("refused");
            ensure!(error.message().contains("CDI_devices") && error.message().contains(part), "{error}");
        }
        wanted.cdi_devices.clear();
        wanted.annotations.insert("cdi.k8s.io/plugin".into(), "example.com/card=one".into());
        let main = client.create(&id, &config, &wanted)?;
        client.start(&main)?;
        ensure!(client.exec(&main, &["test", "-c", "/dev/card"])?.exit_code == 0);
        client.remove(&id)?;
        std::fs::remove_dir_all(daemon.path("cdi"))?;
        std::fs::remove_file(heard)?;
        before.expect_again(&daemon)
    })
}
