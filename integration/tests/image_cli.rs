//! `windlass image`, with a daemon and without: the same words, the same results.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};
use windlass_integration::{
    client::{Client, container, host_network, pod},
    daemon::Daemon,
    image, node,
    registry::{CREDENTIALS, Guard, Registry},
};

fn registry() -> Result<Registry> {
    let registry = Registry::start()?;
    let config = serde_json::json!({ "architecture": image::ARCHITECTURE, "os": "linux", "config": { "Cmd": ["sh"] } });
    registry.add("test/busybox", "v1", &image::layers()?, &config)?;
    registry.add(
        "test/busybox",
        "v2",
        &image::layers()?,
        &serde_json::json!({ "architecture": image::ARCHITECTURE, "os": "linux" }),
    )?;
    Ok(registry)
}

fn json(daemon: &Daemon, words: &[&str]) -> Result<Value> {
    let words: Vec<&str> = ["image"].iter().chain(words).copied().chain(["--format", "json"]).collect();
    let text = daemon.windlass(&words)?;
    let last = text.lines().last().context("no output")?;
    serde_json::from_str(last).with_context(|| format!("{words:?}: {text}"))
}

/// Everything that can be done, one after the other.
fn all_commands(daemon: &Daemon, registry: &Registry) -> Result<()> {
    let (one, two) = (format!("{}/test/busybox:v1", registry.host()), format!("{}/test/busybox:v2", registry.host()));
    let text = daemon.windlass(&["image", "pull", &one])?;
    ensure!(text.contains(&one) && text.contains("sha256:"), "{text}");
    let pulled = json(daemon, &["pull", &two])?;
    ensure!(pulled["tags"][0] == two.as_str() && pulled["layers"][0]["images"] == 2, "{pulled}");
    let id = pulled["id"].as_str().context("id")?;
    let list = daemon.windlass(&["image", "ls"])?;
    ensure!(list.starts_with("NAME") && list.lines().count() == 3 && list.contains(&one) && list.contains(&two), "{list}");
    ensure!(daemon.windlass(&["image", "ls", "--quiet", &two])?.trim() == id);
    let inspected: Value = serde_json::from_str(&daemon.windlass(&["image", "inspect", &id[7..19]])?)?;
    ensure!(inspected["config"]["rootfs"]["diff_ids"].as_array().is_some_and(|ids| !ids.is_empty()), "{inspected}");
    let usage = json(daemon, &["du"])?;
    ensure!(usage["images"].as_array().is_some_and(|images| images.len() == 2) && usage["of_no_image_bytes"] == 0, "{usage}");
    ensure!(usage["images"][0]["own_bytes"] == 0, "the layers are shared: {usage}");
    let checked = daemon.windlass(&["image", "verify"])?;
    ensure!(checked.lines().all(|line| line.ends_with("sound")) && checked.lines().count() >= 2, "{checked}");

    let file = daemon.path("exported.tar");
    daemon.windlass(&["image", "export", &two, "--output", &file.to_string_lossy()])?;
    let removed = daemon.windlass(&["image", "rm", &two])?;
    ensure!(removed.contains(id), "{removed}");
    let error = daemon.windlass(&["image", "rm", &two]).expect_err("it is gone").to_string();
    ensure!(error.contains(&two) && error.contains("image ls"), "{error}");
    let imported = daemon.windlass(&["image", "import", &file.to_string_lossy()])?;
    ensure!(imported.trim() == format!("{id} {two}"), "{imported}");
    let tagged = daemon.windlass(&["image", "tag", id, "own/name:1"])?;
    ensure!(tagged.contains(&two) && daemon.windlass(&["image", "ls", "-q", "own/name:1"])?.trim() == id, "{tagged}");
    let nowhere = daemon.path("nowhere");
    let error = daemon.windlass(&["image", "export", "missing", "-o", &nowhere.to_string_lossy()]).expect_err("no image");
    ensure!(error.to_string().contains("missing") && !nowhere.exists(), "{error}");

    ensure!(json(daemon, &["prune", "--dry-run"])?.as_array().is_some_and(|images| images.len() == 2));
    ensure!(json(daemon, &["prune"])?.as_array().is_some_and(|images| images.len() == 2));
    ensure!(daemon.windlass(&["image", "ls", "-q"])?.is_empty());
    let error = daemon.windlass(&["image", "pull", "Not A Name"]).expect_err("no name").to_string();
    ensure!(error.contains("Not A Name"), "{error}");
    Ok(())
}

