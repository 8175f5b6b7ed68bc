//! The image's bytes on their way to the file: data in sequence, and one open block that takes inodes.

use super::BLOCK;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Data that is written at once.
const BUFFER_BYTES: usize = 1 << 20;
/// Inodes start at multiples of this.
const ALIGNMENT: usize = 32;
/// An inode with its content that is larger gets no new block for that: the content goes where data goes.
const NEW_BLOCK_MAX: usize = BLOCK / 2;

pub(super) struct Output<'a> {
    file: &'a File,
    /// Where the buffer begins in the file; a multiple of a block.
    base: u64,
    buffer: Vec<u8>,
    /// The open block, where it lies, and how much of it is used.
    open: Box<[u8; BLOCK]>,
    open_at: u64,
    used: usize,
}

impl<'a> Output<'a> {
    /// The first block is left to the caller.
    pub(super) fn new(file: &'a File) -> Output<'a> {
        Output {
            file,
            base: BLOCK as u64,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            open: Box::new([0; BLOCK]),
            open_at: 0,
            used: BLOCK,
        }
    }

    /// The block that comes next.
    pub(super) fn next_block(&self) -> io::Result<u32> {
        let at = self.base + self.buffer.len() as u64;
        u32::try_from(at / BLOCK as u64).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))
    }

    /// Appends data. What follows a piece that is not a multiple of a block is to be preceded by [`Self::fill_block`].
    pub(super) fn append(&mut self, data: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(data);
        if self.buffer.len() >= BUFFER_BYTES && self.buffer.len().is_multiple_of(BLOCK) {
            self.flush()?;
        }
        Ok(())
    }

    /// Ends the last block with zeros.
    pub(super) fn fill_block(&mut self) {
        self.buffer.resize(self.buffer.len().next_multiple_of(BLOCK), 0);
    }

    /// Leaves a hole of whole blocks.
    pub(super) fn skip(&mut self, blocks: u64) -> io::Result<()> {
        self.flush()?;
        self.base += blocks * BLOCK as u64;
        Ok(())
    }

    /// Whether an inode of so many bytes, its content's rest included, is placed whole; else the rest goes where data goes.
    pub(super) fn takes(&self, bytes: usize) -> bool {
        self.used + bytes <= BLOCK || bytes <= NEW_BLOCK_MAX
    }

    /// Writes an inode with what belongs to it, which lies in one block if a block can hold it; its place in the file.
    pub(super) fn place(&mut self, bytes: &[u8]) -> io::Result<u64> {
        if bytes.len() > BLOCK {
            let at = u64::from(self.next_block()?) * BLOCK as u64;
            self.append(bytes)?;
            self.fill_block();
            return Ok(at);
        }
        if self.used + bytes.len() > BLOCK {
            self.close()?;
            self.open_at = u64::from(self.next_block()?) * BLOCK as u64;
            self.append(&[0; BLOCK])?;
            self.open.fill(0);
            self.used = 0;
        }
        let end = self.used + bytes.len();
        if let Some(place) = self.open.get_mut(self.used..end) {
            place.copy_from_slice(bytes);
        }
        let at = self.open_at + self.used as u64;
        self.used = end.next_multiple_of(ALIGNMENT);
        Ok(at)
    }

    /// Writes over what was appended or placed before.
    pub(super) fn rewrite(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let inside = |start: u64, length: usize| {
            let from = usize::try_from(at.checked_sub(start)?).ok()?;
            (from + bytes.len() <= length).then_some(from..from + bytes.len())
        };
        let opened = if self.open_at > 0 { inside(self.open_at, BLOCK) } else { None };
        if let Some(place) = opened.and_then(|range| self.open.get_mut(range)) {
            place.copy_from_slice(bytes);
            return Ok(());
        }
        match inside(self.base, self.buffer.len()).and_then(|range| self.buffer.get_mut(range)) {
            Some(place) => place.copy_from_slice(bytes),
            None => self.file.write_all_at(bytes, at)?,
        }
        Ok(())
    }

    /// Writes the open block; the next inode begins another.
    pub(super) fn close(&mut self) -> io::Result<()> {
        if self.open_at == 0 {
            return Ok(());
        }
        let (at, block) = (std::mem::take(&mut self.open_at), self.open.clone());
        self.used = BLOCK;
        self.rewrite(at, block.as_slice())
    }

    /// Writes all that is held.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.base)?;
        self.base += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
