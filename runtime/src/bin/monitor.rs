//! `windlass-monitor --dir RUNDIR`: the monitor of one pod. Started by the daemon with its control connection as fd 0, the tree of layers
//! as fd 1 and a socket for later connections as fd 2.
//!
//! It has a C `main`. Rust's own first opens /dev/null where it takes a standard stream for closed, as it does a tree of layers
//! (an O_PATH descriptor, for which poll(2) gives POLLNVAL), and aborts without a word where it cannot; and it keeps a stack for signals.

#![no_main]

use nix::libc;
use nix::sys::signal::{SigHandler, Signal, signal};
use std::ffi::{CStr, OsStr, c_char, c_int};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The program.
///
/// # Safety
/// `arguments` are `count` strings that stay where they are: those of execve(2), by the C library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(count: c_int, arguments: *const *const c_char) -> c_int {
    let count = usize::try_from(count).unwrap_or_default();
    let word = |index| {
        // SAFETY: the index is below their count.
        OsStr::from_bytes(unsafe { CStr::from_ptr(*arguments.add(index)) }.to_bytes())
    };
    let words: Vec<&OsStr> = (1..count.min(4)).map(word).collect();
    // A connection whose other end is gone gives an error.
    // SAFETY: nothing is called by this signal.
    if let Err(errno) = unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) } {
        return fail(format_args!("ignore SIGPIPE: {errno}"));
    }
    let result = match words.as_slice() {
        [flag, directory] if *flag == "--dir" => {
            windlass_runtime::monitor::run(Path::new(directory)).map_err(|error| error.to_string())
        }
        // The pod's init, started by a monitor and by nobody else.
        [flag] if *flag == "--init" => windlass_runtime::monitor::run_init().map_err(|error| error.to_string()),
        [flag] if *flag == "--version" => {
            println!("{}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        _ => {
            eprintln!(
                "usage: windlass-monitor --dir RUNDIR   (with the daemon's connection as standard input, a listening socket as standard error)"
            );
            return 2;
        }
    };
    match result {
        Ok(()) => libc::EXIT_SUCCESS,
        Err(error) => fail(format_args!("{error}")),
    }
}

fn fail(why: std::fmt::Arguments<'_>) -> c_int {
    // Standard error may be a socket that listens, to which nothing can be written.
    let _ = writeln!(std::io::stderr(), "windlass-monitor: {why}");
    libc::EXIT_FAILURE
}
