//! Volumes that an image declares (`VOLUME`): which of them a container gets, and their directories. Each is the container's own, begins as what
//! the image has there, and goes with the container. A mount of the request goes over them: whatever links the image has, they are mounted first.

use super::spec::{self, normal};
use crate::{
    config::ImageVolumes,
    error::{Error, Result},
    image::Image,
    pod::userns::Users,
};
use rustix::fs::FileType;
use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::{PermissionsExt, chown},
    path::{Component, Path, PathBuf},
    sync::Arc,
};
use windlass_proto::cri::{ContainerConfig, IdMapping};

/// Volumes of an image that a container gets.
const VOLUMES_MAX: usize = 256;
/// Longest path (linux/limits.h, without the closing NUL).
const PATH_MAX_BYTES: usize = 4095;
/// Where the kernel's file systems are, which no image covers.
const KERNEL: [&str; 3] = ["proc", "sys", "dev"];
/// Below a container's directory.
const DIRECTORY: &str = "volumes/declared";

/// A volume of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Declared {
    /// Where the container has it.
    pub(super) target: String,
    /// Where that leads in the image, below its root and without links.
    real: PathBuf,
    /// Whether the image has a directory there.
    exists: bool,
}

/// The directory of all declared volumes of a container.
pub(crate) fn directory(container: &Path) -> PathBuf {
    container.join(DIRECTORY)
}

/// The directory of the volume at this place of the list.
pub(super) fn source(container: &Path, index: usize) -> PathBuf {
    directory(container).join(index.to_string())
}

/// The volumes that a container of the image gets: those that no mount of the request covers. What cannot be one is left out with a line in
/// the log.
pub(super) fn find(how: ImageVolumes, config: &ContainerConfig, image: &Image) -> Result<Vec<Declared>> {
    let declared = image.config.config().as_ref().and_then(|config| config.volumes().clone()).unwrap_or_default();
    if declared.is_empty() || how == ImageVolumes::Ignore {
        return Ok(Vec::new());
    }
    if declared.len() > VOLUMES_MAX {
        return Err(Error::invalid(format!(
            "image: it declares {} volumes, more than {VOLUMES_MAX}; containers.image_volumes = \"ignore\" leaves them out",
            declared.len()
        )));
    }
    let asked = config.mounts.iter().map(|mount| normal(&mount.container_path));
    let mounts: Vec<PathBuf> = asked.chain(spec::POD_FILES.map(|name| format!("/etc/{name}"))).map(PathBuf::from).collect();
    let kernel = KERNEL.iter().map(|name| image.real_path(name).map(|(real, _)| real));
    let kernel: Vec<PathBuf> =
        kernel.collect::<std::result::Result<_, _>>().map_err(|error| Error::invalid(error.to_string()))?;
    let mut found: Vec<Declared> = Vec::new();
    for path in &declared {
        match one(path, &mounts, &kernel, image) {
            Ok(Some(volume)) if !found.iter().any(|other| other.real == volume.real) => found.push(volume),
            Ok(_) => {}
            Err(Refused::LeftOut(why)) => {
                tracing::warn!(image = %image.id, volume = %path, "volume of the image left out: {why}")
            }
            Err(Refused::Failed(error)) => return Err(error),
        }
    }
    // Parents first; a volume over a directory comes before the ones inside it.
    found.sort_by(|one, other| {
        let depth = |volume: &Declared| volume.real.components().count();
        (depth(one), &one.real).cmp(&(depth(other), &other.real))
    });
    Ok(found)
}

