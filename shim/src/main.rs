//! The `windlass` program.
#![forbid(unsafe_code)]

use clap::Parser;
use std::process::ExitCode;
use windlass::cli::{self, Cli};

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("windlass: {error}");
            ExitCode::FAILURE
        }
    }
}
