//! How a process is scheduled, on processors and on disks.

use crate::process::{Context, Kind, StepError};
use crate::sys::priority;
use oci_spec::runtime::{IOPriorityClass, LinuxSchedulerPolicy, Process, Scheduler};

/// Levels of a class of input and output.
const IO_LEVELS: std::ops::Range<i64> = 0..8;

/// Sets what the process asks for, of the calling process; what it does not ask for stays.
pub fn set_priorities(process: &Process) -> Result<(), StepError> {
    if let Some(scheduler) = process.scheduler() {
        priority::set_scheduler(&attributes(scheduler)?).context("set process.scheduler", scheduler.policy())?;
    }
    if let Some(io) = process.io_priority() {
        let class = match io.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        let level = u8::try_from(io.priority()).ok().filter(|_| IO_LEVELS.contains(&io.priority()));
        let invalid = || StepError::because(Kind::Invalid, "set process.ioPriority", io.priority(), "not 0 to 7");
        priority::set_io_priority(class, level.ok_or_else(invalid)?).context("set process.ioPriority", io.class())?;
    }
    Ok(())
}

/// What the kernel is given. Numbers that are not of the policy are left to it: it refuses them.
fn attributes(scheduler: &Scheduler) -> Result<libc::sched_attr, StepError> {
    let invalid = |field: &str, why: &str| Err(StepError::because(Kind::Invalid, "set process.scheduler", field, why));
    if scheduler.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(StepError::because(Kind::Unsupported, "use", "process.scheduler.flags", "not built"));
    }
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => return invalid("policy", "no kernel has SCHED_ISO"),
    };
    let Ok(priority) = u32::try_from(scheduler.priority().unwrap_or(0)) else { return invalid("priority", "negative") };
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return invalid("nice", "not -20 to 19");
    }
    Ok(libc::sched_attr {
        size: u32::try_from(size_of::<libc::sched_attr>()).unwrap_or_default(),
        sched_policy: policy.unsigned_abs(),
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: priority,
        sched_runtime: scheduler.runtime().unwrap_or(0),
        sched_deadline: scheduler.deadline().unwrap_or(0),
        sched_period: scheduler.period().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_is_in_force_and_nonsense_is_named() {
        let process = |json: &str| serde_json::from_str::<Process>(json).expect(json);
        let with = |extra: &str| process(&format!(r#"{{"user":{{"uid":0,"gid":0}},"cwd":"/","args":["x"],{extra}}}"#));
        // Of this thread alone.
        set_priorities(&with(
            r#""scheduler":{"policy":"SCHED_BATCH","nice":7},"ioPriority":{"class":"IOPRIO_CLASS_IDLE","priority":0}"#,
        ))
        .expect("batch");
        let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("stat");
        let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
        assert_eq!((fields[16], fields[38]), ("7", "3"), "nice and policy: {stat}");
        for (extra, named) in [
            (r#""scheduler":{"policy":"SCHED_ISO"}"#, "policy"),
            (r#""scheduler":{"policy":"SCHED_OTHER","nice":20}"#, "nice"),
            (r#""scheduler":{"policy":"SCHED_FIFO","priority":-1}"#, "priority"),
            (r#""ioPriority":{"class":"IOPRIO_CLASS_BE","priority":8}"#, "8"),
        ] {
            assert_eq!(set_priorities(&with(extra)).expect_err(extra).object, named);
        }
    }
}
