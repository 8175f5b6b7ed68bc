//! Pulls: seconds, CPU seconds, bytes written and disk, of each image with each runtime.

use super::{
    Peer,
    images::{Measured, limit},
    rival::{Ground, Kind, Network},
    table::{Table, at},
};
use anyhow::Result;
use std::time::{Duration, Instant};

/// Wait for what a runtime does after it has answered: containerd collects its garbage, CRI-O syncs.
const SETTLE: Duration = Duration::from_secs(1);

/// Pulls every image in turn with each runtime, so many times, and prints the table.
pub(super) fn measure(ground: &Ground<'_>, kinds: &[Kind], images: &[Measured], rounds: usize) -> Result<()> {
    // Two containerds would be measured alike: the OCI runtime has no part in a pull.
    let kinds = kinds.iter().copied().filter(|kind| *kind != Kind::ContainerdCrun);
    let peers = kinds.map(|kind| Peer::start(ground, kind, Network::Own)).collect::<Result<Vec<_>>>()?;
    let mut table = Table::default();
    for round in 0..=rounds {
        for image in images {
            for peer in &peers {
                let sample = one(peer, &format!("{}/{}:1", ground.registry.host(), image.name))?;
                // The first round warms.
                if round > 0 {
                    sample.enter(&mut table, &image.title, peer.rival.kind.name());
                }
            }
        }
    }
    let place = if ground.tmpfs { "tmpfs" } else { "disk" };
    println!("\nPulls from loopback to {place}, {rounds} rounds, median, and its ratio to Windlass's\n\n{}", table.markdown());
    let folder = tempfile::tempdir()?;
    for image in images {
        let seconds = (0..3).map(|_| limit(image, folder.path())).collect::<Result<Vec<_>>>()?;
        println!("the same layers unpacked to plain files, one thread: {}: {:.2} s", image.title, at(&seconds, 0.5));
    }
    peers.into_iter().try_for_each(|peer| peer.rival.stop())
}

struct Sample {
    seconds: f64,
    cpu: f64,
    written: f64,
    disk: f64,
}

impl Sample {
    fn enter(&self, table: &mut Table, title: &str, runtime: &str) {
        let rows = [("s", self.seconds), ("CPU s", self.cpu), ("MB written", self.written), ("MB on disk", self.disk)];
        for (unit, value) in rows {
            table.add(&format!("{title}: {unit}"), runtime, value);
        }
    }
}

fn one(peer: &Peer, image: &str) -> Result<Sample> {
    let rival = &peer.rival;
    let disk = rival.disk_bytes()?;
    let (cpu, written, begin) = (rival.cpu_seconds(), rival.written_bytes(), Instant::now());
    peer.pull(image)?;
    let seconds = begin.elapsed().as_secs_f64();
    let (cpu, written) = (rival.cpu_seconds() - cpu, rival.written_bytes().saturating_sub(written));
    let disk = rival.disk_bytes()?.saturating_sub(disk);
    peer.remove_image(image)?;
    std::thread::sleep(SETTLE);
    Ok(Sample { seconds, cpu, written: written as f64 / 1e6, disk: disk as f64 / 1e6 })
}
