//! What happens to pods and containers, told in order to whoever follows it. Owns the followers and their queues. Never waits for
//! one: a follower whose queue is full is left behind and told so.

use crate::{container, node::now_ns, pod};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};
use tokio::sync::mpsc;
pub use windlass_proto::cri::ContainerEventType as EventKind;

/// Events that wait for one follower, at most.
pub const QUEUE_LIMIT: usize = 1024;
/// Followers at a time, at most.
const FOLLOWERS_MAX: usize = 64;

const POISON: &str = "never poisoned: no panic while held";

/// Something happened to a container, or to a pod when `id` is the pod's. The records are as they were just after it.
#[derive(Debug)]
pub struct Event {
    pub id: String,
    pub kind: EventKind,
    pub at_ns: i64,
    pub pod: pod::Record,
    pub containers: Vec<container::Record>,
}

/// Those who follow.
#[derive(Default)]
pub struct Events(Mutex<Followers>);

#[derive(Default)]
struct Followers {
    list: Vec<Follower>,
    ended: bool,
}

struct Follower {
    queue: mpsc::Sender<Arc<Event>>,
    left_behind: Arc<AtomicBool>,
}

/// The events since it was made.
pub struct Following {
    queue: mpsc::Receiver<Arc<Event>>,
    left_behind: Arc<AtomicBool>,
}

/// How a following ends.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The daemon ends.
    Finished,
    /// The queue was full: what came since is lost.
    LeftBehind,
}

impl Following {
    pub async fn next(&mut self) -> Result<Arc<Event>, End> {
        match self.queue.recv().await {
            Some(event) => Ok(event),
            None if self.left_behind.load(Ordering::Acquire) => Err(End::LeftBehind),
            None => Err(End::Finished),
        }
    }
}

impl Events {
    /// Follows from now on; nothing when there are too many already.
    pub fn follow(&self) -> Option<Following> {
        let mut followers = self.0.lock().expect(POISON);
        followers.list.retain(|follower| !follower.queue.is_closed());
        if followers.list.len() >= FOLLOWERS_MAX {
            return None;
        }
        let (sender, queue) = mpsc::channel(QUEUE_LIMIT);
        let left_behind = Arc::new(AtomicBool::new(false));
        if !followers.ended {
            followers.list.push(Follower { queue: sender, left_behind: left_behind.clone() });
        }
        Some(Following { queue, left_behind })
    }

    /// Tells everyone; `look` is asked for the records only when somebody follows.
    pub fn tell(&self, id: &str, kind: EventKind, look: impl FnOnce() -> (pod::Record, Vec<container::Record>)) {
        // Held while it is told, so that all see one order.
        let mut followers = self.0.lock().expect(POISON);
        if followers.list.is_empty() {
            return;
        }
        let (pod, containers) = look();
        let event = Arc::new(Event { id: id.to_owned(), kind, at_ns: now_ns(), pod, containers });
        followers.list.retain(|follower| match follower.queue.try_send(event.clone()) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            Err(mpsc::error::TrySendError::Full(_)) => {
                follower.left_behind.store(true, Ordering::Release);
                tracing::warn!(waiting = QUEUE_LIMIT, "a follower of events does not read; its stream ends");
                false
            }
        });
    }

    /// How many follow, and how many events wait for the one that is furthest behind.
    pub fn waiting(&self) -> (usize, usize) {
        let followers = self.0.lock().expect(POISON);
        let open = followers.list.iter().filter(|follower| !follower.queue.is_closed());
        let waiting = open.clone().map(|follower| QUEUE_LIMIT - follower.queue.capacity()).max();
        (open.count(), waiting.unwrap_or(0))
    }

    /// Ends every following: the daemon ends.
    pub fn end(&self) {
        let mut followers = self.0.lock().expect(POISON);
        followers.ended = true;
        followers.list.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tell(events: &Events, id: &str) {
        let pod = serde_json::json!({
            "id": "p", "config": {}, "runtime_handler": "", "created_at_ns": 1, "phase": "ready", "netns": "",
            "network_attached": false, "network": null, "cgroup_parent": "/p",
        });
        let pod = serde_json::from_value(pod).expect("a record");
        events.tell(id, EventKind::ContainerCreatedEvent, || (pod, Vec::new()));
    }

    #[tokio::test]
    async fn a_slow_follower_is_left_behind_and_the_others_are_not() {
        let events = Events::default();
        let mut slow = events.follow().expect("room");
        for number in 0..=QUEUE_LIMIT {
            tell(&events, &number.to_string());
        }
        let mut quick = events.follow().expect("room");
        tell(&events, "last");
        for number in 0..QUEUE_LIMIT {
            assert_eq!(slow.next().await.expect("queued").id, number.to_string());
        }
        assert_eq!(slow.next().await.expect_err("left behind"), End::LeftBehind);
        assert_eq!(quick.next().await.expect("told").id, "last");
        events.end();
        assert_eq!(quick.next().await.expect_err("finished"), End::Finished);
        assert_eq!(events.follow().expect("room").next().await.expect_err("finished"), End::Finished);
    }
}
