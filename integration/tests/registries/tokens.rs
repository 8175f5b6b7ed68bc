//! A token service, as registries name one in their challenges: signed tokens for who may have them, over TLS or not.

use anyhow::{Context, Result};
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

pub(crate) const SERVICE: &str = "test registry";
pub(crate) const ISSUER: &str = "test";
/// May have everything.
pub(crate) const USER: (&str, &str) = ("anchor", "chain cable");
/// May have what is below `open/`.
pub(crate) const GUEST: (&str, &str) = ("guest", "word");
/// The refresh token of [`USER`].
pub(crate) const REFRESH: &str = "a-refresh-token-of-the-test";

/// Signs tokens.
struct Signer {
    key: EcdsaKeyPair,
    certificate: Vec<u8>,
}

/// Listens for as long as the process lives.
pub(crate) struct Tokens {
    pub(crate) realm: String,
    /// Who vouches for the tokens, as PEM.
    pub(crate) bundle: PathBuf,
    signer: Arc<Signer>,
    /// Method and scopes of each request that got a token.
    given: Arc<Mutex<Vec<String>>>,
}

impl Tokens {
    pub(crate) fn start(directory: &Path, tls: Option<Arc<ServerConfig>>) -> Result<Tokens> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = CertificateParams::new(vec!["tokens".to_owned()])?.self_signed(&key)?;
        let bundle = directory.join("tokens.pem");
        fs::write(&bundle, certificate.pem())?;
        let signing =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der()).context("a signing key")?;
        let signer = Arc::new(Signer { key: signing, certificate: certificate.der().to_vec() });
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address: SocketAddr = listener.local_addr()?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let given = Arc::new(Mutex::new(Vec::new()));
        let tokens = Tokens { realm: format!("{scheme}://{address}/token"), bundle, signer, given };
        let (signer, given) = (tokens.signer.clone(), tokens.given.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away or does not trust us is a thing that tests do.
                let _ = match &tls {
                    None => serve(stream, &signer, &given),
                    Some(config) => ServerConnection::new(config.clone()).map_err(anyhow::Error::from).and_then(|connection| {
                        let mut stream = StreamOwned::new(connection, stream);
                        serve(&mut stream, &signer, &given)?;
                        stream.conn.send_close_notify();
                        Ok(stream.flush()?)
                    }),
                };
            }
        });
        Ok(tokens)
    }

    /// A token for this, which ends so many seconds from now on.
    pub(crate) fn token(&self, repository: &str, actions: &[&str], lasts_seconds: i64) -> Result<String> {
        self.signer.token(&[json!({ "type": "repository", "name": repository, "actions": actions })], lasts_seconds)
    }

    /// How many tokens were given out.
    pub(crate) fn given(&self) -> Vec<String> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Signer {
    fn token(&self, access: &[Value], lasts_seconds: i64) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs().cast_signed();
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [STANDARD.encode(&self.certificate)] });
        let claims = json!({
            "iss": ISSUER, "sub": "someone", "aud": SERVICE, "exp": now + lasts_seconds, "nbf": now - 7200, "iat": now - 7200,
            "jti": format!("{now}-{lasts_seconds}"), "access": access,
        });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let text = format!("{}.{}", part(&header), part(&claims));
        let signature = self.key.sign(&SystemRandom::new(), text.as_bytes()).context("sign a token")?;
        Ok(format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref())))
    }
}

fn serve(mut stream: impl Read + Write, signer: &Signer, given: &Mutex<Vec<String>>) -> Result<()> {
    let mut reader = BufReader::new(&mut stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let (mut authorization, mut length) = (String::new(), 0);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let Some((name, value)) = header.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => value.clone_into(&mut authorization),
            "content-length" => length = value.parse()?,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let query = match method {
        "POST" => String::from_utf8_lossy(&body).into_owned(),
        _ => target.split_once('?').map(|(_, query)| query.to_owned()).unwrap_or_default(),
    };
    let fields: Vec<(String, String)> = query.split('&').filter_map(|one| one.split_once('=')).map(decoded).collect();
    let reply = answer(method, &fields, &authorization, signer)?;
    if reply.0 == "200 OK" {
        let scopes: Vec<&str> = fields.iter().filter(|(name, _)| name == "scope").map(|(_, value)| value.as_str()).collect();
        given.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{method} {}", scopes.join(" ")));
    }
    let head = format!("HTTP/1.1 {}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", reply.0, reply.1.len());
    stream.write_all(head.as_bytes())?;
    Ok(stream.write_all(reply.1.as_bytes())?)
}

fn answer(method: &str, fields: &[(String, String)], authorization: &str, signer: &Signer) -> Result<(&'static str, String)> {
    let field = |wanted: &str| fields.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
    let basic = |user: (&str, &str)| format!("Basic {}", STANDARD.encode(format!("{}:{}", user.0, user.1)));
    let everything = match method {
        "POST" => field("grant_type") == Some("refresh_token") && field("refresh_token") == Some(REFRESH),
        _ => authorization == basic(USER),
    };
    if field("service") != Some(SERVICE) || !(everything || (method == "GET" && authorization == basic(GUEST))) {
        return Ok(("401 Unauthorized", json!({ "details": "incorrect username or password" }).to_string()));
    }
    let mut access = Vec::new();
    // What is asked for and allowed: somebody who asks for more gets a token that holds less.
    for scope in fields.iter().filter(|(name, _)| name == "scope").flat_map(|(_, value)| value.split(' ')) {
        let [kind, name, actions] = scope.split(':').collect::<Vec<_>>()[..] else { continue };
        if everything || name.starts_with("open/") {
            access.push(json!({ "type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>() }));
        }
    }
    let token = signer.token(&access, 300)?;
    let name = if method == "POST" { "access_token" } else { "token" };
    Ok(("200 OK", json!({ name: token, "expires_in": 300 }).to_string()))
}

/// Percent signs and plus signs read.
fn decoded((name, value): (&str, &str)) -> (String, String) {
    let read = |text: &str| {
        let (mut bytes, mut rest) = (Vec::new(), text.bytes());
        while let Some(byte) = rest.next() {
            bytes.push(match byte {
                b'+' => b' ',
                b'%' => {
                    let digits: Vec<u8> = rest.by_ref().take(2).collect();
                    u8::from_str_radix(&String::from_utf8_lossy(&digits), 16).unwrap_or_default()
                }
                other => other,
            });
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    (read(name), read(value))
}
