//! Where built programs lie, and what a machine must have.

use anyhow::{Context, Result, ensure};
use std::{
    env, fs,
    path::{Path, PathBuf},
};

/// Root of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("")
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The directory below it in which a run leaves its logs and reports.
pub fn reports(name: &str) -> Result<PathBuf> {
    let directory = target().join(name);
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    directory.canonicalize().context("directory of the reports")
}

/// Directory of `windlass`, `windlass-monitor`, `windlass-oci` and `probe`, made by `cargo xtask build`.
pub fn programs() -> Result<PathBuf> {
    let directory = env::var_os("WINDLASS_BIN_DIR").map_or_else(|| target().join("windlass"), PathBuf::from);
    let windlass = directory.join("windlass");
    ensure!(windlass.exists(), "{} is not there; run `cargo xtask build` first", windlass.display());
    directory.canonicalize().context("directory of the programs")
}
