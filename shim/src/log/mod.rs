//! Where the daemon's log goes: lines on standard error, or entries with fields to systemd's journal when standard error leads there.

mod journal;
pub mod names;

use crate::{
    error::{Error, Result},
    telemetry::trace::{self, Spans},
};
use journal::Journal;
use rustix::fs::fstat;
use tracing::Level;
use tracing_subscriber::{EnvFilter, Layer, Registry, filter::filter_fn, fmt, prelude::*};

/// Begins to log, and to tell `traces` of spans. `level` is `log_level` of the configuration.
pub fn start(level: &str, traces: Option<Spans>) -> Result<()> {
    // The transport's own debugging is asked for by its name, for example log_level = "debug,h2=debug". Errors are told whatever is asked
    // for of parts.
    let filter = EnvFilter::try_new(format!("error,h2=warn,hyper=warn,tower=warn,rustls=warn,{}=off,{level}", trace::TARGET))
        .map_err(|error| Error::invalid(format!("log_level {level:?}: {error}")))?;
    if traces.is_some() {
        names::keep();
    }
    let ours =
        filter_fn(|metadata| metadata.is_span() && metadata.target().starts_with("windlass") && *metadata.level() <= Level::INFO);
    let traces = traces.map(|traces| traces.with_filter(ours));
    tracing_subscriber::registry().with(sink().with_filter(filter)).with(traces).init();
    Ok(())
}

fn sink() -> Box<dyn Layer<Registry> + Send + Sync> {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    if leads_to(&stream, std::io::stderr())
        && let Ok(journal) = Journal::open()
    {
        names::keep();
        return Box::new(journal);
    }
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    Box::new(fmt::layer().with_writer(std::io::stderr).with_ansi(colours).with_target(false))
}

/// Whether `stream`, the value of JOURNAL_STREAM (systemd.exec(5): device and inode in decimal), is this file. A program that redirects
/// the output of its children leaves them the variable.
fn leads_to(stream: &str, file: impl std::os::fd::AsFd) -> bool {
    let Some((device, inode)) = stream.split_once(':') else { return false };
    fstat(file).is_ok_and(|stat| device.parse() == Ok(stat.st_dev) && inode.parse() == Ok(stat.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn only_the_file_that_the_variable_names_is_the_journal() {
        let (file, other) = (tempfile::tempfile().expect("a file"), tempfile::tempfile().expect("a file"));
        let metadata = file.metadata().expect("metadata");
        let stream = format!("{}:{}", metadata.dev(), metadata.ino());
        assert!(leads_to(&stream, &file));
        assert!(!leads_to(&stream, &other));
        for wrong in ["", "1", ":", "x:y"] {
            assert!(!leads_to(wrong, &file), "{wrong:?}");
        }
    }
}
