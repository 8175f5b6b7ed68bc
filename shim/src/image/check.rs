//! What `windlass doctor` wants to know: whether the files that pulls read can be read, and layers be mounted.

use super::{
    error::ImageError,
    hosts::{RegistryFiles, hosts_for},
    mounts,
    reference::Reference,
    registries_conf::RegistriesConf,
    trust::TrustFiles,
};
use std::path::{Path, PathBuf};

/// Every file of registries, credentials and policies that is there, and what is wrong with it.
pub fn check_files(registries: &RegistryFiles, trust: &TrustFiles) -> Vec<(PathBuf, Result<(), String>)> {
    let mut found = Vec::new();
    let mut note =
        |path: &Path, outcome: Result<(), ImageError>| found.push((path.to_owned(), outcome.map_err(|error| error.to_string())));
    let entries = |root: PathBuf| {
        let mut found: Vec<PathBuf> =
            std::fs::read_dir(&root).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        found.sort();
        found.into_iter().filter(|path| path.is_dir()).map(move |path| (root.clone(), path))
    };
    for (root, directory) in registries.directories().flat_map(entries) {
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // `_default` is read for a registry without a directory; a port may be written with underscores.
        let registry = match name.strip_suffix('_').and_then(|name| name.rsplit_once('_')) {
            Some((host, port)) => format!("{host}:{port}"),
            None if name == "_default" => "windlass-doctor.invalid".to_owned(),
            None => name,
        };
        // Of this directory alone.
        let files = RegistryFiles { hosts: root, registries_conf: PathBuf::new(), ..registries.clone() };
        let outcome = format!("{registry}/check/check:latest").parse::<Reference>();
        note(&directory, outcome.and_then(|reference| hosts_for(&files, &reference)).map(drop));
    }
    if registries.registries_conf.exists() {
        note(&registries.registries_conf, RegistriesConf::load(&registries.registries_conf).map(drop));
    }
    if registries.auth_file.exists() {
        note(&registries.auth_file, registries.credentials().map(drop));
    }
    found.extend(trust.check());
    found
}

/// Why layers cannot be kept as EROFS images in this directory; `Ok` if they can. A small file is made there and removed.
pub fn can_mount_images(directory: &Path) -> Result<(), String> {
    mounts::probe(directory).map_err(|error| error.to_string())
}
