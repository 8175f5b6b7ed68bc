//! Volumes as the CRI asks for them: options, recursive read-only, image volumes, and images full of links that point outside.

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};
use tonic::Code;
use windlass_integration::{client::container, daemon::Daemon, ground::Ground, image, node};
use windlass_proto::cri;

fn ground() -> Result<Ground> {
    Ground::on(Daemon::start(&[])?)
}

/// Containers with these volumes.
trait Volumes {
    fn wanted(&self, name: &str, mounts: Vec<cri::Mount>) -> cri::ContainerConfig;

    fn with_volumes(&self, name: &str, mounts: Vec<cri::Mount>) -> Result<String>;

    fn refused(&self, code: Code, words: &[&str], mount: cri::Mount) -> Result<()>;

    /// What a script prints; it must succeed.
    fn shell(&self, id: &str, script: &str) -> Result<String>;

    fn fails(&self, id: &str, script: &str, why: &str) -> Result<()>;
}

impl Volumes for Ground {
    fn wanted(&self, name: &str, mounts: Vec<cri::Mount>) -> cri::ContainerConfig {
        cri::ContainerConfig { mounts, ..container(&self.config, name, &["sleep", "1000"]) }
    }

    fn with_volumes(&self, name: &str, mounts: Vec<cri::Mount>) -> Result<String> {
        self.launch(&self.wanted(name, mounts))
    }

    fn refused(&self, code: Code, words: &[&str], mount: cri::Mount) -> Result<()> {
        let error = self.client.create(&self.pod, &self.config, &self.wanted("refused", vec![mount])).expect_err("refused");
        ensure!(error.code() == code, "{error:?}");
        for word in words {
            ensure!(error.message().contains(word), "{word:?} in {:?}", error.message());
        }
        Ok(())
    }

    fn shell(&self, id: &str, script: &str) -> Result<String> {
        let run = self.client.exec(id, &["sh", "-c", script])?;
        ensure!(run.exit_code == 0, "{script}: {}", String::from_utf8_lossy(&run.stderr));
        Ok(String::from_utf8_lossy(&run.stdout).trim().to_owned())
    }

    fn fails(&self, id: &str, script: &str, why: &str) -> Result<()> {
        let run = self.client.exec(id, &["sh", "-c", script])?;
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        ensure!(run.exit_code != 0 && said.contains(why), "{script}: exit {}, {said:?}", run.exit_code);
        Ok(())
    }
}

fn bind(host: &Path, target: &str) -> cri::Mount {
    cri::Mount { container_path: target.into(), host_path: host.to_string_lossy().into_owned(), ..Default::default() }
}

fn of_image(target: &str, name: &str, sub_path: &str) -> cri::Mount {
    cri::Mount {
        container_path: target.into(),
        image: Some(cri::ImageSpec { image: name.into(), ..Default::default() }),
        image_sub_path: sub_path.into(),
        readonly: true,
        ..Default::default()
    }
}

/// A directory with a tmpfs mounted in it; the tmpfs goes with this value.
struct Nested(PathBuf);

impl Nested {
    fn make(at: PathBuf) -> Result<Nested> {
        fs::create_dir_all(at.join("inner"))?;
        mount(Some("tmpfs"), &at.join("inner"), Some("tmpfs"), MsFlags::empty(), Some("size=8m"))?;
        Ok(Nested(at))
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        let _ = umount2(&self.0.join("inner"), MntFlags::MNT_DETACH);
    }
}

