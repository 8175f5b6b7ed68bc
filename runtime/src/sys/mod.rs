//! Kernel facilities without a safe wrapper elsewhere: one file for each. The only place with `unsafe`. No policy, no logging.

pub mod bpf;
pub mod clone;
pub mod descriptors;
pub mod exec;
pub mod keyring;
pub mod mount_attr;
pub mod priority;
pub mod process;
pub mod seccomp;
pub mod signal;
pub mod terminal;
