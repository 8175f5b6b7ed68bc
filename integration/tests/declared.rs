//! Volumes that an image declares: writable where the root is not, each container's own, with what the image has there.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};
use tar::{Builder, EntryType, Header};
use tonic::Code;
use windlass_integration::{
    client::{Client, container},
    daemon::Daemon,
    ground::Ground,
    image, node,
    wait::until,
};
use windlass_proto::cri;

/// An image that declares volumes.
const DECLARING: &str = "localhost/declaring:test";

/// Adds an entry of the image's user 1000.
fn entry(builder: &mut Builder<Vec<u8>>, kind: EntryType, path: &str, mode: u32, content: &str) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(1000);
    header.set_gid(1000);
    header.set_mtime(1_600_000_000);
    if kind == EntryType::Symlink {
        header.set_size(0);
        return Ok(builder.append_link(&mut header, path, content)?);
    }
    header.set_size(content.len() as u64);
    Ok(builder.append_data(&mut header, path, content.as_bytes())?)
}

/// What the image has at its volumes.
fn layer() -> Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    for (path, mode) in [("data/", 0o2750), ("data/inner/", 0o700), ("given/", 0o755), ("real/", 0o755), ("real/v/", 0o711)] {
        entry(&mut builder, EntryType::Directory, path, mode, "")?;
    }
    entry(&mut builder, EntryType::Regular, "data/file", 0o4640, "of the image\n")?;
    entry(&mut builder, EntryType::Regular, "data/inner/file", 0o600, "inside\n")?;
    entry(&mut builder, EntryType::Regular, "given/of-the-image", 0o644, "")?;
    entry(&mut builder, EntryType::Regular, "real/v/file", 0o644, "behind a link\n")?;
    entry(&mut builder, EntryType::Symlink, "data/link", 0o777, "/etc/passwd")?;
    entry(&mut builder, EntryType::Symlink, "linked", 0o777, "real")?;
    Ok(builder.into_inner()?)
}

fn ground(config: &str, fields: serde_json::Value, change: impl FnOnce(&mut cri::PodSandboxConfig)) -> Result<Ground> {
    let mut layers = image::layers()?.to_vec();
    let plain = (image::BUSYBOX, layers.clone(), json!({}));
    layers.push(layer()?);
    Ground::with_handler(Daemon::configured_with(config, vec![plain, (DECLARING, layers, fields)])?, "", change)
}

/// Those of the tests, and some that cannot be.
fn volumes() -> serde_json::Value {
    let paths = [
        "/data",
        "/data/inner/",
        "/given",
        "/given/below",
        "/absent/deep",
        "relative",
        "/linked/v",
        "/real/v",
        "/",
        "/proc",
        "/dev/x",
        "/a/../../b",
        "/etc/hosts",
    ];
    json!({ "Volumes": paths.iter().map(|path| ((*path).to_owned(), json!({}))).collect::<serde_json::Map<_, _>>() })
}

/// A container of the image whose root is read-only.
fn read_only(ground: &Ground, name: &str) -> cri::ContainerConfig {
    let mut wanted = container(&ground.config, name, &["sleep", "1000"]);
    wanted.image = Some(cri::ImageSpec { image: DECLARING.into(), ..Default::default() });
    wanted.linux.get_or_insert_default().security_context.get_or_insert_default().readonly_rootfs = true;
    wanted
}

fn directory(ground: &Ground, id: &str) -> PathBuf {
    ground.daemon.root().join("containers").join(id)
}

