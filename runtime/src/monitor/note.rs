//! The monitor's own messages: stderr, which is `monitor.log` in its run directory. Bounded for its whole life.

use std::fmt::Display;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most bytes that are written.
const NOTES_LIMIT_BYTES: usize = 64 * 1024;

static WRITTEN_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Writes one line.
pub(super) fn note(text: impl Display) {
    let line = format!("{}\n", text.to_string().replace('\n', " "));
    if WRITTEN_BYTES.fetch_add(line.len(), Ordering::Relaxed) + line.len() <= NOTES_LIMIT_BYTES {
        let _ = rustix::io::write(std::io::stderr(), line.as_bytes());
    }
}
