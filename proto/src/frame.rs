//! Frames of the monitor protocol: a 4-byte big-endian length and an encoded [`Frame`]. Reading and writing the socket,
//! and the descriptors that travel with a frame, are the caller's.

use crate::monitor::Frame;
use prost::Message;

/// Largest encoded frame that either side accepts. An `ExecRequest` with the largest argument list the kernel takes fits.
pub const FRAME_LIMIT_BYTES: usize = 8 << 20;

/// Most descriptors that travel with one frame.
pub const FRAME_FDS_MAX: usize = 4;

/// Name of a monitor's listening socket in the run directory of its pod. The daemon makes it, and the last that a monitor does is to remove it.
pub const SOCKET_FILE: &str = "monitor.sock";

/// Version of the protocol that this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// A frame that cannot be accepted. The connection that sent it is of no further use.
#[derive(Debug, PartialEq, Eq)]
pub enum FrameError {
    /// Longer than [`FRAME_LIMIT_BYTES`].
    TooLong(usize),
    /// Not an encoded `Frame`.
    Malformed(String),
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FrameError::TooLong(bytes) => write!(f, "frame of {bytes} bytes, the limit is {FRAME_LIMIT_BYTES}"),
            FrameError::Malformed(cause) => write!(f, "malformed frame: {cause}"),
        }
    }
}

impl std::error::Error for FrameError {}

/// Encodes a frame with its length in front.
pub fn encode(frame: &Frame) -> Result<Vec<u8>, FrameError> {
    let length = frame.encoded_len();
    if length > FRAME_LIMIT_BYTES {
        return Err(FrameError::TooLong(length));
    }
    let mut bytes = Vec::with_capacity(4 + length);
    bytes.extend_from_slice(&(length as u32).to_be_bytes());
    frame.encode(&mut bytes).map_err(|error| FrameError::Malformed(error.to_string()))?;
    Ok(bytes)
}

/// Takes one whole frame off the front of `buffer`, or `None` while it is incomplete.
pub fn decode(buffer: &mut Vec<u8>) -> Result<Option<Frame>, FrameError> {
    let Some(prefix) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_be_bytes(*prefix) as usize;
    if length > FRAME_LIMIT_BYTES {
        return Err(FrameError::TooLong(length));
    }
    let Some(body) = buffer.get(4..4 + length) else { return Ok(None) };
    let frame = Frame::decode(body).map_err(|error| FrameError::Malformed(error.to_string()))?;
    buffer.drain(..4 + length);
    Ok(Some(frame))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::{StartRequest, frame::Body};

    fn start(id: u64, container_id: &str) -> Frame {
        Frame { id, body: Some(Body::Start(StartRequest { container_id: container_id.into() })) }
    }

    #[test]
    fn a_frame_comes_back_whole_from_single_bytes() {
        let sent = start(7, "abc");
        let mut buffer = Vec::new();
        let bytes = encode(&sent).expect("fits");
        for (index, byte) in bytes.iter().enumerate() {
            assert_eq!(decode(&mut buffer), Ok(None), "complete after {index} bytes");
            buffer.push(*byte);
        }
        assert_eq!(decode(&mut buffer), Ok(Some(sent)));
        assert!(buffer.is_empty());
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_come() {
        let mut buffer = ((FRAME_LIMIT_BYTES + 1) as u32).to_be_bytes().to_vec();
        assert_eq!(decode(&mut buffer), Err(FrameError::TooLong(FRAME_LIMIT_BYTES + 1)));
    }

    /// Bytes of version 1. They may never change: monitors of this version may be running when the daemon is upgraded.
    #[test]
    fn golden_bytes_of_version_1() {
        assert_eq!(encode(&start(1, "c")).expect("fits"), [0, 0, 0, 7, 8, 1, 106, 3, 10, 1, b'c']);
    }
}
