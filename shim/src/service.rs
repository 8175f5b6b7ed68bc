//! The service manager's side of the daemon: the socket that it passes, readiness, and the watchdog. Started by hand, the daemon makes its
//! own socket and tells nobody.

use crate::error::{Error, Result};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};
use sd_notify::NotifyState;
use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{net::UnixListener, task::JoinHandle, time};
use tonic::transport::Endpoint;
use windlass_proto::cri::{VersionRequest, runtime_service_client::RuntimeServiceClient};

/// How often, and how far apart, a socket must be found taken.
const SERVED_LOOKS: u32 = 10;
const SERVED_PAUSE: Duration = Duration::from_millis(50);

/// Where clients find the CRI. A socket that the daemon made itself goes when this is dropped; one that was passed stays, because its
/// maker goes on listening.
pub struct Socket {
    path: PathBuf,
    passed: bool,
}

impl Socket {
    /// The socket that the service manager passes (sd_listen_fds(3)), else a new one at `path`, mode 0660 and root's.
    pub fn listen(path: &Path) -> Result<(Socket, UnixListener)> {
        let failed = |error: io::Error| Error::io(format_args!("listen on {}", path.display()), error);
        if let Ok(Some(listener)) = listenfd::ListenFd::from_env().take_unix_listener(0) {
            listener.set_nonblocking(true).map_err(failed)?;
            let address = listener.local_addr().map_err(failed)?;
            let path = address.as_pathname().unwrap_or(path).to_owned();
            return Ok((Socket { path, passed: true }, UnixListener::from_std(listener).map_err(failed)?));
        }
        Ok((Socket { path: path.to_owned(), passed: false }, bind(path).map_err(failed)?))
    }
}

/// Fails where another process serves at this socket, whose clients would be taken away by a new one. One that the service manager passes
/// is nobody else's.
pub fn is_free(path: &Path) -> Result<()> {
    if std::env::var_os("LISTEN_FDS").is_some() || !served(path) {
        return Ok(());
    }
    Err(Error::precondition(format!(
        "{} is served by another process: stop that one, or give this daemon another socket by --socket (and another --root)",
        path.display()
    )))
}

/// Whether somebody listens at this socket, and goes on to: a child of a killed daemon has its socket until it executes its program.
fn served(path: &Path) -> bool {
    let Ok(address) = SocketAddrUnix::new(path) else { return false };
    let taken = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        // EAGAIN: its queue is full.
        matches!(socket.and_then(|socket| connect(&socket, &address)), Ok(()) | Err(Errno::AGAIN))
    };
    for _ in 0..SERVED_LOOKS {
        if !taken() {
            return false;
        }
        std::thread::sleep(SERVED_PAUSE);
    }
    true
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.passed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A new socket at `path` in place of what is there, mode 0660 and root's.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Bound under another name and moved when its mode is right: nobody can connect in between.
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o660))?;
    fs::rename(&temporary, path)?;
    Ok(listener)
}

/// Signs of life for the service manager. Dropped, it says that the daemon is about to end.
pub struct Watchdog(Option<JoinHandle<()>>);

/// Says that the daemon serves at `socket`, and starts the watchdog if the service manager wants one (sd_watchdog_enabled(3)).
///
/// A sign of life is sent only after the daemon has answered a call at its own socket, as kubelet would make it: one that accepts no
/// connection, or whose threads are all stuck, is restarted. Three times within the limit, so that a slow answer costs nothing.
pub fn ready(socket: &Socket) -> Watchdog {
    tell(NotifyState::Ready);
    let limit = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
    Watchdog(limit.map(|limit| tokio::spawn(watch(socket.path.clone(), limit / 3))))
}

async fn watch(socket: PathBuf, period: Duration) {
    loop {
        match time::timeout(period, ask(&socket)).await {
            Ok(Ok(())) => tell(NotifyState::Watchdog),
            Ok(Err(error)) => tracing::warn!(socket = %socket.display(), %error, "the daemon does not answer itself"),
            Err(_) => tracing::warn!(socket = %socket.display(), "the daemon does not answer itself within {period:?}"),
        }
        time::sleep(period).await;
    }
}

/// One call on a connection of its own.
async fn ask(socket: &Path) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let channel = Endpoint::try_from(format!("unix:{}", socket.display()))?.connect().await?;
    RuntimeServiceClient::new(channel).version(VersionRequest::default()).await?;
    Ok(())
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.abort();
        }
        tell(NotifyState::Stopping);
    }
}

fn tell(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "the service manager was not told");
    }
}
