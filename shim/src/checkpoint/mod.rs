//! Checkpoints: what running containers are, written to files, and containers made of such files.
//!
//! CRIU does it, run by the pod's monitor: that one parents the processes, knows their pipes and holds the pod's namespaces, and lets
//! containers go on when this daemon is gone. Here are the files around CRIU's: which image it was, the configuration, what the container
//! had written.
//!
//! ```text
//! config.dump      which image and when            checkpoint/       CRIU's images
//! spec.dump        the OCI configuration           rootfs-diff.tar   what is above the image, as a layer of one
//! status.dump      its times                       dump.log, stats-dump   CRIU's
//! ```
//! This is the layout of the archives that Podman, CRI-O and containerd write. A pod's checkpoint is a directory with `pod.json` and such a
//! directory for each container. Whoever may write one decides what runs: it is trusted as a program of root is.

mod bounds;
mod capture;
mod diff;
mod files;
mod pod;
mod source;

pub use capture::container;
pub use files::IMAGES;
pub use pod::{capture as capture_pod, restore as restore_pod};
pub(crate) use source::{Loaded, Source};

use crate::{
    config::CheckpointConfig,
    error::{Error, Result},
};
use std::path::{Path, PathBuf};

/// Where programs are found whatever the daemon's environment says.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";

/// Directory of the data root where an archive is put together. What an ended daemon left there is worth nothing.
pub const SCRATCH: &str = "checkpoints";

/// The CRIU program.
pub fn program(config: &CheckpointConfig) -> Result<PathBuf> {
    let named = &config.criu;
    let found = if named.components().count() > 1 {
        Some(named.clone()).filter(|path| path.is_absolute() && path.is_file())
    } else {
        let paths = std::env::var("PATH").unwrap_or_default();
        let directories = paths.split(':').chain(SYSTEM_PATH.split(':')).filter(|directory| directory.starts_with('/'));
        directories.map(|directory| Path::new(directory).join(named)).find(|path| path.is_file())
    };
    found.ok_or_else(|| {
        Error::precondition(format!(
            "checkpoints need CRIU (4.0 or newer, for kernels from 6.16 on 4.2), and there is no program {} here: install Debian's package criu, or set checkpoint.criu",
            named.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_itself_and_its_package() {
        for name in ["windlass-no-criu", "/nonexistent/criu", "relative/criu"] {
            let config = CheckpointConfig { criu: name.into(), ..CheckpointConfig::default() };
            let error = program(&config).expect_err(name);
            assert_eq!(error.kind, crate::error::Kind::Precondition);
            assert!(error.message.contains(name) && error.message.contains("package criu"), "{error}");
        }
        let config = CheckpointConfig { criu: "sh".into(), ..CheckpointConfig::default() };
        assert!(program(&config).expect("found").is_absolute());
    }
}
