//! One container: into an archive, and on from there.

use super::{COUNTER, beyond, checkpoint, counts_on, daemon, ground, names, numbers, restored, with_criu};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, path::Path, process::Command};
use windlass_integration::{client, go, ground::Ground, image, wait::until_true};
use windlass_proto::cri;

/// The same volume for the container and for the one that it becomes.
fn with_volume(volume: &Path) -> impl Fn(&mut cri::ContainerConfig) {
    let host_path = volume.to_string_lossy().into_owned();
    move |config| {
        config.mounts.push(cri::Mount { host_path: host_path.clone(), container_path: "/volume".into(), ..Default::default() });
    }
}

#[test]
fn a_restored_container_goes_on_where_it_was() -> Result<()> {
    with_criu(|| {
        let ground = ground()?;
        let volume = ground.daemon.path("volume");
        fs::create_dir_all(&volume)?;
        let id = ground.start("counter", &["sh", "-c", COUNTER], with_volume(&volume))?;
        ground.client.shell(&id, "echo kept > /home/file; ln /home/file /home/link; ln -s file /home/soft; rm /etc/group; rm -r /root; mkdir /root; echo new > /root/new")?;
        beyond(&ground, "counter", 10)?;
        let archive = ground.daemon.path("counter.tar");
        let before = numbers(&ground.log("counter"))?.last().copied().unwrap_or(0);
        checkpoint(&ground.client, &id, &archive, 0)?;
        let after = numbers(&ground.log("counter"))?.last().copied().unwrap_or(0);
        counts_on(&ground, "counter")?;
        looks_like_one(&archive, &ground.client.container(&id)?.image_id)?;

        let mut wanted = restored(&ground.config, "again", &archive);
        with_volume(&volume)(&mut wanted);
        let again = ground.client.create(&ground.pod, &ground.config, &wanted)?;
        let status = ground.client.container(&again)?;
        ensure!(status.state() == cri::ContainerState::ContainerCreated && ground.log("again").is_empty(), "{status:?}");
        ensure!(status.image_id == ground.client.container(&id)?.image_id, "its image is the first one's");
        ground.client.start(&again)?;
        let first = beyond(&ground, "again", after)?.first().copied().context("a line")?;
        ensure!((before..=after + 1).contains(&first), "it goes on at {first}, the checkpoint was between {before} and {after}");
        counts_on(&ground, "again")?;
        is_the_same_inside(&ground, &again, &volume)?;
        ends_as_any(&ground, &again)?;
        ground.client.stop(&id, 0)?;
        ground.end()
    })
}

/// The layout that other tools read.
fn looks_like_one(archive: &Path, image: &str) -> Result<()> {
    ensure!(fs::metadata(archive)?.permissions().mode() & 0o777 == 0o600, "others can read what a container's memory was");
    let mut found = BTreeSet::new();
    let mut entries = tar::Archive::new(fs::File::open(archive)?);
    let mut described = None;
    for entry in entries.entries()? {
        let entry = entry?;
        let path = entry.path()?.to_string_lossy().into_owned();
        if path == "config.dump" {
            described = Some(serde_json::from_reader::<_, Value>(entry)?);
        }
        found.insert(path);
    }
    for name in
        ["config.dump", "spec.dump", "status.dump", "rootfs-diff.tar", "stats-dump", "dump.log", "checkpoint/inventory.img"]
    {
        ensure!(found.contains(name), "the archive lacks {name}: {found:?}");
    }
    let described = described.context("config.dump")?;
    ensure!(described["name"] == "counter" && described["rootfsImageRef"] == image, "{described}");
    Ok(())
}

