//! The connection under the streams: its two halves, and what is known of the client beside its bytes. While a stream's reader holds back the
//! connection nothing is read from it, and the client's end comes behind what it has sent: it is in the socket, or not even that, because the
//! kernel keeps it with bytes that there is no room for. So it is looked for here, the latter in the kernel's table of connections. That
//! shows clients of this machine, as kubelet is one; one elsewhere that ends so is missed.

use super::session::{Input, Output};
use bytes::BytesMut;
use rustix::fd::OwnedFd;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, Interest},
    net::TcpStream,
    sync::mpsc::{self, Permit, error::TrySendError},
    time::{Instant, timeout},
};

/// A connection on which nothing goes either way for so long is ended.
const IDLE_LIMIT: Duration = Duration::from_secs(4 * 3600);
/// A reader may hold back its connection for so long before the client is watched.
const UNWATCHED: Duration = Duration::from_secs(1);
/// How often the table of connections is read then.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// States in that table in which the other end has not closed (tcp_states.h): established, and closed by us alone.
const OPEN_STATES: [&str; 2] = ["01", "08"];

/// An upgraded connection, of which the first bytes were read already.
pub(super) struct Wire {
    pub(super) first: Vec<u8>,
    pub(super) input: Input,
    pub(super) output: Output,
    pub(super) peer: Peer,
}

/// The other end of a connection.
#[derive(Clone)]
pub(super) struct Peer {
    /// Where there is one, a descriptor of the socket of its own, and the client's address and ours.
    socket: Option<Arc<(OwnedFd, [SocketAddr; 2])>>,
    begun: Instant,
    /// When something moved last, since then.
    moved_ms: Arc<AtomicU64>,
}

impl Peer {
    /// The client at the end of this socket.
    pub(super) fn of(socket: &TcpStream) -> io::Result<Peer> {
        let ends = [socket.peer_addr()?, socket.local_addr()?];
        Ok(Peer { socket: Some(Arc::new((socket.as_fd().try_clone_to_owned()?, ends))), ..Peer::unseen() })
    }

    /// One that cannot be watched.
    pub(super) fn unseen() -> Peer {
        Peer { socket: None, begun: Instant::now(), moved_ms: Arc::default() }
    }

