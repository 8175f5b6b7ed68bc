//! Pods, containers and images as the CRI's messages. Pure: copies of records in, messages out.

use crate::{
    container::{self, State},
    image::Image,
    pod::{self, Phase, namespace_modes},
};
use std::collections::HashMap;
use windlass_proto::cri;

type Labels = HashMap<String, String>;

/// True when every wanted label is there with that value.
pub(super) fn labels_match(have: &Labels, want: &Labels) -> bool {
    want.iter().all(|(key, value)| have.get(key) == Some(value))
}

pub(super) fn pod_state(phase: Phase) -> cri::PodSandboxState {
    match phase {
        Phase::Ready => cri::PodSandboxState::SandboxReady,
        Phase::Creating | Phase::NotReady => cri::PodSandboxState::SandboxNotready,
    }
}

pub(super) fn pod(record: &pod::Record) -> cri::PodSandbox {
    cri::PodSandbox {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: pod_state(record.phase).into(),
        created_at: record.created_at_ns,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

pub(super) fn pod_status(record: &pod::Record) -> cri::PodSandboxStatus {
    let mut ips = record.network.iter().flat_map(|network| &network.ips).map(ToString::to_string);
    let network = record.network.is_some().then(|| cri::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| cri::PodIp { ip }).collect(),
    });
    cri::PodSandboxStatus {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: pod_state(record.phase).into(),
        created_at: record.created_at_ns,
        network,
        linux: Some(cri::LinuxPodSandboxStatus {
            namespaces: Some(cri::Namespace { options: Some(namespace_modes(&record.config)) }),
        }),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        runtime_handler: record.runtime_handler.clone(),
    }
}

fn container_state(state: &State) -> cri::ContainerState {
    match state {
        State::Created { .. } => cri::ContainerState::ContainerCreated,
        State::Running { .. } => cri::ContainerState::ContainerRunning,
        State::Exited { .. } => cri::ContainerState::ContainerExited,
    }
}

fn image_spec(record: &container::Record) -> cri::ImageSpec {
    let asked = record.config.image.clone().unwrap_or_default();
    cri::ImageSpec { image: record.image_name.clone(), ..asked }
}

pub(super) fn container(record: &container::Record) -> cri::Container {
    cri::Container {
        id: record.id.clone(),
        pod_sandbox_id: record.pod_id.clone(),
        metadata: record.config.metadata.clone(),
        image: record.config.image.clone(),
        image_ref: record.image_ref.clone(),
        image_id: record.image_id.clone(),
        state: container_state(&record.state).into(),
        created_at: record.created_at_ns,
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
    }
}

pub(super) fn container_status(record: &container::Record) -> cri::ContainerStatus {
    let mut status = cri::ContainerStatus {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: container_state(&record.state).into(),
        created_at: record.created_at_ns,
        image: Some(image_spec(record)),
        image_ref: record.image_ref.clone(),
        image_id: record.image_id.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
        mounts: record.config.mounts.clone(),
        log_path: record.log_path.clone(),
        resources: Some(cri::ContainerResources {
            linux: record.config.linux.as_ref().and_then(|linux| linux.resources.clone()),
            windows: None,
        }),
        user: Some(cri::ContainerUser { linux: Some(record.user.clone()) }),
        stop_signal: stop_signal(record).into(),
        ..Default::default()
    };
    status.started_at = record.state.started_at_ns();
    if let Some((exit, reason, message)) = record.state.end() {
        status.finished_at = exit.finished_at_ns;
        status.exit_code = exit.code;
        status.reason = reason.to_owned();
        status.message = message.to_owned();
    }
    status
}

fn stop_signal(record: &container::Record) -> cri::Signal {
    if record.config.stop_signal() != cri::Signal::RuntimeDefault {
        return record.config.stop_signal();
    }
    let name = match record.stop_signal {
        34 => "SIGRTMIN".to_owned(),
        64 => "SIGRTMAX".to_owned(),
        number @ 35..=49 => format!("SIGRTMINPLUS{}", number - 34),
        number @ 50..=63 => format!("SIGRTMAXMINUS{}", 64 - number),
        number => nix::sys::signal::Signal::try_from(number).map(|signal| signal.as_str().to_owned()).unwrap_or_default(),
    };
    cri::Signal::from_str_name(&format!("SIGNAL_{name}")).unwrap_or(cri::Signal::RuntimeDefault)
}

pub(super) fn image(image: &Image, pinned: bool) -> cri::Image {
    let user = image.config.config().as_ref().and_then(|config| config.user().clone()).unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default();
    let (uid, username) = match user.parse::<i64>() {
        Ok(value) => (Some(cri::Int64Value { value }), String::new()),
        Err(_) => (None, user.to_owned()),
    };
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size_bytes,
        uid,
        username,
        spec: Some(cri::ImageSpec { image: image.id.clone(), ..Default::default() }),
        pinned,
    }
}
