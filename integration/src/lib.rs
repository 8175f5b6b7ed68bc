//! The harness: a real daemon in mount and network namespaces of its own, driven over the CRI on the real kernel.

pub mod build;
pub mod client;
pub mod compare;
pub mod critest;
pub mod daemon;
pub mod demo;
pub mod go;
pub mod ground;
pub mod guest;
pub mod guest_tests;
pub mod image;
pub mod kubelet;
pub mod leak;
pub mod measure;
pub mod metrics;
pub mod node;
pub mod prometheus;
pub mod registry;
pub mod setup;
pub mod soak;
pub mod standin;
pub mod standin_registry;
pub mod streams;
pub mod suite;
pub mod validation;
pub mod wait;
