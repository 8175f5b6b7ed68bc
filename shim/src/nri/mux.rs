//! The two byte streams that share a plugin's socket: one on which the daemon calls the plugin, one on which the plugin calls the daemon.
//! A frame is the stream's number and the payload's length, four bytes each, the highest first, and the payload. Frames say nothing
//! about messages: a sender may cut them as it likes.

use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The stream of the plugin's service: the daemon asks.
pub(super) const PLUGIN: u32 = 1;
/// The stream of the runtime's service: the plugin asks.
pub(super) const RUNTIME: u32 = 2;

const HEADER_BYTES: usize = 8;
/// Largest payload, by the interface: the largest message and its header.
const PAYLOAD_MAX_BYTES: usize = super::ttrpc::HEADER_BYTES + super::ttrpc::MESSAGE_MAX_BYTES;
/// What the reader of the plugins' own library takes at once at the beginning of a message. A longer frame there is an error to it, and
/// more than 256 frames that wait are too; hence one of this size and one for all the rest.
const FIRST_BYTES: usize = 4096;

/// A message as the frames that carry it.
pub(super) fn frames(stream: u32, message: &[u8]) -> Vec<u8> {
    let (first, rest) = message.split_at(message.len().min(FIRST_BYTES));
    let mut bytes = Vec::with_capacity(message.len() + 2 * HEADER_BYTES);
    for part in [first, rest].into_iter().filter(|part| !part.is_empty()) {
        bytes.extend_from_slice(&stream.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

/// Reads one frame: its stream and its payload. `None` at the end of the socket.
pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<(u32, Vec<u8>)>> {
    let stream = match from.read_u32().await {
        Ok(stream) => stream,
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = usize::try_from(from.read_u32().await?).unwrap_or(usize::MAX);
    if length > PAYLOAD_MAX_BYTES {
        return Err(io::Error::other(format!("a frame of {length} bytes, the limit is {PAYLOAD_MAX_BYTES}")));
    }
    // Not taken at its word: memory grows with what has come.
    let mut payload = Vec::new();
    from.take(length as u64).read_to_end(&mut payload).await?;
    if payload.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some((stream, payload)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_message_is_one_frame_or_two() {
        for (length, expected) in
            [(10, vec![10]), (4096, vec![4096]), (4097, vec![4096, 1]), (3 << 20, vec![4096, (3 << 20) - 4096])]
        {
            let bytes = frames(PLUGIN, &vec![7; length]);
            let mut from = bytes.as_slice();
            let mut found = Vec::new();
            while let Some((stream, payload)) = read(&mut from).await.expect("a frame") {
                assert_eq!(stream, PLUGIN);
                found.push(payload.len());
            }
            assert_eq!(found, expected);
        }
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_or_cut_off_is_an_error() {
        let mut long = Vec::from(1u32.to_be_bytes());
        long.extend((PAYLOAD_MAX_BYTES as u32 + 1).to_be_bytes());
        assert!(read(&mut long.as_slice()).await.expect_err("too long").to_string().contains("the limit is"));
        let cut = frames(PLUGIN, b"message");
        read(&mut &cut[..cut.len() - 1]).await.expect_err("cut off in the payload");
        read(&mut &cut[..6]).await.expect_err("cut off in the header");
    }
}
