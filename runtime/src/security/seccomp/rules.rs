//! A profile as decisions by system call number, for each architecture it covers. The rules of meeting entries are those that
//! profiles are written for in the field (libseccomp as runc uses it):
//!
//! - An entry that does what the default does is left out. An unknown name is left out.
//! - An entry without arguments wins over every entry with some; among equals the first that matches.
//! - The arguments of an entry must all match; if one index comes twice, any of them is enough.
//! - A process of an architecture that the profile does not name is killed at its first call.
//! - A call newer than every call that the profile names fails with ENOSYS, so that programs fall back to an older one; not where the
//!   default lets calls pass, nor where a tracer decides.

use super::table::{Architecture, multiplexed, numbers};
use crate::process::{Kind, StepError};
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompOperator as Operator, LinuxSyscall,
};
use std::collections::BTreeSet;

/// SECCOMP_RET_* of linux/seccomp.h.
pub(super) const KILL_THREAD: u32 = 0;
const KILL_PROCESS: u32 = 0x8000_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
/// ERRNO with ENOSYS.
pub(super) const NO_CALL: u32 = ERRNO | 38;

/// Largest errno, MAX_ERRNO of the kernel; it would cut a larger one in silence.
const ERRNO_MAX: u32 = 4095;

/// One comparison of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    /// 0 to 5.
    pub(super) index: u32,
    pub(super) operator: Operator,
    pub(super) value: u64,
    /// For MASKED_EQ, whose mask is `value`.
    pub(super) second: u64,
}

/// Conditions that must all hold, and what happens then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) conditions: Vec<Condition>,
    /// What the filter returns.
    pub(super) action: u32,
}

/// What happens at one system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    /// Always this.
    Return(u32),
    /// The first rule that matches, else the default.
    Chain(Vec<Rule>),
}

/// The decisions of one architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Calls {
    pub(super) architecture: Architecture,
    /// By number, each once.
    pub(super) decisions: Vec<(u32, Decision)>,
    /// The newest call that the profile names; above it NO_CALL. `None`: the default everywhere.
    pub(super) newest: Option<u32>,
}

/// A whole profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rules {
    pub(super) default: u32,
    pub(super) architectures: Vec<Calls>,
}

fn refuse<T>(what: impl std::fmt::Display, why: &str) -> Result<T, StepError> {
    Err(StepError::because(Kind::Invalid, "compile seccomp profile", what, why))
}

/// What the filter returns for an action.
fn action(action: Action, errno: Option<u32>) -> Result<u32, StepError> {
    let value = match action {
        Action::ScmpActErrno if errno.is_some_and(|errno| errno > ERRNO_MAX) => {
            return refuse(format_args!("errnoRet {}", errno.unwrap_or(0)), "is not an errno");
        }
        Action::ScmpActTrace if errno.is_some_and(|errno| errno > 0xffff) => {
            return refuse(format_args!("errnoRet {}", errno.unwrap_or(0)), "does not fit 16 bits");
        }
        Action::ScmpActNotify => {
            let why = "there is no agent that could be notified";
            return Err(StepError::because(Kind::Unsupported, "compile seccomp profile", "SCMP_ACT_NOTIFY", why));
        }
        Action::ScmpActErrno => return Ok(ERRNO | errno.unwrap_or(libc::EPERM.unsigned_abs())),
        Action::ScmpActTrace => return Ok(TRACE | errno.unwrap_or(libc::EPERM.unsigned_abs())),
        Action::ScmpActKill | Action::ScmpActKillThread => KILL_THREAD,
        Action::ScmpActKillProcess => KILL_PROCESS,
        Action::ScmpActTrap => TRAP,
        Action::ScmpActLog => LOG,
        Action::ScmpActAllow => ALLOW,
    };
    if errno.is_some() {
        return refuse(action, "takes no errnoRet");
    }
    Ok(value)
}

