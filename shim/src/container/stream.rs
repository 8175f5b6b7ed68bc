//! Exec and attach with live streams, and connections into a pod's network. Bytes are copied here between the client's streams and the
//! descriptors that the monitor gave; the monitor never sees an exec's.
//!
//! An exec whose client goes away is killed with everything in its cgroup; one that ends by itself leaves what it put into the background. An
//! attached client that goes away, or does not read, changes nothing for the container, but for the end of an input that is for one client.

use super::{Container, exec};
use crate::{
    error::{Error, Kind, Result},
    monitor::Monitor,
    node::{Node, new_id},
    pod::Phase,
    streaming::{Ending, Handler, Input, Output, Streams, TerminalSize, Wanted},
};
use rustix::{
    fd::OwnedFd,
    termios::{Winsize, tcsetwinsize},
};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream, unix::pipe},
    sync::mpsc,
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use windlass_proto::monitor::{AttachRequest, CloseStdinRequest, DetachRequest, SocketsRequest, frame::Body};

const BUFFER_BYTES: usize = 64 << 10;
/// How long output is waited for after an exec's process has ended: one that it left behind may hold the pipe open.
const DRAIN_LIMIT: Duration = Duration::from_millis(300);
/// Most output that is taken after the process has ended; a pipe holds 64 KiB.
const DRAIN_LIMIT_BYTES: usize = 1 << 20;
/// How long what an attached client sent before it went away may take to reach the program.
const LAST_INPUT_LIMIT: Duration = Duration::from_secs(2);
/// Longest wait for a terminal's first size before its program starts.
const FIRST_SIZE_LIMIT: Duration = Duration::from_millis(50);
/// Longest wait for a connection within the node.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Serves streams from the node's containers and pods.
pub struct Sessions(pub Arc<Node>);

#[tonic::async_trait]
impl Handler for Sessions {
    async fn exec(&self, container_id: &str, command: Vec<String>, tty: bool, streams: Streams) -> Ending {
        let container = match self.0.container(container_id) {
            Ok(container) => container,
            Err(error) => return Ending::Failed(error),
        };
        run(&self.0, &container, command, tty, streams).await.unwrap_or_else(Ending::Failed)
    }

    async fn attach(&self, container_id: &str, _tty: bool, streams: Streams) -> Ending {
        let container = match self.0.container(container_id) {
            Ok(container) => container,
            Err(error) => return Ending::Failed(error),
        };
        attach(&self.0, &container, streams).await.unwrap_or_else(Ending::Failed)
    }

    async fn dial(&self, pod_id: &str, port: u16) -> Result<TcpStream> {
        let pod = self.0.pod(pod_id)?;
        if pod.phase() != Phase::Ready {
            return Err(Error::precondition(format!("pod {pod_id} is not running")));
        }
        let monitor = pod.monitor()?;
        connect(&monitor, port).await
    }
}

fn source(descriptor: OwnedFd) -> Result<pipe::Receiver> {
    // Unchecked, because a terminal's master is none that tokio calls a pipe; it is read and watched like one.
    let made = rustix::io::ioctl_fionbio(&descriptor, true).map_err(io::Error::from);
    made.and_then(|()| pipe::Receiver::from_owned_fd_unchecked(descriptor))
        .map_err(|error| Error::io("output of the process", error))
}

fn sink(descriptor: OwnedFd) -> Result<pipe::Sender> {
    let made = rustix::io::ioctl_fionbio(&descriptor, true).map_err(io::Error::from);
    made.and_then(|()| pipe::Sender::from_owned_fd_unchecked(descriptor))
        .map_err(|error| Error::io("input of the process", error))
}

fn copy_of(descriptor: &OwnedFd) -> Result<OwnedFd> {
    descriptor.try_clone().map_err(|error| Error::io("terminal of the process", error))
}

fn resize(master: &OwnedFd, size: TerminalSize) {
    let size = Winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
    // It may have ended a moment ago.
    let _ = tcsetwinsize(master, size);
}

/// Applies every size that comes.
async fn follow_size(master: OwnedFd, sizes: Option<mpsc::Receiver<TerminalSize>>) {
    if let Some(mut sizes) = sizes {
        while let Some(size) = sizes.recv().await {
            resize(&master, size);
        }
    }
}

