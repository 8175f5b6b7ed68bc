//! The image store: pulls and imports images, keeps each layer once by chain id, as an EROFS image or a directory, and answers
//! what an image is. A layer is fetched, verified, decompressed and unpacked in one pass; no compressed copy stays.
//!
//! It knows no pod, no container and no gRPC; a container holds its layers by a [`Lease`]. What it mounts is
//! layers, in a tree that nobody sees (`mounts`).
//! Durability: layers first, one `syncfs`, then layer records, the image record last; what has no record is unfinished
//! work and is removed when the store opens.

mod archive;
mod auth;
mod check;
mod copy;
mod credentials;
mod digest;
mod erofs;
mod error;
mod export;
mod extract;
mod fuzz;
mod hosts;
mod import;
mod layers;
mod manifest;
mod mounts;
mod object;
mod partial;
mod progress;
mod proxies;
mod read;
mod record;
pub mod reference;
mod registries_conf;
mod registry;
mod replaced;
mod sparse;
mod split;
mod store;
mod tls;
mod transfer;
mod tree;
mod trust;
mod unpack;
mod verify;

#[cfg(test)]
mod hostile_archives;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod registry_tests;
#[cfg(test)]
mod test_images;
#[cfg(test)]
mod test_registry;
#[cfg(test)]
mod tests;

pub use auth::RegistryAuth;
pub use check::{can_mount_images, check_files};
pub use error::ImageError;
pub use extract::unpack_archive;
#[doc(hidden)]
pub use fuzz::fuzz_layer;
pub use hosts::RegistryFiles;
pub use layers::{FsUsage, LayerFormat, Lease};
pub use manifest::Platform;
pub use object::{Image, Layer};
pub use progress::{LayerProgress, LayerState, Progress};
pub use reference::Reference;
pub use store::{Store, StoreConfig};
pub use trust::TrustFiles;
pub use verify::Verdict;
