//! What a container's process may do: capabilities, resource limits, priorities, out-of-memory score, system calls. Applied by the child to itself,
//! never by the monitor: all of it survives exec and would spread.

mod apparmor;
mod capabilities;
mod limits;
mod priority;
mod seccomp;
mod selinux;

pub use apparmor::confine_at_exec;
pub use capabilities::{Capabilities, NAMES as CAPABILITIES};
pub(crate) use capabilities::{bounding_set, own_bounding_set};
pub use limits::{reachable_rlimit, set_oom_score, set_rlimits};
pub use priority::set_priorities;
pub use seccomp::Filter;
pub use selinux::{check, label_at_exec};
pub(crate) use selinux::{label_queues, mount_label, mount_option};
