//! A registry on loopback for tests, one thread for each connection, with faults on request.

use super::digest;
use super::test_images::Made;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
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
    /// Request lines, in order.
    pub(super) log: Vec<String>,
}

pub(super) struct Registry {
    pub(super) address: String,
    pub(super) content: Arc<Mutex<Content>>,
}

impl Registry {
    pub(super) fn start() -> Registry {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let content = Arc::new(Mutex::new(Content::default()));
        let (shared, own) = (Arc::downgrade(&content), address.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let Some(content) = shared.upgrade() else { return };
                let own = own.clone();
                std::thread::spawn(move || drop(serve(stream, &content, &own)));
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

fn serve(mut stream: TcpStream, content: &Mutex<Content>, own: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        let Some((key, value)) = line.split_once(": ") else { break };
        headers.insert(key.to_ascii_lowercase(), value.to_owned());
    }
    let (head, body) = answer(&request, &headers, &mut content.lock().unwrap(), own);
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)
}

fn answer(request: &str, headers: &HashMap<String, String>, content: &mut Content, own: &str) -> (String, Vec<u8>) {
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let range = headers.get("range").cloned().unwrap_or_default();
    content.log.push(format!("{path} {range}"));
    let authorization = headers.get("authorization").cloned().unwrap_or_default();
    if let Some(login) = &content.login {
        use base64::Engine as _;
        let basic = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(login));
        if path.starts_with("/token") {
            return if authorization == basic {
                reply("200 OK", "", b"{\"token\":\"let-me-in\"}")
            } else {
                reply("401 No", "", b"")
            };
        }
        if authorization != "Bearer let-me-in" {
            let challenge = format!("WWW-Authenticate: Bearer realm=\"http://{own}/token\",service=\"test\"\r\n");
            return reply("401 Unauthorized", &challenge, b"");
        }
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