/// Copies the client's input until it ends, then closes the process's. False if it was the process that ended it.
async fn copy_in(input: Option<Input>, sink: Option<pipe::Sender>) -> bool {
    let (Some(mut input), Some(mut sink)) = (input, sink) else { return false };
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(count) = input.read(&mut buffer).await {
        if count == 0 {
            break;
        }
        if sink.write_all(buffer.get(..count).unwrap_or_default()).await.is_err() {
            return false;
        }
    }
    true
}

/// Copies output until it ends. Once `ended`, only what is there already is waited for.
async fn copy_out(source: Option<pipe::Receiver>, output: Option<Output>, ended: CancellationToken) {
    let (Some(mut source), Some(mut output)) = (source, output) else { return };
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut late_bytes = 0;
    loop {
        let read = if ended.is_cancelled() {
            match timeout(DRAIN_LIMIT, source.read(&mut buffer)).await {
                Ok(read) => read,
                Err(_) => break,
            }
        } else {
            tokio::select! {
                read = source.read(&mut buffer) => read,
                () = ended.cancelled() => continue,
            }
        };
        // EIO of a terminal's master: no program has it open any more.
        let Ok(count) = read else { break };
        if ended.is_cancelled() {
            late_bytes += count;
        }
        if count == 0
            || output.write_all(buffer.get(..count).unwrap_or_default()).await.is_err()
            || late_bytes > DRAIN_LIMIT_BYTES
        {
            break;
        }
    }
    let _ = output.shutdown().await;
}

