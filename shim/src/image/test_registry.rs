//! A registry on loopback for tests, one thread for each connection, with faults on request.

use super::digest;
use super::test_images::Made;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

#[derive(Default)]
pub(super) struct Content {
    /// By the path behind `/v2/`.
    pub(super) objects: HashMap<String, Vec<u8>>,
    /// Answer this often with 500 before anything else.
    pub(super) failures: u32,
    /// Cut each blob's answer after so many bytes.
    pub(super) cut_after: Option<usize>,
    pub(super) ignore_ranges: bool,
    /// user:password the token service wants; the registry then wants its token.
    pub(super) login: Option<String>,
    /// Refresh token that the token service takes.
    pub(super) identity: Option<String>,
    /// The token that the registry takes; the service gives it.
    pub(super) token: String,
    /// After so many requests the registry takes another token.
    pub(super) token_lasts: Option<usize>,
    /// Answer this with 429 and these headers, once each.
    pub(super) busy: Vec<String>,
    /// Send all requests for blobs to this address.
    pub(super) redirect: Option<String>,
    /// A header that every request must have.
    pub(super) header: Option<(String, String)>,
    /// Bytes of bodies that were sent.
    pub(super) served_bytes: usize,
    /// Request lines, in order.
    pub(super) log: Vec<String>,
    /// Authorization headers, in order.
    pub(super) authorizations: Vec<String>,
}

pub(super) struct Registry {
    pub(super) address: String,
    pub(super) content: Arc<Mutex<Content>>,
}

impl Registry {
    pub(super) fn start() -> Registry {
        Registry::start_with(None)
    }

    /// Over TLS.
    pub(super) fn start_tls(config: Arc<ServerConfig>) -> Registry {
        Registry::start_with(Some(config))
    }

    fn start_with(tls: Option<Arc<ServerConfig>>) -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let content = Arc::new(Mutex::new(Content { token: "let-me-in".into(), ..Content::default() }));
        let (shared, own) = (Arc::downgrade(&content), address.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(content) = shared.upgrade() else { return };
                let own = own.clone();
                let tls = tls.clone();
                std::thread::spawn(move || match tls {
                    None => drop(serve(stream, &content, &format!("http://{own}"))),
                    Some(config) => {
                        let Ok(mut stream) = ServerConnection::new(config).map(|tls| StreamOwned::new(tls, stream)) else {
                            return;
                        };
                        let _ = serve(&mut stream, &content, &format!("https://{own}"));
                        stream.conn.send_close_notify();
                        let _ = stream.flush();
                    }
                });
            }
        });
        Registry { address, content }
    }

    pub(super) fn push(&self, name: &str, tag: &str, image: &Made) {
        let mut content = self.content.lock().unwrap();
        for blob in image.layers.iter().chain([&image.config]) {
            content.objects.insert(format!("{name}/blobs/{}", digest::of(blob)), blob.clone());
        }
        content.objects.insert(format!("{name}/manifests/{tag}"), image.manifest.clone());
        content.objects.insert(format!("{name}/manifests/{}", digest::of(&image.manifest)), image.manifest.clone());
    }

    pub(super) fn name(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    pub(super) fn requests(&self, part: &str) -> usize {
        self.content.lock().unwrap().log.iter().filter(|l| l.contains(part)).count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // Wakes the listener, which then finds its content gone.
        self.content = Arc::default();
        let _ = TcpStream::connect(&self.address);
    }
}

fn serve(mut stream: impl Read + Write, content: &Mutex<Content>, own: &str) -> std::io::Result<()> {
    let mut reader = BufReader::new(&mut stream);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((key, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(key.to_ascii_lowercase(), value.to_owned());
    }
    let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    headers.insert("body".into(), String::from_utf8_lossy(&body).into_owned());
    let (head, body) = answer(&request, &headers, &mut content.lock().unwrap(), own);
    content.lock().unwrap().served_bytes += body.len();
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)
}

fn answer(request: &str, headers: &HashMap<String, String>, content: &mut Content, own: &str) -> (String, Vec<u8>) {
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let range = headers.get("range").cloned().unwrap_or_default();
    content.log.push(format!("{path} {range}"));
    let authorization = headers.get("authorization").cloned().unwrap_or_default();
    content.authorizations.push(authorization.clone());
    if let Some((name, value)) = &content.header
        && headers.get(name) != Some(value)
        && !path.starts_with("/token")
    {
        return reply("400 Bad Request", "", b"");
    }
    if let Some(busy) = content.busy.pop() {
        return reply("429 Too Many Requests", &format!("{busy}\r\n"), b"");
    }
    if content.login.is_some() || content.identity.is_some() {
        use base64::Engine as _;
        let encode = |login: &String| format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(login));
        if path.starts_with("/token") {
            let basic = request.starts_with("GET") && content.login.as_ref().map(encode) == Some(authorization);
            let refresh = content.identity.as_ref().map(|token| format!("refresh_token={token}&"));
            let form = headers["body"].clone() + "&";
            let identity = request.starts_with("POST") && refresh.is_some_and(|refresh| form.contains(&refresh));
            return if basic || identity {
                reply("200 OK", "", format!("{{\"token\":\"{}\"}}", content.token).as_bytes())
            } else {
                reply("401 No", "", b"")
            };
        }
        if let Some(left) = &mut content.token_lasts {
            if *left == 0 {
                content.token.push('+');
                content.token_lasts = None;
            } else {
                *left -= 1;
            }
        }
        if authorization != format!("Bearer {}", content.token) {
            let challenge = format!("WWW-Authenticate: Bearer realm=\"{own}/token\",service=\"test\"\r\n");
            return reply("401 Unauthorized", &challenge, b"");
        }
    }
    if let Some(to) = content.redirect.as_ref().filter(|_| path.contains("/blobs/")) {
        return reply("307 Temporary Redirect", &format!("Location: {to}{path}\r\n"), b"");
    }
    if content.failures > 0 {
        content.failures -= 1;
        return reply("500 Oops", "", b"");
    }
    let path = path.split('?').next().unwrap_or_default();
    let Some(object) = path.strip_prefix("/v2/").and_then(|p| content.objects.get(p)) else {
        return reply("404 Not Found", "", b"");
    };
    let start: usize = range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap_or(0);
    let (mut head, mut body) = if start > 0 && !content.ignore_ranges {
        let header = format!("Content-Range: bytes {start}-{}/{}\r\n", object.len() - 1, object.len());
        reply("206 Partial Content", &header, &object[start..])
    } else {
        reply("200 OK", "", object)
    };
    if let Some(cut) = content.cut_after.filter(|_| path.contains("/blobs/")) {
        // A server that ignores ranges would never get further if each answer were cut at the same place.
        let cut = if content.ignore_ranges && start > 0 { body.len() } else { cut };
        body.truncate(cut);
    }
    head.push_str("\r\n");
    (head, body)
}

fn reply(status: &str, headers: &str, body: &[u8]) -> (String, Vec<u8>) {
    let end = if status.starts_with('2') && !body.starts_with(b"{\"token\"") { "" } else { "\r\n" };
    (format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}Content-Length: {}\r\n{end}", body.len()), body.to_vec())
}