#[test]
fn an_image_volume_shows_its_image_and_outlives_it() -> Result<()> {
    node::run(|| {
        let daemon = Daemon::prepare(&[])?;
        let archive = daemon.path("images.tar");
        let [busybox, probe] = image::layers()?;
        for (name, layers) in [
            (image::BUSYBOX, vec![busybox.clone(), probe.clone()]),
            ("localhost/data:test", vec![probe.clone(), image::links_layer(&[("out", "/../../etc/shadow"), ("in", "/probe")])?]),
            ("localhost/one:test", vec![probe]),
        ] {
            image::write_archive_of(&archive, name, layers)?;
            daemon.windlass(&["image", "import", &archive.to_string_lossy()])?;
        }
        fs::remove_file(archive)?;
        let mut daemon = daemon;
        daemon.serve()?;
        let ground = Ground::on(daemon)?;
        let data = "localhost/data:test";
        let status = ground.client.image_status(cri::ImageStatusRequest {
            image: Some(cri::ImageSpec { image: data.into(), ..Default::default() }),
            verbose: false,
        })?;
        let by_id = status.image.map(|image| image.id).unwrap_or_default();
        let mut noexec = of_image("/noexec", &by_id, "");
        noexec.mount_options = vec!["noexec".into()];
        let mounts = vec![
            of_image("/whole", data, ""),
            of_image("/by/id", &by_id, ""),
            of_image("/file", data, "in"),
            of_image("/one", "localhost/one:test", ""),
            of_image("/sub", image::BUSYBOX, "etc"),
            noexec,
        ];
        let id = ground.with_volumes("main", mounts)?;
        for path in ["/whole/probe", "/by/id/probe", "/file", "/one/probe"] {
            ground.shell(&id, &format!("cmp {path} /probe && {path} exit 0"))?;
        }
        ground.shell(&id, "cmp /sub/passwd /etc/passwd")?;
        for path in ["/whole/x", "/one/x", "/sub/x", "/one/probe"] {
            ground.fails(&id, &format!("echo > {path}"), "Read-only file system")?;
        }
        ground.fails(&id, "/noexec/probe exit 0", "Permission denied")?;
        let mounts = ground.client.container(&id)?.mounts;
        ensure!(mounts.iter().filter(|mount| mount.image.is_some()).count() == 6, "{mounts:?}");
        let told = |path: &str| mounts.iter().find(|mount| mount.container_path == path).and_then(|mount| mount.image.clone());
        for path in ["/whole", "/by/id"] {
            ensure!(told(path).is_some_and(|image| image.image_ref == by_id), "{path}: {mounts:?}");
        }

        for name in [data, "localhost/one:test"] {
            let image = Some(cri::ImageSpec { image: name.into(), ..Default::default() });
            ground.client.remove_image(cri::RemoveImageRequest { image })?;
        }
        ground.shell(&id, "cmp /whole/probe /probe && cmp /one/probe /probe && test -L /whole/out")?;
        ground.refused(Code::Unknown, &["ImageVolumeMountFailed: ", data], of_image("/data", data, ""))?;
        ground.end()
    })
}

#[test]
fn an_image_volume_that_cannot_be_had() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let missing = of_image("/data", image::BUSYBOX, "no/such");
        ground.refused(Code::Unknown, &["ImageVolumeMountFailed: ", "no/such"], missing)?;
        ground.refused(Code::InvalidArgument, &["image_sub_path"], of_image("/data", image::BUSYBOX, "../etc"))?;
        ground.refused(Code::InvalidArgument, &["image_sub_path"], of_image("/data", image::BUSYBOX, "/etc"))?;
        let both = cri::Mount { host_path: "/etc".into(), ..of_image("/data", image::BUSYBOX, "") };
        ground.refused(Code::InvalidArgument, &["host_path"], both)?;
        ground.refused(Code::InvalidArgument, &["image"], of_image("/data", "", ""))?;
        ground.end()
    })
}

#[test]
fn options_of_a_volume_hold_below_it_too() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let volume = Nested::make(ground.daemon.path("volume"))?;
        for place in ["busybox", "inner/busybox"] {
            fs::copy("/bin/busybox", volume.0.join(place))?;
        }
        let option = |name: &str| cri::Mount { mount_options: vec![name.into()], ..bind(&volume.0, "/data") };
        let all =
            cri::Mount { mount_options: ["noexec", "nodev", "nosuid"].map(str::to_owned).to_vec(), ..bind(&volume.0, "/all") };
        let id = ground.with_volumes("main", vec![bind(&volume.0, "/data"), all])?;
        for place in ["busybox", "inner/busybox"] {
            ground.shell(&id, &format!("/data/{place} true && echo > /all/{place}.new"))?;
            ground.fails(&id, &format!("/all/{place} true"), "Permission denied")?;
        }
        let table = ground.shell(&id, "cat /proc/self/mountinfo")?;
        for path in [" /all ", " /all/inner "] {
            let line = table.lines().find(|line| line.contains(path)).unwrap_or_default();
            ensure!(["noexec", "nodev", "nosuid"].iter().all(|option| line.contains(option)), "{path}: {table}");
        }
        for bad in ["rw", "suid", "size=3"] {
            ground.refused(Code::InvalidArgument, &["mount_options", bad], option(bad))?;
        }
        let status = ground.client.status(cri::StatusRequest::default())?;
        ensure!(status.features.is_some_and(|features| features.mount_options), "mount_options are not advertised");
        drop(volume);
        ground.end()
    })
}

