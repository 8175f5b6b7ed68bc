//! The bundle: `config.json` of the OCI runtime specification and `rootfs.json`, the plan of an overlay root.
//! Only reads; the daemon writes them.

mod check;

pub(crate) use check::check;
pub use check::check_resources;

use crate::process::{Context, Kind, StepError};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Newest version of [`RootfsPlan`] that this build reads: 2 added `image_volumes` and `sources_resolved`, 3 layers that are EROFS
/// images.
pub const ROOTFS_PLAN_VERSION: u32 = 3;

/// Name of the plan's file in a bundle.
pub const ROOTFS_PLAN_FILE: &str = "rootfs.json";

/// Largest file of a bundle that is read.
const FILE_LIMIT_BYTES: u64 = 16 << 20;

/// How the root is composed: `rootfs.json` of a bundle. Without that file `root.path` of `config.json` is the root.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootfsPlan {
    /// 1, or that with which one of its fields came; at most [`ROOTFS_PLAN_VERSION`].
    pub version: u32,
    /// Absolute layers, the topmost first (the order of overlayfs' `lowerdir`): directories, or EROFS images (`.erofs`). At least one.
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
    /// Read-only volumes that are made of layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_volumes: Vec<ImageVolume>,
    /// Bind sources of `config.json` were resolved before: a link in one of them is a change that came since, and refused.
    #[serde(default)]
    pub sources_resolved: bool,
    /// Absolute path of the compiled `linux.seccomp`, named after its digest: read where it is, written where it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seccomp_program: Option<PathBuf>,
}

/// A volume made of an image's layers. The bind mounts of `config.json` whose source is [`ImageVolume::source`] show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageVolume {
    /// Absolute; an empty directory of the bundle.
    pub source: PathBuf,
    /// Absolute layers, the topmost first. At least one.
    pub lower: Vec<PathBuf>,
    /// File or directory of the image that is shown in place of its root, resolved inside the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sub_path: Option<PathBuf>,
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
    if !(1..=ROOTFS_PLAN_VERSION).contains(&plan.version) {
        let why = format!("version {} of the plan, this build reads 1 to {ROOTFS_PLAN_VERSION}", plan.version);
        return Err(StepError::because(Kind::Unsupported, "read", path.display(), why));
    }
    if plan.lower.is_empty() || plan.image_volumes.iter().any(|volume| volume.lower.is_empty()) {
        return invalid("no lower directory");
    }
    if plan.upper.is_some() != plan.work.is_some() {
        return invalid("upper and work go together");
    }
    let volumes = plan.image_volumes.iter().flat_map(|volume| volume.lower.iter().chain([&volume.source]));
    if plan
        .lower
        .iter()
        .chain(&plan.upper)
        .chain(&plan.work)
        .chain(&plan.seccomp_program)
        .chain(volumes)
        .any(|path| !path.is_absolute())
    {
        return invalid("every path must be absolute");
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
