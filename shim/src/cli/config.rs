//! `windlass config`: the file with its meaning, what is wrong with one, and what holds.

use super::{
    Flags,
    output::{Format, json, line, raw},
};
use crate::{
    config::{self, Config, DEFAULT_PATH, REFERENCE},
    error::{Error, Result},
};
use clap::Subcommand;
use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

/// `windlass config ...`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print a configuration file that explains every field and has its default.
    Default,
    /// Check a configuration file: name every field that there is none of, and every value that makes no sense, with its line. Exits with 1
    /// if there are any. Nothing of the node is looked at; `windlass doctor` does that.
    Check {
        /// The file [default: /etc/windlass/config.toml, if it exists]
        file: Option<PathBuf>,
        /// How to print problems
        #[arg(long, value_enum, default_value_t = Format::Text)]
        format: Format,
    },
    /// Print the configuration that holds for a daemon with these flags: the file, with defaults for what it does not say.
    Show {
        #[command(flatten)]
        flags: Flags,
        /// Only what is not the default
        #[arg(long)]
        changed: bool,
    },
}

/// Runs a command to its end.
pub(super) fn run(command: ConfigCommand) -> Result<ExitCode> {
    match command {
        ConfigCommand::Default => raw(REFERENCE.trim_end())?,
        ConfigCommand::Check { file, format } => return check(file.as_deref(), format),
        ConfigCommand::Show { flags, changed } => show(&flags.load()?, changed)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn check(named: Option<&Path>, format: Format) -> Result<ExitCode> {
    let file = named.unwrap_or(Path::new(DEFAULT_PATH));
    let text = match std::fs::read_to_string(file) {
        // As a daemon takes it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && named.is_none() => String::new(),
        read => read.map_err(|error| Error::io(format_args!("read configuration {}", file.display()), error))?,
    };
    let problems = config::read(&text).err().unwrap_or_default();
    match format {
        Format::Json => json(&problems)?,
        Format::Text if problems.is_empty() => line(format_args!("{}: no problem", file.display()))?,
        Format::Text => problems.iter().try_for_each(|problem| line(format_args!("{}: {problem}", file.display())))?,
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(config: &Config, changed: bool) -> Result<()> {
    let encode = |config: &Config| {
        toml::Table::try_from(config).map_err(|error| Error::internal(format!("encode the configuration: {error}")))
    };
    let mut table = encode(config)?;
    if changed {
        without(&mut table, &encode(&Config::default())?);
    }
    raw(toml::to_string(&table).map_err(|error| Error::internal(format!("encode the configuration: {error}")))?.trim_end())
}

/// Takes out what is the same in the other table.
fn without(table: &mut toml::Table, other: &toml::Table) {
    table.retain(|key, value| match (value, other.get(key)) {
        (toml::Value::Table(inner), Some(toml::Value::Table(same))) => {
            without(inner, same);
            !inner.is_empty()
        }
        (value, same) => Some(&*value) != same,
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_the_default_is_left() {
        let text =
            "root = \"/x\"\n[network]\nbridge = \"windlass0\"\nmode = \"cni\"\n[handlers.runc]\npath = \"/usr/sbin/runc\"\n";
        let config = config::read(text).expect("a configuration");
        let mut table = toml::Table::try_from(&config).expect("a table");
        without(&mut table, &toml::Table::try_from(Config::default()).expect("a table"));
        let expected: toml::Table =
            "root = \"/x\"\nnetwork.mode = \"cni\"\nhandlers.runc.path = \"/usr/sbin/runc\"".parse().expect("a table");
        assert_eq!(table, expected);
    }
}
