//! What a stream is for, between the wire and the pod. Knows neither.

use crate::error::{Error, Result};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

/// The client's half that is read.
pub type Input = Box<dyn AsyncRead + Send + Unpin>;
/// The client's half that is written.
pub type Output = Box<dyn AsyncWrite + Send + Unpin>;

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

/// The client's side of an exec or attach. The end of a reader is the client's half-close; shutting a writer down half-closes that stream.
pub struct Streams {
    pub stdin: Option<Input>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    pub resize: Option<mpsc::Receiver<TerminalSize>>,
    /// Cancelled when the client's connection has ended.
    pub gone: CancellationToken,
}

/// How an exec or attach came to its end.
#[derive(Debug)]
pub enum Ending {
    /// The process ended with this code.
    Exited(i32),
    /// The client left, or there was nothing more to show.
    Detached,
    Failed(Error),
}

/// Which streams a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// What a URL stands for.
#[derive(Debug, Clone)]
pub enum Target {
    Exec { container_id: String, command: Vec<String>, wanted: Wanted },
    Attach { container_id: String, wanted: Wanted },
    PortForward { pod_id: String, ports: Vec<u16> },
}

impl Target {
    /// The first part of the URL's path.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Target::Exec { .. } => "exec",
            Target::Attach { .. } => "attach",
            Target::PortForward { .. } => "portforward",
        }
    }
}

/// Who serves the streams.
#[tonic::async_trait]
pub trait Handler: Send + Sync + 'static {
    async fn exec(&self, container_id: &str, command: Vec<String>, tty: bool, streams: Streams) -> Ending;
    async fn attach(&self, container_id: &str, tty: bool, streams: Streams) -> Ending;
    /// Connects to a port on the pod's loopback.
    async fn dial(&self, pod_id: &str, port: u16) -> Result<TcpStream>;
}
