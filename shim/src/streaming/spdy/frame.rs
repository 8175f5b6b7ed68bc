//! Frames of SPDY/3.1: their heads in both directions. Knows no stream and no socket.

/// Bytes of every frame's head.
pub(super) const HEAD_BYTES: usize = 8;
/// Longest control frame that is taken; they carry header blocks at most.
pub(super) const CONTROL_LIMIT_BYTES: usize = 32 << 10;
/// Half-closes the sender's side of a stream.
const FIN: u8 = 1;

const VERSION: u16 = 3;
const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;

/// A frame's head as it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    Data { stream: u32, last: bool, length: usize },
    Control { kind: u16, last: bool, length: usize },
}

impl Head {
    /// Reads a head. Control frames of another version, or too long, are errors.
    pub(super) fn read(bytes: [u8; HEAD_BYTES]) -> Result<Head, String> {
        let [a, b, c, d, flags, l0, l1, l2] = bytes;
        let length = u32::from_be_bytes([0, l0, l1, l2]) as usize;
        let last = flags & FIN != 0;
        if a & 0x80 == 0 {
            return Ok(Head::Data { stream: u32::from_be_bytes([a, b, c, d]), last, length });
        }
        let version = u16::from_be_bytes([a & 0x7f, b]);
        if version != VERSION {
            return Err(format!("control frame of SPDY version {version}"));
        }
        if length > CONTROL_LIMIT_BYTES {
            return Err(format!("control frame of {length} bytes"));
        }
        Ok(Head::Control { kind: u16::from_be_bytes([c, d]), last, length })
    }
}

/// What a control frame says, as far as a server must know.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Control<'a> {
    /// A new stream, and its compressed header block.
    Open {
        stream: u32,
        last: bool,
        block: &'a [u8],
    },
    /// The client gives a stream up.
    Reset {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    /// The client opens no more streams.
    Goaway,
    /// SETTINGS, WINDOW_UPDATE and the like: nothing here depends on them.
    Other,
}

impl Control<'_> {
    /// Reads the body of a control frame.
    pub(super) fn read(kind: u16, last: bool, body: &[u8]) -> Result<Control<'_>, String> {
        let number = |at: usize| {
            let bytes = body.get(at..).and_then(|rest| rest.first_chunk::<4>());
            bytes.map(|bytes| u32::from_be_bytes(*bytes)).ok_or_else(|| format!("control frame {kind} ends early"))
        };
        let stream = |at| number(at).map(|number| number & 0x7fff_ffff);
        Ok(match kind {
            // Stream, associated stream, priority and slot, then the block.
            SYN_STREAM => Control::Open { stream: stream(0)?, last, block: body.get(10..).ok_or("SYN_STREAM ends early")? },
            RST_STREAM => Control::Reset { stream: stream(0)? },
            PING => Control::Ping { id: number(0)? },
            GOAWAY => Control::Goaway,
            _ => Control::Other,
        })
    }
}

/// The head of a data frame.
pub(super) fn data(stream: u32, length: usize, last: bool) -> [u8; HEAD_BYTES] {
    head(stream, if last { FIN } else { 0 }, length)
}

fn head(first: u32, flags: u8, length: usize) -> [u8; HEAD_BYTES] {
    let [a, b, c, d] = first.to_be_bytes();
    let [_, l0, l1, l2] = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [a, b, c, d, flags, l0, l1, l2]
}

fn control(kind: u16, parts: &[&[u8]]) -> Vec<u8> {
    let length = parts.iter().map(|part| part.len()).sum();
    let mut frame = head(1 << 31 | u32::from(VERSION) << 16 | u32::from(kind), 0, length).to_vec();
    parts.iter().for_each(|part| frame.extend_from_slice(part));
    frame
}

/// SYN_REPLY with a compressed header block.
pub(super) fn reply(stream: u32, block: &[u8]) -> Vec<u8> {
    control(SYN_REPLY, &[&stream.to_be_bytes(), block])
}

/// RST_STREAM with status CANCEL.
pub(super) fn reset(stream: u32) -> Vec<u8> {
    control(RST_STREAM, &[&stream.to_be_bytes(), &5u32.to_be_bytes()])
}

/// PING, which carries the client's number back.
pub(super) fn ping(id: &[u8]) -> Vec<u8> {
    control(PING, &[id])
}

/// GOAWAY: no stream after this one is looked at.
pub(super) fn goaway(last: u32) -> Vec<u8> {
    control(GOAWAY, &[&last.to_be_bytes(), &0u32.to_be_bytes()])
}

#[cfg(test)]
pub(super) fn open(stream: u32, last: bool, block: &[u8]) -> Vec<u8> {
    let mut frame = control(SYN_STREAM, &[&stream.to_be_bytes(), &0u32.to_be_bytes(), &[0, 0], block]);
    frame[4] = u8::from(last);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Frames as another implementation puts them on the wire.
    #[test]
    fn frames_are_those_of_the_draft() {
        assert_eq!(reply(3, &[9]), [0x80, 3, 0, 2, 0, 0, 0, 5, 0, 0, 0, 3, 9]);
        assert_eq!(reset(5), [0x80, 3, 0, 3, 0, 0, 0, 8, 0, 0, 0, 5, 0, 0, 0, 5]);
        assert_eq!(ping(&[0, 0, 0, 1]), [0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1]);
        assert_eq!(goaway(7), [0x80, 3, 0, 7, 0, 0, 0, 8, 0, 0, 0, 7, 0, 0, 0, 0]);
        assert_eq!(data(1, 0x01_0203, true), [0, 0, 0, 1, 1, 1, 2, 3]);
        assert!(Head::read([0x80, 2, 0, 1, 0, 0, 0, 0]).is_err());
        assert!(Head::read([0x80, 3, 0, 1, 0, 0xff, 0, 0]).is_err());
    }

    proptest! {
        #[test]
        fn a_head_survives(stream in 0u32..1 << 31, length in 0usize..1 << 24, last: bool) {
            prop_assert_eq!(Head::read(data(stream, length, last)), Ok(Head::Data { stream, last, length }));
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error(kind: u16, last: bool, body: Vec<u8>, head: [u8; 8]) {
            let _ = Head::read(head);
            let _ = Control::read(kind, last, &body);
        }
    }
}
