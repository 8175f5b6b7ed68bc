//! What plugins are told, and by which method.

use prost::Message;
use windlass_proto::nri::{self, Container, Event, PodSandbox};

/// Whether plugins have a say in it: it goes on only as they want it. Of the rest they are told.
pub(super) fn asked(event: Event) -> bool {
    use Event::*;
    matches!(
        event,
        RunPodSandbox | UpdatePodSandbox | CreateContainer | StartContainer | UpdateContainer | ValidateContainerAdjustment
    )
}

/// A request that is passed on to plugins.
pub(super) trait Relayed: Message {
    type Reply: Message + Default;
    const EVENT: Event;
    const METHOD: &'static str;

    /// What a plugin of an interface before 0.12 is told instead, for the events that had no method of their own there.
    fn subject(&self) -> Option<(Option<PodSandbox>, Option<Container>)> {
        None
    }
}

/// Methods that older plugins have too.
macro_rules! asked {
    ($($name:ident($request:ident) -> $reply:ident;)*) => {
        $(impl Relayed for nri::$request {
            type Reply = nri::$reply;
            const EVENT: Event = Event::$name;
            const METHOD: &'static str = stringify!($name);
        })*
    };
}

asked! {
    UpdatePodSandbox(UpdatePodSandboxRequest) -> UpdatePodSandboxResponse;
    CreateContainer(CreateContainerRequest) -> CreateContainerResponse;
    UpdateContainer(UpdateContainerRequest) -> UpdateContainerResponse;
    StopContainer(StopContainerRequest) -> StopContainerResponse;
    ValidateContainerAdjustment(ValidateContainerAdjustmentRequest) -> ValidateContainerAdjustmentResponse;
}

/// Methods that once were one, StateChange: of pods, and of containers.
macro_rules! told {
    (|$one:ident| $subject:expr; $($name:ident($request:ident) -> $reply:ident;)*) => {
        $(impl Relayed for nri::$request {
            type Reply = nri::$reply;
            const EVENT: Event = Event::$name;
            const METHOD: &'static str = stringify!($name);

            fn subject(&self) -> Option<(Option<PodSandbox>, Option<Container>)> {
                let $one = self;
                Some($subject)
            }
        })*
    };
}

told! {
    |one| (one.pod.clone(), None);
    RunPodSandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
    PostUpdatePodSandbox(PostUpdatePodSandboxRequest) -> PostUpdatePodSandboxResponse;
    StopPodSandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
    RemovePodSandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
}

told! {
    |one| (one.pod.clone(), one.container.clone());
    PostCreateContainer(PostCreateContainerRequest) -> PostCreateContainerResponse;
    StartContainer(StartContainerRequest) -> StartContainerResponse;
    PostStartContainer(PostStartContainerRequest) -> PostStartContainerResponse;
    PostUpdateContainer(PostUpdateContainerRequest) -> PostUpdateContainerResponse;
    RemoveContainer(RemoveContainerRequest) -> RemoveContainerResponse;
}
