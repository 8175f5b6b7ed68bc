//! A connection with a plugin: calls in both directions (ttrpc, PROTOCOL.md of github.com/containerd/ttrpc; unary calls alone).
//! The crate for it wants a socket for each direction and generated services; what is needed of it are these lines.
//!
//! One task reads, one writes. Whatever is wrong with what comes ends the connection, and with it every call that waits.

use super::mux;
use prost::Message;
use std::{
    collections::HashMap,
    fmt, io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    task::coop::consume_budget,
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use windlass_proto::ttrpc::{Request, Response, Status};

pub(super) const HEADER_BYTES: usize = 10;
/// Largest message, by the protocol.
pub(super) const MESSAGE_MAX_BYTES: usize = 4 << 20;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// Messages that wait to be written to one plugin.
const WRITE_QUEUE: usize = 16;
/// Requests of one plugin that wait to be dealt with.
const REQUEST_QUEUE: usize = 16;

// Codes of gRPC.
pub(super) const INVALID_ARGUMENT: i32 = 3;
pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
pub(super) const UNIMPLEMENTED: i32 = 12;

const POISON: &str = "never poisoned: no panic while held";

type Pending = Arc<Mutex<HashMap<u32, oneshot::Sender<Response>>>>;

/// Why a call has no reply.
#[derive(Debug)]
pub(super) enum CallError {
    /// The connection is gone.
    Closed,
    /// Not within this time.
    Timeout(Duration),
    /// It owes the answer to an earlier call that was given up. Nothing was sent.
    Late,
    /// Others have called it for all of this time. Nothing was sent.
    Busy(Duration),
    /// The reply is no such message.
    Protocol(String),
    /// The request has so many bytes, which are more than the protocol takes. Nothing was sent.
    TooLarge(usize),
    /// The plugin says no.
    Refused(Status),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Closed => f.write_str("the connection is gone"),
            CallError::Timeout(limit) => write!(f, "no answer in {limit:?}"),
            CallError::Late => f.write_str("it has not answered what it was asked before"),
            CallError::Busy(limit) => write!(f, "its turn for this did not come in {limit:?}"),
            CallError::Protocol(why) => write!(f, "an answer that is none: {why}"),
            CallError::TooLarge(bytes) => write!(f, "a request of {bytes} bytes, the limit is {MESSAGE_MAX_BYTES}"),
            CallError::Refused(status) => f.write_str(&status.message),
        }
    }
}

/// A request of the plugin.
#[derive(Debug)]
pub(super) struct Incoming {
    stream: u32,
    pub(super) request: Request,
}

/// The connection. Dropping it ends it.
pub(super) struct Connection {
    queue: mpsc::Sender<Vec<u8>>,
    pending: Pending,
    next: AtomicU32,
    /// The answer that a call was given up for, until it comes.
    late: Mutex<Option<oneshot::Receiver<Response>>>,
    closed: CancellationToken,
}

impl Connection {
    /// Takes over a socket; also the plugin's requests.
    pub(super) fn over(socket: UnixStream) -> (Connection, mpsc::Receiver<Incoming>) {
        let (from, to) = socket.into_split();
        let (queue, messages) = mpsc::channel(WRITE_QUEUE);
        let (incoming, requests) = mpsc::channel(REQUEST_QUEUE);
        let (pending, closed) = (Pending::default(), CancellationToken::new());
        tokio::spawn(until(closed.clone(), write(to, messages)));
        let reading = read(from, pending.clone(), incoming, queue.clone());
        let (end, waiting) = (closed.clone(), pending.clone());
        tokio::spawn(async move {
            until(end, reading).await;
            waiting.lock().expect(POISON).clear();
        });
        (Connection { queue, pending, next: AtomicU32::new(1), late: Mutex::default(), closed }, requests)
    }

    /// Calls a method and waits for its reply, at most `limit`, which the plugin is told. Nobody waits for a peer that owes an answer.
    pub(super) async fn call<R: Message + Default>(
        &self,
        (service, method): (&str, &str),
        request: &impl Message,
        limit: Duration,
    ) -> Result<R, CallError> {
        let deadline = Instant::now() + limit;
        let request = Request {
            service: service.into(),
            method: method.into(),
            payload: request.encode_to_vec(),
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
            metadata: Vec::new(),
        };
        // Those of a caller are odd.
        let id = self.next.fetch_add(2, Ordering::Relaxed);
        let message = message(id, REQUEST, &request).map_err(CallError::TooLarge)?;
        let (sender, mut receiver) = oneshot::channel();
        self.pending.lock().expect(POISON).insert(id, sender);
        let mut forget = Forget { pending: &self.pending, id, keep: false };
        if self.closed.is_cancelled() {
            return Err(CallError::Closed);
        }
        if self.owes() {
            return Err(CallError::Late);
        }
        let sending = self.queue.send(mux::frames(mux::PLUGIN, &message));
        let sent = tokio::time::timeout_at(deadline, sending).await.map_err(|_| CallError::Timeout(limit))?;
        sent.map_err(|_| CallError::Closed)?;
        let Ok(reply) = tokio::time::timeout_at(deadline, &mut receiver).await else {
            forget.keep = true;
            *self.late.lock().expect(POISON) = Some(receiver);
            return Err(CallError::Timeout(limit));
        };
        let reply = reply.map_err(|_| CallError::Closed)?;
        match reply.status {
            Some(status) if status.code != 0 => Err(CallError::Refused(status)),
            _ => R::decode(reply.payload.as_slice()).map_err(|error| CallError::Protocol(error.to_string())),
        }
    }

