//! `windlass-monitor --dir RUNDIR`: the monitor of one pod. Started by the daemon with its control connection as fd 0 and a socket
//! for later ones as fd 2.

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).take(3).collect();
    let words: Vec<&OsStr> = arguments.iter().map(AsRef::as_ref).collect();
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
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be a socket that listens, to which nothing can be written.
            let _ = writeln!(std::io::stderr(), "windlass-monitor: {error}");
            ExitCode::FAILURE
        }
    }
}
