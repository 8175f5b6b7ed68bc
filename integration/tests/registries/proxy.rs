//! A proxy before a registry that does what networks and registries do: it cuts, stalls, alters, lies, refuses and sends elsewhere. And
//! counts bytes.

use anyhow::{Context, Result};
use std::{
    collections::{BTreeSet, VecDeque},
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

const CHUNK: usize = 16 << 10;
/// Longest silence of either side.
const LIMIT: Duration = Duration::from_secs(60);

/// What becomes of one request for a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// No more comes after so many bytes, and the connection stays until the client goes.
    Stall(usize),
    /// The body comes in so many pieces, with a pause before each.
    Drip(usize, Duration),
    /// One bit of this byte is another one.
    Flip(usize),
    /// The length that is told is so much more than the true one.
    Length(i64),
    /// So many bytes more come, and are told.
    More(usize),
    /// Nothing but a status, and headers (with line ends).
    Status(&'static str, &'static str),
    /// The registry sees this token.
    Token(String),
    /// 307 to this host and port.
    Redirect(String),
    /// The registry does not see what range is asked for.
    NoRange,
    /// The answer's range begins one byte later than the one that was asked for.
    Shift,
}

/// A request that came, and what was sent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    pub(crate) path: String,
    pub(crate) range: String,
    pub(crate) authorization: String,
    pub(crate) status: String,
    /// Bytes of the body.
    pub(crate) sent: u64,
}

#[derive(Default)]
struct State {
    faults: VecDeque<Fault>,
    /// The last of the faults goes on.
    lasting: bool,
    /// Digests that the faults concern.
    blobs: BTreeSet<String>,
    seen: Vec<Seen>,
    /// Answers with such a blob that are under way, and the most of them at a time.
    under_way: usize,
    most: usize,
}

pub(crate) struct Proxy {
    pub(crate) address: String,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    /// Listens for as long as the process lives.
    pub(crate) fn start(upstream: &str) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let proxy = Proxy { address: listener.local_addr()?.to_string(), state: Arc::default() };
        let (state, upstream) = (proxy.state.clone(), upstream.to_owned());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (state, upstream) = (state.clone(), upstream.clone());
                // A connection that breaks off is what this is for.
                std::thread::spawn(move || drop(serve(&stream, &upstream, &state)));
            }
        });
        Ok(proxy)
    }

    /// Concerns requests for these blobs from now on, one fault for each request; `lasting`: the last one for all that follow.
    pub(crate) fn set(&self, blobs: &[String], faults: &[Fault], lasting: bool) {
        let mut state = locked(&self.state);
        state.blobs = blobs.iter().cloned().collect();
        state.faults = faults.iter().cloned().collect();
        state.lasting = lasting;
        state.seen.clear();
        (state.under_way, state.most) = (0, 0);
    }

    /// The requests since [`Proxy::set`] whose path has this in it.
    pub(crate) fn seen(&self, part: &str) -> Vec<Seen> {
        locked(&self.state).seen.iter().filter(|seen| seen.path.contains(part)).cloned().collect()
    }

    /// Most answers with blobs at a time.
    pub(crate) fn most(&self) -> usize {
        locked(&self.state).most
    }
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// First line, and headers with small names.
type Head = (String, Vec<(String, String)>);

fn read_head(reader: &mut impl BufRead) -> Result<Head> {
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { return Ok((first.trim_end().to_owned(), headers)) };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn header(headers: &[(String, String)], name: &str) -> String {
    headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.clone()).unwrap_or_default()
}

