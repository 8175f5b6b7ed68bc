//! Proxies by the environment: which requests go by way of one, and which do not.

use crate::{
    Ground,
    authority::Authority,
    directories, quoted,
    servers::{Image, Server, Ways},
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{
    io::{BufRead, BufReader, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
};
use tonic::Code;
use windlass_integration::{image, node};

/// Where the proxy finds whatever has no address.
const NEAR: &str = "10.99.0.1";
const EXEMPT: &str = "10.99.0.2";

/// A proxy as a company has one: forwards, tunnels, and wants a password.
struct Forward {
    address: String,
    /// First line of each request, and what it brought to be let through.
    seen: Arc<Mutex<Vec<(String, String)>>>,
}

impl Forward {
    fn start() -> Result<Forward> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let forward = Forward { address: listener.local_addr()?.to_string(), seen: Arc::default() };
        let seen = forward.seen.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let seen = seen.clone();
                std::thread::spawn(move || drop(pass(stream, &seen)));
            }
        });
        Ok(forward)
    }

    /// What came since the last look.
    fn seen(&self) -> Vec<(String, String)> {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn pass(client: TcpStream, seen: &Mutex<Vec<(String, String)>>) -> Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let (mut headers, mut login) = (String::new(), String::new());
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "proxy-authorization" => value.trim().clone_into(&mut login),
            "connection" => {}
            _ => headers.push_str(&line),
        }
    }
    seen.lock().unwrap_or_else(PoisonError::into_inner).push((first.trim().to_owned(), login));
    let (method, target) = first.trim().split_once(' ').context("a request")?;
    let target = target.split(' ').next().unwrap_or_default();
    let rest = target.strip_prefix("http://").unwrap_or(target);
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let mut server = TcpStream::connect(found(host))?;
    let mut client = client;
    if method == "CONNECT" {
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
        let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    } else {
        server.write_all(format!("{method} {path} HTTP/1.1\r\n{headers}Connection: close\r\n\r\n").as_bytes())?;
    }
    std::io::copy(&mut server, &mut client)?;
    Ok(client.shutdown(Shutdown::Write)?)
}

/// Names are known to the proxy alone.
fn found(host: &str) -> String {
    let port = host.rsplit_once(':').map_or("80", |(_, port)| port);
    if host.starts_with(|c: char| c.is_ascii_digit()) { host.to_owned() } else { format!("{NEAR}:{port}") }
}

#[test]
fn pulls_by_way_of_a_proxy_and_those_that_are_exempt() -> Result<()> {
    node::run(|| {
        for address in [NEAR, EXEMPT] {
            node::run_command("ip", &["address", "add", &format!("{address}/32"), "dev", "lo"])?;
        }
        let (directory, storage) = directories()?;
        let pushed = Image::new(&[image::files_layer(&[("file", 0o644, b"content")])?], json!({}))?;
        let own = Server::distribution(directory.path(), &storage, Ways::default())?;
        own.push("team/app", "v1", &pushed)?;
        let at = |address| Server::distribution(directory.path(), &storage, Ways { at: Some(address), ..Ways::default() });
        let (near, exempt) = (at(NEAR)?, at(EXEMPT)?);
        let authority = Authority::new(directory.path())?;
        let pair = authority.server("registry", &["registry.example"])?;
        let ways = Ways { at: Some(NEAR), tls: Some(&pair), ..Ways::default() };
        let tls = Server::distribution(directory.path(), &storage, ways)?;
        let named = format!("registry.example:{}", tls.address.rsplit_once(':').context("a port")?.1);
        let forward = Forward::start()?;
        let variable = format!("http://node:a%20word@{}", forward.address);
        let words = format!(".internal.example, {EXEMPT}");
        let environment = [("HTTP_PROXY", variable.as_str()), ("https_proxy", &variable), ("NO_PROXY", &words)];
        let ground = Ground::under("", &environment)?;
        let configure = |ground: &Ground| {
            ground.hosts(&near.address, &format!("server = \"http://{}\"\n", near.address))?;
            ground.hosts(&exempt.address, &format!("server = \"http://{}\"\n", exempt.address))?;
            ground.hosts(&named, &format!("server = \"https://{named}\"\nca = {}\n", quoted(&authority.certificate())))
        };
        configure(&ground)?;
        let plain = format!("GET http://{}/v2/team/app/", near.address);
        for (registry, by_way) in [
            (near.address.clone(), Some(plain)),
            (named.clone(), Some(format!("CONNECT {named} "))),
            (exempt.address.clone(), None),
            (own.address.clone(), None),
        ] {
            let name = format!("{registry}/team/app:v1");
            ensure!(ground.pull(&name, None).with_context(|| name.clone())? == pushed.id());
            let seen = forward.seen();
            match by_way {
                None => ensure!(seen.is_empty(), "{registry}: {seen:?}"),
                Some(begin) => {
                    ensure!(!seen.is_empty() && seen.iter().all(|(line, _)| line.starts_with(&begin)), "{registry}: {seen:?}");
                    ensure!(seen.iter().all(|(_, login)| login == "Basic bm9kZTphIHdvcmQ="), "{registry}: {seen:?}");
                }
            }
            ground.remove(&name)?;
        }
        ensure!(!ground.daemon.log().contains("word"), "the proxy's password is in the log");
        drop(ground);
        // A proxy that is not there, and one that is none.
        let closed = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let environment = [("HTTP_PROXY", format!("http://node:word@{closed}")), ("HTTPS_PROXY", "gopher://there".to_owned())];
        let ground = Ground::under("", &environment.each_ref().map(|(name, value)| (*name, value.as_str())))?;
        configure(&ground)?;
        for (registry, code, why) in [
            (&near.address, Code::Unknown, format!("by way of the proxy {closed}")),
            (&named, Code::Internal, "HTTPS_PROXY: a proxy of the kind \"gopher\"".to_owned()),
        ] {
            let error = ground.pull(&format!("{registry}/team/app:v1"), None).expect_err("no proxy");
            ensure!(error.code() == code && error.message().contains(&why) && !error.message().contains("word"), "{error:?}");
        }
        ensure!(ground.pull(&own.name("team/app:v1"), None)? == pushed.id(), "loopback needs no proxy");
        Ok(())
    })
}
