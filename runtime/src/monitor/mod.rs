//! The monitor of one pod: holds its namespaces, parents its processes, writes its logs and tells every connected daemon what
//! ended. One thread, one epoll loop; every request that must wait for a process is answered when that process reports or is
//! reaped. It never decides anything by itself: restarts, deadlines and records belong to the daemon, which it outlives.
//!
//! ```text
//! Create -> CREATING -Ready-> CREATED -Start-> STARTING -exec-> RUNNING -reaped-> EXITED -Delete-> forgotten
//!              |Failed            |killed          |Failed (128)                     ^
//!           forgotten             +----------------+---------------------------------+
//! ```
//! Between being reaped and EXITED a container's cgroup is killed and must be empty, its pipes are drained and closed: whoever
//! sees EXITED may unmount its volumes.

mod attach;
mod checkpoint;
mod connection;
mod container;
mod exec;
mod exits;
mod init;
mod note;
mod pod;
mod poll;
mod prepare;
mod reap;
mod server;
mod sysctl;

pub use init::run as run_init;
pub use prepare::run;