#[test]
fn read_only_volumes_recursive_and_not() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let volume = Nested::make(ground.daemon.path("volume"))?;
        let top = cri::Mount { readonly: true, ..bind(&volume.0, "/top") };
        let all = cri::Mount { readonly: true, recursive_read_only: true, ..bind(&volume.0, "/all") };
        let id = ground.with_volumes("main", vec![top, all])?;
        ground.shell(&id, "echo > /top/inner/written")?;
        for path in ["/top/x", "/all/x", "/all/inner/x"] {
            ground.fails(&id, &format!("echo > {path}"), "Read-only file system")?;
        }
        ensure!(volume.0.join("inner/written").exists());
        let writable = cri::Mount { recursive_read_only: true, ..bind(&volume.0, "/bad") };
        ground.refused(Code::InvalidArgument, &["recursive_read_only"], writable)?;
        drop(volume);
        ground.end()
    })
}

#[test]
fn sources_and_targets_of_every_kind() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let host = ground.daemon.path("volume");
        fs::create_dir_all(host.join("real"))?;
        fs::write(host.join("real/file"), "content\n")?;
        symlink("real", host.join("link"))?;
        symlink(host.join("real/file"), host.join("file-link"))?;
        symlink("nowhere", host.join("dangling"))?;
        let shared = ground.daemon.path("shm");
        fs::create_dir(&shared)?;
        fs::write(shared.join("mine"), "")?;
        let mounts = vec![
            bind(&host.join("link"), "/a/new/directory"),
            bind(&host.join("file-link"), "/etc/group"),
            bind(&host.join("real/file"), "/new/file"),
            bind(&host.join("real"), "/a/new"),
            bind(&shared, "/dev/shm"),
            bind(&host.join("not/there"), "/made"),
        ];
        let id = ground.with_volumes("main", mounts)?;
        for path in ["/a/new/directory/file", "/a/new/file", "/etc/group", "/new/file"] {
            ensure!(ground.shell(&id, &format!("cat {path}"))? == "content", "{path}");
        }
        ground.shell(&id, "test -e /dev/shm/mine && touch /made/here")?;
        let made = fs::metadata(host.join("not/there"))?;
        ensure!(made.is_dir() && made.permissions().mode() & 0o777 == 0o755 && host.join("not/there/here").exists(), "{made:?}");
        ground.refused(Code::InvalidArgument, &["dangling"], bind(&host.join("dangling"), "/x"))?;
        ground.refused(Code::InvalidArgument, &["host_path"], bind(Path::new("not/absolute"), "/x"))?;
        ground.refused(Code::InvalidArgument, &["container_path"], bind(&host, "relative"))?;
        ground.end()
    })
}

/// What kubelet makes for volumes in memory and of huge pages.
#[test]
fn volumes_of_other_file_systems_keep_their_kind() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let mut mounts = Vec::new();
        for (kind, options) in [("hugetlbfs", "pagesize=2M"), ("tmpfs", "size=128k")] {
            let at = ground.daemon.path(kind);
            fs::create_dir(&at)?;
            mount(Some(kind), &at, Some(kind), MsFlags::empty(), Some(options)).with_context(|| format!("mount {kind}"))?;
            mounts.push(bind(&at, &format!("/volumes/{kind}")));
        }
        let id = ground.with_volumes("main", mounts)?;
        let seen = ground.shell(&id, "grep ' /volumes/' /proc/self/mountinfo | sed 's/.* - //' | sort")?;
        let kinds: Vec<&str> = seen.lines().filter_map(|line| line.split(' ').next()).collect();
        ensure!(kinds == ["hugetlbfs", "tmpfs"] && seen.contains("pagesize=2M") && seen.contains("size=128k"), "{seen}");
        ground.shell(&id, "mkdir /volumes/hugetlbfs/a && dd if=/dev/zero of=/volumes/tmpfs/b bs=64k count=2")?;
        ground.fails(&id, "dd if=/dev/zero of=/volumes/tmpfs/c bs=64k count=1", "No space left")?;
        for kind in ["hugetlbfs", "tmpfs"] {
            umount2(&ground.daemon.path(kind), MntFlags::MNT_DETACH)?;
        }
        ground.end()
    })
}

