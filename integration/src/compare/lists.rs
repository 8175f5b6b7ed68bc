//! Lists and statistics of many containers. A runtime may give an answer again while it is young, and then the measure is of its memory
//! and not of its looking: so statistics are asked for at three distances, and each is a row of its own.

use super::{Peer, table::Table};
use crate::client::Client;
use std::time::{Duration, Instant};
use tonic::Status;
use windlass_proto::cri;

/// Rounds behind one that warms.
const ROUNDS: usize = 15;

/// How long before a call the one before it was, and what that means for Windlass.
const DISTANCES: [(&str, Duration, usize); 3] = [
    // Longer than any age up to which it gives the size of a writable layer again: as a kubelet asks.
    ("11 s after the last", Duration::from_secs(11), 3),
    // Longer than the age up to which it gives a sample again.
    ("1.1 s after the last", Duration::from_millis(1100), ROUNDS),
    // What was sampled just now, from memory.
    ("at once again", Duration::ZERO, ROUNDS),
];

/// Adds the rows of `count` containers.
pub(super) fn measure(peer: &Peer, count: usize, table: &mut Table) {
    let bare = Rounds { peer, count, distance: Duration::ZERO, rounds: ROUNDS };
    bare.time(&format!("ListContainers of {count}, ms"), table, &|client| {
        client.list_containers(cri::ListContainersRequest::default()).map(|reply| reply.containers.len())
    });
    for (when, distance, rounds) in DISTANCES {
        let rounds = Rounds { peer, count, distance, rounds };
        rounds.time(&format!("ListContainerStats of {count}, {when}, ms"), table, &|client| {
            client.list_container_stats(cri::ListContainerStatsRequest::default()).map(|reply| reply.stats.len())
        });
        rounds.time(&format!("ListPodSandboxStats of {count}, {when}, ms"), table, &|client| {
            client.list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default()).map(|reply| reply.stats.len())
        });
    }
}

struct Rounds<'a> {
    peer: &'a Peer,
    count: usize,
    distance: Duration,
    rounds: usize,
}

impl Rounds<'_> {
    /// Times the call; what gives fewer than all is no sample. The processor's time is that of everything that the runtime has.
    fn time(&self, title: &str, table: &mut Table, call: &dyn Fn(&Client) -> Result<usize, Status>) {
        let name = self.peer.rival.kind.name();
        for round in 0..=self.rounds {
            std::thread::sleep(self.distance);
            let (cpu, begin) = (self.peer.rival.cpu_seconds(), Instant::now());
            let given = call(&self.peer.client);
            let (took, cpu) = (begin.elapsed(), self.peer.rival.cpu_seconds() - cpu);
            match given {
                Ok(given) if given < self.count => return println!("{name}: {title}: gave {given} of {}", self.count),
                Ok(_) if round > 0 => {
                    table.add(title, name, took.as_secs_f64() * 1e3);
                    table.add(&format!("{title}: its CPU"), name, cpu * 1e3);
                }
                Ok(_) => {}
                Err(status) => return println!("{name}: {title}: {}", status.message()),
            }
        }
    }
}