    /// Bytes have gone to it or have come.
    pub(super) fn moved(&self) {
        self.moved_ms.store(u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    fn idle(&self) -> Duration {
        self.begun.elapsed().saturating_sub(Duration::from_millis(self.moved_ms.load(Relaxed)))
    }

    /// Reads what comes next, unless nothing moves for too long.
    pub(super) async fn read(&self, input: &mut (impl AsyncRead + Unpin), into: &mut BytesMut) -> io::Result<usize> {
        loop {
            let left = IDLE_LIMIT.saturating_sub(self.idle());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            // Output that went meanwhile counts as well.
            if let Ok(read) = timeout(left, input.read_buf(into)).await {
                self.moved();
                return read;
            }
        }
    }

    /// Hands something over as soon as there is room. False if nobody takes it; an error if the client goes away before.
    pub(super) async fn give<T>(&self, queue: &mpsc::Sender<T>, what: T) -> io::Result<bool> {
        let what = match queue.try_send(what) {
            Ok(()) => return Ok(true),
            Err(TrySendError::Closed(_)) => return Ok(false),
            Err(TrySendError::Full(what)) => what,
        };
        let room: Result<Permit<'_, T>, _> = match timeout(UNWATCHED, queue.reserve()).await {
            Ok(room) => room,
            Err(_) => tokio::select! {
                room = queue.reserve() => room,
                gone = self.gone() => return Err(gone),
            },
        };
        Ok(room.map(|permit| permit.send(what)).is_ok())
    }

    /// Waits until the client has closed its end, whatever it sent before.
    async fn gone(&self) -> io::Error {
        match self.watch().await {
            Ok(()) => io::ErrorKind::ConnectionAborted.into(),
            Err(error) => error,
        }
    }

    async fn watch(&self) -> io::Result<()> {
        let Some((socket, ends)) = self.socket.as_deref() else { return std::future::pending().await };
        // One more descriptor, because each is watched once at a time, and one connection may be held back in two places.
        let watched = TcpStream::from_std(std::net::TcpStream::from(socket.try_clone()?))?;
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        loop {
            tokio::select! {
                ready = watched.ready(Interest::READABLE) => {
                    if ready?.is_read_closed() {
                        return Ok(());
                    }
                    // Nothing is read here: the next change is waited for.
                    let _ = watched.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
                }
                _ = looks.tick() => {
                    if has_closed(ends).await {
                        return Ok(());
                    }
                }
            }
        }
    }
}

/// An address as the kernel's tables have it: 32-bit words of this machine's order, in hex.
fn in_table(address: SocketAddr) -> String {
    let octets = match address.ip().to_canonical() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let words =
        octets.chunks_exact(4).filter_map(|word| word.try_into().ok()).map(|word| format!("{:08X}", u32::from_ne_bytes(word)));
    format!("{}:{:04X}", words.collect::<String>(), address.port())
}

/// Whether the connection's other end is on this machine and has been closed.
async fn has_closed(ends: &[SocketAddr; 2]) -> bool {
    let table = if ends[0].ip().to_canonical().is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
    let Ok(lines) = tokio::fs::read_to_string(table).await else { return false };
    let [local, remote] = ends.map(in_table);
    lines.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some(&local)
            && words.next() == Some(&remote)
            && words.next().is_some_and(|state| !OPEN_STATES.contains(&state))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{io::AsyncWriteExt, net::TcpListener};

    #[tokio::test]
    async fn a_client_that_goes_is_missed_behind_what_it_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listens");
        let mut client = TcpStream::connect(listener.local_addr().expect("an address")).await.expect("connected");
        let (server, _) = listener.accept().await.expect("accepted");
        let peer = Peer::of(&server).expect("a peer");
        let (queue, mut taken) = mpsc::channel(1);
        assert!(peer.give(&queue, 1).await.expect("there"));
        client.write_all(b"more").await.expect("written");
        // Both hold the connection back until the client has gone.
        let (first, second) = (peer.clone(), peer.clone());
        let gone = async {
            tokio::time::sleep(UNWATCHED + Duration::from_millis(100)).await;
            client.write_all(b"more").await.expect("written");
            drop(client);
        };
        let (first, second, ()) = tokio::join!(first.give(&queue, 2), second.give(&queue, 3), gone);
        assert!(first.is_err() && second.is_err());
        assert_eq!(taken.recv().await, Some(1));
        drop(taken);
        assert!(!peer.give(&queue, 4).await.expect("nobody takes it"));
    }

    #[tokio::test]
    async fn a_client_that_goes_is_missed_though_its_end_does_not_arrive() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).await.expect("listens");
            let client = TcpStream::connect(listener.local_addr().expect("an address")).await.expect("connected");
            let (server, _) = listener.accept().await.expect("accepted");
            let peer = Peer::of(&server).expect("a peer");
            // More than both sockets hold.
            let bytes = vec![0; 1 << 20];
            while timeout(Duration::from_millis(100), client.writable()).await.is_ok() {
                let _ = client.try_write(&bytes);
            }
            assert!(timeout(Duration::from_millis(100), peer.gone()).await.is_err(), "it is there");
            drop(client);
            timeout(LOOK_INTERVAL * 3, peer.gone()).await.expect("missed");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_connection_on_which_nothing_moves_is_idle() {
        let peer = Peer::unseen();
        let (_silent, mut input) = tokio::io::duplex(16);
        let mut into = BytesMut::new();
        let writing = async {
            for _ in 0..3 {
                tokio::time::sleep(IDLE_LIMIT / 2).await;
                peer.moved();
            }
        };
        let begun = Instant::now();
        let (read, ()) = tokio::join!(peer.read(&mut input, &mut into), writing);
        assert_eq!(read.expect_err("idle").kind(), io::ErrorKind::TimedOut);
        assert!((IDLE_LIMIT * 5 / 2..IDLE_LIMIT * 3).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }
}
