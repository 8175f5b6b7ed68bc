//! Many pods made and removed, some at a time: whether the last starts as fast as the first.

use crate::client::Client;
use anyhow::{Result, bail, ensure};
use std::{
    fmt,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};
use windlass_proto::cri::PodSandboxConfig;

/// How many of something, where `variable` of the environment sets no other number.
pub fn number(variable: &str, otherwise: usize) -> Result<usize> {
    Ok(std::env::var(variable).map_or(Ok(otherwise), |number| number.parse())?)
}

/// What a soak took, in its order.
#[derive(Debug)]
pub struct Report {
    width: usize,
    whole: Duration,
    runs: Vec<Duration>,
    removals: Vec<Duration>,
}

/// Runs and removes pods that `config` describes, `clients` of them at a time, until there were `pods`.
pub fn run(clients: Vec<Client>, pods: usize, config: impl Fn() -> PodSandboxConfig + Sync) -> Result<Report> {
    let (begun, next, width) = (Instant::now(), AtomicUsize::new(0), clients.len());
    let worker = |client: Client| -> Result<Vec<(Instant, Duration, Duration)>> {
        let mut times = Vec::new();
        while next.fetch_add(1, Ordering::Relaxed) < pods {
            let start = Instant::now();
            let id = client.run(&config())?;
            let ran = Instant::now();
            client.remove(&id)?;
            times.push((start, ran - start, ran.elapsed()));
        }
        Ok(times)
    };
    let mut times = std::thread::scope(|scope| -> Result<Vec<_>> {
        let worker = &worker;
        let threads: Vec<_> = clients.into_iter().map(|client| scope.spawn(move || worker(client))).collect();
        let mut all = Vec::new();
        for thread in threads {
            match thread.join() {
                Ok(times) => all.extend(times?),
                Err(_) => bail!("a worker panicked"),
            }
        }
        Ok(all)
    })?;
    ensure!(times.len() == pods, "{} pods of {pods}", times.len());
    times.sort_unstable();
    let (runs, removals) = times.into_iter().map(|(_, run, removal)| (run, removal)).unzip();
    Ok(Report { width, whole: begun.elapsed(), runs, removals })
}

impl Report {
    /// Medians of RunPodSandbox in the first and in the last tenth.
    pub fn ends(&self) -> (Duration, Duration) {
        let tenth = (self.runs.len() / 10).max(1);
        (middle(&self.runs[..tenth]), middle(&self.runs[self.runs.len() - tenth..]))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = self.ends();
        write!(
            formatter,
            "{} pods, {} at a time, in {:.1?}: RunPodSandbox median {:.1?}, of the first tenth {first:.1?}, of the last {last:.1?}, longest {:.1?}; stop and removal median {:.1?}",
            self.runs.len(),
            self.width,
            self.whole,
            middle(&self.runs),
            self.runs.iter().max().copied().unwrap_or_default(),
            middle(&self.removals),
        )
    }
}

fn middle(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}
