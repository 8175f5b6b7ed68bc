//! The master of a container's terminal, as the monitor holds it. The child opens the pair in the container's own devpts.

use rustix::io::Errno;
use rustix::termios::{Winsize, tcsetwinsize};
use std::os::fd::AsFd;

/// Reads what the terminal's programs wrote. 0 is the end: EIO from a master says that no slave is open any more.
pub fn read_master(master: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    match rustix::io::read(master, buffer) {
        Err(Errno::IO) => Ok(0),
        other => other,
    }
}

/// Sets the size in characters. The foreground process group gets SIGWINCH.
pub fn resize(master: impl AsFd, columns: u16, rows: u16) -> Result<(), Errno> {
    tcsetwinsize(master, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })
}
