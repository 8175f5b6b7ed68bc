//! The `windlass` program.
#![forbid(unsafe_code)]

use clap::Parser;
use std::{io::Write, process::ExitCode};
use windlass::cli::{self, Cli};

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            // Nobody may be there to read it.
            let _ = writeln!(std::io::stderr(), "windlass: {}", cli::safe(&error.message, &['\n']));
            ExitCode::FAILURE
        }
    }
}
