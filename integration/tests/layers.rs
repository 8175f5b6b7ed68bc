//! How layers are kept: as EROFS images that all containers share, or as directories.

use anyhow::{Context, Result, ensure};
use std::{fs, path::Path};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    node,
};
use windlass_proto::cri;

/// EROFS file systems that the kernel has, whoever mounted them.
fn file_systems() -> Result<usize> {
    let names = fs::read_dir("/sys/fs/erofs")?.map(|entry| Ok(entry?.file_name()));
    Ok(names.collect::<Result<Vec<_>>>()?.iter().filter(|name| *name != "features").count())
}

fn layers(daemon: &Daemon, extension: &str) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(daemon.root().join("images/layers"))? {
        let path = entry?.path();
        let form = path.extension().map(|extension| extension.to_string_lossy().into_owned()).unwrap_or_default();
        count += usize::from(form == extension && (!extension.is_empty() || path.is_dir()));
    }
    Ok(count)
}

/// A pod with a container that sleeps, of its own users or not.
fn start(client: &Client, logs: &Path, own_users: bool) -> Result<(String, String)> {
    let mut config = pod(logs);
    let ids = || vec![cri::IdMapping { container_id: 0, host_id: 1 << 20, length: 1 << 16 }];
    let mut options = cri::NamespaceOption { pid: cri::NamespaceMode::Container.into(), ..Default::default() };
    options.userns_options =
        own_users.then(|| cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids: ids(), gids: ids() });
    config.linux.get_or_insert_default().security_context.get_or_insert_default().namespace_options = Some(options.clone());
    let id = client.run(&config)?;
    let mut wanted = container(&config, "main", &["sleep", "1000"]);
    wanted.linux.get_or_insert_default().security_context.get_or_insert_default().namespace_options = Some(options);
    let main = client.create(&id, &config, &wanted)?;
    client.start(&main)?;
    let run = client
        .exec(&main, &["sh", "-c", "cat /etc/passwd >/dev/null && stat -c %u:%g /bin/busybox && echo x >/new && cat /new"])?;
    ensure!(run.stdout == b"0:0\nx\n", "{run:?}");
    Ok((id, main))
}

#[test]
fn layers_are_images_that_all_containers_share() -> Result<()> {
    node::run(|| {
        let at_first = file_systems()?;
        let mut daemon = Daemon::start(&[])?;
        ensure!(layers(&daemon, "erofs")? > 0 && layers(&daemon, "")? == 0, "layers are kept as images here");
        let client = Client::connect(&daemon)?;
        let logs = daemon.path("logs");
        let first = start(&client, &logs, false)?.0;
        let mounted = file_systems()? - at_first;
        ensure!(mounted > 0 && mounted <= layers(&daemon, "erofs")?, "{mounted} file systems");
        let mut pods = vec![start(&client, &logs, false)?.0, start(&client, &logs, true)?.0];
        ensure!(
            file_systems()? - at_first == mounted,
            "three pods share {mounted} file systems, not {}",
            file_systems()? - at_first
        );
        drop(client);
        daemon.kill9()?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        pods.push(start(&client, &logs, true)?.0);
        ensure!(file_systems()? - at_first == mounted, "the next daemon has the same ones: {}", file_systems()? - at_first);
        for pod in pods {
            client.remove(&pod)?;
        }
        client.remove(&first)?;
        drop(client);
        daemon.stop()?;
        drop(daemon);
        let left = (0..3000).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(20));
            file_systems().is_ok_and(|count| count == at_first)
        });
        ensure!(left, "file systems are left: {}", file_systems()? - at_first);
        Ok(())
    })
}

#[test]
fn layers_may_be_directories_and_images_at_once() -> Result<()> {
    node::run(|| {
        let mut daemon = Daemon::prepare(&[])?;
        let path = daemon.path("config.toml");
        let plain = fs::read_to_string(&path)?;
        daemon.configure("[images]\nlayers = \"directory\"\n")?;
        let archive = daemon.path("images.tar");
        windlass_integration::image::write_archive(&archive)?;
        daemon.windlass(&["image", "import", &archive.to_string_lossy()])?;
        ensure!(layers(&daemon, "erofs")? == 0 && layers(&daemon, "")? > 0, "directories were asked for");
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        let logs = daemon.path("logs");
        let old = start(&client, &logs, false).context("directories")?;
        start(&client, &logs, true).context("directories for users of their own")?;
        drop(client);
        daemon.stop()?;
        // What there is stays as it is.
        fs::write(&path, plain)?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        ensure!(layers(&daemon, "erofs")? == 0 && client.exec(&old.1, &["true"])?.exit_code == 0);
        start(&client, &logs, false).context("directories of another time")?;
        Ok(())
    })
}

#[test]
fn a_form_of_layers_that_is_no_form() -> Result<()> {
    node::run(|| {
        let daemon = Daemon::prepare(&[])?;
        daemon.configure("[images]\nlayers = \"squashfs\"\n")?;
        let error = daemon.windlass(&["image", "ls"]).expect_err("no such form").to_string();
        ensure!(error.contains("squashfs") && error.contains("erofs"), "{error}");
        Ok(())
    })
}