/// Why a path is no volume.
enum Refused {
    /// The container does without it.
    LeftOut(&'static str),
    Failed(Error),
}

/// `None`: a mount of the request is there.
fn one(path: &str, mounts: &[PathBuf], kernel: &[PathBuf], image: &Image) -> std::result::Result<Option<Declared>, Refused> {
    if path.contains('\0') || path.len() > PATH_MAX_BYTES {
        return Err(Refused::LeftOut("it has a NUL byte or is too long"));
    }
    if Path::new(path).components().any(|part| part == Component::ParentDir) {
        return Err(Refused::LeftOut("it has `..` in it"));
    }
    // One that is relative begins at the root, as elsewhere.
    let target = normal(path);
    let covered = |path: &Path| mounts.iter().any(|mount| path.starts_with(mount));
    if covered(Path::new(&target)) {
        return Ok(None);
    }
    let (real, kind) = image.real_path(&target).map_err(|error| Refused::Failed(Error::invalid(error.to_string())))?;
    if real.as_os_str().is_empty() {
        return Err(Refused::LeftOut("it is the root"));
    }
    // Also by links of the image: nothing that it brings may pass for what the kernel tells.
    let named = |name: &&str| Path::new(&target).starts_with(Path::new("/").join(name));
    if KERNEL.iter().any(named) || kernel.iter().any(|other| real.starts_with(other) || other.starts_with(&real)) {
        return Err(Refused::LeftOut("a file system of the kernel is there"));
    }
    if covered(&Path::new("/").join(&real)) {
        return Ok(None);
    }
    match kind {
        Some(FileType::Directory) | None => Ok(Some(Declared { target, real, exists: kind.is_some() })),
        Some(_) => Err(Refused::Failed(Error::invalid(format!(
            "image: its volume {path:?} is no directory in it; mount a volume there, or set containers.image_volumes = \"ignore\""
        )))),
    }
}

/// Makes the directories of the volumes in a container's directory.
pub(super) async fn make(
    how: ImageVolumes,
    image: &Arc<Image>,
    volumes: Vec<Declared>,
    container: &Path,
    users: Option<Users>,
) -> Result<()> {
    if volumes.is_empty() {
        return Ok(());
    }
    let (image, container) = (image.clone(), container.to_owned());
    let work = move || match how {
        ImageVolumes::Bind => fill(&image, &volumes, &container),
        ImageVolumes::Mkdir => volumes.iter().try_for_each(|volume| add(&image, volume, &container.join("upper"), users)),
        ImageVolumes::Ignore => Ok(()),
    };
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal(format!("make volumes of the image: {error}")))?
}

/// A directory for each volume, with what the image has there.
fn fill(image: &Image, volumes: &[Declared], container: &Path) -> Result<()> {
    let mut copies = Vec::new();
    for (index, volume) in volumes.iter().enumerate() {
        let path = source(container, index);
        fs::create_dir_all(&path).map_err(|error| Error::io(format_args!("create {}", path.display()), error))?;
        if volume.exists {
            copies.push((volume.real.clone(), path));
        }
    }
    if copies.is_empty() {
        return Ok(());
    }
    image.copy(&copies).map_err(|error| Error::of_image(error).during("make volumes of the image"))
}

/// Makes the directory in the container's writable layer where the image lacks it; those above that the image has stay as they are there.
fn add(image: &Image, volume: &Declared, upper: &Path, users: Option<Users>) -> Result<()> {
    if volume.exists {
        return Ok(());
    }
    let failed = |error: io::Error| Error::io(format_args!("create the image's volume {}", volume.target), error);
    fs::create_dir_all(upper).map_err(failed)?;
    let mut place = upper.to_owned();
    let mut below = PathBuf::new();
    for name in volume.real.components() {
        place.push(name);
        below.push(name);
        let (mode, uid, gid) = match image.directory(&below).map_err(Error::of_image)? {
            Some(found) => (found.st_mode & 0o7777, found.st_uid, found.st_gid),
            None => (0o755, 0, 0),
        };
        match fs::create_dir(&place) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            other => other.map_err(failed)?,
        }
        // The writable layer has the host's ids. One that the pod does not have becomes its root's.
        let host =
            |id: u32, range: Option<IdMapping>| range.map_or(id, |range| range.host_id + if id < range.length { id } else { 0 });
        let (uid, gid) = (host(uid, users.map(|users| users.uids)), host(gid, users.map(|users| users.gids)));
        chown(&place, Some(uid), Some(gid)).map_err(failed)?;
        fs::set_permissions(&place, Permissions::from_mode(mode)).map_err(failed)?;
    }
    Ok(())
}
