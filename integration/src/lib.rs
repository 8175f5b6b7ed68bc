//! The harness.

pub mod critest;
pub mod go;