fn conditions(arguments: &[LinuxSeccompArg]) -> Result<Vec<Condition>, StepError> {
    let convert = |argument: &LinuxSeccompArg| {
        let index = u32::try_from(argument.index()).ok().filter(|index| *index < 6);
        let Some(index) = index else {
            return refuse(format_args!("args.index {}", argument.index()), "a system call has arguments 0 to 5");
        };
        let second = argument.value_two().unwrap_or(0);
        Ok(Condition { index, operator: argument.op(), value: argument.value(), second })
    };
    arguments.iter().map(convert).collect()
}

/// The rules of one entry: one with all conditions, or one for each when an index repeats.
fn entry_rules(entry: &LinuxSyscall, action: u32) -> Result<Vec<Rule>, StepError> {
    let conditions = conditions(entry.args().as_deref().unwrap_or_default())?;
    let different: BTreeSet<u32> = conditions.iter().map(|condition| condition.index).collect();
    if different.len() == conditions.len() {
        return Ok(vec![Rule { conditions, action }]);
    }
    Ok(conditions.into_iter().map(|condition| Rule { conditions: vec![condition], action }).collect())
}

/// True where calls pass that the profile does not name, or somebody else decides.
fn passes(action: u32) -> bool {
    matches!(action & 0xffff_0000, ALLOW | LOG | TRACE)
}

impl Rules {
    /// Reads a profile.
    pub(super) fn new(profile: &LinuxSeccomp) -> Result<Rules, StepError> {
        let default = action(profile.default_action(), profile.default_errno_ret())?;
        let mut covered = BTreeSet::from([Architecture::NATIVE]);
        covered.extend(profile.architectures().iter().flatten().filter_map(|arch| Architecture::of(*arch)));
        let stub = !passes(default) && default != NO_CALL;
        let mut architectures: Vec<Calls> =
            covered.into_iter().map(|architecture| Calls { architecture, decisions: Vec::new(), newest: None }).collect();
        for entry in profile.syscalls().iter().flatten() {
            let action = action(entry.action(), entry.errno_ret())?;
            let rules = entry_rules(entry, action)?;
            for name in entry.names() {
                let numbers = numbers(name);
                for calls in &mut architectures {
                    let Some(number) = calls.architecture.of_all(numbers) else { continue };
                    if stub {
                        calls.newest = calls.newest.max(Some(number));
                    }
                    if action != default {
                        calls.add_all(name, number, &rules);
                    }
                }
            }
        }
        architectures.iter_mut().for_each(Calls::settle);
        Ok(Rules { default, architectures })
    }
}

impl Calls {
    fn add_all(&mut self, name: &str, number: u32, rules: &[Rule]) {
        for rule in rules {
            self.add(number, rule.clone());
        }
        if self.architecture != Architecture::X86 {
            return;
        }
        // The same call by its other way in. Arguments are behind a pointer there: what depends on them is not allowed, and
        // forbidden whatever they are.
        let Some((other, call)) = multiplexed(name) else { return };
        let Some(other) = self.architecture.of_all(numbers(other)) else { return };
        for rule in rules {
            if rule.conditions.is_empty() || !passes(rule.action) {
                // ipc(2) keeps a version above bit 15, socketcall(2) none.
                let operator = Operator::ScmpCmpMaskedEq;
                let condition = Condition { index: 0, operator, value: 0xffff, second: call };
                self.add(other, Rule { conditions: vec![condition], action: rule.action });
            }
        }
    }

    fn add(&mut self, number: u32, rule: Rule) {
        let always = rule.conditions.is_empty();
        self.decisions.push((number, if always { Decision::Return(rule.action) } else { Decision::Chain(vec![rule]) }));
    }

    /// Makes one decision of all that were added for a number.
    fn settle(&mut self) {
        // Stable: what was added first stays first.
        self.decisions.sort_by_key(|(number, _)| *number);
        self.decisions.dedup_by(|(number, decision), (before, first)| {
            if number != before {
                return false;
            }
            match (first, decision) {
                (Decision::Return(_), _) => {}
                (first, always @ Decision::Return(_)) => std::mem::swap(first, always),
                (Decision::Chain(rules), Decision::Chain(more)) => rules.append(more),
            }
            true
        });
    }
}
