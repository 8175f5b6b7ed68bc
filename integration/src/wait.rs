//! Waiting for a condition, with a bound.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(5);

/// Asks `check` until it gives something; fails, naming `what`, when it fails or after 15 s.
pub fn until<T>(what: &str, mut check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = check()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {} s", LIMIT.as_secs());
        }
        std::thread::sleep(PAUSE);
    }
}
