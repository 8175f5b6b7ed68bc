//! Completions for shells and manual pages, made of the same description as `--help`.

use super::Cli;
use crate::error::{Error, Result};
use clap::CommandFactory;
use std::{io::Write, path::Path};

/// Prints the completions of a shell.
pub(super) fn completions(shell: clap_complete::Shell) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "windlass", &mut text);
    match std::io::stdout().write_all(&text) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("write the completions", error)),
        _ => Ok(()),
    }
}

/// Writes `windlass.1` and one page for each command, `windlass-image-pull.1`.
pub(super) fn write(directory: &Path) -> Result<()> {
    clap_mangen::generate_to(Cli::command().disable_help_subcommand(true), directory)
        .map_err(|error| Error::io(format_args!("write manual pages into {}", directory.display()), error))
}
