//! What the fuzzer of clients and the replay of its corpus call: the bytes of one client after its upgrade, through framing, roles and pairs, to a
//! handler that echoes. In memory, but for the listener that port-forwards lead to.

use super::*;
use std::{
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

/// Longest time that a client which has ended may be served.
const END_LIMIT: Duration = Duration::from_secs(20);
/// Most of the answer that is looked at; the rest is read and thrown away.
const ANSWER_BYTES: u64 = 1 << 20;

/// Kinds of connection, by the first byte of the fuzzer's input.
const PROTOCOLS: [(&str, Kinds); 7] = [
    ("v4.channel.k8s.io", Kinds::Exec),
    ("", Kinds::Exec),
    ("portforward.k8s.io", Kinds::Forward),
    ("v5.channel.k8s.io", Kinds::WebSocketExec),
    ("v4.base64.channel.k8s.io", Kinds::WebSocketExec),
    ("v4.channel.k8s.io", Kinds::WebSocketForward),
    (port_forward::TUNNEL_PROTOCOL, Kinds::Tunnel),
];

#[derive(Clone, Copy)]
enum Kinds {
    Exec,
    Forward,
    WebSocketExec,
    WebSocketForward,
    Tunnel,
}

/// How often a client that has said all lets the server's tasks run before it ends. Everything is in memory, so turns are enough.
const WAIT_TURNS: usize = 200;

/// Ends after so many turns of the other tasks.
struct Waiting(usize);

impl AsyncRead for Waiting {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Some(left) = self.0.checked_sub(1) else { return Poll::Ready(Ok(())) };
        self.0 = left;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

struct Echo;

#[tonic::async_trait]
impl Handler for Echo {
    async fn exec(&self, _: &str, _: Vec<String>, _: bool, mut streams: Streams) -> Ending {
        while let Some(sizes) = &mut streams.resize
            && sizes.recv().await.is_some()
        {}
        if let (Some(mut stdin), Some(mut stdout)) = (streams.stdin.take(), streams.stdout.take()) {
            let _ = tokio::io::copy(&mut stdin, &mut stdout).await;
        }
        Ending::Exited(0)
    }

    async fn attach(&self, _: &str, _: bool, _: Streams) -> Ending {
        Ending::Detached
    }

    async fn dial(&self, _: &str, port: u16) -> Result<TcpStream> {
        Err(Error::not_found(format!("nothing listens on port {port}")))
    }
}

/// Serves a client that says these bytes, the first of which chooses the protocol, and then ends. What it is answered.
///
/// # Panics
/// If the server is not done with it in time: a bug.
pub fn fuzz_client(bytes: &[u8]) -> Vec<u8> {
    let Some((choice, said)) = bytes.split_first() else { return Vec::new() };
    let (protocol, kind) = PROTOCOLS[usize::from(*choice) % PROTOCOLS.len()];
    let said = said.to_vec();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let served = runtime.block_on(async move {
        let (output, mut answer) = tokio::io::duplex(64 << 10);
        let answered = tokio::spawn(async move {
            let mut start = Vec::new();
            let _ = (&mut answer).take(ANSWER_BYTES).read_to_end(&mut start).await;
            let _ = tokio::io::copy(&mut answer, &mut tokio::io::sink()).await;
            start
        });
        let all = async {
            serve(protocol, kind, said, Box::new(output)).await;
            answered.await.unwrap_or_default()
        };
        timeout(END_LIMIT, all).await
    });
    served.expect("a client that has ended is still served")
}

async fn serve(protocol: &'static str, kind: Kinds, said: Vec<u8>, output: Output) {
    let handler: Arc<dyn Handler> = Arc::new(Echo);
    let wanted = Wanted { stdin: true, stdout: true, stderr: true, tty: false };
    let target = Target::Exec { container_id: "c".into(), command: vec!["cat".into()], wanted };
    let pod = "p".to_owned();
    // Half of it is there with the request's head, as a client that does not wait might have it.
    let later = std::io::Cursor::new(said[said.len() / 2..].to_vec()).chain(Waiting(WAIT_TURNS));
    let first = said[..said.len() / 2].to_vec();
    let wire = Wire { first, input: Box::new(later), output, peer: Peer::unseen() };
    match kind {
        Kinds::Exec => remote_command::over_spdy(handler, target, protocol, spdy::Connection::start(wire)).await,
        Kinds::Forward => port_forward::over_spdy(handler, pod, spdy::Connection::start(wire)).await,
        Kinds::WebSocketExec => remote_command::over_websocket(handler, target, protocol, wire).await,
        Kinds::WebSocketForward => port_forward::over_websocket(handler, pod, vec![80, 81], protocol, wire).await,
        Kinds::Tunnel => port_forward::over_spdy(handler, pod, spdy::Connection::start(websocket::tunnel(wire))).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CORPUS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/client");

    /// The well-formed ones of the corpus are answered as they should be; their header blocks were made by zlib itself.
    #[test]
    fn the_corpus_is_answered() {
        let mut count = 0;
        for entry in std::fs::read_dir(CORPUS).expect("the corpus") {
            let path = entry.expect("an entry").path();
            let answer = fuzz_client(&std::fs::read(&path).expect("a file"));
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let expected: &[&[u8]] = match name.as_str() {
                "exec" => &[b"hello, ", b"stdin", br#""status":"Success""#, &[0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 9]],
                "exec-v1" => &[b"hello, ", b"stdin"],
                "forward" | "forward-without-ids" | "tunnel" => &[b"port 8080 of pod p: nothing listens"],
                "websocket" => &[b"\x01hello, stdin", br#""status":"Success""#, b"\x8a\x04ping"],
                "websocket-base64" => &[b"1aGVsbG8sIHN0ZGlu"],
                "websocket-forward" => &[b"\x01port 80: nothing listens", b"\x03port 81: nothing listens"],
                _ => &[],
            };
            for part in expected {
                assert!(answer.windows(part.len()).any(|found| found == *part), "{name}: {answer:?}");
            }
            count += 1;
        }
        assert!(count >= 15, "{count} files");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_client_is_served_for_ever(kind in 0u8..7, bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            fuzz_client(&[&[kind][..], &bytes].concat());
        }
    }
}
