//! How results are printed: lines, tables, JSON, and figures as people read them.

use crate::{
    error::{Error, Kind, Result},
    node::now_ns,
};
use clap::ValueEnum;
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use serde::Serialize;
use std::{borrow::Cow, fmt::Display, future::Future, io::Write};
use tokio::sync::oneshot;

/// Digits of an id that people see.
const SHORT_ID: usize = 12;
/// What stands where nothing is known.
pub(super) const NOTHING: &str = "-";

/// Form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[value(alias = "table")]
    Text,
    /// For programs
    Json,
}

/// What a terminal obeys and does not show: control characters (U+0000-1F, U+007F-9F) and those that turn the direction of writing.
fn obeyed(character: char) -> bool {
    character.is_control() || matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A text that others may have written, as a terminal may have it: what it would obey is told by its number. `keep` is left as it is.
pub fn safe<'a>(text: &'a str, keep: &[char]) -> Cow<'a, str> {
    let told = |character: char| obeyed(character) && !keep.contains(&character);
    if !text.chars().any(told) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for character in text.chars() {
        if told(character) { out.extend(character.escape_default()) } else { out.push(character) }
    }
    Cow::Owned(out)
}

/// A line of the result for people, with nothing in it that a terminal obeys.
pub(super) fn line(text: impl Display) -> Result<()> {
    raw(safe(&text.to_string(), &[]))
}

/// A line as it is. [`Kind::Unread`]: its reader has gone away.
pub(super) fn raw(text: impl Display) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").map_err(|error| failed_write("write the result", error))
}

/// What became of a write to standard output or standard error.
pub(super) fn failed_write(operation: &str, error: std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => Error::new(Kind::Unread, "nobody reads the output any more"),
        _ => Error::io(operation, error),
    }
}

/// Work whose results are read as they come: it ends when its reader goes away, also where nothing is to be told.
pub(super) async fn while_read(work: impl Future<Output = Result<()>>) -> Result<()> {
    let (sender, gone) = oneshot::channel::<()>();
    // Errors and the other end's close are told without being asked for (poll(2)); a file has neither, and the thread ends with the program.
    std::thread::spawn(move || {
        let stdout = rustix::stdio::stdout();
        let mut watched = [PollFd::new(&stdout, PollFlags::empty())];
        let outcome = loop {
            match poll(&mut watched, None) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        match outcome {
            Ok(_) => drop(sender.send(())),
            Err(_) => std::mem::forget(sender),
        }
    });
    tokio::select! {
        done = work => done,
        _ = gone => Err(Error::new(Kind::Unread, "nobody reads the output any more")),
    }
}

/// JSON with the characters that only some terminals obey escaped as well; they stand in its strings alone.
fn encoded(text: serde_json::Result<String>) -> Result<String> {
    let text = text.map_err(|error| Error::internal(format!("encode the result: {error}")))?;
    if !text.chars().any(|character| character != '\n' && obeyed(character)) {
        return Ok(text);
    }
    let escaped = |character: char| match character {
        '\n' => "\n".to_owned(),
        other if obeyed(other) => format!("\\u{:04x}", u32::from(other)),
        other => other.to_string(),
    };
    Ok(text.chars().map(escaped).collect())
}

/// A value as one line.
pub(super) fn json(value: &impl Serialize) -> Result<()> {
    raw(encoded(serde_json::to_string(value))?)
}

/// A value in lines.
pub(super) fn pretty(value: &impl Serialize) -> Result<()> {
    raw(encoded(serde_json::to_string_pretty(value))?)
}

/// An id or digest as people see it.
pub(super) fn short(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..SHORT_ID).unwrap_or(hex)
}

/// Bytes as people read them.
pub(super) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units.get(unit).copied().unwrap_or_default()) }
}

/// A span of time as people read it: its two largest units at most.
pub(super) fn span(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, 1..=9) => format!("{minutes}m{}s", seconds % 60),
        (0, 0, _) => format!("{minutes}m"),
        (0, 1..=9, _) => format!("{hours}h{}m", minutes % 60),
        (0, ..) => format!("{hours}h"),
        (1..=9, ..) => format!("{days}d{}h", hours % 24),
        _ => format!("{days}d"),
    }
}

/// The time since a moment in nanoseconds since the epoch.
pub(super) fn age(since_ns: i64) -> String {
    match u64::try_from(now_ns().saturating_sub(since_ns)) {
        Ok(ns) if since_ns > 0 => span(ns / 1_000_000_000),
        _ => NOTHING.to_owned(),
    }
}

/// A moment in nanoseconds since the epoch, as RFC 3339 has it.
pub(super) fn moment(ns: i64) -> String {
    let time = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(ns)).ok();
    let text = time.and_then(|time| time.format(&time::format_description::well_known::Rfc3339).ok());
    text.unwrap_or_else(|| NOTHING.to_owned())
}

/// Rows under each other, as wide as their cells.
pub(super) fn table<R: AsRef<[String]>>(rows: &[R]) -> Result<()> {
    let rows: Vec<Vec<Cow<'_, str>>> = rows.iter().map(|row| row.as_ref().iter().map(|cell| safe(cell, &[])).collect()).collect();
    let mut widths: Vec<usize> = Vec::new();
    for row in &rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        line(cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

/// A row of a table.
pub(super) fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        for (bytes, expected) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_572_864, "1.5 MiB"), (u64::MAX, "16777216.0 TiB")]
        {
            assert_eq!(size(bytes), expected);
        }
        assert_eq!(short("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short("abc"), "abc");
    }

    #[test]
    fn what_a_terminal_obeys_is_told_by_its_number() {
        assert_eq!(safe("a\u{1b}[2J\nb\tc", &['\n', '\t']), "a\\u{1b}[2J\nb\tc");
        assert_eq!(safe("OK\r\n\u{9b}\u{202e}\u{7f}", &[]), "OK\\r\\n\\u{9b}\\u{202e}\\u{7f}");
        assert!(matches!(safe("plain, größer", &[]), Cow::Borrowed("plain, größer")));
        let json = encoded(serde_json::to_string_pretty(&serde_json::json!({ "a": "\u{9b}x\u{1b}" }))).expect("encoded");
        assert_eq!(json, "{\n  \"a\": \"\\u009bx\\u001b\"\n}");
    }

    #[test]
    fn spans_for_people() {
        for (seconds, expected) in [
            (0, "0s"),
            (59, "59s"),
            (61, "1m1s"),
            (600, "10m"),
            (3_700, "1h1m"),
            (36_000, "10h"),
            (90_000, "1d1h"),
            (864_000, "10d"),
        ] {
            assert_eq!(span(seconds), expected);
        }
        assert_eq!(age(0), NOTHING);
        assert_eq!(moment(1_000_000_000), "1970-01-01T00:00:01Z");
    }
}
