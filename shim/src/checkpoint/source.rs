//! Where a container to restore comes from: an archive on this node, an image that is one, or a directory of a pod's checkpoint.

use super::{files, program};
use crate::{
    error::{Error, Kind, Result},
    image::{Image, unpack_archive},
    node::Node,
};
use oci_spec::runtime::Spec;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use std::{
    fs::{self, File},
    io::{BufReader, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Largest description that is read.
const FILE_LIMIT_BYTES: u64 = 16 << 20;

/// A checkpoint.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// An archive.
    Archive(PathBuf),
    /// The files of one.
    Directory(PathBuf),
    /// An image with the files of one.
    Image(Arc<Image>),
}

/// A checkpoint whose files are in a container's directory.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// Name of its image on this node.
    pub(crate) image: Arc<Image>,
    /// CRIU's program.
    pub(crate) criu: PathBuf,
    spec: Spec,
}

impl Source {
    /// The checkpoint of this name, which stands where an image's would: the path of an archive, or an image that holds one.
    pub(crate) fn of(node: &Node, name: &str) -> Result<Option<Source>> {
        if name.starts_with('/') {
            let path = PathBuf::from(name);
            if !path.is_file() {
                return Err(Error::not_found(format!("config.image.image {name:?}: there is no checkpoint archive")));
            }
            return Ok(Some(Source::Archive(path)));
        }
        let Some(image) = node.images.get(name) else { return Ok(None) };
        let holds =
            image.layers.len() == 1 && image.has_path(&format!("{}/inventory.img", files::IMAGES)).map_err(Error::of_image)?;
        if !holds {
            return Ok(None);
        }
        if !node.config.checkpoint.restore_images {
            return Err(Error::precondition(format!(
                "image {name:?} is a checkpoint, which runs as whoever made it wants; checkpoint.restore_images of the configuration allows it"
            )));
        }
        Ok(Some(Source::Image(image)))
    }

    /// Puts the files into the directory of a new container: CRIU's into `checkpoint/`, what the container had written into `upper/`. Blocks.
    pub(crate) fn load(&self, node: &Node, directory: &Path) -> Result<Loaded> {
        let criu = program(&node.config.checkpoint)?;
        let from = directory.join("from");
        let made = [directory.join("upper"), from.clone()].iter().try_for_each(fs::create_dir_all);
        made.map_err(|error| Error::io(format_args!("create {}", directory.display()), error))?;
        let mut held: Option<OwnedFd> = None;
        let files = match self {
            Source::Archive(path) => {
                let opened = File::open(path).map_err(|error| Error::io(format_args!("open {}", path.display()), error))?;
                unpack(node, opened, &from).map_err(|error| error.during(path.display()))?;
                from.clone()
            }
            Source::Directory(path) => path.clone(),
            Source::Image(image) => {
                let layer = image.layers.first().ok_or_else(|| Error::internal("an image without a layer"))?;
                let root = held.insert(layer.root().map_err(Error::of_image)?);
                PathBuf::from(format!("/proc/self/fd/{}", root.as_fd().as_raw_fd()))
            }
        };
        let loaded = self.take(node, &files, directory, criu)?;
        crate::store::remove_tree(&from)?;
        Ok(loaded)
    }

