//! Frames of WebSocket (RFC 6455, section 5): heads in both directions, and the mask that clients use. Knows no socket.

/// Longest message that is taken. The clients of Kubernetes send 32 KiB.
pub(super) const PAYLOAD_LIMIT_BYTES: u64 = 4 << 20;
/// Longest payload of a control frame.
const CONTROL_LIMIT_BYTES: u64 = 125;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Continuation,
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

impl Kind {
    fn number(self) -> u8 {
        match self {
            Kind::Continuation => 0,
            Kind::Text => 1,
            Kind::Binary => 2,
            Kind::Close => 8,
            Kind::Ping => 9,
            Kind::Pong => 10,
        }
    }

    fn of(number: u8) -> Option<Kind> {
        [Kind::Continuation, Kind::Text, Kind::Binary, Kind::Close, Kind::Ping, Kind::Pong]
            .into_iter()
            .find(|kind| kind.number() == number)
    }
}

/// A frame's head as it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: Kind,
    /// Nothing of the message follows.
    pub(super) last: bool,
    /// Of zeros in a server's.
    pub(super) mask: [u8; 4],
    pub(super) length: usize,
    /// Bytes of the head itself.
    pub(super) head_bytes: usize,
}

/// Whose frames are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    Client,
    Server,
}

/// Reads a head of a client's frame; `None` until it is there whole.
pub(super) fn read(bytes: &[u8]) -> Result<Option<Head>, String> {
    read_of(Sender::Client, bytes)
}

/// Reads a head; `None` until it is there whole.
pub(super) fn read_of(sender: Sender, bytes: &[u8]) -> Result<Option<Head>, String> {
    let Some([first, second]) = bytes.first_chunk::<2>().copied() else { return Ok(None) };
    if first & 0x70 != 0 {
        return Err("a frame with an extension that was not agreed on".into());
    }
    let kind = Kind::of(first & 0x0f).ok_or_else(|| format!("a frame of kind {}", first & 0x0f))?;
    let last = first & 0x80 != 0;
    match (sender, second & 0x80 != 0) {
        (Sender::Client, false) => return Err("a client's frame without a mask".into()),
        (Sender::Server, true) => return Err("a server's frame with a mask".into()),
        _ => {}
    }
    let (length, at) = match second & 0x7f {
        126 => match bytes.get(2..).and_then(|rest| rest.first_chunk::<2>()) {
            Some(length) => (u64::from(u16::from_be_bytes(*length)), 4),
            None => return Ok(None),
        },
        127 => match bytes.get(2..).and_then(|rest| rest.first_chunk::<8>()) {
            Some(length) => (u64::from_be_bytes(*length), 10),
            None => return Ok(None),
        },
        length => (u64::from(length), 2),
    };
    let control = matches!(kind, Kind::Close | Kind::Ping | Kind::Pong);
    if length > PAYLOAD_LIMIT_BYTES || (control && (length > CONTROL_LIMIT_BYTES || !last)) {
        return Err(format!("a frame of {length} bytes"));
    }
    let length = usize::try_from(length).map_err(|_| "a frame that is too long")?;
    if sender == Sender::Server {
        return Ok(Some(Head { kind, last, mask: [0; 4], length, head_bytes: at }));
    }
    let Some(mask) = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()) else { return Ok(None) };
    Ok(Some(Head { kind, last, mask: *mask, length, head_bytes: at + 4 }))
}

/// Puts the mask on a payload, or takes it away.
pub(super) fn mask(payload: &mut [u8], mask: [u8; 4]) {
    let word = u64::from_ne_bytes([mask[0], mask[1], mask[2], mask[3], mask[0], mask[1], mask[2], mask[3]]);
    let mut words = payload.chunks_exact_mut(8);
    for bytes in &mut words {
        if let Some(eight) = bytes.first_chunk_mut::<8>() {
            *eight = (u64::from_ne_bytes(*eight) ^ word).to_ne_bytes();
        }
    }
    for (byte, mask) in words.into_remainder().iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// The head of a server's whole message.
pub(super) fn head(kind: Kind, length: usize) -> Vec<u8> {
    let mut head = vec![0x80 | kind.number()];
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short), _) if short < 126 => head.push(short),
        (_, Ok(medium)) => {
            head.push(126);
            head.extend(medium.to_be_bytes());
        }
        _ => {
            head.push(127);
            head.extend((length as u64).to_be_bytes());
        }
    }
    head
}

/// A client's whole message.
pub(super) fn of_client(kind: Kind, payload: &[u8], key: [u8; 4]) -> Vec<u8> {
    let mut frame = head(kind, payload.len());
    frame[1] |= 0x80;
    frame.extend(key);
    let at = frame.len();
    frame.extend_from_slice(payload);
    mask(&mut frame[at..], key);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The examples of RFC 6455, section 5.7.
    #[test]
    fn frames_are_those_of_the_rfc() {
        let hello = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        let found = read(&hello).expect("a head").expect("whole");
        assert_eq!((found.kind, found.last, found.length, found.head_bytes), (Kind::Text, true, 5, 6));
        let mut payload = hello[6..].to_vec();
        mask(&mut payload, found.mask);
        assert_eq!(payload, b"Hello");
        assert_eq!(head(Kind::Binary, 256), [0x82, 0x7e, 1, 0]);
        assert_eq!(head(Kind::Binary, 65_536), [0x82, 0x7f, 0, 0, 0, 0, 0, 1, 0, 0]);
        for bad in
            [&[0x81, 0x05][..], &[0xc1, 0x80], &[0x83, 0x80], &[0x09, 0x80, 0, 0, 0, 0], &[0x82, 0xff, 1, 0, 0, 0, 0, 0, 0, 0]]
        {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_message_survives(payload in prop::collection::vec(any::<u8>(), 0..70_000)) {
            let wire = of_client(Kind::Binary, &payload, [1, 2, 3, 4]);
            let found = read(&wire).expect("a head").expect("whole");
            prop_assert_eq!(found.length, payload.len());
            let mut plain = wire[found.head_bytes..].to_vec();
            mask(&mut plain, found.mask);
            prop_assert!(plain == payload);
        }

        #[test]
        fn any_bytes_are_a_head_or_an_error(bytes: Vec<u8>) {
            let _ = read(&bytes);
            let _ = read_of(Sender::Server, &bytes);
        }
    }
}
