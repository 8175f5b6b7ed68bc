//! Plugins that the daemon starts itself: executable files `NN-name` of a directory. Each gets its name, its index and one end of a pair of
//! sockets, whose number it is told; its configuration comes with the first call. Its output goes where the daemon's does.

use super::plugin::check_name;
use crate::error::{Error, Result};
use command_fds::{CommandFdExt, FdMapping};
use rustix::fd::OwnedFd;
use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Stdio,
};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
};

/// Number of a plugin's end of its socket.
const SOCKET: i32 = 3;

/// Largest configuration file of a plugin.
const CONFIG_MAX_BYTES: u64 = 1 << 20;

/// A plugin as its file names it.
#[derive(Debug)]
pub(super) struct Found {
    path: PathBuf,
    index: String,
    name: String,
    config: String,
}

/// A running plugin. Dropping it kills the process; tokio reaps it.
pub(super) struct Launched {
    pub(super) index: String,
    pub(super) name: String,
    pub(super) config: String,
    _process: Child,
}

/// Finds the plugins of a directory, which need not be there.
///
/// # Errors
/// An executable whose name is not `NN-name`, or a configuration that cannot be read: what is there is meant to run.
pub(super) fn find(plugins: &Path, configurations: &Path) -> Result<Vec<Found>> {
    let failed = |error: io::Error| Error::io(format_args!("read nri.plugin_path {}", plugins.display()), error);
    let entries = match fs::read_dir(plugins) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        let Ok(about) = fs::metadata(&path) else { continue };
        if !about.is_file() || about.permissions().mode() & 0o111 == 0 {
            continue;
        }
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (index, name) = file.split_once('-').unwrap_or((&file, ""));
        check_name(index, name).map_err(|why| Error::invalid(format!("{}: {why}", path.display())))?;
        let config = configuration(configurations, &file, name)?;
        found.push(Found { index: index.into(), name: name.into(), path, config });
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// `NN-name.conf`, else `name.conf`, else nothing.
fn configuration(directory: &Path, file: &str, name: &str) -> Result<String> {
    for path in [directory.join(format!("{file}.conf")), directory.join(format!("{name}.conf"))] {
        let failed = |error: io::Error| Error::io(format_args!("read {}", path.display()), error);
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
            Ok(about) if about.len() > CONFIG_MAX_BYTES => {
                return Err(Error::invalid(format!("{} has more than {CONFIG_MAX_BYTES} bytes", path.display())));
            }
            Ok(_) => return fs::read_to_string(&path).map_err(failed),
        }
    }
    Ok(String::new())
}

impl Found {
    /// Runs it; also the daemon's end of its socket.
    pub(super) fn launch(self) -> Result<(UnixStream, Launched)> {
        let failed = |error: io::Error| Error::io(format_args!("launch NRI plugin {}", self.path.display()), error);
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let mut command = Command::new(&self.path);
        command
            .env_clear()
            .env("NRI_PLUGIN_NAME", &self.name)
            .env("NRI_PLUGIN_IDX", &self.index)
            .env("NRI_PLUGIN_SOCKET", SOCKET.to_string())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let socket = FdMapping { parent_fd: OwnedFd::from(theirs), child_fd: SOCKET };
        command.fd_mappings(vec![socket]).map_err(|error| Error::internal(format!("launch NRI plugin: {error}")))?;
        let process = command.spawn().map_err(failed)?;
        let socket = UnixStream::from_std(ours).map_err(failed)?;
        Ok((socket, Launched { index: self.index, name: self.name, config: self.config, _process: process }))
    }
}
