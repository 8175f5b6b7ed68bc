//! Where the daemon's log goes: lines on standard error.

pub mod names;

use crate::{
    error::{Error, Result},
    telemetry::trace::{self, Spans},
};
use tracing::Level;
use tracing_subscriber::{EnvFilter, Layer, Registry, filter::filter_fn, fmt, prelude::*};

/// Begins to log, and to tell `traces` of spans. `level` is `log_level` of the configuration.
pub fn start(level: &str, traces: Option<Spans>) -> Result<()> {
    // The transport's own debugging is asked for by its name, for example log_level = "debug,h2=debug".
    let filter = EnvFilter::try_new(format!("h2=warn,hyper=warn,tower=warn,rustls=warn,{}=off,{level}", trace::TARGET))
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
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    Box::new(fmt::layer().with_writer(std::io::stderr).with_ansi(colours).with_target(false))
}
