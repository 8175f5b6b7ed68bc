//! Seccomp filters, from the profile of a bundle to the kernel. The compiler is our own: libseccomp needs milliseconds where this
//! needs tens of microseconds, and other crates serve one architecture or one errno in a filter. A start and an
//! exec each compile anew, 0.1 ms for the default profile with its three architectures: a cache would save less than it could get wrong.

mod filter;
mod program;
mod rules;
mod table;
#[cfg(test)]
mod tests;

pub use filter::Filter;