#[test]
fn every_command_with_a_daemon_and_without() -> Result<()> {
    node::run(|| {
        let registry = registry()?;
        let mut daemon = Daemon::prepare(&[])?;
        all_commands(&daemon, &registry).context("without a daemon")?;
        daemon.serve()?;
        all_commands(&daemon, &registry).context("with a daemon")?;
        registry.set_guard(Guard::Basic);
        let name = format!("{}/test/busybox:v1", registry.host());
        daemon.windlass(&["image", "pull", &name]).expect_err("credentials are wanted");
        let mut command = daemon.command(&["image", "pull", "--user", CREDENTIALS.0, &name])?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        std::io::Write::write_all(&mut child.stdin.take().context("stdin")?, format!("{}\n", CREDENTIALS.1).as_bytes())?;
        ensure!(child.wait_with_output()?.status.success(), "the password of standard input");
        Ok(())
    })
}

#[test]
fn what_containers_use_is_not_pruned_and_outlives_its_removal() -> Result<()> {
    node::run(|| {
        let registry = registry()?;
        let mut daemon = Daemon::prepare(&[])?;
        daemon.serve()?;
        let (one, two) = (format!("{}/test/busybox:v1", registry.host()), format!("{}/test/busybox:v2", registry.host()));
        daemon.windlass(&["image", "pull", "--quiet", &one, &two])?;
        let client = Client::connect(&daemon)?;
        let config = host_network(pod(&daemon.path("logs")));
        let id = client.run(&config)?;
        let mut wanted = container(&config, "main", &["sleep", "1000"]);
        wanted.image = Some(windlass_proto::cri::ImageSpec { image: one.clone(), ..Default::default() });
        let main = client.create(&id, &config, &wanted)?;
        client.start(&main)?;
        let pruned = daemon.windlass(&["image", "prune"])?;
        ensure!(pruned.contains(&two) && !pruned.contains(&one), "{pruned}");
        drop(client);
        daemon.stop()?;
        // No daemon, and the container runs on.
        let removed = daemon.windlass(&["image", "rm", &one])?;
        ensure!(removed.contains("1 containers"), "{removed}");
        ensure!(json(&daemon, &["du"])?["of_no_image_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        ensure!(client.exec(&main, &["cat", "/bin/busybox"])?.stdout.len() > 1000, "its files are there");
        client.remove(&id)?;
        let until = Instant::now() + Duration::from_secs(60);
        while json(&daemon, &["du"])?["used_bytes"] != 0 {
            ensure!(Instant::now() < until, "layers are left: {}", json(&daemon, &["du"])?);
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })
}

#[test]
fn another_root_is_not_the_daemons() -> Result<()> {
    node::run(|| {
        let registry = registry()?;
        let (mut one, mut two) = (Daemon::prepare(&[])?, Daemon::prepare(&[])?);
        one.serve()?;
        let name = format!("{}/test/busybox:v1", registry.host());
        one.windlass(&["image", "pull", "-q", &name])?;
        let socket = one.socket();
        let words = ["image", "--socket", &socket.to_string_lossy(), "prune"];
        // Nobody serves the other root: it is empty, and the daemon is not asked.
        ensure!(two.windlass(&words)?.is_empty());
        two.serve()?;
        let error = two.windlass(&words).expect_err("the socket of another root").to_string();
        ensure!(error.contains("--socket") && error.contains(&one.root().display().to_string()), "{error}");
        ensure!(!one.windlass(&["image", "ls", "-q"])?.is_empty(), "its image is there");
        Ok(())
    })
}

#[test]
fn pinned_images_stay() -> Result<()> {
    node::run(|| {
        let registry = registry()?;
        let mut daemon = Daemon::prepare(&[])?;
        let (one, two) = (format!("{}/test/busybox:v1", registry.host()), format!("{}/test/busybox:v2", registry.host()));
        daemon.configure(&format!("[images]\npinned = [\"other\", {one:?}]\n"))?;
        daemon.serve()?;
        daemon.windlass(&["image", "pull", "-q", &one, &two])?;
        let client = Client::connect(&daemon)?;
        let pinned = |expected: &[&String]| -> Result<()> {
            let images = client.list_images(windlass_proto::cri::ListImagesRequest::default())?.images;
            let found: Vec<&String> = images.iter().filter(|image| image.pinned).flat_map(|image| &image.repo_tags).collect();
            ensure!(found == expected, "{images:?}");
            Ok(())
        };
        pinned(&[&one])?;
        ensure!(daemon.windlass(&["image", "prune"])?.contains(&two));
        pinned(&[&one])?;
        // Asked for by name, it goes.
        daemon.windlass(&["image", "rm", &one])?;
        pinned(&[])?;
        daemon.stop()?;
        let path = daemon.path("config.toml");
        fs::write(&path, fs::read_to_string(&path)?.replace(":v1", ":*"))?;
        daemon.windlass(&["image", "pull", "-q", &one, &two])?;
        ensure!(json(&daemon, &["prune"])?.as_array().is_some_and(Vec::is_empty), "both names begin so");
        Ok(())
    })
}

#[test]
fn damage_is_told_and_repaired() -> Result<()> {
    node::run(|| {
        let registry = registry()?;
        let mut daemon = Daemon::prepare(&[])?;
        daemon.serve()?;
        let name = format!("{}/test/busybox:v1", registry.host());
        daemon.windlass(&["image", "pull", &name])?;
        let layers = fs::read_dir(daemon.root().join("images/layers"))?.flatten().map(|entry| entry.path());
        let layer = layers.filter(|path| path.extension().is_some_and(|end| end == "erofs")).max().context("a layer")?;
        let mut bytes = fs::read(&layer)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&layer, bytes)?;
        let error = daemon.windlass(&["image", "verify"]).expect_err("damaged").to_string();
        ensure!(error.contains("DAMAGED") && error.contains("--repair"), "{error}");
        let error = daemon.windlass(&["image", "verify", "--repair"]).expect_err("damaged").to_string();
        ensure!(error.contains(&format!("given up: {name}")), "{error}");
        ensure!(daemon.windlass(&["image", "ls", "-q"])?.is_empty());
        daemon.windlass(&["image", "pull", &name])?;
        daemon.windlass(&["image", "verify"])?;
        Ok(())
    })
}

#[test]
fn a_terminal_shows_bars_and_a_pipe_shows_lines() -> Result<()> {
    node::run(|| {
        let registry = registry()?;
        let mut daemon = Daemon::prepare(&[])?;
        daemon.serve()?;
        let name = format!("{}/test/busybox:v1", registry.host());
        let plain = daemon.command(&["image", "pull", &name])?.output()?;
        let said = String::from_utf8_lossy(&plain.stderr).into_owned();
        ensure!(said.lines().any(|line| line.contains(&name) && line.contains("done")) && !said.contains('\u{1b}'), "{said:?}");
        daemon.windlass(&["image", "rm", &name])?;
        // script(1) gives it a terminal.
        let command = daemon.command(&["image", "pull", &name])?;
        let words: Vec<_> =
            std::iter::once(command.get_program()).chain(command.get_args()).map(|word| word.to_string_lossy()).collect();
        let seen = Command::new("script").args(["-qec", &words.join(" "), "/dev/null"]).stdin(Stdio::null()).output()?;
        let seen = String::from_utf8_lossy(&seen.stdout).into_owned();
        ensure!(seen.contains("[=====") && seen.contains("done"), "{seen:?}");
        Ok(())
    })
}
