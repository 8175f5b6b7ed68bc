//! Go modules that the conformance tests need: the CRI's own interface file, and the real `crictl` and `critest`, built from
//! `integration/go` into `<target>/windlass-tools`. Owns that cache; versions and checksums are committed, never taken as they come.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the Go module that builds the tools is kept.
const TOOLS_MODULE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/go");

/// Part of the stamp: changes when the way of building changes.
const RECIPE: &str = "1 CGO_ENABLED=0 -trimpath";

/// The built programs.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The command line client of the CRI.
    pub crictl: PathBuf,
    /// The validation suite of the CRI. One digest in it is of an image that only its publisher has: see `critest`.
    pub critest: PathBuf,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Download {
    dir: Option<PathBuf>,
    sum: Option<String>,
    error: Option<String>,
}

/// The folder of an unpacked Go module. Fails unless its content has the checksum `h1` (go.sum's form).
pub fn module(path: &str, version: &str, h1: &str) -> Result<PathBuf> {
    let scratch = tempfile::tempdir().context("make a folder for go mod download")?;
    std::fs::write(scratch.path().join("go.mod"), "module windlass/download\n").context("write go.mod")?;
    let name = format!("{path}@{version}");
    let output = Command::new("go")
        .args(["mod", "download", "-json", &name])
        .current_dir(scratch.path())
        .env("GOFLAGS", "-mod=mod")
        .env("GOWORK", "off")
        .output()
        .context("run go (Debian: apt-get install golang-go; Go 1.24 or newer)")?;
    let found: Download = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("download {name}: {}", String::from_utf8_lossy(&output.stderr)))?;
    if let Some(error) = found.error {
        bail!("download {name}: {error}");
    }
    let sum = found.sum.unwrap_or_default();
    ensure!(sum == h1, "download {name}: checksum {sum}, committed is {h1}");
    found.dir.with_context(|| format!("download {name}: go named no folder"))
}

/// `<target>` of this build: `CARGO_TARGET_DIR`, or `target` beside the workspace's manifest.
pub fn target_dir() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target"),
    }
}

/// Builds crictl and critest unless `<target>/windlass-tools` holds the ones of this recipe. Prints what it does.
pub fn tools() -> Result<Tools> {
    let dir = target_dir().join("windlass-tools");
    std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let lock = std::fs::File::create(dir.join("lock")).context("create the lock of the tools")?;
    lock.lock().context("wait for the lock of the tools")?;

    let tools = Tools { crictl: dir.join("crictl"), critest: dir.join("critest") };
    let stamp_file = dir.join("stamp");
    let stamp = stamp()?;
    let current = std::fs::read_to_string(&stamp_file).is_ok_and(|found| found == stamp);
    if current && tools.crictl.is_file() && tools.critest.is_file() {
        return Ok(tools);
    }
    println!("building crictl and critest v1.34.0 from Go modules into {} (about two minutes)", dir.display());
    go_build(&["build", "-trimpath"], &tools.crictl, "sigs.k8s.io/cri-tools/cmd/crictl")?;
    go_build(&["test", "-c", "-trimpath"], &tools.critest, "sigs.k8s.io/cri-tools/cmd/critest")?;
    std::fs::write(&stamp_file, stamp).context("write the stamp of the tools")?;
    Ok(tools)
}

fn stamp() -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(RECIPE);
    for name in ["go.mod", "go.sum", "tools.go"] {
        hash.update(std::fs::read(Path::new(TOOLS_MODULE).join(name)).with_context(|| format!("read {name} of the tools"))?);
    }
    Ok(hex::encode(hash.finalize()))
}

fn go_build(verb: &[&str], output: &Path, package: &str) -> Result<()> {
    println!("  {package}");
    // The checksum database does not answer for cri-tools; the committed go.sum pins it.
    let status = Command::new("go")
        .args(verb)
        .arg("-o")
        .arg(output)
        .arg(package)
        .current_dir(TOOLS_MODULE)
        .env("GONOSUMDB", "sigs.k8s.io/cri-tools")
        .env("GOFLAGS", "-mod=readonly -buildvcs=false")
        .env("GOWORK", "off")
        .env("CGO_ENABLED", "0")
        .stdin(Stdio::null())
        .status()
        .context("run go (Debian: apt-get install golang-go; Go 1.24 or newer)")?;
    ensure!(status.success(), "build {package}: go ended with {status}");
    Ok(())
}
