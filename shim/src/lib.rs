//! The daemon: serves the CRI and keeps pods, containers, images and the pod network.
#![forbid(unsafe_code)]

pub mod image;
pub mod network;
