//! Seccomp filters, from the profile of a bundle to the kernel. The compiler is our own: libseccomp needs milliseconds where this
//! needs tens of microseconds, and other crates serve one architecture or one errno in a filter. Where the
//! bundle's plan names a file for it, a profile is compiled by the first container that has it (0.1 ms for the default one with its three
//! architectures) and read by all that follow, execs included.

mod cache;
mod filter;
mod program;
mod rules;
mod table;
#[cfg(test)]
mod tests;

pub use filter::Filter;
