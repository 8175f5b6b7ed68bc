//! Exec, Attach and PortForward: what is asked for is checked, and a URL stands for it.

use super::Service;
use crate::{
    container::Container,
    error::{Error, Result},
    pod::Phase,
    streaming::{Target, Wanted},
};
use std::sync::Arc;
use windlass_proto::cri;

fn running(service: &Service, id: &str) -> Result<Arc<Container>> {
    let container = service.node.container(id)?;
    if container.is_running() {
        Ok(container)
    } else {
        Err(Error::precondition(format!("container {} is not running", container.id)))
    }
}

fn checked(wanted: Wanted) -> Result<Wanted> {
    if wanted.tty && wanted.stderr {
        return Err(Error::invalid("tty and stderr cannot both be true: a terminal has one output"));
    }
    if !(wanted.stdin || wanted.stdout || wanted.stderr) {
        return Err(Error::invalid("one of stdin, stdout and stderr must be true"));
    }
    Ok(wanted)
}

pub(super) fn exec(service: &Service, request: cri::ExecRequest) -> Result<String> {
    let cri::ExecRequest { container_id, cmd, tty, stdin, stdout, stderr } = request;
    let wanted = checked(Wanted { stdin, stdout, stderr, tty })?;
    if cmd.is_empty() {
        return Err(Error::invalid("cmd is empty"));
    }
    let container_id = running(service, &container_id)?.id.clone();
    service.streaming.url(Target::Exec { container_id, command: cmd, wanted })
}

pub(super) fn attach(service: &Service, request: cri::AttachRequest) -> Result<String> {
    let cri::AttachRequest { container_id, stdin, tty, stdout, stderr } = request;
    // kubelet says of the container that it has a terminal; a client that has none itself (`kubectl attach -i` of a pipe) wants both
    // outputs, opens their streams and none for sizes. What the terminal writes comes on the first.
    let wanted = checked(Wanted { stdin, stdout, stderr, tty: tty && !stderr })?;
    let container_id = running(service, &container_id)?.id.clone();
    service.streaming.url(Target::Attach { container_id, wanted })
}

pub(super) fn port_forward(service: &Service, request: cri::PortForwardRequest) -> Result<String> {
    let pod = service.node.pod(&request.pod_sandbox_id)?;
    if pod.phase() != Phase::Ready {
        return Err(Error::precondition(format!("pod {} is not running", pod.id)));
    }
    let port = |port: &i32| u16::try_from(*port).ok().filter(|port| *port > 0);
    let wrong = |value: &i32| Error::invalid(format!("port {value} is not within 1 to 65535"));
    let ports = request.port.iter().map(|value| port(value).ok_or_else(|| wrong(value))).collect::<Result<_>>()?;
    service.streaming.url(Target::PortForward { pod_id: pod.id.clone(), ports })
}
