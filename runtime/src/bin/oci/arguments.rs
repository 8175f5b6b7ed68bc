//! The command line: global flags, a command, its flags, its operands. Flags come before operands; what follows the first operand is
//! never read as a flag, so that the program of an exec keeps its own.

use crate::{Outcome, invalid};
use std::fmt::Write;
use std::path::PathBuf;

/// A flag.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flag {
    /// With its dashes.
    pub(crate) name: &'static str,
    /// `-x`, or empty.
    pub(crate) short: &'static str,
    /// What its value is called; empty for a switch.
    pub(crate) value: &'static str,
    pub(crate) about: &'static str,
}

/// A flag without a value.
pub(crate) const fn switch(name: &'static str, short: &'static str, about: &'static str) -> Flag {
    Flag { name, short, value: "", about }
}

/// A flag with one.
pub(crate) const fn value(name: &'static str, short: &'static str, value: &'static str, about: &'static str) -> Flag {
    Flag { name, short, value, about }
}

/// A command.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) name: &'static str,
    pub(crate) operands: &'static str,
    /// Fewest and most operands.
    pub(crate) count: (usize, usize),
    pub(crate) about: &'static str,
    pub(crate) flags: &'static [&'static [Flag]],
    pub(crate) run: fn(&Call) -> Outcome<i32>,
}

/// Flags that were given, in their order.
#[derive(Debug, Default)]
pub(crate) struct Given(Vec<(&'static str, String)>);

impl Given {
    /// Whether a switch was given.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(given, _)| *given == name)
    }

    /// The last value of a flag.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    /// Every value of a flag.
    pub(crate) fn all<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    /// A value that is a path.
    pub(crate) fn path(&self, name: &str) -> Option<PathBuf> {
        self.get(name).map(PathBuf::from)
    }

    /// A value that is a number.
    pub(crate) fn number<T: std::str::FromStr>(&self, name: &str) -> Outcome<Option<T>> {
        let parse = |text: &str| text.parse().map_err(|_| invalid(name, &format!("{text} is not a number it takes")));
        self.get(name).map(parse).transpose()
    }
}

/// A command that was called.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) root: PathBuf,
    pub(crate) log: crate::log::Log,
    pub(crate) flags: Given,
    pub(crate) operands: Vec<String>,
}

impl Call {
    /// The container's id, the first operand of most commands.
    pub(crate) fn id(&self) -> Outcome<&str> {
        let id = self.operands.first().map(String::as_str).unwrap_or_default();
        let valid = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
        if id.is_empty() || id.starts_with('.') || !id.chars().all(valid) {
            return Err(invalid(id, "not a container id"));
        }
        Ok(id)
    }

    /// Directory of the container's record.
    pub(crate) fn home(&self) -> Outcome<PathBuf> {
        Ok(self.root.join(self.id()?))
    }
}

/// Takes flags off the front of `words`.
pub(crate) fn flags(words: &mut impl Iterator<Item = String>, known: &[&[Flag]]) -> Outcome<(Given, Option<String>)> {
    let mut given = Given::default();
    while let Some(word) = words.next() {
        if word == "--" {
            return Ok((given, words.next()));
        }
        if !word.starts_with('-') || word == "-" {
            return Ok((given, Some(word)));
        }
        let (name, inline) = match word.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (word.as_str(), None),
        };
        let flag = known.iter().copied().flatten().find(|flag| flag.name == name || flag.short == name);
        let flag = flag.ok_or_else(|| invalid(name, "no such flag; --help lists them"))?;
        let value = match (flag.value.is_empty(), inline) {
            (true, Some(text)) if text == "false" => continue,
            (true, _) => String::new(),
            (false, Some(text)) => text,
            (false, None) => words.next().ok_or_else(|| invalid(flag.name, "needs a value"))?,
        };
        given.0.push((flag.name, value));
    }
    Ok((given, None))
}

/// Flags and the operands after them.
pub(crate) fn command_line(command: &Command, words: &mut impl Iterator<Item = String>) -> Outcome<(Given, Vec<String>)> {
    let (given, first) = flags(words, command.flags)?;
    let operands: Vec<String> = first.into_iter().chain(words).collect();
    let (fewest, most) = command.count;
    if !given.has("--help") && !(fewest..=most).contains(&operands.len()) {
        return Err(invalid(command.name, &format!("wrong number of operands; usage: {} {}", command.name, command.operands)));
    }
    Ok((given, operands))
}

/// The help of the program.
pub(crate) fn usage(global: &[Flag], commands: &[Command]) -> String {
    let mut text = "windlass-oci [FLAGS] COMMAND [FLAGS] [OPERANDS]\n\n".to_owned();
    list(&mut text, global);
    text.push_str("\ncommands (COMMAND --help lists its flags)\n");
    for command in commands {
        let _ = writeln!(text, "  {:<34}{}", format!("{} {}", command.name, command.operands), command.about);
    }
    text
}

/// The help of a command.
pub(crate) fn help(command: &Command) -> String {
    let mut text = format!("windlass-oci {} [FLAGS] {}: {}\n\n", command.name, command.operands, command.about);
    for flags in command.flags {
        list(&mut text, flags);
    }
    text
}

fn list(text: &mut String, flags: &[Flag]) {
    for flag in flags {
        let short = if flag.short.is_empty() { String::new() } else { format!(", {}", flag.short) };
        let _ = writeln!(text, "  {:<34}{}", format!("{}{short} {}", flag.name, flag.value), flag.about);
    }
}
