//! Names: by the C library's resolver, which reads /etc/resolv.conf, and by one query to one server.

use std::{
    io::{Error, ErrorKind, Read, Result, Write},
    net::{TcpStream, ToSocketAddrs, UdpSocket},
    process::ExitCode,
    time::Duration,
};

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(5);
/// Types of records (RFC 1035, 2782).
const TYPES: [(&str, u16); 3] = [("A", 1), ("PTR", 12), ("SRV", 33)];

/// `resolve NAME...`: a line of each name's addresses, in order.
pub(crate) fn resolve(names: &[String]) -> ExitCode {
    let line = |name: &String| {
        let addresses = (name.as_str(), 0).to_socket_addrs()?;
        let mut addresses: Vec<String> = addresses.map(|address| address.ip().to_string()).collect();
        addresses.sort();
        addresses.dedup();
        Ok(addresses.join(" "))
    };
    said(names.iter().map(line).collect::<Result<Vec<_>>>().map(|lines| lines.join("\n")))
}

/// `query udp|tcp SERVER TYPE NAME`: the answer's code and how many records it has.
pub(crate) fn query(words: &[String]) -> ExitCode {
    said(ask(words).and_then(|answer| {
        let field = |at: usize| answer.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
        let (Some(flags), Some(records)) = (field(2), field(6)) else { return Err(ErrorKind::UnexpectedEof.into()) };
        Ok(format!("code {} records {records}", flags & 0xf))
    }))
}

fn said(result: Result<String>) -> ExitCode {
    match result {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn ask(words: &[String]) -> Result<Vec<u8>> {
    let [transport, server, kind, name] = words else { return Err(Error::other("query udp|tcp SERVER TYPE NAME")) };
    let kind = TYPES.iter().find(|(known, _)| known == kind).ok_or_else(|| Error::other("no such type"))?.1;
    // A header that wants recursion, with one question of class IN (RFC 1035, 4.1).
    let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.').filter(|label| !label.is_empty()) {
        message.push(u8::try_from(label.len()).map_err(Error::other)?);
        message.extend(label.bytes());
    }
    message.push(0);
    message.extend([kind.to_be_bytes(), 1u16.to_be_bytes()].concat());
    let mut answer = vec![0; 1 << 16];
    if transport == "tcp" {
        let mut stream = TcpStream::connect((server.as_str(), 53))?;
        stream.set_read_timeout(Some(LIMIT))?;
        let length = u16::try_from(message.len()).map_err(Error::other)?;
        stream.write_all(&[&length.to_be_bytes()[..], &message].concat())?;
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        answer.truncate(u16::from_be_bytes(length).into());
        stream.read_exact(&mut answer)?;
    } else {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        socket.set_read_timeout(Some(LIMIT))?;
        socket.connect((server.as_str(), 53))?;
        socket.send(&message)?;
        let length = socket.recv(&mut answer)?;
        answer.truncate(length);
    }
    Ok(answer)
}