    /// Whether the answer that a call was given up for is still to come.
    fn owes(&self) -> bool {
        let mut late = self.late.lock().expect(POISON);
        let owes = late.as_mut().is_some_and(|answer| matches!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
        if !owes {
            *late = None;
        }
        owes
    }

    /// Answers a request of the plugin.
    pub(super) async fn answer(&self, to: &Incoming, outcome: Result<Vec<u8>, Status>) {
        let response = match outcome {
            Ok(payload) => Response { status: None, payload },
            Err(status) => Response { status: Some(status), payload: Vec::new() },
        };
        if let Ok(message) = message(to.stream, RESPONSE, &response) {
            let _ = self.queue.send(mux::frames(mux::RUNTIME, &message)).await;
        }
    }

    /// Ends it: whoever waits is told.
    pub(super) fn close(&self) {
        self.closed.cancel();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

/// Takes a call from the list that nobody waits for any more, unless its answer is to be noticed.
struct Forget<'a> {
    pending: &'a Pending,
    id: u32,
    keep: bool,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if !self.keep {
            self.pending.lock().expect(POISON).remove(&self.id);
        }
    }
}

/// Does work until it ends, or the connection does.
async fn until(closed: CancellationToken, work: impl Future<Output = io::Result<()>>) {
    let outcome = closed.run_until_cancelled(work).await;
    if let Some(Err(error)) = outcome {
        tracing::debug!(%error, "connection with a plugin");
    }
    closed.cancel();
}

/// A whole message, or how long it would have been.
fn message(stream: u32, kind: u8, body: &impl Message) -> Result<Vec<u8>, usize> {
    let length = body.encoded_len();
    let Some(stated) = u32::try_from(length).ok().filter(|_| length <= MESSAGE_MAX_BYTES) else { return Err(length) };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + length);
    bytes.extend_from_slice(&stated.to_be_bytes());
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(&[kind, 0]);
    bytes.extend_from_slice(&body.encode_to_vec());
    Ok(bytes)
}

async fn write(mut to: OwnedWriteHalf, mut messages: mpsc::Receiver<Vec<u8>>) -> io::Result<()> {
    while let Some(message) = messages.recv().await {
        to.write_all(&message).await?;
    }
    Ok(())
}

async fn read(
    from: OwnedReadHalf,
    pending: Pending,
    incoming: mpsc::Sender<Incoming>,
    queue: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let mut from = BufReader::new(from);
    let (mut replies, mut requests) = (Assembly::default(), Assembly::default());
    while let Some((stream, payload)) = mux::read(&mut from).await? {
        match stream {
            mux::PLUGIN => {
                replies.add(&payload);
                while let Some((id, kind, body)) = replies.next()? {
                    let waiting = pending.lock().expect(POISON).remove(&id);
                    if let (RESPONSE, Some(waiting)) = (kind, waiting) {
                        let _ = waiting.send(Response::decode(body.as_slice())?);
                    }
                    // A frame may be made of nothing but empty messages.
                    consume_budget().await;
                }
            }
            mux::RUNTIME => {
                requests.add(&payload);
                while let Some((id, kind, body)) = requests.next()? {
                    if kind != REQUEST {
                        return Err(io::Error::other(format!("a message of type {kind} where requests are")));
                    }
                    let one = Incoming { stream: id, request: Request::decode(body.as_slice())? };
                    if incoming.try_send(one).is_err() {
                        let status =
                            Status { code: RESOURCE_EXHAUSTED, message: format!("{REQUEST_QUEUE} requests wait already") };
                        let response = Response { status: Some(status), payload: Vec::new() };
                        let refusal = message(id, RESPONSE, &response).unwrap_or_default();
                        // Never waited for: a plugin that reads none of its answers cannot stop its own input.
                        let _ = queue.try_send(mux::frames(mux::RUNTIME, &refusal));
                    }
                    consume_budget().await;
                }
            }
            // Reserved.
            _ => {}
        }
    }
    Ok(())
}

/// What has come of a stream and is no whole message yet.
#[derive(Default)]
struct Assembly {
    bytes: Vec<u8>,
    /// Where the next message begins.
    at: usize,
}

impl Assembly {
    fn add(&mut self, payload: &[u8]) {
        self.bytes.drain(..self.at);
        self.at = 0;
        self.bytes.extend_from_slice(payload);
    }

