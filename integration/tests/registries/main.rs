//! Registries that the world uses, and everything that goes wrong on the way to them: who may pull, what is fetched and how much of it,
//! and that nothing half there is ever listed.

mod authority;
mod faults;
mod forward;
mod limits;
mod names;
mod proxy;
mod real;
mod resume;
mod servers;
mod tokens;

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tonic::Status;
use windlass_integration::{
    client::{Client, container, host_network, pod},
    daemon::Daemon,
};
use windlass_proto::cri;

/// A daemon that reads its registries' configuration from its own directory.
struct Ground {
    daemon: Daemon,
    client: Client,
}

impl Ground {
    /// With further lines of the configuration's `[images]`.
    fn new(lines: &str) -> Result<Ground> {
        Ground::under(lines, &[])
    }

    /// The same, with these variables in the daemon's environment.
    fn under(lines: &str, environment: &[(&'static str, &str)]) -> Result<Ground> {
        let mut daemon = Daemon::prepare(&[])?;
        daemon.environment = environment.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let directory = daemon.path("");
        let at = |name: &str| directory.join(name).display().to_string();
        let (certs, conf, auth) = (at("certs.d"), at("registries.conf"), at("auth.json"));
        let images =
            format!("[images]\nregistry_config_dir = {certs:?}\nregistries_conf = {conf:?}\nauth_file = {auth:?}\n{lines}");
        daemon.configure(&images)?;
        daemon.serve()?;
        let client = Client::connect(&daemon)?;
        Ok(Ground { daemon, client })
    }

    fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.daemon.path(name);
        fs::create_dir_all(path.parent().context("a directory")?)?;
        fs::write(&path, text).with_context(|| format!("write {name}"))?;
        Ok(path)
    }

    fn hosts(&self, registry: &str, text: &str) -> Result<()> {
        self.write(&format!("certs.d/{registry}/hosts.toml"), text).map(drop)
    }

    fn pull(&self, name: &str, auth: Option<cri::AuthConfig>) -> Result<String, Status> {
        self.client
            .pull_image(cri::PullImageRequest { image: spec(name), auth, sandbox_config: None })
            .map(|reply| reply.image_ref)
    }

    fn remove(&self, name: &str) -> Result<()> {
        Ok(self.client.remove_image(cri::RemoveImageRequest { image: spec(name) }).map(drop)?)
    }

    fn images(&self) -> Result<Vec<cri::Image>> {
        Ok(self.client.list_images(cri::ListImagesRequest::default())?.images)
    }

    /// Every layer verifies, and there are so many of them.
    fn expect_sound(&self, layers: usize) -> Result<()> {
        let checked = self.daemon.windlass(&["image", "verify"])?;
        let sound = checked.lines().filter(|line| line.ends_with("sound")).count();
        ensure!(sound == layers && checked.lines().count() == layers, "{layers} layers: {checked}");
        Ok(())
    }

    /// Nothing unfinished is among the layers, once what is removed in the background has gone.
    fn expect_finished(&self) -> Result<()> {
        eventually("no unfinished layers", || {
            let left = self.daemon.unfinished_layers()?;
            ensure!(left.is_empty(), "left: {left:?}");
            Ok(())
        })
    }

    /// Bytes of layers that are kept for a later pull.
    fn kept_bytes(&self) -> u64 {
        let files = fs::read_dir(self.daemon.root().join("images/partial")).into_iter().flatten().flatten();
        files.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.len()).sum()
    }

    /// A container of the image runs, and its status says the image's id.
    fn expect_runs(&self, id: &str) -> Result<()> {
        let sandbox = host_network(pod(&self.daemon.path("logs")));
        let pod_id = self.client.run(&sandbox)?;
        let mut wanted = container(&sandbox, "main", &["sleep", "1000"]);
        wanted.image = spec(id);
        let created = self.client.create(&pod_id, &sandbox, &wanted)?;
        self.client.start(&created)?;
        let status = self.client.container(&created)?;
        ensure!(status.image_id == id, "{status:?}");
        let seen = self.client.exec(&created, &["cat", "/etc/passwd"])?;
        ensure!(String::from_utf8_lossy(&seen.stdout).starts_with("root:"), "{seen:?}");
        Ok(self.client.remove(&pod_id)?)
    }
}

fn spec(name: &str) -> Option<cri::ImageSpec> {
    Some(cri::ImageSpec { image: name.into(), ..Default::default() })
}

fn login(user: &str, password: &str) -> Option<cri::AuthConfig> {
    Some(cri::AuthConfig { username: user.into(), password: password.into(), ..Default::default() })
}

/// Repeats `check` until it succeeds; at the deadline its last error is the result.
fn eventually(what: &str, check: impl Fn() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match check() {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error).with_context(|| format!("{what}: not within 20 s")),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// Entries of an auth file, `registry` and `user:password`.
fn auth_file(entries: &[(&str, &str)]) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let one = |(name, login): &(&str, &str)| ((*name).to_owned(), serde_json::json!({ "auth": STANDARD.encode(login) }));
    let auths: serde_json::Map<String, serde_json::Value> = entries.iter().map(one).collect();
    serde_json::json!({ "auths": auths }).to_string()
}

/// A directory of a test, and in it one of a registry.
fn directories() -> Result<(tempfile::TempDir, PathBuf)> {
    let directory = tempfile::tempdir()?;
    let storage = directory.path().join("storage");
    fs::create_dir(&storage)?;
    Ok((directory, storage))
}

/// A file's path as TOML writes it.
fn quoted(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}
