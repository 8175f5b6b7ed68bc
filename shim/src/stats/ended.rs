//! Processor time of a pod's containers that have ended, for pods without a cgroup of their own: their use is a sum, and must not fall when
//! one of its parts goes. A container's own cgroup tells its time until the container is removed.

use std::collections::HashMap;

/// Held while a sum is made, so that none of its parts goes meanwhile.
#[derive(Debug, Default)]
pub struct Ended {
    removed_ns: u64,
    by_container: HashMap<String, u64>,
}

impl Ended {
    /// Begins with the time of those that were removed before.
    pub fn since(removed_ns: u64) -> Ended {
        Ended { removed_ns, by_container: HashMap::new() }
    }

    /// Keeps the time of one that has ended, by the first reading.
    pub(super) fn note(&mut self, id: &str, read: impl FnOnce() -> Option<u64>) {
        if !self.by_container.contains_key(id)
            && let Some(usage_ns) = read()
        {
            self.by_container.insert(id.to_owned(), usage_ns);
        }
    }

    /// One is removed; returns the time of all that are.
    pub fn removed(&mut self, id: &str) -> u64 {
        self.removed_ns += self.by_container.remove(id).unwrap_or(0);
        self.removed_ns
    }

    /// The time of all but those that are counted as living.
    pub fn sum_ns(&self, living: &[&str]) -> u64 {
        let noted = self.by_container.iter().filter(|(id, _)| !living.contains(&id.as_str()));
        self.removed_ns + noted.map(|(_, usage_ns)| usage_ns).sum::<u64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_stays_used() {
        let mut ended = Ended::since(100);
        ended.note("a", || Some(10));
        ended.note("a", || Some(99));
        ended.note("b", || Some(5));
        ended.note("c", || None);
        assert_eq!((ended.sum_ns(&[]), ended.sum_ns(&["b"])), (115, 110));
        assert_eq!(ended.removed("a"), 110);
        assert_eq!(ended.removed("unknown"), 110);
        assert_eq!(ended.sum_ns(&[]), 115);
    }
}