    /// The next whole message: its stream, type and body.
    fn next(&mut self) -> io::Result<Option<(u32, u8, Vec<u8>)>> {
        let Some((&[l0, l1, l2, l3, s0, s1, s2, s3, kind, _], rest)) = self.bytes[self.at..].split_first_chunk::<HEADER_BYTES>()
        else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        if length > MESSAGE_MAX_BYTES {
            return Err(io::Error::other(format!("a message of {length} bytes, the limit is {MESSAGE_MAX_BYTES}")));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let body = rest[..length].to_vec();
        self.at += HEADER_BYTES + length;
        Ok(Some((u32::from_be_bytes([s0, s1, s2, s3]), kind, body)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    impl Assembly {
        fn of(bytes: Vec<u8>) -> Assembly {
            Assembly { bytes, at: 0 }
        }
    }

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let one = message(3, REQUEST, &Request { method: "x".into(), ..Default::default() }).expect("short");
        let two = message(5, RESPONSE, &Response { payload: vec![1; 300], status: None }).expect("short");
        let all = [one.clone(), two].concat();
        for step in [1, 7, 11, all.len()] {
            let mut assembly = Assembly::default();
            let mut found = Vec::new();
            for part in all.chunks(step) {
                assembly.add(part);
                while let Some((stream, kind, _)) = assembly.next().expect("messages") {
                    found.push((stream, kind));
                }
            }
            assert_eq!(found, [(3, REQUEST), (5, RESPONSE)]);
            assembly.add(&[]);
            assert!(assembly.bytes.is_empty());
        }
        let mut long = Assembly::of(one);
        long.bytes[0] = 1;
        assert!(long.next().expect_err("too long").to_string().contains("the limit is"));
        message(1, REQUEST, &Request { payload: vec![0; MESSAGE_MAX_BYTES], ..Default::default() }).expect_err("too long");
    }

    #[tokio::test]
    async fn a_peer_that_is_silent_or_talks_nonsense_ends_every_call() {
        let limit = Duration::from_millis(50);
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let (connection, _requests) = Connection::over(ours);
        let call = connection.call::<Response>(("s", "m"), &Request::default(), limit).await;
        assert!(matches!(call, Err(CallError::Timeout(_))), "{call:?}");
        let call = connection.call::<Response>(("s", "m"), &Request::default(), limit).await;
        assert!(matches!(call, Err(CallError::Late)), "{call:?}");
        assert_eq!(
            connection.pending.lock().expect(POISON).len(),
            1,
            "of a call that is over its answer is all that is waited for"
        );
        *connection.late.lock().expect(POISON) = None;
        let (mut from, mut to) = theirs.into_split();
        let request = Request::default();
        let waiting = connection.call::<Response>(("s", "m"), &request, Duration::from_secs(10));
        let nonsense = async {
            let _ = from.read(&mut [0; 64]).await;
            to.write_all(&[0xff; 64]).await.expect("write");
        };
        let (call, ()) = tokio::join!(waiting, nonsense);
        assert!(matches!(call, Err(CallError::Closed)), "{call:?}");
        let call = connection.call::<Response>(("s", "m"), &Request::default(), limit).await;
        assert!(matches!(call, Err(CallError::Closed)), "{call:?}");
    }

    #[tokio::test]
    async fn a_late_answer_ends_the_silence() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let (connection, _requests) = Connection::over(ours);
        let ask = async |limit| connection.call::<Response>(("s", "m"), &Request::default(), limit).await;
        let call = ask(Duration::from_millis(50)).await;
        assert!(matches!(call, Err(CallError::Timeout(_))), "{call:?}");
        let (_, payload) = mux::read(&mut theirs).await.expect("a frame").expect("no end");
        let (id, _, _) = Assembly::of(payload).next().expect("a message").expect("whole");
        let answer = |id| mux::frames(mux::PLUGIN, &message(id, RESPONSE, &Response::default()).expect("short"));
        theirs.write_all(&answer(id)).await.expect("write");
        while connection.owes() {
            tokio::task::yield_now().await;
        }
        assert!(connection.pending.lock().expect(POISON).is_empty());
        let answers = async {
            mux::read(&mut theirs).await.expect("a frame").expect("no end");
            theirs.write_all(&answer(id + 2)).await.expect("write");
        };
        let (call, ()) = tokio::join!(ask(Duration::from_secs(10)), answers);
        call.expect("an answer");
    }

    #[tokio::test]
    async fn more_requests_than_wait_are_refused() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let (_connection, _requests) = Connection::over(ours);
        for id in 0..=REQUEST_QUEUE as u32 {
            let request = message(id * 2 + 1, REQUEST, &Request::default()).expect("short");
            theirs.write_all(&mux::frames(mux::RUNTIME, &request)).await.expect("write");
        }
        let (stream, payload) = mux::read(&mut theirs).await.expect("a frame").expect("no end");
        let (id, kind, body) = Assembly::of(payload).next().expect("a message").expect("whole");
        assert_eq!((stream, id, kind), (mux::RUNTIME, REQUEST_QUEUE as u32 * 2 + 1, RESPONSE));
        let status = Response::decode(body.as_slice()).expect("a response").status.expect("a refusal");
        assert_eq!(status.code, RESOURCE_EXHAUSTED);
    }
}
