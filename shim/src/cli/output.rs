//! How results are printed: lines, tables, JSON, and figures as people read them.

use crate::{
    error::{Error, Result},
    node::now_ns,
};
use clap::ValueEnum;
use serde::Serialize;
use std::io::Write;

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

/// A line of the result. A reader that has gone away has seen enough.
pub(super) fn line(text: impl std::fmt::Display) -> Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| Error::io("write the result", error)),
    }
}

/// A value as one line.
pub(super) fn json(value: &impl Serialize) -> Result<()> {
    line(serde_json::to_string(value).map_err(|error| Error::internal(format!("encode the result: {error}")))?)
}

/// A value in lines.
pub(super) fn pretty(value: &impl Serialize) -> Result<()> {
    line(serde_json::to_string_pretty(value).map_err(|error| Error::internal(format!("encode the result: {error}")))?)
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
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.as_ref().len()), 0);
        for (width, cell) in widths.iter_mut().zip(row.as_ref()) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let cells = row.as_ref().iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
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
