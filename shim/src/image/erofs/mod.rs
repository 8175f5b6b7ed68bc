//! Writes a layer as one EROFS image while its tar stream comes in: file data and inodes go out as they are read, directories at the
//! end. Uncompressed; what is small lies beside its inode. Needs no kernel support to write and never mounts.
//!
//! The format is that of Linux's fs/erofs/erofs_fs.h: everything is little-endian, a block has 4096 bytes, and an inode's number is its
//! place in units of 32 bytes. Nothing newer than Linux 5.4 is used.

mod build;
mod directory;
mod format;
mod output;
#[cfg(test)]
pub(super) mod tests;
mod tree;

pub(super) use build::build;

const BLOCK: usize = 4096;
