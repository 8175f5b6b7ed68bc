//! A clean Debian system in a folder, made once from this machine's own sources of packages, and throw-away copies of it to install into.

use crate::{
    build,
    client::Client,
    daemon::{STOP_LIMIT, cgroup_root, remove_cgroup},
    go,
    process::Process,
    setup, wait,
};
use anyhow::{Context, Result, ensure};
use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// What is there besides the essential packages: what our package depends on, and the units' judge.
const INCLUDED: &str = "nftables,systemd";

/// Where this machine may name its sources.
const SOURCES: [&str; 2] = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"];

/// Changes when the way of making changes.
const RECIPE: &str = "1 minbase";

/// Becomes the process that holds the mount namespace: the copy is its root, with the machine's devices, processes and cgroups in it.
const HOLD: &str = "
mount --bind $0 $0
cd $0
mount -t proc proc proc
mount --rbind /sys sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
mkdir -p .old run/netns
pivot_root . .old
umount -l .old
rmdir .old
echo ready
exec sleep infinity";

/// The folder with the system as it is made, which nobody may change.
fn made() -> Result<PathBuf> {
    system("debian", INCLUDED)
}

/// A folder with the essential packages and these, which nobody may change. Made by mmdebstrap unless `<target>/windlass-tools/<name>` has it.
pub fn system(name: &str, included: &str) -> Result<PathBuf> {
    let directory = setup::target().join("windlass-tools").join(name);
    let system = directory.join("root");
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let suite = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")).context("the codename of this Debian")?;
    go::unless_stamped(&directory, &[RECIPE, suite, included], &[&system.join("usr/bin/dpkg")], || {
        if system.exists() {
            fs::remove_dir_all(&system)?;
        }
        let mut command = Command::new("mmdebstrap");
        command.args(["--quiet", "--variant=minbase", &format!("--include={included}"), suite]).arg(&system);
        command.args(SOURCES.into_iter().filter(|path| Path::new(path).exists()));
        build::step(&format!("make a Debian {suite} in {} (a minute)", directory.display()), &mut command)
    })?;
    system.canonicalize().context("find the Debian system")
}

/// A copy of the system, in a mount namespace of its own. Dropping it ends the namespace; processes that were started in it are the caller's.
pub struct Debian {
    holder: Process,
    /// The copy's files, where it is one. Removed after the holder's end.
    _directory: Option<tempfile::TempDir>,
}

impl Debian {
    /// Makes the system that copies are made of; needs the network the first time.
    pub fn prepare() -> Result<()> {
        made().map(drop)
    }

    /// A new copy, in the network namespace of the caller.
    pub fn start() -> Result<Debian> {
        let directory = tempfile::Builder::new().prefix("windlass-debian-").tempdir()?;
        // Whole, and no overlay: no other overlay could have its upper directory there.
        let copied = Command::new("cp").arg("-a").arg(made()?.join(".")).arg(directory.path()).status().context("run cp")?;
        ensure!(copied.success(), "copy the Debian system: {copied}");
        let mut system = Debian::of(directory.path())?;
        system._directory = Some(directory);
        Ok(system)
    }

    /// A system that is there, which keeps what is done in it.
    pub fn of(root: &Path) -> Result<Debian> {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-ec", HOLD]).arg(root);
        let mut holder = Process::from(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("run unshare")?);
        let mut line = String::new();
        BufReader::new(holder.stdout.take().context("output of the holder")?).read_line(&mut line)?;
        let system = Debian { holder, _directory: None };
        ensure!(line == "ready\n", "{} cannot be entered", root.display());
        Ok(system)
    }

    /// Path of a file of the copy, as the machine sees it.
    pub fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.holder.id())).join(name.trim_start_matches('/'))
    }

    /// The process whose mount namespace is the copy's.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// A command that runs in the copy, with a clean environment.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &self.holder.id().to_string(), "--"]).args(words).stdin(Stdio::null());
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root").env("LC_ALL", "C.UTF-8");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// Runs a command in the copy to its end.
    pub fn output(&self, words: &[&str]) -> Result<Output> {
        self.command(words).output().with_context(|| format!("run {}", words.join(" ")))
    }

    /// The output of a command that must succeed, both streams.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let output = self.output(words)?;
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "{}: {}\n{text}", words.join(" "), output.status);
        Ok(text)
    }

    /// Every file of the copy's own file system but what dpkg and its tools write about their work, in order.
    pub fn files(&self) -> Result<Vec<String>> {
        let own = ["/var/lib/dpkg", "/var/cache", "/var/log"];
        let found = self.run(&["find", "/", "-xdev"])?;
        let mut files: Vec<String> =
            found.lines().filter(|path| !own.iter().any(|own| path.starts_with(own))).map(str::to_owned).collect();
        files.sort();
        Ok(files)
    }
}

/// A copy of the system in which a daemon runs from the usual places. Dropping it ends daemon and pods.
pub struct DebianNode {
    pub system: Debian,
    daemon: Option<Process>,
    /// Parent of the pods' cgroups for the configuration: one that the machine's other daemons do not have.
    pub cgroup: String,
}

impl DebianNode {
    /// A copy without a daemon; `name` tells nodes apart.
    pub fn start(name: &str) -> Result<DebianNode> {
        Ok(DebianNode::of(Debian::start()?, name))
    }

    /// The same of another system.
    pub fn of(system: Debian, name: &str) -> DebianNode {
        DebianNode { system, daemon: None, cgroup: format!("/windlass-{name}-{}", std::process::id()) }
    }

    /// Where its socket is seen from here.
    pub fn socket(&self) -> PathBuf {
        self.system.path("/run/windlass/windlass.sock")
    }

    /// Starts `/usr/bin/windlass` as the unit does, and waits until it answers.
    pub fn serve(&mut self) -> Result<Client> {
        let log = fs::File::create(self.system.path("/var/log/windlass"))?;
        let mut command = self.system.command(&["/usr/bin/windlass", "serve"]);
        self.daemon = Some(command.stdout(Stdio::null()).stderr(log).spawn().context("start the installed windlass")?.into());
        let socket = self.socket();
        wait::until("the installed daemon's socket", || Ok(Client::connect_to(&socket).ok())).with_context(|| self.log())
    }

    /// SIGTERM and a clean end.
    pub fn stop(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("the daemon runs")?;
        let status = daemon.terminate(STOP_LIMIT).with_context(|| self.log())?;
        ensure!(status.success(), "windlass ended with {status}\n{}", self.log());
        Ok(())
    }

    /// What the daemon wrote.
    pub fn log(&self) -> String {
        fs::read_to_string(self.system.path("/var/log/windlass")).unwrap_or_default()
    }

    pub fn cgroup_directory(&self) -> PathBuf {
        cgroup_root().join(self.cgroup.trim_start_matches('/'))
    }
}

impl Drop for DebianNode {
    fn drop(&mut self) {
        drop(self.daemon.take());
        let _ = fs::write(self.cgroup_directory().join("cgroup.kill"), "1");
        remove_cgroup(&self.cgroup_directory());
    }
}
