//! The files of a container's checkpoint beside CRIU's, and the archive of all of them.

use super::bounds::{Bounds, Stop};
use crate::{
    container::{Record, State},
    error::{Error, Result},
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

pub(super) const CONFIG: &str = "config.dump";
pub(super) const SPEC: &str = "spec.dump";
const STATUS: &str = "status.dump";
pub(super) const DIFF: &str = "rootfs-diff.tar";
/// CRIU's images, in a checkpoint and in the bundle of a container that is restored from it.
pub const IMAGES: &str = "checkpoint";

/// Deleted files, in the archives of CRI-O and Podman; here the difference has them.
pub(super) const DELETED: &str = "deleted.files";

/// `config.dump`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Config {
    #[serde(default)]
    pub(super) id: String,
    #[serde(default)]
    pub(super) name: String,
    /// What a person calls the image.
    #[serde(default, rename = "rootfsImage")]
    pub(super) image: String,
    /// Its id.
    #[serde(default, rename = "rootfsImageRef")]
    pub(super) image_ref: String,
    #[serde(default, rename = "rootfsImageName")]
    pub(super) image_name: String,
    #[serde(default)]
    runtime: String,
    #[serde(default, rename = "createdTime")]
    created: String,
    #[serde(default, rename = "checkpointedTime")]
    checkpointed: String,
}

/// Writes what is known of a container whose bundle is `bundle`.
pub(super) fn describe(record: &Record, bundle: &Path, to: &Path) -> Result<()> {
    let State::Running { started_at_ns, .. } = record.state else {
        return Err(Error::precondition(format!("container {} has ended", record.id)));
    };
    let config = Config {
        id: record.id.clone(),
        name: record.name().to_owned(),
        image: record.image_name.clone(),
        image_ref: record.image_id.clone(),
        image_name: record.image_name.clone(),
        runtime: "windlass".into(),
        created: time(record.created_at_ns),
        checkpointed: time(crate::node::now_ns()),
    };
    let status = json!({ "CreatedAt": record.created_at_ns, "StartedAt": started_at_ns, "FinishedAt": 0, "ExitCode": 0 });
    write(&to.join(CONFIG), json!(config).to_string().as_bytes())?;
    write(&to.join(STATUS), status.to_string().as_bytes())?;
    let spec = bundle.join("config.json");
    let spec = fs::read(&spec).map_err(|error| Error::io(format_args!("read {}", spec.display()), error))?;
    write(&to.join(SPEC), &spec)
}

fn time(ns: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ns)).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    at.format(&Rfc3339).unwrap_or_default()
}

pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(|error| Error::io(format_args!("write {}", path.display()), error))
}

/// Makes the archive `to` of the directory `from`, for its owner alone; there is none, or a whole one.
pub(super) async fn pack(from: PathBuf, to: PathBuf, bounds: &Bounds) -> Result<()> {
    let partial = Partial::beside(&to);
    let path = partial.0.clone();
    bounds.blocking(move |stop| pack_now(&from, &path, stop)).await?;
    fs::rename(&partial.0, &to).map_err(|error| Error::io(format_args!("name {}", to.display()), error))
}

/// An archive under another name until it is whole. Dropping it removes what is there.
struct Partial(PathBuf);

impl Partial {
    fn beside(path: &Path) -> Partial {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Partial(path.with_file_name(format!(".{name}.partial")))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn pack_now(from: &Path, to: &Path, stop: Stop) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(format_args!("write {}", to.display()), error);
    let _ = fs::remove_file(to);
    let file = File::options().write(true).create_new(true).mode(0o600).open(to).map_err(failed)?;
    let mut archive = tar::Builder::new(stop.guard(BufWriter::with_capacity(1 << 20, file)));
    archive.append_dir_all("", from).map_err(failed)?;
    archive.into_inner().and_then(|mut file| file.flush()).map_err(failed)
}
