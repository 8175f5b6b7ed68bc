//! That a container ends once, whoever says so: its monitor's event, the loss of its monitor, or a start that failed. Each of them may come
//! at the same moment as another. While a start is under way its outcome decides: an end that comes meanwhile waits for it.

use super::Exit;
use std::sync::{Mutex, MutexGuard};

const POISON: &str = "never poisoned: no panic while held";

/// Held while an end is published, so that whoever comes second finds it published.
pub(super) struct Ending(Mutex<Stage>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Alive,
    /// A start is under way, and the end that came meanwhile.
    Starting(Option<Exit>),
    Ended,
}

/// A start under way. Dropping it says that the start is over, however it went, also when its caller has gone.
pub(super) struct Starting<'a, P: Fn(Exit)> {
    ending: &'a Ending,
    publish: P,
}

impl Ending {
    pub(super) fn new(ended: bool) -> Ending {
        Ending(Mutex::new(if ended { Stage::Ended } else { Stage::Alive }))
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.0.lock().expect(POISON)
    }

    /// Takes word of an end; the first publishes it.
    pub(super) fn exited(&self, exit: Exit, publish: impl FnOnce(Exit)) {
        let mut stage = self.stage();
        match *stage {
            Stage::Alive => {
                *stage = Stage::Ended;
                publish(exit);
            }
            Stage::Starting(None) => *stage = Stage::Starting(Some(exit)),
            Stage::Starting(Some(_)) | Stage::Ended => {}
        }
    }

    /// Begins a start. `publish` is for an end that comes in the middle of it.
    pub(super) fn start<P: Fn(Exit)>(&self, publish: P) -> Starting<'_, P> {
        let mut stage = self.stage();
        if *stage == Stage::Alive {
            *stage = Stage::Starting(None);
        }
        drop(stage);
        Starting { ending: self, publish }
    }
}

impl<P: Fn(Exit)> Starting<'_, P> {
    /// The start failed, which is the container's end.
    pub(super) fn failed(self, publish: impl FnOnce()) {
        let mut stage = self.ending.stage();
        if matches!(*stage, Stage::Starting(_)) {
            *stage = Stage::Ended;
            publish();
        }
    }
}

impl<P: Fn(Exit)> Drop for Starting<'_, P> {
    fn drop(&mut self) {
        let mut stage = self.ending.stage();
        match *stage {
            Stage::Starting(None) => *stage = Stage::Alive,
            Stage::Starting(Some(exit)) => {
                *stage = Stage::Ended;
                (self.publish)(exit);
            }
            Stage::Alive | Stage::Ended => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering},
    };

    fn exit(code: i32) -> Exit {
        Exit { code, oom_killed: false, finished_at_ns: 1 }
    }

    #[test]
    fn many_words_of_an_end_are_one_end() {
        for _ in 0..200 {
            let (ending, together, published) = (Ending::new(false), Barrier::new(4), AtomicUsize::new(0));
            std::thread::scope(|scope| {
                for code in 0..4 {
                    let (ending, together, published) = (&ending, &together, &published);
                    scope.spawn(move || {
                        together.wait();
                        ending.exited(exit(code), |_| {
                            published.fetch_add(1, Ordering::SeqCst);
                        });
                        assert_eq!(published.load(Ordering::SeqCst), 1, "published when the word returns");
                    });
                }
            });
            assert_eq!(published.load(Ordering::SeqCst), 1);
        }
    }

    #[test]
    fn a_starts_outcome_goes_first() {
        let told = Mutex::new(Vec::new());
        let tell = |exit: Exit| told.lock().expect(POISON).push(exit.code);
        let ending = Ending::new(false);
        let starting = ending.start(tell);
        ending.exited(exit(128), tell);
        starting.failed(|| tell(exit(-1)));
        ending.exited(exit(128), tell);
        assert_eq!(*told.lock().expect(POISON), [-1], "a failed start is the end");

        told.lock().expect(POISON).clear();
        let ending = Ending::new(false);
        let starting = ending.start(tell);
        ending.exited(exit(3), tell);
        assert!(told.lock().expect(POISON).is_empty(), "the start goes on");
        drop(starting);
        ending.exited(exit(4), tell);
        assert_eq!(*told.lock().expect(POISON), [3], "a short program, or a caller that went");

        let ending = Ending::new(false);
        drop(ending.start(tell));
        ending.exited(exit(5), tell);
        assert_eq!(*told.lock().expect(POISON), [3, 5]);
    }
}
