//! The server's face: tokens and upgrades.

use super::*;
use tokio::io::AsyncReadExt;

struct Nobody;

#[tonic::async_trait]
impl Handler for Nobody {
    async fn exec(&self, _: &str, _: Vec<String>, _: bool, _: Streams) -> Ending {
        Ending::Exited(0)
    }
    async fn attach(&self, _: &str, _: bool, _: Streams) -> Ending {
        Ending::Detached
    }
    async fn dial(&self, _: &str, _: u16) -> Result<TcpStream> {
        Err(Error::not_found("nothing listens"))
    }
}

async fn server() -> Server {
    let config = StreamingConfig { address: "127.0.0.1:0".into(), ..StreamingConfig::default() };
    Server::start(&config, Arc::new(Nobody)).await.expect("a server")
}

fn exec() -> Target {
    Target::Exec { container_id: "c".into(), command: vec!["true".into()], wanted: Wanted::default() }
}

/// The first line of the answer to this request, whose URL goes in for `{}`.
async fn answer(server: &Server, url: &str, request: &str) -> String {
    let mut socket = TcpStream::connect(server.address).await.expect("connected");
    let path = url.splitn(4, '/').nth(3).expect("a path");
    socket.write_all(request.replace("{}", path).as_bytes()).await.expect("written");
    let mut answer = vec![0; 4096];
    let count = socket.read(&mut answer).await.expect("an answer");
    String::from_utf8_lossy(&answer[..count]).into_owned()
}

#[tokio::test]
async fn a_url_is_for_one_use_and_for_its_kind() {
    let server = server().await;
    let url = server.url(exec()).expect("a URL");
    let upgrade =
        "POST /{} HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n";
    let other = url.replace("/exec/", "/attach/");
    assert!(answer(&server, &other, upgrade).await.starts_with("HTTP/1.1 404 "));
    let first = answer(&server, &url, upgrade).await;
    assert!(first.starts_with("HTTP/1.1 101 ") && first.contains("X-Stream-Protocol-Version: v4.channel.k8s.io"), "{first}");
    assert!(answer(&server, &url, upgrade).await.starts_with("HTTP/1.1 404 "));
}

#[tokio::test]
async fn what_cannot_be_upgraded_is_told_why() {
    let server = server().await;
    for (request, expected) in [
        ("GET /{} HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "),
        ("PUT /{} HTTP/1.1\r\n\r\n", "HTTP/1.1 405 "),
        ("nonsense\r\n\r\n", "HTTP/1.1 400 "),
        (
            "GET /{} HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v9\r\n\r\n",
            "HTTP/1.1 403 ",
        ),
        (
            "GET /{} HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n",
            "HTTP/1.1 400 ",
        ),
        (
            "GET /{} HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: a\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io, v5.channel.k8s.io\r\n\r\n",
            "HTTP/1.1 101 ",
        ),
    ] {
        let url = server.url(exec()).expect("a URL");
        let found = answer(&server, &url, request).await;
        assert!(found.starts_with(expected), "{request:?}: {found}");
        if expected.contains("403") {
            assert!(found.contains("X-Accepted-Stream-Protocol-Versions: v4.channel.k8s.io"), "{found}");
        }
        if expected.contains("101") {
            assert!(found.contains("Sec-WebSocket-Protocol: v5.channel.k8s.io"), "{found}");
        }
    }
}

#[tokio::test]
async fn tokens_are_bounded() {
    let server = server().await;
    for _ in 0..TOKENS_MAX {
        server.url(exec()).expect("a URL");
    }
    assert_eq!(server.url(exec()).expect_err("one too many").kind, Kind::Exhausted);
}