/// An exec from its start to its end, or its client's.
async fn run(node: &Node, container: &Container, command: Vec<String>, tty: bool, mut streams: Streams) -> Result<Ending> {
    let first_size = match streams.resize.as_mut().filter(|_| tty) {
        Some(sizes) => timeout(FIRST_SIZE_LIMIT, sizes.recv()).await.ok().flatten(),
        None => None,
    };
    let wanted =
        Wanted { stdin: streams.stdin.is_some(), stdout: streams.stdout.is_some(), stderr: streams.stderr.is_some(), tty };
    let mut started = exec::start(node, container, command, wanted).await?;
    let mut next = || started.descriptors.next().ok_or_else(|| Error::internal("the monitor gave too few descriptors"));
    let ended = CancellationToken::new();
    let (mut input, mut out, mut err, mut master) = (None, None, None, None);
    if tty {
        let made = next()?;
        if let Some(size) = first_size {
            resize(&made, size);
        }
        input = Some(sink(copy_of(&made)?)?);
        out = Some(source(copy_of(&made)?)?);
        master = Some(made);
    } else {
        if wanted.stdin {
            input = Some(sink(next()?)?);
        }
        if wanted.stdout {
            out = Some(source(next()?)?);
        }
        if wanted.stderr {
            err = Some(source(next()?)?);
        }
    }
    let copying_in = tokio::spawn(copy_in(streams.stdin.take(), input));
    let sizing = tokio::spawn(async move {
        if let Some(master) = master {
            follow_size(master, streams.resize.take()).await;
        }
    });
    let _aborted = (AbortOnDrop(copying_in), AbortOnDrop(sizing));
    let copying_out = async {
        tokio::join!(copy_out(out, streams.stdout.take(), ended.clone()), copy_out(err, streams.stderr.take(), ended.clone()))
    };
    tokio::pin!(copying_out);
    let mut copied = false;
    let exit = loop {
        tokio::select! {
            exit = &mut started.exit => break exit,
            _ = &mut copying_out, if !copied => copied = true,
            () = streams.gone.cancelled() => {
                started.kill().await;
                return Ok(Ending::Detached);
            }
        }
    };
    let exit = exit.map_err(|_| Error::new(Kind::Unavailable, "the pod ended while the command ran"))?;
    ended.cancel();
    if !copied {
        tokio::select! {
            _ = &mut copying_out => {}
            () = streams.gone.cancelled() => {}
        }
    }
    Ok(Ending::Exited(exit.code))
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A client attached to a container, from its coming to its going or the output's end.
async fn attach(node: &Node, container: &Container, mut streams: Streams) -> Result<Ending> {
    if !container.is_running() {
        return Err(Error::precondition(format!("container {} is not running", container.id)));
    }
    let monitor = node.pod(&container.pod_id)?.monitor()?;
    let attach_id = new_id()?[..16].to_owned();
    let (stdout, stderr) = (streams.stdout.is_some(), streams.stderr.is_some());
    let request = AttachRequest {
        container_id: container.id.clone(),
        attach_id: attach_id.clone(),
        stdin: streams.stdin.is_some(),
        stdout,
        stderr,
    };
    let (reply, descriptors) =
        monitor.call(Body::Attach(request)).await.map_err(|error| error.during(format_args!("attach to {}", container.id)))?;
    let Body::AttachReply(reply) = reply else { return Err(Error::internal("the monitor answered another request")) };
    let served = serve_attached(container, &monitor, &mut streams, reply, descriptors.into_iter()).await;
    let detach = DetachRequest { container_id: container.id.clone(), attach_id };
    match monitor.call(Body::Detach(detach)).await {
        Ok((Body::DetachReply(reply), _)) if reply.overrun && !streams.gone.is_cancelled() => {
            let why = "the client did not read fast enough and was disconnected; the container's log has everything";
            Err(Error::new(Kind::Exhausted, why))
        }
        _ => served.map(|()| Ending::Detached),
    }
}

async fn serve_attached(
    container: &Container,
    monitor: &Arc<Monitor>,
    streams: &mut Streams,
    reply: windlass_proto::monitor::AttachReply,
    mut descriptors: impl Iterator<Item = OwnedFd>,
) -> Result<()> {
    let (mut input, mut sizing) = (None, None);
    if reply.stdin {
        let descriptor = descriptors.next().ok_or_else(|| Error::internal("the monitor gave no input"))?;
        if reply.terminal {
            input = Some(sink(copy_of(&descriptor)?)?);
            sizing = Some(AbortOnDrop(tokio::spawn(follow_size(descriptor, streams.resize.take()))));
        } else {
            input = Some(sink(descriptor)?);
        }
    }
    let out = streams.stdout.is_some().then(|| descriptors.next()).flatten().map(source).transpose()?;
    let err = streams.stderr.is_some().then(|| descriptors.next()).flatten().map(source).transpose()?;
    let has_output = out.is_some() || err.is_some();
    let client_input = streams.stdin.take();
    let has_input = reply.stdin && client_input.is_some();
    let once = reply.stdin_once && client_input.is_some() && !reply.terminal;
    let ended = container.input_ended.clone();
    let mut copying_in = AbortOnDrop(tokio::spawn(async move {
        tokio::select! {
            by_client = copy_in(client_input, input) => by_client,
            // Another client had the last word; its end is the program's when nobody holds the pipe any more.
            () = ended.cancelled() => false,
        }
    }));
    // Output has no end of the process's here: the monitor ends it when everything has been given.
    let never = CancellationToken::new();
    let copying_out = async {
        tokio::join!(copy_out(out, streams.stdout.take(), never.clone()), copy_out(err, streams.stderr.take(), never.clone()))
    };
    tokio::pin!(copying_out);
    let mut reads = has_input;
    loop {
        tokio::select! {
            _ = &mut copying_out, if has_output => break,
            () = container.wait_exited(), if !has_output => break,
            by_client = &mut copying_in.0, if reads => {
                reads = false;
                if once {
                    end_input(container, monitor).await;
                }
                // A client that ends its input has seen enough, but for one that ends the program's.
                if matches!(by_client, Ok(true)) && !(once && has_output) {
                    break;
                }
            }
            () = streams.gone.cancelled() => {
                if reads {
                    let _ = timeout(LAST_INPUT_LIMIT, &mut copying_in.0).await;
                }
                if once {
                    end_input(container, monitor).await;
                }
                break;
            }
        }
    }
    drop(sizing);
    Ok(())
}

/// The input of a program that reads one client's is at its end, whoever else is attached.
async fn end_input(container: &Container, monitor: &Monitor) {
    container.input_ended.cancel();
    close_stdin(monitor, &container.id).await;
}

async fn close_stdin(monitor: &Monitor, container_id: &str) {
    if let Err(error) = monitor.call(Body::CloseStdin(CloseStdinRequest { container_id: container_id.to_owned() })).await {
        tracing::debug!(container = %container_id, %error, "input not closed");
    }
}

/// Connects to the pod's loopback, by IPv4 and then by IPv6, with sockets that the monitor made in the pod's network.
async fn connect(monitor: &Monitor, port: u16) -> Result<TcpStream> {
    let (_, sockets) = monitor.call(Body::Sockets(SocketsRequest {})).await?;
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let mut failure = None;
    for (socket, address) in sockets.into_iter().zip(loopback) {
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(socket));
        let connected = timeout(CONNECT_LIMIT, socket.connect((address, port).into())).await;
        match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = failure.or(Some(Error::io(format_args!("connect to {address} port {port}"), error))),
        }
    }
    Err(failure.unwrap_or_else(|| Error::internal("the monitor gave no sockets")))
}
