//! The contracts of Windlass: the CRI v1 API of kubelet and the protocol between the daemon and a pod's monitor.
//! Generated code and framing; no logic.

/// The Kubernetes Container Runtime Interface, `runtime.v1` of cri-api 0.37.2.
#[cfg(feature = "cri")]
pub mod cri {
    #![allow(clippy::all, clippy::allow_attributes, unreachable_pub, missing_docs, reason = "generated")]
    tonic::include_proto!("runtime.v1");
}

/// What the command line asks of a daemon. `proto/image.proto` describes every message.
#[cfg(feature = "cri")]
pub mod image {
    #![allow(clippy::all, clippy::allow_attributes, unreachable_pub, missing_docs, reason = "generated")]
    tonic::include_proto!("windlass.image.v1");
}

/// What an OpenTelemetry collector takes of traces.
#[cfg(feature = "cri")]
pub mod trace {
    #![allow(clippy::all, clippy::allow_attributes, unreachable_pub, missing_docs, reason = "generated")]
    tonic::include_proto!("opentelemetry.proto.collector.trace.v1");
}

/// The Node Resource Interface: what plugins are told and answer.
#[cfg(feature = "cri")]
pub mod nri {
    #![allow(clippy::all, clippy::allow_attributes, unreachable_pub, missing_docs, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/nri.pkg.api.v1alpha1.rs"));
}

/// The remote procedure calls that the Node Resource Interface is spoken over.
#[cfg(feature = "cri")]
pub mod ttrpc {
    #![allow(clippy::all, clippy::allow_attributes, unreachable_pub, missing_docs, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/ttrpc.rs"));
}

/// The calls of containerd's API that cAdvisor makes.
#[cfg(feature = "cri")]
pub mod containerd {
    #![allow(clippy::all, clippy::allow_attributes, unreachable_pub, missing_docs, reason = "generated")]
    pub mod containers {
        tonic::include_proto!("containerd.services.containers.v1");
    }
    pub mod tasks {
        tonic::include_proto!("containerd.services.tasks.v1");
    }
    pub mod version {
        tonic::include_proto!("containerd.services.version.v1");
    }
}

/// The protocol between the daemon and a monitor. `proto/monitor.proto` describes every message.
pub mod monitor {
    #![allow(clippy::all, clippy::allow_attributes, unreachable_pub, missing_docs, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/windlass.monitor.v1.rs"));
}

/// What CRIU is told and answers. `proto/criu.proto` describes every message.
pub mod criu {
    #![allow(clippy::all, clippy::allow_attributes, unreachable_pub, missing_docs, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}

pub mod frame;