#[test]
fn links_of_an_image_never_lead_outside() -> Result<()> {
    node::run(|| {
        let mut daemon = Daemon::prepare(&[])?;
        let (archive, outside) = (daemon.path("images.tar"), daemon.path("outside"));
        fs::create_dir(&outside)?;
        fs::write(outside.join("hosts"), "untouched\n")?;
        let away = outside.to_string_lossy().into_owned();
        let up = format!("../../../../../../../..{away}");
        let [busybox, probe] = image::layers()?;
        let names = ["abs", "rel", "dev", "proc", "sys", "etc", "var/work"];
        let hostile: Vec<(&str, &str)> =
            names.iter().map(|name| (*name, if *name == "rel" { up.as_str() } else { away.as_str() })).collect();
        image::write_archive_of(&archive, image::BUSYBOX, vec![busybox, probe, image::links_layer(&hostile)?])?;
        daemon.windlass(&["image", "import", &archive.to_string_lossy()])?;
        daemon.serve()?;
        let ground = Ground::on(daemon)?;
        let volume = ground.daemon.path("volume");
        fs::create_dir(&volume)?;
        let mounts = vec![bind(&volume, "/abs/made/here"), bind(&volume, "/rel/there"), bind(&volume, "/etc/volume")];
        let mut wanted = ground.wanted("main", mounts);
        wanted.working_dir = "/var/work/made".into();
        wanted.command = vec!["/bin/sleep".into(), "1000".into()];
        // Whether such an image can run is its own affair; that nothing outside was touched is ours.
        if let Ok(id) = ground.client.create(&ground.pod, &ground.config, &wanted) {
            let _ = ground.client.start(&id);
        }
        let found: Vec<_> = fs::read_dir(&outside)?.flatten().map(|entry| entry.file_name()).collect();
        ensure!(found == ["hosts"], "made outside of the root: {found:?}");
        ensure!(fs::read_to_string(outside.join("hosts"))? == "untouched\n");
        ground.end()
    })
}

#[test]
fn a_volume_with_links_that_change_never_leads_outside() -> Result<()> {
    node::run(|| {
        let ground = ground()?;
        let (shared, outside) = (ground.daemon.path("shared"), ground.daemon.path("outside"));
        fs::create_dir_all(shared.join("real"))?;
        fs::create_dir(&outside)?;
        // A container that owns the volume swaps a directory and a link to the host as fast as it can.
        let script = format!(
            "cd /shared; ln -s {} link; while :; do mv real x; mv link real; mv real link; mv x real; done",
            outside.display()
        );
        let mut swapper = ground.wanted("swapper", vec![bind(&shared, "/shared")]);
        swapper.command = ["sh", "-c", &script].map(str::to_owned).to_vec();
        let id = ground.client.create(&ground.pod, &ground.config, &swapper)?;
        ground.client.start(&id)?;
        let inner = ground.daemon.path("inner");
        fs::create_dir(&inner)?;
        for round in 0..60 {
            let mounts = vec![bind(&shared, "/v"), bind(&inner, &format!("/v/real/deep{round}"))];
            if let Ok(id) = ground.client.create(&ground.pod, &ground.config, &ground.wanted(&format!("c{round}"), mounts)) {
                let _ = ground.client.start(&id);
                ground.client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
            }
            ensure!(fs::read_dir(&outside)?.count() == 0, "made outside of the root");
        }
        ground.end()
    })
}