    fn take(&self, node: &Node, files: &Path, directory: &Path, criu: PathBuf) -> Result<Loaded> {
        let config: files::Config = parse(&files.join(files::CONFIG))?;
        let spec: Spec = parse(&files.join(files::SPEC))?;
        copy_images(&files.join(files::IMAGES), &directory.join(files::IMAGES))?;
        let upper = directory.join("upper");
        match plain(&files.join(files::DIFF)) {
            Ok(file) => unpack(node, file, &upper).map_err(|error| error.during(files::DIFF))?,
            // Nothing was written.
            Err(error) if error.kind == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
        if files.join(files::DELETED).symlink_metadata().is_ok() {
            let deleted: Vec<String> = parse(&files.join(files::DELETED))?;
            unpack(node, whiteouts(&deleted)?.as_slice(), &upper)?;
        }
        let names = [&config.image_ref, &config.image, &config.image_name];
        let image = names.into_iter().filter(|name| !name.is_empty()).find_map(|name| node.images.get(name));
        let image = image.ok_or_else(|| {
            Error::not_found(format!(
                "image {:?} ({}) of the checkpoint is not on this node; pull it first",
                config.image, config.image_ref
            ))
        })?;
        Ok(Loaded { image, criu, spec })
    }
}

impl Loaded {
    /// Refuses a configuration that is for another kind of container. With `strict` it must describe the very process.
    pub(crate) fn check(&self, spec: &Spec, strict: bool) -> Result<()> {
        let differ = |what: &str, then: String, now: String| {
            Err(Error::invalid(format!("{what}: the checkpoint has {then}, the configuration {now}")))
        };
        let process = |spec: &Spec| spec.process().clone().unwrap_or_default();
        let (then, now) = (process(&self.spec), process(spec));
        if then.terminal().unwrap_or(false) != now.terminal().unwrap_or(false) {
            return differ("tty", format!("{:?}", then.terminal()), format!("{:?}", now.terminal()));
        }
        let namespaces = |spec: &Spec| {
            let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
            let mut names: Vec<String> = listed.iter().map(|namespace| format!("{:?}", namespace.typ())).collect();
            names.sort();
            names
        };
        if namespaces(&self.spec) != namespaces(spec) {
            return differ("namespaces", namespaces(&self.spec).join(" "), namespaces(spec).join(" "));
        }
        if !strict {
            return Ok(());
        }
        for (what, then, now) in [
            ("command and args", format!("{:?}", then.args()), format!("{:?}", now.args())),
            ("working_dir", format!("{:?}", then.cwd()), format!("{:?}", now.cwd())),
            ("envs", format!("{:?}", environment(&then)), format!("{:?}", environment(&now))),
            ("security_context: user", format!("{:?}", then.user()), format!("{:?}", now.user())),
        ] {
            if then != now {
                return differ(what, then, now);
            }
        }
        Ok(())
    }
}

/// Without the host's name, which is the pod's of now.
fn environment(process: &oci_spec::runtime::Process) -> Vec<String> {
    let all = process.env().clone().unwrap_or_default();
    let mut kept: Vec<String> = all.into_iter().filter(|variable| !variable.starts_with("HOSTNAME=")).collect();
    kept.sort();
    kept
}

/// Opens a file that is no link and nothing else that leads elsewhere.
fn plain(path: &Path) -> Result<File> {
    let invalid =
        |why: String| Error::invalid(format!("checkpoint: {} {why}", path.file_name().unwrap_or_default().to_string_lossy()));
    match path.symlink_metadata() {
        Ok(found) if found.is_file() => File::open(path).map_err(|error| invalid(format!("cannot be read: {error}"))),
        Ok(_) => Err(invalid("is no plain file".into())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Error::not_found(format!("checkpoint: there is no {}", path.file_name().unwrap_or_default().to_string_lossy())))
        }
        Err(error) => Err(invalid(format!("cannot be read: {error}"))),
    }
}

pub(super) fn parse<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let mut bytes = Vec::new();
    // A checkpoint without this is none.
    let file = plain(path).map_err(|error| Error::invalid(error.message))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    file.take(FILE_LIMIT_BYTES).read_to_end(&mut bytes).map_err(|error| Error::io(format_args!("read {name}"), error))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::invalid(format!("checkpoint: {name}: {error}")))
}

fn unpack(node: &Node, from: impl Read, to: &Path) -> Result<()> {
    unpack_archive(&node.images, BufReader::with_capacity(1 << 20, from), to).map_err(|error| match Error::of_image(error) {
        error if error.kind == Kind::Exhausted => error,
        error => Error::invalid(format!("checkpoint: {}", error.message)),
    })
}

/// Copies CRIU's images, plain files all: it is root that reads them.
fn copy_images(from: &Path, to: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::io("copy CRIU's images", error);
    if !from.symlink_metadata().is_ok_and(|found| found.is_dir()) {
        return Err(Error::invalid(format!("checkpoint: there is no directory {}", files::IMAGES)));
    }
    fs::create_dir_all(to).map_err(failed)?;
    for entry in fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let mut file = plain(&entry.path())?;
        let mut copy = File::create(to.join(entry.file_name())).map_err(failed)?;
        std::io::copy(&mut file, &mut copy).map_err(failed)?;
    }
    Ok(())
}

/// The list of deleted files as an archive that deletes them.
fn whiteouts(deleted: &[String]) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for path in deleted {
        let path = Path::new(path.trim_start_matches('/'));
        let Some(name) = path.file_name() else { continue };
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(0);
        let hidden = path.with_file_name(format!(".wh.{}", name.to_string_lossy()));
        let added = archive.append_data(&mut header, hidden, std::io::empty());
        added.map_err(|error| Error::invalid(format!("checkpoint: {}: {error}", files::DELETED)))?;
    }
    archive.into_inner().map_err(|error| Error::io("read deleted files", error))
}