#[test]
fn volumes_of_an_image_are_writable_and_each_container_s_own() -> Result<()> {
    node::run(|| {
        let mut ground = ground("", volumes(), |_| {})?;
        let host = ground.daemon.path("given");
        fs::create_dir(&host)?;
        let mut wanted = read_only(&ground, "main");
        wanted.mounts = vec![cri::Mount {
            container_path: "/given/".into(),
            host_path: host.to_string_lossy().into_owned(),
            ..Default::default()
        }];
        let id = ground.launch(&wanted)?;
        let run = |script: &str| ground.client.shell(&id, script);
        let seen = run("stat -c '%a %u %g %Y %n' /data /data/file /data/inner /data/inner/file /linked/v")?;
        let expected = [
            "2750 1000 1000 1600000000 /data",
            "4640 1000 1000 1600000000 /data/file",
            "700 1000 1000 1600000000 /data/inner",
            "600 1000 1000 1600000000 /data/inner/file",
            "711 1000 1000 1600000000 /linked/v",
        ];
        ensure!(seen == expected.join("\n"), "{seen}");
        ensure!(run("cat /data/file /data/inner/file /real/v/file")? == "of the image\ninside\nbehind a link");
        ensure!(run("readlink /data/link; ls -A /absent/deep /relative")? == "/etc/passwd\n/absent/deep:\n\n/relative:");
        run("for d in /data /data/inner /absent/deep /relative /real/v; do echo mine > $d/new || exit 1; done; ! touch /new")?;
        // The mount of the request goes over the volume, and the kernel's file systems are the kernel's.
        ensure!(run("ls -A /given; touch /given/x; cat /proc/1/comm")? == "sleep");
        ensure!(host.join("x").exists() && !host.join("below").exists());
        let listed = run("cut -d' ' -f5 /proc/self/mountinfo | sort")?;
        let mounts: Vec<&str> =
            listed.lines().filter(|path| !["/dev", "/etc", "/proc", "/sys"].iter().any(|own| path.starts_with(own))).collect();
        ensure!(mounts == ["/", "/absent/deep", "/data", "/data/inner", "/given", "/real/v", "/relative"], "{mounts:?}");
        let log = ground.daemon.log();
        for left_out in ["/", "/proc", "/dev/x", "/a/../../b"] {
            ensure!(
                log.contains(&format!("volume={left_out} ")) || log.contains(&format!("volume={left_out}\n")),
                "{left_out}: {log}"
            );
        }
        // Nothing of it is another container's.
        let other = ground.launch(&read_only(&ground, "other"))?;
        ensure!(
            ground.client.shell(&other, "ls -A /data /relative /given")?
                == "/data:\nfile\ninner\nlink\n\n/given:\nbelow\nof-the-image\n\n/relative:"
        );
        run("dd if=/dev/zero of=/data/large bs=1M count=3 2>/dev/null")?;
        until("the volume is counted in the writable layer", || {
            let reply = ground.client.container_stats(cri::ContainerStatsRequest { container_id: id.clone() })?;
            let used = reply.stats.and_then(|stats| stats.writable_layer?.used_bytes).map_or(0, |used| used.value);
            Ok((used >= 3 << 20).then_some(()))
        })?;
        ground.daemon.kill9()?;
        ground.daemon.serve()?;
        ground.client = Client::connect(&ground.daemon)?;
        ensure!(ground.client.shell(&id, "cat /data/new /data/inner/new")? == "mine\nmine");
        let place = directory(&ground, &id);
        ensure!(place.join("volumes").exists());
        ground.client.stop(&id, 0)?;
        ground.client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
        ensure!(!place.exists());
        ground.end()
    })
}

#[test]
fn volumes_of_an_image_where_users_are_the_pod_s() -> Result<()> {
    node::run(|| {
        let ids = || vec![cri::IdMapping { host_id: 300_000, container_id: 0, length: 65536 }];
        let users = cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids: ids(), gids: ids() };
        let ground = ground("", volumes(), |config| {
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.namespace_options.get_or_insert_default().userns_options = Some(users);
        })?;
        let id = ground.launch(&read_only(&ground, "main"))?;
        let run = |script: &str| ground.client.shell(&id, script);
        ensure!(run("stat -c '%u %g' /data /data/file /absent/deep")? == "1000 1000\n1000 1000\n0 0");
        run("echo x > /data/new; chown 7 /data/new; echo x > /absent/deep/new")?;
        let owner = fs::metadata(directory(&ground, &id).join("volumes/declared"))?.uid();
        ensure!(owner == 0, "{owner}");
        ensure!(run("stat -c %u /data/new /absent/deep/new")? == "7\n0");
        ground.end()
    })
}

