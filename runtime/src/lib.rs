//! The low-level runtime: turns an OCI bundle into namespaced processes on an overlay root in a cgroup v2 leaf.
//! No tokio, no threads: a forked child may use ordinary code because nobody else holds a lock.

pub mod bundle;
pub mod cgroup;
pub mod log;
pub mod monitor;
pub mod namespace;
pub mod process;
pub mod pty;
pub mod rootfs;
pub mod security;
pub mod sys;
