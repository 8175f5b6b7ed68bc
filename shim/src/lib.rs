//! The daemon: serves the CRI and keeps pods, containers, images and the pod network.
//!
//! `cri` is the RPC face and the only place that knows tonic; `pod` and `container` hold the state and its transitions;
//! `monitor` talks to the process that every pod has; `image` and `network` know no pod; `store` writes records.
//! Whatever needs a namespace, a clone or an unsafe call happens in the monitor, never here.
#![forbid(unsafe_code)]

pub mod apparmor;
pub mod cdi;
pub mod cgroup;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod container;
pub mod cri;
pub mod error;
pub mod events;
mod glob;
pub mod image;
pub mod log;
pub mod monitor;
pub mod network;
pub mod node;
pub mod nri;
pub mod pod;
pub mod selinux;
pub mod service;
pub mod stats;
pub mod store;
pub mod streaming;
pub mod telemetry;