fn is_the_same_inside(ground: &Ground, id: &str, volume: &Path) -> Result<()> {
    fs::write(volume.join("from-outside"), "seen")?;
    let script = "cat /home/link /home/soft /root/new /volume/from-outside; ls /etc/group /root/.. 2>&1 | head -1; \
                  stat -c %h /home/file; hostname; cat /proc/1/comm; ls /root";
    let seen = ground.client.shell(id, script)?;
    let expected =
        format!("kept\nkept\nnew\nseenls: /etc/group: No such file or directory\n2\n{}\nsh\nnew", ground.config.hostname);
    ensure!(seen == expected, "inside:\n{seen}\nexpected:\n{expected}");
    let counter = || -> Result<u64> { ground.client.shell(id, "cat /counter")?.parse().context("a number") };
    let first = counter();
    until_true("its file changes", || Ok(counter().ok() > first.as_ref().ok().copied()))?;
    // Its first process is the one that status names, in its pod's namespaces.
    let request = cri::ContainerStatusRequest { container_id: id.into(), verbose: true };
    let info: Value = serde_json::from_str(ground.client.container_status(request)?.info.get("info").context("info")?)?;
    let pid = info["pid"].as_i64().context("a process id")?;
    ensure!(fs::read_to_string(format!("/proc/{pid}/comm"))?.trim() == "sh", "process {pid} is not the container's");
    let kept = names(&ground.daemon.root().join("containers").join(id));
    ensure!(!kept.contains(&"checkpoint".to_owned()) && !kept.contains(&"from".to_owned()), "memory is still on disk: {kept:?}");
    Ok(())
}

fn ends_as_any(ground: &Ground, id: &str) -> Result<()> {
    ground.client.stop(id, 20)?;
    let status = ground.client.container(id)?;
    ensure!(status.exit_code == 7 && ground.log("again").contains("asked at"), "{status:?}");
    Ok(())
}

#[test]
fn a_server_listens_again_and_its_connections_are_closed() -> Result<()> {
    with_criu(|| {
        let mut ground = ground()?;
        let id = ground.start("server", &["/probe", "echo", "7000"], |config| {
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.no_new_privs = true;
            security.readonly_rootfs = true;
            security.seccomp = Some(cri::SecurityProfile::default());
        })?;
        let echoes = |ground: &Ground, id: &str| {
            until_true("the server answers", || {
                let answer = ground.client.exec(id, &["sh", "-c", "echo hello | nc 127.0.0.1 7000"])?;
                Ok(answer.stdout == b"hello\n")
            })
        };
        let connections = |ground: &Ground, id: &str| -> Result<usize> {
            let listed = ground.client.shell(id, "netstat -tn")?;
            Ok(listed.lines().filter(|line| line.contains("ESTABLISHED")).count())
        };
        echoes(&ground, &id)?;
        // A client that is no child of the container's own process stays outside.
        ground.client.shell(&id, "sleep 600 | nc 127.0.0.1 7000 > /dev/null 2>&1 &")?;
        until_true("a client is connected", || Ok(connections(&ground, &id)? == 2))?;
        let archive = ground.daemon.path("server.tar");
        checkpoint(&ground.client, &id, &archive, 0)?;
        ensure!(connections(&ground, &id)? == 2, "the connection goes on here");
        echoes(&ground, &id)?;

        ground.client.remove(&ground.pod)?;
        ground.config = client::pod(&ground.daemon.path("logs"));
        ground.pod = ground.client.run(&ground.config)?;
        let mut wanted = restored(&ground.config, "again", &archive);
        let security = wanted.linux.get_or_insert_default().security_context.get_or_insert_default();
        security.no_new_privs = true;
        security.readonly_rootfs = true;
        security.seccomp = Some(cri::SecurityProfile::default());
        let again = ground.launch(&wanted)?;
        ensure!(connections(&ground, &again)? == 0, "a connection of another pod");
        echoes(&ground, &again)?;
        let status = ground.client.shell(&again, "touch /x").expect_err("the root is read-only");
        ensure!(status.to_string().contains("touch"), "{status}");
        // Of a restored container another can be made.
        let second = ground.daemon.path("second.tar");
        checkpoint(&ground.client, &again, &second, 0)?;
        ground.client.remove(&ground.pod)?;
        ground.config = client::pod(&ground.daemon.path("logs"));
        ground.pod = ground.client.run(&ground.config)?;
        let mut third = restored(&ground.config, "third", &second);
        third.linux.clone_from(&wanted.linux);
        let third = ground.launch(&third)?;
        echoes(&ground, &third)?;
        ground.end()
    })
}

