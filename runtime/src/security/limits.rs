//! Resource limits and the out-of-memory score of a process.

use crate::process::{Context, StepError};
use oci_spec::runtime::{PosixRlimit, PosixRlimitType as Type};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Sets each limit. Without CAP_SYS_RESOURCE a hard limit cannot be raised; the nearest allowed value is taken then.
pub fn set_rlimits(limits: &[PosixRlimit]) -> Result<(), StepError> {
    for limit in limits {
        let resource = resource(limit.typ());
        let wanted = Rlimit { current: value(limit.soft()), maximum: value(limit.hard()) };
        let set = match setrlimit(resource, wanted) {
            Err(rustix::io::Errno::PERM) => setrlimit(resource, nearest(wanted, getrlimit(resource))),
            other => other,
        };
        set.context("set rlimit", limit.typ())?;
    }
    Ok(())
}

/// Soft and hard value as [`set_rlimits`] would set them, for a program that fails where it may not raise one. A hard limit that may be
/// raised is, of the calling process.
pub fn reachable_rlimit(limit: &PosixRlimit) -> (u64, u64) {
    let own = getrlimit(resource(limit.typ()));
    let wanted = Rlimit { current: value(limit.soft()), maximum: value(limit.hard()) };
    let near = nearest(wanted, own);
    let raised = Rlimit { current: own.current, maximum: wanted.maximum };
    if near.maximum == wanted.maximum || setrlimit(resource(limit.typ()), raised).is_ok() {
        return (limit.soft(), limit.hard());
    }
    (near.current.unwrap_or(u64::MAX), near.maximum.unwrap_or(u64::MAX))
}

fn nearest(wanted: Rlimit, own: Rlimit) -> Rlimit {
    let least = |a: Option<u64>, b: Option<u64>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    };
    let maximum = least(wanted.maximum, own.maximum);
    Rlimit { current: least(wanted.current, maximum), maximum }
}

/// RLIM_INFINITY is `None`.
fn value(limit: u64) -> Option<u64> {
    (limit != u64::MAX).then_some(limit)
}

fn resource(typ: Type) -> Resource {
    match typ {
        Type::RlimitCpu => Resource::Cpu,
        Type::RlimitFsize => Resource::Fsize,
        Type::RlimitData => Resource::Data,
        Type::RlimitStack => Resource::Stack,
        Type::RlimitCore => Resource::Core,
        Type::RlimitRss => Resource::Rss,
        Type::RlimitNproc => Resource::Nproc,
        Type::RlimitNofile => Resource::Nofile,
        Type::RlimitMemlock => Resource::Memlock,
        Type::RlimitAs => Resource::As,
        Type::RlimitLocks => Resource::Locks,
        Type::RlimitSigpending => Resource::Sigpending,
        Type::RlimitMsgqueue => Resource::Msgqueue,
        Type::RlimitNice => Resource::Nice,
        Type::RlimitRtprio => Resource::Rtprio,
        Type::RlimitRttime => Resource::Rttime,
    }
}

/// Writes oom_score_adj of the calling process. Where the kernel refuses a lower value than the inherited one, that one stays:
/// it is the nearest allowed. Through the host's /proc.
pub fn set_oom_score(score: i32) -> Result<(), StepError> {
    match std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        other => other.context("set oom_score_adj", score),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_allowed_limit_keeps_within_the_hard_one() {
        let limit = |current, maximum| Rlimit { current, maximum };
        for (wanted, own, expected) in [
            (limit(Some(5), Some(10)), limit(Some(1), Some(4)), limit(Some(4), Some(4))),
            (limit(None, None), limit(Some(1), Some(4)), limit(Some(4), Some(4))),
            (limit(Some(2), Some(3)), limit(None, None), limit(Some(2), Some(3))),
        ] {
            assert_eq!(nearest(wanted, own), expected);
        }
    }
}
