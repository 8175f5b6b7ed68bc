//! The harness.

pub mod go;
