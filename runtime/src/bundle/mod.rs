//! The bundle: `config.json` of the OCI runtime specification and `rootfs.json`, the plan of an overlay root.
//! Only reads; the daemon writes them.

use crate::process::{Context, Kind, StepError};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Version of [`RootfsPlan`] that this build reads.
pub const ROOTFS_PLAN_VERSION: u32 = 1;

/// Name of the plan's file in a bundle.
pub const ROOTFS_PLAN_FILE: &str = "rootfs.json";

/// Largest file of a bundle that is read.
const FILE_LIMIT_BYTES: u64 = 16 << 20;

/// How the root is composed: `rootfs.json` of a bundle. Without that file `root.path` of `config.json` is the root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootfsPlan {
    /// [`ROOTFS_PLAN_VERSION`].
    pub version: u32,
    /// Absolute layer directories, the topmost first (the order of overlayfs' `lowerdir`). At least one.
    pub lower: Vec<PathBuf>,
    /// Absolute directory that takes the changes. Without it and `work` the root is read-only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upper: Option<PathBuf>,
    /// Absolute empty directory on the file system of `upper`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub work: Option<PathBuf>,
    /// The container sees its root read-only, whatever `config.json` says.
    #[serde(default)]
    pub readonly: bool,
    /// Skips every sync of the upper directory, which is worth nothing after a crash.
    #[serde(default)]
    pub volatile: bool,
}

/// Reads and checks `config.json`.
pub fn read_config(bundle: &Path) -> Result<Spec, StepError> {
    let path = bundle.join("config.json");
    let bytes = read_bounded(&path).context("read", path.display()).map_err(|error| error.kind(Kind::Invalid))?;
    parse(&bytes, &path)
}

/// Reads and checks the plan, `None` if the bundle has none.
pub fn read_rootfs_plan(bundle: &Path) -> Result<Option<RootfsPlan>, StepError> {
    let path = bundle.join(ROOTFS_PLAN_FILE);
    let bytes = match read_bounded(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.context("read", path.display())?,
    };
    let plan: RootfsPlan = parse(&bytes, &path)?;
    let invalid = |why: &str| Err(StepError::because(Kind::Invalid, "read", path.display(), why));
    if plan.version != ROOTFS_PLAN_VERSION {
        let why = format!("version {} of the plan, this build reads {ROOTFS_PLAN_VERSION}", plan.version);
        return Err(StepError::because(Kind::Unsupported, "read", path.display(), why));
    }
    if plan.lower.is_empty() {
        return invalid("no lower directory");
    }
    if plan.upper.is_some() != plan.work.is_some() {
        return invalid("upper and work go together");
    }
    if plan.lower.iter().chain(&plan.upper).chain(&plan.work).any(|path| !path.is_absolute()) {
        return invalid("every directory must be absolute");
    }
    Ok(Some(plan))
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<T, StepError> {
    serde_json::from_slice(bytes).map_err(|error| StepError::because(Kind::Invalid, "read", path.display(), error))
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(FILE_LIMIT_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}
