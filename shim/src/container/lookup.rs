//! Lookups of what a request names on the host: volumes, devices, profiles. The file system behind such a path (NFS, FUSE) may not answer, and
//! the thread that asks it then hangs for as long. So they are made in threads beside those of the requests, of which there is a limited
//! number, each answer is waited for a limited time, and a path that has not answered is not asked again before it does.

use crate::error::{Error, Kind, Result};
use std::{
    fmt::Display,
    mem,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tracing::Span;

/// Longest wait for one answer. Kubelet waits two minutes for a container.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Threads of all lookups: half of the blocking ones that the runtime has, so that there are always some for everything else.
const THREADS_MAX: usize = 256;

/// The lookups of a node.
pub struct Lookups {
    threads: Arc<Semaphore>,
    overdue: Overdue,
}

/// Paths that were not answered for in time, each once for every thread that still asks for it.
type Overdue = Arc<Mutex<Vec<PathBuf>>>;

impl Default for Lookups {
    fn default() -> Lookups {
        Lookups { threads: Arc::new(Semaphore::new(THREADS_MAX)), overdue: Overdue::default() }
    }
}

impl Lookups {
    /// The lookups of one request, whose caller waits for `limit`.
    pub(crate) fn begin(&self, limit: Option<Duration>) -> Looking {
        Looking {
            threads: self.threads.clone(),
            overdue: self.overdue.clone(),
            limit: limit.map_or(ANSWER_LIMIT, |limit| limit.min(ANSWER_LIMIT)),
            now: Arc::new(Mutex::new(Now {
                what: String::new(),
                path: PathBuf::new(),
                since: Instant::now(),
                hold: Hold::Waited,
            })),
        }
    }
}

/// The lookups of one request. Clones are the same ones.
#[derive(Clone)]
pub(crate) struct Looking {
    threads: Arc<Semaphore>,
    overdue: Overdue,
    limit: Duration,
    now: Arc<Mutex<Now>>,
}

/// What is being looked at.
struct Now {
    what: String,
    path: PathBuf,
    since: Instant,
    hold: Hold,
}

/// Who waits for the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hold {
    Waited,
    Ended,
    GivenUp,
}

fn locked<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says that a thread has ended, however it did.
struct Thread(Looking);

impl Drop for Thread {
    fn drop(&mut self) {
        let mut now = locked(&self.0.now);
        if mem::replace(&mut now.hold, Hold::Ended) == Hold::GivenUp {
            let mut overdue = locked(&self.0.overdue);
            if let Some(place) = overdue.iter().position(|path| *path == now.path) {
                overdue.swap_remove(place);
            }
            tracing::info!(path = %now.path.display(), "the file system answers that was given up");
        }
    }
}

impl Looking {
    /// Says that `path`, which `what` of the request names, is looked at next. Fails where it is overdue from an earlier request, and where
    /// nobody waits for this one any more.
    pub(crate) fn at(&self, what: impl Display, path: &Path) -> Result<()> {
        let mut now = locked(&self.now);
        if now.hold == Hold::GivenUp {
            return Err(Error::new(Kind::Deadline, "given up"));
        }
        if locked(&self.overdue).iter().any(|overdue| overdue == path) {
            let why = "its file system does not answer, and an earlier request still waits for it";
            return Err(Error::new(Kind::Deadline, format!("{what}: {why}")));
        }
        (now.what, now.path, now.since) = (what.to_string(), path.to_owned(), Instant::now());
        Ok(())
    }

    /// Says that the file system has answered and is asked for more of the same. `false`: nobody waits any more.
    pub(crate) fn goes_on(&self) -> bool {
        let mut now = locked(&self.now);
        now.since = Instant::now();
        now.hold == Hold::Waited
    }

