//! A read-only registry of the stand-in images, on loopback and over plain HTTP. Answers manifests and blobs and nothing else.

use crate::{
    daemon::Daemon,
    standin::{Images, MANIFEST_TYPE, digest},
};
use anyhow::{Context, Result};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// Registries whose names critest uses.
const MIRRORED: [&str; 4] = ["registry.k8s.io", "gcr.io", "public.ecr.aws", "docker.io"];
/// Longest wait for a client that says nothing.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);
/// Longest request head, in bytes.
const HEAD_LIMIT: u64 = 64 << 10;

/// The registry; it ends when dropped.
#[derive(Debug)]
pub struct StandinRegistry {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl StandinRegistry {
    /// A daemon that serves, for which this is every registry; the files that say so are in `mirrors`.
    pub fn daemon(&self, mirrors: &Path) -> Result<Daemon> {
        self.write_mirrors(mirrors)?;
        let mut daemon = Daemon::prepare(&["--registry-config-dir", &mirrors.to_string_lossy()])?;
        daemon.serve()?;
        Ok(daemon)
    }

    /// Listens on a free port of loopback, in the network namespace of the calling thread.
    pub fn start(images: Images) -> Result<StandinRegistry> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen on loopback")?;
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let images = Arc::new(images);
        let thread = std::thread::Builder::new().name("registry".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                if stopped.load(Ordering::Acquire) {
                    return;
                }
                let images = images.clone();
                std::thread::spawn(move || {
                    // A client may go away at any time.
                    let _ = serve(stream, &images);
                });
            }
        })?;
        Ok(StandinRegistry { address, stop, thread: Some(thread) })
    }

    /// Writes a `<name>/hosts.toml` below `directory` for every registry that critest names, sending it here.
    pub fn write_mirrors(&self, directory: &Path) -> Result<()> {
        for name in MIRRORED {
            let directory = directory.join(name);
            fs::create_dir_all(&directory)?;
            let text = format!(
                "server = \"http://{0}\"\n\n[host.\"http://{0}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
                self.address
            );
            fs::write(directory.join("hosts.toml"), text).context("write hosts.toml")?;
        }
        Ok(())
    }
}

impl Drop for StandinRegistry {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread, which then sees that it is to end.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut stream: TcpStream, images: &Images) -> Result<()> {
    stream.set_read_timeout(Some(CLIENT_LIMIT))?;
    stream.set_write_timeout(Some(CLIENT_LIMIT))?;
    let mut reader = BufReader::new(Read::take(&stream, HEAD_LIMIT));
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 && !line.trim().is_empty() {
        line.clear();
    }
    drop(reader);
    let mut words = first.split_whitespace();
    let (method, path) = (words.next().context("a method")?, words.next().context("a path")?);
    let found = find(path.split('?').next().unwrap_or_default(), images);
    let (status, kind, body) = match found {
        Some((kind, body)) => ("200 OK", kind, body),
        None => ("404 Not Found", "application/json", &b"{\"errors\":[{\"code\":\"NAME_UNKNOWN\",\"message\":\"unknown\"}]}"[..]),
    };
    let mut head =
        format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\nContent-Type: {kind}\r\n", body.len());
    if kind == MANIFEST_TYPE {
        head.push_str(&format!("Docker-Content-Digest: {}\r\n", digest(body)));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if method != "HEAD" {
        stream.write_all(body)?;
    }
    Ok(())
}

fn find<'a>(path: &str, images: &'a Images) -> Option<(&'static str, &'a [u8])> {
    let rest = path.strip_prefix("/v2/")?;
    if rest.is_empty() {
        return Some(("application/json", b"{}"));
    }
    if let Some((repository, reference)) = rest.split_once("/manifests/") {
        let separator = if reference.starts_with("sha256:") { '@' } else { ':' };
        return images.manifests.get(&format!("{repository}{separator}{reference}")).map(|body| (MANIFEST_TYPE, body.as_slice()));
    }
    let (_, digest) = rest.split_once("/blobs/")?;
    images.blobs.get(digest).map(|body| ("application/octet-stream", body.as_slice()))
}
