//! As much of HTTP/1.1 as an upgrade takes: one request head, and the answers to it.

use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest request head, and most lines of it.
const HEAD_LIMIT_BYTES: usize = 32 << 10;
const LINES_MAX: usize = 100;

/// A request without a body.
#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    headers: Vec<(String, String)>,
    /// What came behind the head: the first bytes of the protocol that is upgraded to.
    pub(super) rest: Vec<u8>,
}

impl Request {
    /// Every value of a header, split at commas.
    pub(super) fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let lines = self.headers.iter().filter(move |(found, _)| found.eq_ignore_ascii_case(name));
        lines.flat_map(|(_, value)| value.split(',')).map(str::trim).filter(|value| !value.is_empty())
    }

    /// Whether a header has this value among others, in any case.
    pub(super) fn has(&self, name: &str, value: &str) -> bool {
        self.values(name).any(|found| found.eq_ignore_ascii_case(value))
    }

    /// The values of a parameter of the query.
    pub(super) fn parameters<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let query = self.path.split_once('?').map_or("", |(_, query)| query);
        query.split('&').filter_map(move |pair| pair.split_once('=').filter(|(key, _)| *key == name).map(|(_, value)| value))
    }
}

/// Reads a request's head. A head that is no HTTP, or too long, is an `InvalidData` error.
pub(super) async fn read(io: &mut (impl AsyncRead + Unpin)) -> io::Result<Request> {
    let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut bytes = Vec::new();
    loop {
        let mut headers = [httparse::EMPTY_HEADER; LINES_MAX];
        let mut head = httparse::Request::new(&mut headers);
        match head.parse(&bytes) {
            Ok(httparse::Status::Complete(length)) => {
                let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
                return Ok(Request {
                    method: head.method.unwrap_or_default().to_owned(),
                    path: head.path.unwrap_or_default().to_owned(),
                    headers: head.headers.iter().map(|header| (header.name.to_owned(), text(header.value))).collect(),
                    rest: bytes.get(length..).unwrap_or_default().to_vec(),
                });
            }
            Ok(httparse::Status::Partial) if bytes.len() < HEAD_LIMIT_BYTES => {}
            Ok(httparse::Status::Partial) => return Err(bad(format!("request head over {HEAD_LIMIT_BYTES} bytes"))),
            Err(error) => return Err(bad(format!("request head: {error}"))),
        }
        if io.read_buf(&mut bytes).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Answers 101 with these headers.
pub(super) async fn switch(io: &mut (impl AsyncWrite + Unpin), headers: &[(&str, &str)]) -> io::Result<()> {
    let mut text = String::from("HTTP/1.1 101 Switching Protocols\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str("\r\n");
    io.write_all(text.as_bytes()).await
}

/// Answers a failure, after which the connection ends.
pub(super) async fn refuse(
    io: &mut (impl AsyncWrite + Unpin),
    status: &str,
    headers: &[(&str, &str)],
    message: &str,
) -> io::Result<()> {
    let mut text = format!("HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str(&format!("Content-Length: {}\r\n\r\n{message}\n", message.len() + 1));
    io.write_all(text.as_bytes()).await?;
    io.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_head_is_read_and_what_follows_is_kept() {
        let mut wire: &[u8] =
            b"POST /exec/abc?port=80&port=90 HTTP/1.1\r\nConnection: Upgrade, x\r\nUPGRADE: SPDY/3.1\r\n\r\nrest";
        let request = read(&mut wire).await.expect("a request");
        assert_eq!((request.method.as_str(), request.rest.as_slice()), ("POST", &b"rest"[..]));
        assert!(request.has("connection", "upgrade") && request.has("Upgrade", "spdy/3.1"));
        assert_eq!(request.parameters("port").collect::<Vec<_>>(), ["80", "90"]);
    }

    #[tokio::test]
    async fn what_is_no_head_is_refused() {
        for wire in [&b"\x80\x03\x00\x01"[..], b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"GET / HTTP/1.1\r\n"] {
            assert!(read(&mut &wire[..]).await.is_err(), "{wire:?}");
        }
        let endless = [b"GET / HTTP/1.1\r\na: ".to_vec(), vec![b'x'; HEAD_LIMIT_BYTES * 2]].concat();
        assert!(read(&mut endless.as_slice()).await.is_err());
    }
}
