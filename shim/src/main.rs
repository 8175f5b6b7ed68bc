//! The `windlass` program.
#![forbid(unsafe_code)]

use clap::Parser;
use std::process::ExitCode;
use windlass::cli::{self, Cli};

fn main() -> ExitCode {
    match cli::run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("windlass: {error}");
            ExitCode::FAILURE
        }
    }
}
