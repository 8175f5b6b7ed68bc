//! The CRI's validation suite against a running daemon: the one digest it hard-wires, and its command line. The daemon, its namespaces
//! and the registry with the stand-in images are the caller's.

use crate::{
    ginkgo::{Outcomes, outcomes},
    go,
    standin::Images,
};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The digest of the suite's `test-image-digest` as its publisher pushed it, in lowercase hex.
pub const PUBLISHED_DIGEST: &str = "9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf";

/// Copies critest with [`PUBLISHED_DIGEST`] replaced by `digest` (64 hex digits), wherever it stands.
pub fn with_digest(critest: &Path, digest: &str, output: &Path) -> Result<()> {
    ensure!(digest.len() == PUBLISHED_DIGEST.len(), "digest {digest} is not 64 hex digits");
    let mut program = std::fs::read(critest).with_context(|| format!("read {}", critest.display()))?;
    let places = replace(&mut program, PUBLISHED_DIGEST.as_bytes(), digest.as_bytes());
    ensure!(places > 0, "{} does not hold the published digest: another version?", critest.display());
    std::fs::write(output, program).with_context(|| format!("write {}", output.display()))?;
    let mode = std::fs::metadata(critest).context("look at critest")?.permissions();
    std::fs::set_permissions(output, mode).with_context(|| format!("make {} executable", output.display()))
}

/// Overwrites every `from` with the equally long `to`; returns how many there were.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) -> usize {
    let mut places = 0;
    let mut start = 0;
    while let Some(found) = bytes[start..].windows(from.len()).position(|window| window == from) {
        bytes[start + found..][..to.len()].copy_from_slice(to);
        start += found + to.len();
        places += 1;
    }
    places
}

/// The suite ready to run, and the images that it pulls. Made where the network is, used where it need not be.
pub struct Prepared {
    folder: tempfile::TempDir,
    pub images: Images,
}

impl Prepared {
    /// Builds what is missing, and lays the suite and its runner side by side.
    pub fn new() -> Result<Prepared> {
        let tools = go::tools()?;
        let images = Images::build()?;
        let folder = tempfile::tempdir().context("make a folder for the suite")?;
        let prepared = Prepared { folder, images };
        with_digest(&tools.critest, &prepared.images.pinned_digest()?, &prepared.program())?;
        std::os::unix::fs::symlink(tools.ginkgo.canonicalize()?, prepared.folder.path().join("ginkgo")).context("link ginkgo")?;
        Ok(prepared)
    }

    /// The suite, with the digest of these images.
    pub fn program(&self) -> PathBuf {
        self.folder.path().join("critest")
    }
}

/// A run of the suite.
#[derive(Debug, Clone)]
pub struct Run<'a> {
    /// With `-parallel N` it calls `ginkgo`, which has to lie beside it.
    pub suite: &'a Path,
    pub socket: &'a Path,
    /// Where log and report are left.
    pub output: &'a Path,
    /// Bounds the whole suite.
    pub limit: Duration,
    /// A regular expression of the specs to run; empty for all.
    pub focus: &'a str,
    /// Further flags of the suite.
    pub flags: &'a [&'a str],
    /// A process whose mount namespace it runs in; none where that is the caller's, which is the daemon's too.
    pub beside: Option<i32>,
}

impl Run<'_> {
    /// Runs it to its end, in the daemon's network namespace, which is the caller's. A failed spec is no error here.
    pub fn outcomes(&self) -> Result<Outcomes> {
        let report = self.output.join("critest.json");
        let log = std::fs::File::create(self.output.join("critest.log")).context("create critest's log")?;
        let endpoint = format!("unix://{}", self.socket.display());
        let mut command = match self.beside {
            Some(pid) => {
                let mut enter = Command::new("nsenter");
                enter.args(["--mount", "--target", &pid.to_string(), "--"]).arg(self.suite);
                enter
            }
            None => Command::new(self.suite),
        };
        let status = command
            .args(["-config", "/nonexistent", "-runtime-endpoint", &endpoint, "-image-endpoint", &endpoint])
            .args(["-ginkgo.v", "-ginkgo.no-color", "-test.timeout", &format!("{}s", self.limit.as_secs())])
            .arg("-ginkgo.json-report")
            .arg(&report)
            .args(["-ginkgo.focus", self.focus])
            .args(self.flags)
            .env("PATH", path_with(self.suite.parent().context("the suite's folder")?)?)
            .current_dir(self.output)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share critest's log")?)
            .stderr(log)
            .status()
            .with_context(|| format!("run {}", self.suite.display()))?;
        let text = std::fs::read(&report).with_context(|| {
            format!("critest ended with {status} and left no report; its log is in {}", self.output.display())
        })?;
        outcomes(&text)
    }
}

/// The program search path with one more folder.
fn path_with(folder: &Path) -> Result<std::ffi::OsString> {
    let usual = std::env::var_os("PATH").unwrap_or_default();
    std::env::join_paths(std::iter::once(folder.to_owned()).chain(std::env::split_paths(&usual))).context("a search path")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_of_the_digest_is_replaced() {
        let mut bytes = b"..aab.aab".to_vec();
        assert_eq!(replace(&mut bytes, b"aab", b"xyz"), 2);
        assert_eq!(bytes, b"..xyz.xyz");
    }
}