fn configured(how: &str, expected: &str) -> Result<()> {
    let (config, expected) = (format!("[containers]\nimage_volumes = {how:?}\n"), expected.to_owned());
    node::run(move || {
        let fields = json!({ "Volumes": { "/data": {}, "/absent/deep": {}, "/linked/new": {}, "/etc/hosts": {} } });
        let ground = ground(&config, fields, |_| {})?;
        let id = ground.launch(&read_only(&ground, "main"))?;
        let run = |script: &str| ground.client.shell(&id, script);
        let seen = run("stat -c '%a %u %g %n' /absent/deep /real/new 2>/dev/null; ! touch /data/x 2>/dev/null")?;
        ensure!(seen == expected, "{seen}");
        ensure!(run("stat -c '%a %u' /real /data; cat /data/file")? == "755 1000\n2750 1000\nof the image");
        ground.end()
    })
}

#[test]
fn volumes_of_an_image_as_directories_of_the_root() -> Result<()> {
    configured("mkdir", "755 0 0 /absent/deep\n755 0 0 /real/new")
}

#[test]
fn volumes_of_an_image_that_are_ignored() -> Result<()> {
    configured("ignore", "")
}

#[test]
fn volumes_of_an_image_that_lead_elsewhere_or_nowhere() -> Result<()> {
    node::run(|| {
        let mut layers = image::layers()?.to_vec();
        let plain = (image::BUSYBOX, layers.clone(), json!({}));
        let mut daemon = Daemon::prepare(&[])?;
        let (marker, outside) = (daemon.path("outside/marker"), daemon.path("outside"));
        fs::create_dir(&outside)?;
        fs::write(&marker, "of the host")?;
        let away = format!("../../../../../../../..{}", outside.display());
        layers.push(image::links_layer(&[
            ("away", &away),
            ("absolute", &outside.to_string_lossy()),
            ("kernel", "/proc"),
            ("self", "self"),
        ])?);
        let fields = |paths: &[&str]| json!({ "Volumes": paths.iter().map(|path| ((*path).to_owned(), json!({}))).collect::<serde_json::Map<_, _>>() });
        let archive = daemon.path("images.tar");
        let many: Vec<String> = (0..257).map(|number| format!("/v/{number}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for (name, layers, fields) in [
            (plain.0, plain.1, plain.2),
            ("localhost/links:test", layers.clone(), fields(&["/away", "/absolute/v", "/kernel/sys", "/kernel"])),
            ("localhost/file:test", layers.clone(), fields(&["/etc/passwd"])),
            ("localhost/loop:test", layers.clone(), fields(&["/self/x"])),
            ("localhost/many:test", layers.clone(), fields(&many)),
        ] {
            image::write_archive_with(&archive, name, layers, fields)?;
            daemon.windlass(&["image", "import", &archive.to_string_lossy()])?;
        }
        fs::remove_file(&archive)?;
        daemon.serve()?;
        let ground = Ground::on(daemon)?;
        let create = |name: &str| {
            let mut wanted = container(&ground.config, name, &["sleep", "1000"]);
            wanted.image = Some(cri::ImageSpec { image: format!("localhost/{name}:test"), ..Default::default() });
            ground.client.create(&ground.pod, &ground.config, &wanted)
        };
        let id = create("links")?;
        ground.client.start(&id)?;
        ensure!(
            ground.client.shell(&id, "ls -A /away /absolute; cat /proc/1/comm; touch /away/x /absolute/v/x")?.ends_with("sleep")
        );
        let names: Vec<_> = fs::read_dir(&outside)?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(names == ["marker"], "{names:?}");
        for (name, told) in [("file", "/etc/passwd"), ("loop", "/self/x"), ("many", "257 volumes")] {
            let error = create(name).err().with_context(|| format!("{name} is refused"))?;
            ensure!(error.code() == Code::InvalidArgument && error.message().contains(told), "{name}: {error}");
        }
        ground.end()
    })
}
