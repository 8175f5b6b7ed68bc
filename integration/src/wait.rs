//! Waiting for a condition, with a bound.

use crate::guest;
use anyhow::{Context, Result, bail};
use std::time::{Duration, Instant};

/// The bound where a test names none: far above what anything takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(5);
/// Between looks that start a program.
const LONG_PAUSE: Duration = Duration::from_millis(100);
/// The guest has one processor, on which a call of the kernel takes nine microseconds.
const GUEST_FACTOR: u32 = 3;

/// How many times longer everything may take than on a host.
pub fn factor() -> u32 {
    if guest::is_here() { GUEST_FACTOR } else { 1 }
}

/// A pause between looks that start a program, so that they are not what keeps the processor busy.
pub fn pause() {
    std::thread::sleep(LONG_PAUSE * factor());
}

/// Asks `check` until it gives something; fails, naming `what`, when it fails or after 60 s of a host.
pub fn until<T>(what: &str, check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    until_within(LIMIT, what, check)
}

/// The same with a bound of its own.
pub fn until_within<T>(limit: Duration, what: &str, mut check: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let limit = limit * factor();
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

/// Repeats `check` until it succeeds; at the bound its last error is the result, with what `standing` tells.
pub fn until_ok<T>(
    limit: Duration,
    what: &str,
    standing: impl Fn() -> String,
    mut check: impl FnMut() -> Result<T>,
) -> Result<T> {
    let limit = limit * factor();
    let deadline = Instant::now() + limit;
    loop {
        match check() {
            Ok(done) => return Ok(done),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).with_context(|| format!("{what}: not within {limit:?}\n{}", standing()));
            }
            Err(_) => pause(),
        }
    }
}

/// Asks `check` until it says yes; how long that took.
pub fn until_true(what: &str, mut check: impl FnMut() -> Result<bool>) -> Result<Duration> {
    let begun = Instant::now();
    until(what, || Ok(check()?.then_some(()))).map(|()| begun.elapsed())
}
