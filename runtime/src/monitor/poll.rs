//! The epoll instance, and what its entries stand for. An entry is removed before its descriptor is closed: a child between fork
//! and exec may hold a duplicate that would keep it alive.

use crate::log::Stream;
use rustix::event::{Timespec, epoll};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Events taken at once.
const EVENTS_MAX: usize = 32;

/// What a descriptor belongs to. Numbers are keys that are never used twice, so an event of something gone is found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    Listener,
    Signals,
    Connection(u64),
    ContainerReport(u64),
    Output(u64, Stream),
    ExecReport(u64),
    CheckpointReport(u64),
}

impl Source {
    fn encode(self) -> u64 {
        match self {
            Source::Listener => 0,
            Source::Signals => 1,
            Source::Connection(key) => key << 3 | 2,
            Source::ContainerReport(key) => key << 3 | 3,
            Source::Output(key, Stream::Stdout) => key << 3 | 4,
            Source::Output(key, Stream::Stderr) => key << 3 | 5,
            Source::ExecReport(key) => key << 3 | 6,
            Source::CheckpointReport(key) => key << 3 | 7,
        }
    }

    fn decode(data: u64) -> Source {
        let key = data >> 3;
        match data & 7 {
            0 => Source::Listener,
            1 => Source::Signals,
            2 => Source::Connection(key),
            3 => Source::ContainerReport(key),
            4 => Source::Output(key, Stream::Stdout),
            5 => Source::Output(key, Stream::Stderr),
            6 => Source::ExecReport(key),
            _ => Source::CheckpointReport(key),
        }
    }
}

pub(super) struct Poll {
    epoll: OwnedFd,
}

impl Poll {
    pub(super) fn new() -> std::io::Result<Poll> {
        Ok(Poll { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Watches for input, end of file and errors.
    pub(super) fn add(&self, fd: impl AsFd, source: Source) -> std::io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(source.encode()), epoll::EventFlags::IN)?)
    }

    /// Watches for room for output as well, or no longer.
    pub(super) fn want_output(&self, fd: impl AsFd, source: Source, wanted: bool) {
        let output = if wanted { epoll::EventFlags::OUT } else { epoll::EventFlags::empty() };
        let data = epoll::EventData::new_u64(source.encode());
        let _ = epoll::modify(&self.epoll, fd, data, epoll::EventFlags::IN | output);
    }

    pub(super) fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// What is ready, at the latest after `timeout`.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> std::io::Result<Vec<Source>> {
        let timeout = timeout.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() });
        let mut events = Vec::with_capacity(EVENTS_MAX);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) => Ok(events.into_iter().map(|event| Source::decode(event.data.u64())).collect()),
            Err(rustix::io::Errno::INTR) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_survives_its_encoding() {
        for source in [
            Source::Listener,
            Source::Signals,
            Source::Connection(1),
            Source::ContainerReport(2),
            Source::Output(3, Stream::Stdout),
            Source::Output(4, Stream::Stderr),
            Source::ExecReport(1 << 40),
            Source::CheckpointReport(5),
        ] {
            assert_eq!(Source::decode(source.encode()), source);
        }
    }
}
