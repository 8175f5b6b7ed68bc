//! Waiting for a condition, with a bound.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// The bound where a test names none: far above what anything takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(20);
const PAUSE: Duration = Duration::from_millis(5);

/// Asks `check` until it gives something; fails, naming `what`, when it fails or after 20 s.
pub fn until<T>(what: &str, check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    until_within(LIMIT, what, check)
}

/// The same with a bound of its own.
pub fn until_within<T>(limit: Duration, what: &str, mut check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = check()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {limit:?}");
        }
        std::thread::sleep(PAUSE);
    }
}

/// Asks `check` until it says yes; how long that took.
pub fn until_true(what: &str, mut check: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let begun = Instant::now();
    until(what, || Ok(check()?.then_some(()))).map(|()| begun.elapsed())
}
