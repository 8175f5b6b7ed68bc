//! One daemon under a temporary root, with the programs that `cargo xtask build` laid side by side.

use crate::{node, process::Process, setup};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Longest wait for the daemon's socket.
const START_LIMIT: Duration = Duration::from_secs(90);
/// Longest wait for the daemon's clean end.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(60);

/// A daemon of a test. Dropping it kills the daemon, every monitor below its state directory, and removes its files.
pub struct Daemon {
    directory: tempfile::TempDir,
    process: Option<Process>,
    extra: Vec<String>,
    /// Variables that it is started with, besides those of the test.
    pub environment: Vec<(&'static str, String)>,
    /// Parent of the cgroups of this daemon's pods.
    pub cgroup: String,
    /// Folder of the programs, where they are not those of this build.
    pub programs: Option<PathBuf>,
}

impl Daemon {
    /// Prepares a daemon without starting it.
    pub fn prepare(extra: &[&str]) -> Result<Daemon> {
        let directory = tempfile::Builder::new().prefix("windlass-test-").tempdir()?;
        let unique = directory.path().file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        let daemon = Daemon {
            process: None,
            extra: extra.iter().map(|text| (*text).to_owned()).collect(),
            environment: Vec::new(),
            programs: None,
            cgroup: format!("/{unique}"),
            directory,
        };
        let bridge = format!("wlt{}", &unique[unique.len() - 6..]);
        let (cdi, cni) = (daemon.path("cdi"), daemon.path("cni"));
        let config = format!(
            "[cgroup]\nparent = {:?}\n[devices]\ncdi_spec_dirs = [{cdi:?}]\n[network]\nbridge = {bridge:?}\ncni_conf_dir = {cni:?}\n",
            daemon.cgroup
        );
        fs::write(daemon.path("config.toml"), config)?;
        Ok(daemon)
    }

    /// A daemon that serves, with the test images on it.
    pub fn start(extra: &[&str]) -> Result<Daemon> {
        Daemon::prepare(extra)?.with_images()
    }

    /// The same with more of a configuration.
    pub fn configured(text: &str) -> Result<Daemon> {
        let daemon = Daemon::prepare(&[])?;
        daemon.configure(text)?;
        daemon.with_images()
    }

    /// As systemd has its pods: their default parent is the slice of that name.
    #[must_use]
    pub fn in_its_slice(mut self) -> Daemon {
        self.cgroup = format!("/{}.slice", self.cgroup.trim_start_matches('/').replace('-', "_"));
        self
    }

    /// Appends to its configuration, for its next start.
    pub fn configure(&self, text: &str) -> Result<()> {
        let mut file = fs::File::options().append(true).open(self.path("config.toml"))?;
        Ok(file.write_all(text.as_bytes())?)
    }

    /// Puts the test images on it, and serves.
    pub fn with_images(mut self) -> Result<Daemon> {
        let daemon = &mut self;
        let archive = daemon.path("images.tar");
        crate::image::write_archive(&archive)?;
        daemon.windlass(&["image", "import", &archive.to_string_lossy()])?;
        fs::remove_file(archive)?;
        daemon.serve()?;
        Ok(self)
    }

    /// A daemon that serves, with these images on it: name, uncompressed layers, further fields of the configuration.
    pub fn start_with(images: Vec<(&str, Vec<Vec<u8>>, serde_json::Value)>) -> Result<Daemon> {
        Daemon::configured_with("", images)
    }

    /// The same with more of a configuration.
    pub fn configured_with(text: &str, images: Vec<(&str, Vec<Vec<u8>>, serde_json::Value)>) -> Result<Daemon> {
        let mut daemon = Daemon::prepare(&[])?;
        daemon.configure(text)?;
        let archive = daemon.path("images.tar");
        for (name, layers, fields) in images {
            crate::image::write_archive_with(&archive, name, layers, fields)?;
            daemon.windlass(&["image", "import", &archive.to_string_lossy()])?;
        }
        fs::remove_file(archive)?;
        daemon.serve()?;
        Ok(daemon)
    }

    /// A path in the daemon's temporary directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn root(&self) -> PathBuf {
        self.path("root")
    }