    /// Runs `work`, which blocks, as long as it gets answers. One that was given up comes to its end at its next look.
    pub(crate) async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
        let busy = |first: String| {
            Error::new(
                Kind::Deadline,
                format!("too many lookups wait for file systems that do not answer, the first for {first}"),
            )
        };
        let turn = timeout_at(Instant::now() + self.limit, self.threads.clone().acquire_owned()).await;
        let turn =
            turn.map_err(|_| busy(locked(&self.overdue).first().map(|path| path.display().to_string()).unwrap_or_default()))?;
        let turn = turn.map_err(|_| Error::internal("lookups have ended"))?;
        {
            let mut now = locked(&self.now);
            (now.hold, now.since) = (Hold::Waited, Instant::now());
        }
        let (own, span) = (self.clone(), Span::current());
        let mut running = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let _thread = Thread(own);
            span.in_scope(work)
        });
        loop {
            let deadline = locked(&self.now).since + self.limit;
            if let Ok(done) = timeout_at(deadline, &mut running).await {
                return done.unwrap_or_else(|error| Err(Error::internal(format!("look at the host's files: {error}"))));
            }
            if let Some(error) = self.give_up() {
                return Err(error);
            }
        }
    }

    /// Gives a thread up that has had its time. `None`: it goes on, or has ended.
    fn give_up(&self) -> Option<Error> {
        let mut now = locked(&self.now);
        if now.hold == Hold::Ended || now.since.elapsed() < self.limit {
            return None;
        }
        now.hold = Hold::GivenUp;
        locked(&self.overdue).push(now.path.clone());
        tracing::warn!(path = %now.path.display(), limit = ?self.limit, "a file system does not answer");
        let message = format!("{}: its file system does not answer (waited {:?})", now.what, self.limit);
        Some(Error::new(Kind::Deadline, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn error<T>(outcome: Result<T>) -> String {
        outcome.err().map(|error| error.message).unwrap_or_default()
    }

    #[tokio::test]
    async fn a_path_without_an_answer_is_given_up_and_not_asked_again_before_it_answers() {
        let lookups = Lookups::default();
        let (answer, asked) = mpsc::channel::<()>();
        let looking = lookups.begin(Some(Duration::from_secs(2)));
        let own = looking.clone();
        let stuck = looking.run(move || {
            own.at("mounts: /a", Path::new("/a"))?;
            let _ = asked.recv();
            own.at("mounts: /b", Path::new("/b"))
        });
        assert_eq!(error(stuck.await), "mounts: /a: its file system does not answer (waited 2s)");
        let (next, other) = (lookups.begin(None), lookups.begin(None));
        let (own, second) = (next.clone(), other.clone());
        let refused = next.run(move || own.at("mounts: /a", Path::new("/a"))).await;
        assert!(error(refused).contains("an earlier request still waits"));
        other.run(move || second.at("mounts: /b", Path::new("/b"))).await.expect("another path is served");
        drop(answer);
        while lookups.threads.available_permits() < THREADS_MAX {
            tokio::task::yield_now().await;
        }
        next.at("mounts: /a", Path::new("/a")).expect("served again");
    }

    #[tokio::test]
    async fn work_that_gets_answers_has_all_the_time_and_one_that_finds_no_thread_says_why() {
        let lookups = Lookups { threads: Arc::new(Semaphore::new(1)), ..Lookups::default() };
        let looking = lookups.begin(Some(Duration::from_secs(2)));
        let (step, steps) = mpsc::channel::<()>();
        let own = looking.clone();
        let work = tokio::spawn(async move {
            let other = own.clone();
            own.run(move || {
                other.at("relabel /a", Path::new("/a"))?;
                while steps.recv().is_ok() {
                    assert!(other.goes_on());
                }
                Ok(())
            })
            .await
        });
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(3) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let before = locked(&looking.now).since;
            step.send(()).expect("it listens");
            while locked(&looking.now).since == before {
                tokio::task::yield_now().await;
            }
        }
        assert!(!work.is_finished());
        let waiting = lookups.begin(Some(Duration::from_millis(100))).run(|| Ok(())).await;
        assert!(error(waiting).contains("too many lookups"));
        drop(step);
        work.await.expect("no panic").expect("done");
    }
}
