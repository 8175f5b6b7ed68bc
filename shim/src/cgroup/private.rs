//! systemd's own D-Bus socket, which takes root's calls where there is no message bus, as in small images.
//!
//! There systemd calls itself `org.freedesktop.systemd1` as the sender of its messages, which is no unique name as the specification wants and
//! zbus insists on. The field is read as `:rg.freedesktop.systemd1`, which is one and as long.

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};
use zbus::{
    connection::socket::{ReadHalf, Socket, Split, WriteHalf},
    export::async_trait::async_trait,
};

pub(super) const PATH: &str = "/run/systemd/private";

/// The field as systemd writes it: number, signature, length, text, all little-endian.
const SENDER: &[u8] = b"\x07\x01s\0\x18\0\0\0org.freedesktop.systemd1\0";
/// Where its text begins.
const TEXT_AT: usize = 8;

/// A connection to it.
pub(super) struct Private(UnixStream);

impl Private {
    pub(super) async fn connect() -> io::Result<Private> {
        UnixStream::connect(PATH).await.map(Private)
    }
}

impl Socket for Private {
    type ReadHalf = Reader;
    type WriteHalf = Writer;

    fn split(self) -> Split<Reader, Writer> {
        let (read, write) = self.0.into_split();
        Split::new(Reader(read), Writer(write))
    }
}

#[derive(Debug)]
pub(super) struct Reader(OwnedReadHalf);

#[derive(Debug)]
pub(super) struct Writer(OwnedWriteHalf);

#[async_trait]
impl ReadHalf for Reader {
    /// Reads on while a field may be cut off. zbus asks for the rest of a message, so that no field goes beyond `buffer`.
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let mut filled = 0;
        loop {
            let read = self.0.read(&mut buffer[filled..]).await?;
            filled += read;
            let cut = rename(&mut buffer[..filled]);
            if !cut || read == 0 || filled == buffer.len() {
                return Ok((filled, Vec::new()));
            }
        }
    }
}

#[async_trait]
impl WriteHalf for Writer {
    async fn sendmsg(&mut self, buffer: &[u8], _: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.0.write(buffer).await
    }

    async fn close(&mut self) -> io::Result<()> {
        self.0.shutdown().await
    }
}

/// Makes a unique name of each whole field. True when the bytes end with the beginning of another.
fn rename(bytes: &mut [u8]) -> bool {
    for at in 0..(bytes.len() + 1).saturating_sub(SENDER.len()) {
        if bytes[at..].starts_with(SENDER) {
            bytes[at + TEXT_AT] = b':';
        }
    }
    (1..SENDER.len().min(bytes.len() + 1)).any(|length| bytes.ends_with(&SENDER[..length]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_senders_name_is_unique_however_it_is_cut() {
        let message = [b"before".as_slice(), SENDER, b"\x07\x01", SENDER, b"after"].concat();
        let expected = String::from_utf8_lossy(&message).replace("org.free", ":rg.free");
        for cut in 1..message.len() {
            let (ours, mut theirs) = UnixStream::pair().expect("a pair");
            let mut read = Private(ours).split();
            let mut found = vec![0; message.len()];
            let (first, rest) = message.split_at(cut);
            theirs.write_all(first).await.expect("written");
            let (sent, filled) = tokio::join!(
                async {
                    tokio::task::yield_now().await;
                    theirs.write_all(rest).await
                },
                async {
                    let mut filled = 0;
                    while filled < message.len() {
                        filled += read.read_mut().recvmsg(&mut found[filled..]).await.expect("read").0;
                    }
                    filled
                }
            );
            sent.expect("written");
            assert_eq!((filled, String::from_utf8_lossy(&found).as_ref()), (message.len(), expected.as_str()), "cut at {cut}");
        }
    }
}
