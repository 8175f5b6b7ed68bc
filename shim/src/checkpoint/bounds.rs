//! How long an operation may take, and whether anybody waits for it. One that is over has ended all that it began.

use crate::error::{Error, Kind, Result};
use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

/// Time of an operation whose caller names none.
const DEFAULT_LIMIT: Duration = Duration::from_secs(600);

/// The bounds of one operation.
pub(super) struct Bounds {
    deadline: Instant,
    gone: CancellationToken,
}

impl Bounds {
    /// Why it is over, once it is.
    async fn over(&self) -> Error {
        tokio::select! {
            () = sleep_until(self.deadline) => Error::new(Kind::Deadline, "the time for it is over"),
            () = self.gone.cancelled() => Error::new(Kind::Deadline, "the caller has gone"),
        }
    }

    /// Fails when it is over.
    pub(super) fn check(&self) -> Result<()> {
        if self.gone.is_cancelled() || Instant::now() >= self.deadline {
            return Err(Error::new(Kind::Deadline, "the time for it is over, or the caller has gone"));
        }
        Ok(())
    }

    /// Waits for `work` as long as it is not over; then `work` is dropped.
    pub(super) async fn hold<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            done = work => done,
            error = self.over() => Err(error),
        }
    }

    /// Runs `work`, which blocks. When it is over `work` cannot write any more by way of its argument, and it has ended when this returns.
    pub(super) async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(Stop) -> Result<T> + Send + 'static) -> Result<T> {
        let stop = Stop::default();
        let own = stop.clone();
        let mut running = tokio::task::spawn_blocking(move || work(own));
        tokio::select! {
            done = &mut running => done.unwrap_or_else(|error| Err(Error::internal(format!("it ended early: {error}")))),
            error = self.over() => {
                stop.0.store(true, Ordering::Relaxed);
                let _ = running.await;
                Err(error)
            }
        }
    }
}

/// Says to blocking work that it shall end.
#[derive(Debug, Default, Clone)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    /// A writer that fails from then on.
    pub(super) fn guard<W>(self, inner: W) -> Guarded<W> {
        Guarded { inner, stop: self }
    }
}

/// See [`Stop::guard`].
pub(super) struct Guarded<W> {
    inner: W,
    stop: Stop,
}

impl<W: Write> Write for Guarded<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.stop.0.load(Ordering::Relaxed) {
            return Err(io::Error::other("given up"));
        }
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Runs an operation to its end, which is soon when the caller has gone: it always lets containers go on and takes back its files.
pub(super) async fn to_its_end<T: Send + 'static, F>(limit: Option<Duration>, work: impl FnOnce(Bounds) -> F) -> Result<T>
where
    F: Future<Output = Result<T>> + Send + 'static,
{
    let gone = CancellationToken::new();
    let _guard = gone.clone().drop_guard();
    let deadline = Instant::now() + limit.unwrap_or(DEFAULT_LIMIT);
    let done = tokio::spawn(work(Bounds { deadline, gone })).await;
    done.unwrap_or_else(|error| Err(Error::internal(format!("the operation ended early: {error}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_blocks_has_ended_when_its_time_is_over() {
        let ended = Arc::new(AtomicBool::new(false));
        let told = ended.clone();
        let outcome = to_its_end(Some(Duration::from_millis(20)), |bounds| async move {
            bounds
                .blocking(move |stop| {
                    let mut writer = stop.guard(io::sink());
                    while writer.write_all(b"more").is_ok() {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    told.store(true, Ordering::Relaxed);
                    Ok(())
                })
                .await
        })
        .await;
        assert_eq!(outcome.expect_err("its time is over").kind, Kind::Deadline);
        assert!(ended.load(Ordering::Relaxed));
    }
}
