//! Building: Debian packages that are missing, the static target, and the programs side by side.

use crate::{go, node::output_of, setup};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

/// The target of the static programs.
const STATIC_TARGET: &str = "x86_64-unknown-linux-musl";

/// Debian packages, and a program of each by which its presence is seen.
const PACKAGES: [(&str, &str); 19] = [
    ("curl", "/usr/bin/curl"),
    ("busybox-static", "/bin/busybox"),
    ("runc", "/usr/sbin/runc"),
    ("crun", "/usr/bin/crun"),
    ("nftables", "/usr/sbin/nft"),
    ("iproute2", "/sbin/ip"),
    ("procps", "/usr/bin/pgrep"),
    ("gcc", "/usr/bin/gcc"),
    ("xz-utils", "/usr/bin/xz"),
    ("dbus", "/usr/bin/dbus-daemon"),
    ("apparmor", "/usr/sbin/apparmor_parser"),
    ("openssl", "/usr/bin/openssl"),
    ("e2fsprogs", "/usr/sbin/mkfs.ext4"),
    ("containernetworking-plugins", "/usr/lib/cni/bridge"),
    ("iptables", "/usr/sbin/iptables"),
    ("docker-registry", "/usr/bin/docker-registry"),
    ("dpkg-dev", "/usr/bin/dpkg-shlibdeps"),
    ("mmdebstrap", "/usr/bin/mmdebstrap"),
    ("systemd", "/lib/systemd/systemd-journald"),
];

/// Runs a program with its output shown, and says how long it took.
pub fn step(title: &str, command: &mut Command) -> Result<()> {
    println!("==> {title}");
    let start = Instant::now();
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("run {command:?}"))?;
    if !status.success() {
        bail!("{title}: {status}");
    }
    println!("    {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Installs the Debian packages of a list whose files are not there.
pub fn install(packages: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> = packages.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(name, _)| *name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    step("apt-get update", Command::new("apt-get").args(["update", "-qq"]))?;
    let title = format!("install {}", missing.join(" "));
    step(
        &title,
        Command::new("apt-get").args(["install", "-y", "-qq", "--no-install-recommends"]).args(&missing).stdout(Stdio::null()),
    )
}

/// Debian's other busybox, which cannot be installed beside the static one: its shell executes its tools, as those of most images do,
/// where the static one calls them within itself. Fetched once into `<target>/windlass-tools`.
pub fn executing_busybox() -> Result<PathBuf> {
    Ok(unpacked("busybox", &["busybox"], "bin/busybox")?.join("bin/busybox"))
}

/// The folder of Debian packages that are not installed, unpacked into `<target>/windlass-tools/<name>` unless `product` of them is there.
pub fn unpacked(name: &str, packages: &[&str], product: &str) -> Result<PathBuf> {
    let directory = setup::target().join("windlass-tools").join(name);
    go::unless_stamped(&directory, packages, &[&directory.join(product)], || {
        let directory = directory.canonicalize()?;
        let said = packages.join(" ");
        let mut fetch = Command::new("apt-get");
        step(&format!("fetch {said}"), fetch.args(["download", "-qq"]).args(packages).current_dir(&directory))?;
        let script = "for package in *.deb; do dpkg --extract $package .; done && rm *.deb";
        step(&format!("unpack {said}"), Command::new("sh").args(["-ec", script]).current_dir(&directory))
    })?;
    directory.canonicalize().with_context(|| format!("find {}", directory.display()))
}

/// A cargo of this workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(setup::workspace());
    command
}

/// Installs what the machine lacks.
pub fn install_missing() -> Result<()> {
    install(&PACKAGES)?;
    executing_busybox().map(drop)
}

/// Installs what is missing and builds everything that a node or a test runs, and the benchmark.
pub fn all() -> Result<()> {
    for_a_node()?;
    step("build bench", cargo().args(["build", "--release", "-p", "windlass", "-p", "windlass-integration", "--bin", "bench"]))?;
    lay_out(&setup::target().join("release"), &["bench"])
}

/// Installs what is missing and builds everything that a node or a test runs.
pub fn for_a_node() -> Result<()> {
    install_missing()?;
    let installed = output_of("rustup", &["target", "list", "--installed"]).context("rustup is needed for the static target")?;
    if !installed.lines().any(|line| line == STATIC_TARGET) {
        step(&format!("rustup target add {STATIC_TARGET}"), Command::new("rustup").args(["target", "add", STATIC_TARGET]))?;
    }
    step("build windlass", cargo().args(["build", "--release", "-p", "windlass", "--bin", "windlass"]))?;
    let fixed = ["build", "--profile", "monitor", "--target", STATIC_TARGET];
    step(
        "build windlass-monitor, windlass-oci and probe",
        cargo().args(fixed).args(["-p", "windlass-runtime", "-p", "windlass-probe", "--bins"]),
    )?;
    let target = setup::target();
    lay_out(&target.join("release"), &["windlass"])?;
    lay_out(&target.join(STATIC_TARGET).join("monitor"), &["windlass-monitor", "windlass-oci", "probe"])
}

/// Copies programs to where [`setup::programs`] looks for them.
fn lay_out(from: &Path, names: &[&str]) -> Result<()> {
    let directory = setup::target().join("windlass");
    fs::create_dir_all(&directory)?;
    for name in names {
        // Replaced by rename: a running daemon keeps the file that it has open.
        let temporary = directory.join(format!(".{name}"));
        fs::copy(from.join(name), &temporary).with_context(|| format!("copy {name}"))?;
        fs::rename(&temporary, directory.join(name))?;
    }
    println!("==> in {}: {}", directory.display(), names.join(", "));
    Ok(())
}