fn serve(mut client: &TcpStream, upstream: &str, state: &Mutex<State>) -> Result<()> {
    client.set_read_timeout(Some(LIMIT))?;
    client.set_write_timeout(Some(LIMIT))?;
    let (first, mut headers) = read_head(&mut BufReader::new(client))?;
    let path = first.split(' ').nth(1).context("a path")?.to_owned();
    let (range, authorization) = (header(&headers, "range"), header(&headers, "authorization"));
    let (fault, at, blob) = {
        let mut state = locked(state);
        let blob = state.blobs.iter().any(|digest| path.contains(digest.as_str()));
        let fault = match (blob, state.faults.len()) {
            (true, 1) if state.lasting => state.faults.front().cloned(),
            (true, _) => state.faults.pop_front(),
            _ => None,
        };
        state.seen.push(Seen { path: path.clone(), range, authorization, ..Seen::default() });
        (fault.unwrap_or(Fault::None), state.seen.len() - 1, blob)
    };
    let say = |status: &str| {
        if let Some(seen) = locked(state).seen.get_mut(at) {
            status.clone_into(&mut seen.status);
        }
    };
    match &fault {
        Fault::Status(status, more) => {
            say(status);
            write!(client, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n{more}\r\n")?;
            return Ok(());
        }
        Fault::Redirect(to) => {
            say("307");
            let location = format!("Location: http://{to}{path}");
            write!(client, "HTTP/1.1 307 Temporary Redirect\r\nConnection: close\r\nContent-Length: 0\r\n{location}\r\n\r\n")?;
            return Ok(());
        }
        Fault::Token(token) => {
            headers.retain(|(name, _)| name != "authorization");
            headers.push(("authorization".into(), format!("Bearer {token}")));
        }
        Fault::NoRange => headers.retain(|(name, _)| name != "range"),
        _ => {}
    }
    let mut server = TcpStream::connect(upstream)?;
    headers.retain(|(name, _)| name != "connection");
    server.write_all(format!("{first}\r\n{}Connection: close\r\n\r\n", lines(&headers)).as_bytes())?;
    let mut reader = BufReader::new(server);
    let (status, mut headers) = read_head(&mut reader)?;
    say(status.split(' ').nth(1).unwrap_or_default());
    let length: usize = header(&headers, "content-length").parse().unwrap_or_default();
    let told = match &fault {
        Fault::Length(more) => length.saturating_add_signed(isize::try_from(*more)?),
        Fault::More(more) => length + more,
        _ => length,
    };
    for (name, value) in &mut headers {
        match (name.as_str(), &fault) {
            ("content-length", _) => *value = told.to_string(),
            ("content-range", Fault::Shift) => *value = shifted(value),
            _ => {}
        }
    }
    client.write_all(format!("{status}\r\n{}\r\n", lines(&headers)).as_bytes())?;
    if blob {
        let mut state = locked(state);
        state.under_way += 1;
        state.most = state.most.max(state.under_way);
    }
    // An answer is over when its last piece is on its way: the client may ask for the next thing then.
    let tell = |sent: usize, over: bool| {
        let mut state = locked(state);
        if let Some(seen) = state.seen.get_mut(at).filter(|_| !over) {
            seen.sent = sent as u64;
        }
        if blob && over {
            state.under_way = state.under_way.saturating_sub(1);
        }
    };
    if body(client, &mut reader, &fault, length, &tell) {
        tell(0, true);
    }
    let _ = client.shutdown(Shutdown::Write);
    Ok(())
}

fn lines(headers: &[(String, String)]) -> String {
    headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect()
}

/// `bytes 5-9/10` as `bytes 6-9/10`.
fn shifted(range: &str) -> String {
    let digits: String = range.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    let next = digits.parse().map_or(0, |start: u64| start + 1);
    range.replacen(&digits, &next.to_string(), 1)
}

/// Sends the body as the fault wants it, and tells how much of it before each piece goes: a client may be quick. Returns whether the last
/// piece has not gone.
fn body(mut client: &TcpStream, reader: &mut impl Read, fault: &Fault, length: usize, tell: &dyn Fn(usize, bool)) -> bool {
    let (end, stall) = match fault {
        Fault::Cut(at) => (*at, false),
        Fault::Stall(at) => (*at, true),
        // A server never sends more than it has told.
        Fault::Length(more) if *more < 0 => (length.saturating_add_signed(isize::try_from(*more).unwrap_or(0)), false),
        _ => (usize::MAX, false),
    };
    let piece = match fault {
        Fault::Drip(pieces, _) => (length / pieces).max(1),
        _ => CHUNK,
    };
    let mut sent = 0;
    while sent < end.min(length) {
        let mut bytes = vec![0; piece.min(end.min(length) - sent)];
        if reader.read_exact(&mut bytes).is_err() {
            return true;
        }
        if let Fault::Flip(at) = fault
            && let Some(byte) = at.checked_sub(sent).and_then(|index| bytes.get_mut(index))
        {
            *byte ^= 1;
        }
        sent += bytes.len();
        tell(sent, false);
        if let Fault::Drip(_, pause) = fault {
            std::thread::sleep(*pause);
        }
        if sent == length {
            tell(sent, true);
        }
        if client.write_all(&bytes).is_err() {
            return sent < length;
        }
    }
    if let Fault::More(more) = fault {
        let _ = client.write_all(&vec![0; *more]);
    }
    if stall {
        // Until the client goes.
        let _ = client.read(&mut [0]);
    }
    sent < length
}
