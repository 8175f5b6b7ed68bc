//! System calls that fail at will in a daemon, its monitors and their children, by a seccomp filter whose notifications come here
//! (seccomp_unotify(2), Linux 5.19 for `WAIT_KILLABLE_RECV`). Each such call of theirs waits for a word: go on, or this errno. Nothing of
//! the programs is changed, and the kernel is the real one.

mod calls;
mod filter;

pub use calls::{Place, Program};

use anyhow::{Context, Result, ensure};
use filter::Listener;
use nix::errno::Errno;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

/// One call: of those of its step that are at this place, which one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    pub place: Place,
    /// From 1.
    pub occurrence: u32,
}

/// Makes calls fail in everything that was started on its watch. It must live as long as that: without it, those calls fail with ENOSYS.
#[derive(Default)]
pub struct Injector {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    /// Calls of the step that is recorded, in their order.
    recorded: Option<Vec<Call>>,
    seen: BTreeMap<Place, u32>,
    armed: Option<(Call, Errno)>,
    hit: bool,
}

impl Injector {
    /// Does `work` on a thread of the caller's namespaces. Every process that it starts, and all that they start, is watched.
    pub fn watch<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let (send, receive) = mpsc::channel::<Listener>();
        let shared = self.shared.clone();
        // Before the filter is there: a thread that has it could not make one that answers.
        thread::Builder::new().name("faults".into()).spawn(move || {
            if let Ok(listener) = receive.recv() {
                serve(&listener, &shared);
            }
        })?;
        let filtered = move || {
            send.send(filter::install()?).ok().context("nobody listens to the filter")?;
            work()
        };
        thread::scope(|scope| scope.spawn(filtered).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes every call from now on.
    pub fn record(&self) {
        *self.shared() = Shared { recorded: Some(Vec::new()), ..Shared::default() };
    }

    /// What was noted.
    pub fn recorded(&self) -> Result<Vec<Call>> {
        std::mem::take(&mut *self.shared()).recorded.context("nothing was recorded")
    }

    /// Makes the call fail, once, when it comes.
    pub fn arm(&self, call: &Call, errno: Errno) -> Result<()> {
        let mut shared = self.shared();
        ensure!(shared.armed.is_none(), "one fault at a time");
        *shared = Shared { armed: Some((call.clone(), errno)), ..Shared::default() };
        Ok(())
    }

    /// Makes nothing fail any more; whether something did.
    pub fn disarm(&self) -> bool {
        std::mem::take(&mut *self.shared()).hit
    }
}

impl Shared {
    /// What becomes of a call.
    fn verdict(&mut self, place: Place) -> Option<Errno> {
        let count = self.seen.entry(place.clone()).or_default();
        *count += 1;
        let call = Call { place, occurrence: *count };
        if let Some(recorded) = &mut self.recorded {
            recorded.push(call);
            return None;
        }
        let (_, errno) = self.armed.as_ref().filter(|(armed, _)| !self.hit && *armed == call)?;
        self.hit = true;
        Some(*errno)
    }
}

/// Answers until all who could ask are gone.
fn serve(listener: &Listener, shared: &Mutex<Shared>) {
    while let Some(notice) = listener.next() {
        let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = {
            let shared = lock();
            shared.recorded.is_some()
                || shared.armed.as_ref().is_some_and(|(call, _)| !shared.hit && call.place.number == notice.number)
        };
        let place = if wanted { calls::place(&notice) } else { None };
        let verdict = place.and_then(|place| lock().verdict(place));
        listener.answer(&notice, verdict);
    }
}
