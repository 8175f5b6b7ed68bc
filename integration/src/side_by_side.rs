//! Commands that run side by side. What each of them prints is kept, so that it can be shown whole when the command has ended.

use anyhow::{Context, Result};
use nix::{
    sys::wait::{Id, WaitPidFlag, waitid},
    unistd::{Pid, SysconfVar, sysconf},
};
use rustix::event::{PollFd, PollFlags, Timespec};
use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{Read, Seek},
    process::{Command, ExitStatus, Stdio},
    sync::{Mutex, PoisonError, mpsc},
    time::{Duration, Instant},
};

/// A command, and what it is called.
#[derive(Debug)]
pub struct Job {
    pub name: String,
    pub command: Command,
}

/// What a job has left.
#[derive(Debug)]
pub struct Ended {
    pub name: String,
    pub status: ExitStatus,
    /// Standard output and error, in order.
    pub output: String,
    pub took: Duration,
    /// Processor time of it and of all its descendants that were waited for: not of what it leaves to the first process, as daemons.
    pub processor: Duration,
}

/// Runs all jobs, begun in this order, at most `width` of them at once; `tell` is called as they end. One that is not done within `limit` is
/// killed, and says so. An error if one could not be run: no more are begun then.
pub fn run(jobs: Vec<Job>, width: usize, limit: Duration, mut tell: impl FnMut(Ended)) -> Result<()> {
    let waiting = Mutex::new(VecDeque::from(jobs));
    let next = || waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let (ended, told) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..width {
            let ended = ended.clone();
            scope.spawn(move || {
                while let Some(job) = next() {
                    if ended.send(run_one(job, limit)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(ended);
        told.into_iter().try_for_each(|ended| ended.map(&mut tell))
    })
}

fn run_one(Job { name, mut command }: Job, limit: Duration) -> Result<Ended> {
    // A file and no pipe: a process that outlives the command may have it open.
    let mut kept = tempfile::tempfile().context("make a file for what a command prints")?;
    let begun = Instant::now();
    command.stdin(Stdio::null()).stdout(kept.try_clone()?).stderr(kept.try_clone()?);
    let mut child = command.spawn().with_context(|| format!("run {name}"))?;
    let id = Pid::from_raw(child.id().cast_signed());
    let in_time = ends_within(id, limit).with_context(|| format!("wait for {name}"))?;
    if !in_time {
        child.kill()?;
    }
    waitid(Id::Pid(id), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT).with_context(|| format!("wait for {name}"))?;
    let processor = processor_time(id)?;
    let status = child.wait()?;
    let mut output = text_of(&mut kept)?;
    if !in_time {
        output.push_str(&format!("\nnot done within {} s: killed\n", limit.as_secs()));
    }
    Ok(Ended { name, status, output, took: begun.elapsed(), processor })
}

/// Waits for the end of a child.
fn ends_within(child: Pid, limit: Duration) -> Result<bool> {
    let child = rustix::process::Pid::from_raw(child.as_raw()).context("a number of a process")?;
    let ended = rustix::process::pidfd_open(child, rustix::process::PidfdFlags::empty())?;
    let deadline = Instant::now() + limit;
    loop {
        let rest = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
        match rustix::event::poll(&mut [PollFd::new(&ended, PollFlags::IN)], Some(&rest)) {
            Err(rustix::io::Errno::INTR) => {}
            ready => return Ok(ready? > 0),
        }
    }
}

fn text_of(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes).context("read what a command printed")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Fields 14 to 17 of proc_pid_stat(5): of a process that has ended and of its descendants, as long as nobody has waited for it.
fn processor_time(process: Pid) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let after_name = text.rsplit_once(") ").context("a name in brackets in /proc/<pid>/stat")?.1;
    let ticks = after_name.split(' ').skip(11).take(4).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("ticks of a second")?.cast_unsigned();
    Ok(Duration::from_millis(ticks * 1000 / per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn shell(name: &str, script: &str) -> Job {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Job { name: name.into(), command }
    }

    #[test]
    fn outputs_stay_whole_and_processor_time_of_descendants_counts() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().display();
        // Each ends only if the other runs at the same time.
        let meets = |own: &str, other: &str| {
            format!("echo {own} 1; touch {path}/{own}; until test -e {path}/{other}; do sleep 0.01; done; echo {own} 2 >&2")
        };
        let busy = "sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done'; exit 3";
        let jobs = vec![shell("a", &meets("a", "b")), shell("b", &meets("b", "a")), shell("busy", busy)];
        let mut ended = Vec::new();
        run(jobs, 2, LONG, |one| ended.push(one)).expect("a run");
        ended.sort_by(|a, b| a.name.cmp(&b.name));
        let said: Vec<_> = ended.iter().map(|one| (one.output.as_str(), one.status.code())).collect();
        assert_eq!(said, [("a 1\na 2\n", Some(0)), ("b 1\nb 2\n", Some(0)), ("", Some(3))]);
        assert!(ended[2].processor >= Duration::from_millis(50), "{:?}", ended[2].processor);
    }

    #[test]
    fn a_command_that_does_not_end_is_killed_and_says_so() {
        let mut ended = Vec::new();
        let jobs = vec![shell("long", "echo begun; exec sleep 1000")];
        run(jobs, 1, Duration::from_secs(2), |one| ended.push(one)).expect("a run");
        assert_eq!(ended[0].output, "begun\n\nnot done within 2 s: killed\n");
        assert!(!ended[0].status.success());
    }

    #[test]
    fn a_command_that_is_not_there_is_an_error() {
        let jobs = vec![Job { name: "nothing".into(), command: Command::new("/no/such/program") }];
        let error = run(jobs, 3, LONG, |_| ()).expect_err("no program");
        assert_eq!(error.to_string(), "run nothing");
    }
}