#[test]
fn a_terminal_is_restored_with_its_container() -> Result<()> {
    with_criu(|| {
        let ground = ground()?;
        let terminal = |config: &mut cri::ContainerConfig| {
            config.tty = true;
            config.stdin = true;
        };
        let id = ground.start("counter", &["sh", "-c", COUNTER], terminal)?;
        beyond(&ground, "counter", 5)?;
        let archive = ground.daemon.path("terminal.tar");
        checkpoint(&ground.client, &id, &archive, 0)?;
        counts_on(&ground, "counter")?;
        let mut wanted = restored(&ground.config, "again", &archive);
        let refused = ground.client.create(&ground.pod, &ground.config, &wanted).expect_err("another kind of container");
        ensure!(refused.code() == tonic::Code::InvalidArgument && refused.message().contains("tty"), "{refused}");
        terminal(&mut wanted);
        let again = ground.launch(&wanted)?;
        counts_on(&ground, "again")?;
        ensure!(ground.client.shell(&again, "test -t 0 < /proc/1/fd/0 && echo terminal")? == "terminal", "no terminal");
        ground.end()
    })
}

#[test]
fn an_image_that_is_a_checkpoint_runs_where_that_is_allowed() -> Result<()> {
    with_criu(|| {
        let ground = ground()?;
        let id = ground.start("counter", &["sh", "-c", COUNTER], |_| {})?;
        beyond(&ground, "counter", 5)?;
        let archive = ground.daemon.path("counter.tar");
        checkpoint(&ground.client, &id, &archive, 0)?;
        let layer = fs::read(&archive)?;
        let packed = ground.daemon.path("image.tar");
        image::write_archive_of(&packed, "localhost/counter:checkpoint", vec![layer])?;
        ground.daemon.windlass(&["image", "import", &packed.to_string_lossy()])?;
        let wanted = restored(&ground.config, "again", Path::new("localhost/counter:checkpoint"));
        let refused = ground.client.create(&ground.pod, &ground.config, &wanted).expect_err("not allowed by default");
        ensure!(
            refused.code() == tonic::Code::FailedPrecondition && refused.message().contains("checkpoint.restore_images"),
            "{refused}"
        );
        let Ground { mut daemon, client, config, pod, before } = ground;
        daemon.configure("restore_images = true\n")?;
        daemon.stop()?;
        daemon.serve()?;
        drop(client);
        let ground = Ground { client: client::Client::connect(&daemon)?, daemon, config, pod, before };
        ground.launch(&wanted)?;
        counts_on(&ground, "again")?;
        ground.client.remove(&ground.pod).map_err(Into::into)
    })
}

#[test]
fn a_checkpoint_with_more_rights_than_its_configuration_does_not_run() -> Result<()> {
    with_criu(|| {
        let ground = ground()?;
        let added = |config: &mut cri::ContainerConfig| {
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.capabilities = Some(cri::Capability { add_capabilities: vec!["NET_ADMIN".into()], ..Default::default() });
        };
        let id = ground.start("counter", &["sh", "-c", COUNTER], added)?;
        beyond(&ground, "counter", 5)?;
        let archive = ground.daemon.path("counter.tar");
        checkpoint(&ground.client, &id, &archive, 0)?;
        let mut wanted = restored(&ground.config, "less", &archive);
        let less = ground.client.create(&ground.pod, &ground.config, &wanted)?;
        let refused = ground.client.start(&less).expect_err("more than it may");
        ensure!(refused.message().contains("capabilities") && ground.log("less").is_empty(), "{refused}");
        let status = ground.client.exited(&less)?;
        ensure!(status.exit_code == 128 && status.reason == "StartError", "{status:?}");
        wanted.metadata = Some(cri::ContainerMetadata { name: "same".into(), attempt: 0 });
        wanted.log_path = "same.log".into();
        added(&mut wanted);
        ground.launch(&wanted)?;
        counts_on(&ground, "same")?;
        ground.end()
    })
}

#[test]
fn crictl_writes_a_checkpoint() -> Result<()> {
    with_criu(|| {
        let ground = Ground::on(daemon(None)?)?;
        let id = ground.start("counter", &["sh", "-c", COUNTER], |_| {})?;
        let archive = ground.daemon.path("crictl.tar");
        let config = ground.daemon.path("crictl.yaml");
        fs::write(&config, "")?;
        let endpoint = format!("unix://{}", ground.daemon.socket().display());
        let mut crictl = Command::new(go::tools()?.crictl);
        crictl.arg("--config").arg(&config).args([
            "--timeout",
            "60s",
            "--runtime-endpoint",
            &endpoint,
            "--image-endpoint",
            &endpoint,
        ]);
        let output = crictl.args(["checkpoint", "--export"]).arg(&archive).arg(&id).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        ensure!(archive.is_file(), "crictl has written nothing");
        counts_on(&ground, "counter")?;
        ground.end()
    })
}