    /// Names in the layers' directory that belong to no finished layer.
    pub fn unfinished_layers(&self) -> Result<Vec<String>> {
        let names = fs::read_dir(self.root().join("images/layers"))?.flatten().map(|entry| entry.file_name());
        let names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        let recorded = |name: &str| name.split('.').next().is_some_and(|hex| names.contains(&format!("{hex}.json")));
        Ok(names.iter().filter(|name| !recorded(name)).cloned().collect())
    }

    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    pub fn socket(&self) -> PathBuf {
        self.state().join("windlass.sock")
    }

    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.id())
    }

    /// A command of the program with this daemon's root and socket.
    pub fn command(&self, words: &[&str]) -> Result<Command> {
        let programs = self.programs.clone().map_or_else(setup::programs, Ok)?;
        let mut command = Command::new(programs.join("windlass"));
        let (subcommand, rest) = words.split_first().context("a subcommand")?;
        command.arg(subcommand);
        command.args(["--config".as_ref(), self.path("config.toml").as_os_str()]);
        command.args(["--root".as_ref(), self.root().as_os_str()]);
        command.args(["--state".as_ref(), self.state().as_os_str()]);
        command.args(rest);
        Ok(command)
    }

    /// Runs a command of the program with this daemon's root and socket.
    pub fn windlass(&self, words: &[&str]) -> Result<String> {
        node::succeed(&format!("windlass {}", words.join(" ")), &mut self.command(words)?)
    }

    /// Starts the daemon and waits for its socket.
    pub fn serve(&mut self) -> Result<()> {
        let log = fs::File::options().create(true).append(true).open(self.path("log"))?;
        let _ = fs::remove_file(self.socket());
        let mut command = self.command(&["serve"])?;
        command.args(&self.extra).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        let mut process = Process::from(command.spawn().context("start windlass")?);
        let deadline = Instant::now() + START_LIMIT;
        while !self.socket().exists() {
            if let Some(status) = process.try_wait()? {
                bail!("windlass ended with {status}:\n{}", self.log());
            }
            if Instant::now() > deadline {
                let _ = process.kill();
                bail!("windlass gave no socket in {START_LIMIT:?}:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.process = Some(process);
        Ok(())
    }

    /// SIGKILL, as a crash would be.
    pub fn kill9(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the daemon runs")?;
        process.kill()?;
        process.wait()?;
        Ok(())
    }

    /// SIGTERM and a clean end.
    pub fn stop(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the daemon runs")?;
        let status = process.terminate(STOP_LIMIT).with_context(|| format!("end windlass:\n{}", self.log()))?;
        if !status.success() {
            bail!("windlass ended with {status}:\n{}", self.log());
        }
        Ok(())
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Monitors of this daemon's pods, by their run directories.
    pub fn monitors(&self) -> Vec<i32> {
        let state = self.state();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|text| text.parse::<i32>().ok()) else { continue };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if line.starts_with(b"windlass-monitor") && contains(&line, state.as_os_str().as_encoded_bytes()) {
                found.push(pid);
            }
        }
        found
    }

    /// Directory of the pods' cgroups.
    pub fn cgroup_directory(&self) -> PathBuf {
        cgroup_root().join(self.cgroup.trim_start_matches('/'))
    }
}

/// Where this machine has its cgroup v2 tree.
pub fn cgroup_root() -> PathBuf {
    let hybrid = Path::new("/sys/fs/cgroup/unified");
    if hybrid.exists() { hybrid } else { Path::new("/sys/fs/cgroup") }.to_owned()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() || std::env::var_os("WINDLASS_TEST_LOG").is_some() {
            eprintln!("--- daemon log\n{}", self.log());
        }
        drop(self.process.take());
        let cgroup = self.cgroup_directory();
        if cgroup.exists() {
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
        }
        for pid in self.monitors() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
        remove_cgroup(&cgroup);
    }
}

/// Removes a cgroup and those below it, once their processes are gone.
pub fn remove_cgroup(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path());
        }
    }
    let deadline = Instant::now() + Duration::from_secs(2);
    while fs::remove_dir(directory).is_err() && directory.exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The command lines of the processes in a cgroup and below it.
pub fn command_lines(cgroup: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for pid in fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default().lines() {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        found.push(String::from_utf8_lossy(&line).trim_end_matches('\0').replace('\0', " "));
    }
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir()) {
        found.extend(command_lines(&entry.path()));
    }
    found
}
