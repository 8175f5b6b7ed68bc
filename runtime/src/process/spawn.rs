//! The parent's side: clones the child into its cgroup and pid namespace. Returns at once; the child works on alone.

use super::{Child, Enter, Kind, Spawn, StepError};

/// Starts to build the container of a bundle. Returns as soon as the child exists; what it reports comes by
/// [`Child::report`].
pub fn create(spawn: Spawn<'_>) -> Result<Child, StepError> {
    Err(StepError::because(Kind::Unsupported, "create", spawn.bundle.display(), "not built"))
}

/// Adds a process to a running container. There is no gate: the program runs as soon as it can.
pub fn enter(enter: Enter<'_>) -> Result<Child, StepError> {
    Err(StepError::because(Kind::Unsupported, "exec", enter.bundle.display(), "not built"))
}
