//! Decisions as a classic BPF program:
//!
//! ```text
//! load the architecture; for each one: its section; else kill
//! section: load the number; binary search over ranges of numbers with the same decision
//! leaf:    return, or the chain of argument rules and the default
//! ```

use super::rules::{Calls, Condition, Decision, KILL_THREAD, NO_CALL, Rule, Rules};
use super::table::{Architecture, X32_BIT};
use crate::process::{Kind, StepError};
use crate::sys::seccomp::Instruction;
use oci_spec::runtime::LinuxSeccompOperator as Operator;

/// Most instructions that the kernel takes (BPF_MAXINSNS).
const LENGTH_MAX: usize = 4096;

// linux/bpf_common.h: class | size or operation | mode or source.
pub(super) const LOAD: u16 = 0x20;
pub(super) const AND: u16 = 0x54;
pub(super) const JUMP: u16 = 0x05;
pub(super) const JUMP_EQUAL: u16 = 0x15;
pub(super) const JUMP_GREATER: u16 = 0x25;
pub(super) const JUMP_NOT_LESS: u16 = 0x35;
pub(super) const RETURN: u16 = 0x06;

// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

type Program = Vec<Instruction>;

fn plain(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn length(program: &[Instruction]) -> u32 {
    u32::try_from(program.len()).unwrap_or(u32::MAX)
}

/// The program of a profile.
pub(super) fn compile(rules: &Rules) -> Result<Program, StepError> {
    let mut program = vec![plain(LOAD, ARCHITECTURE)];
    let sections = &rules.architectures;
    let x32 = sections.iter().find(|calls| calls.architecture == Architecture::X32);
    for calls in sections.iter().filter(|calls| calls.architecture != Architecture::X32) {
        let mut section = vec![plain(LOAD, NUMBER)];
        let mut tree = search(&ranges(calls, rules.default), rules.default, calls.architecture);
        if calls.architecture == Architecture::X86_64 {
            tree = with_x32(tree, x32, rules.default);
        }
        section.append(&mut tree);
        program.push(Instruction { code: JUMP_EQUAL, jt: 1, jf: 0, k: calls.architecture.audit() });
        program.push(plain(JUMP, length(&section)));
        program.append(&mut section);
    }
    program.push(plain(RETURN, KILL_THREAD));
    if program.len() > LENGTH_MAX {
        let why = format!("{} instructions, the kernel takes {LENGTH_MAX}", program.len());
        return Err(StepError::because(Kind::Invalid, "compile seccomp profile", "", why));
    }
    Ok(program)
}

/// x32 shares its audit value with x86_64 and has numbers of its own from [`X32_BIT`] on. Without it such a call kills; -1 is
/// no call of x32 but one that a tracer has skipped.
fn with_x32(tree: Program, x32: Option<&Calls>, default: u32) -> Program {
    let own = match x32 {
        Some(calls) => {
            let numbers = calls.decisions.iter().map(|(number, decision)| (number | X32_BIT, decision.clone()));
            let newest = calls.newest.map(|newest| newest | X32_BIT);
            let shifted = Calls { architecture: Architecture::X32, decisions: numbers.collect(), newest };
            search(&ranges(&shifted, default), default, Architecture::X32)
        }
        None => vec![plain(RETURN, KILL_THREAD)],
    };
    let mut program = vec![
        Instruction { code: JUMP_NOT_LESS, jt: 0, jf: 2, k: X32_BIT },
        Instruction { code: JUMP_EQUAL, jt: 1, jf: 0, k: u32::MAX },
        plain(JUMP, length(&tree)),
    ];
    program.extend(tree);
    program.extend(own);
    program
}

/// First number of each range with one decision, in order, from 0.
fn ranges(calls: &Calls, default: u32) -> Vec<(u32, Decision)> {
    let mut ranges = vec![(0, Decision::Return(default))];
    let mut next = 0;
    let mut push = |start: u32, decision: &Decision| match ranges.last_mut() {
        Some((_, last)) if last == decision => {}
        Some(last) if last.0 == start => last.1 = decision.clone(),
        _ => ranges.push((start, decision.clone())),
    };
    for (number, decision) in &calls.decisions {
        if *number > next {
            push(next, &Decision::Return(default));
        }
        push(*number, decision);
        next = number + 1;
    }
    push(next, &Decision::Return(default));
    if let Some(newest) = calls.newest {
        push(newest + 1, &Decision::Return(NO_CALL));
    }
    ranges
}

/// The binary search; the number is in the accumulator.
fn search(ranges: &[(u32, Decision)], default: u32, architecture: Architecture) -> Program {
    match ranges {
        [] => vec![plain(RETURN, default)],
        [(_, Decision::Return(action))] => vec![plain(RETURN, *action)],
        [(_, Decision::Chain(rules))] => chain(rules, default, architecture),
        _ => {
            let (low, high) = ranges.split_at(ranges.len() / 2);
            let pivot = high.first().map_or(0, |(start, _)| *start);
            let left = search(low, default, architecture);
            let mut program = match u8::try_from(left.len()) {
                Ok(near) => vec![Instruction { code: JUMP_NOT_LESS, jt: near, jf: 0, k: pivot }],
                Err(_) => vec![Instruction { code: JUMP_NOT_LESS, jt: 0, jf: 1, k: pivot }, plain(JUMP, length(&left))],
            };
            program.extend(left);
            program.extend(search(high, default, architecture));
            program
        }
    }
}

fn chain(rules: &[Rule], default: u32, architecture: Architecture) -> Program {
    let mut program = Vec::new();
    for rule in rules {
        // From the last condition to the first: each knows how far the next rule is.
        let mut body = vec![plain(RETURN, rule.action)];
        for condition in rule.conditions.iter().rev() {
            let after = u8::try_from(body.len()).unwrap_or(u8::MAX);
            let mut test = if architecture.is_wide() { wide(condition, after) } else { narrow(condition, after) };
            test.append(&mut body);
            body = test;
        }
        program.append(&mut body);
    }
    program.push(plain(RETURN, default));
    program
}

fn low_word(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

fn high_word(value: u64) -> u32 {
    (value >> 32) as u32
}

/// The last comparison of a test: goes on when it holds, else to the next rule, `after` instructions behind it.
fn last(condition: &Condition, after: u8) -> Instruction {
    let k = low_word(condition.value);
    let (code, negated) = match condition.operator {
        Operator::ScmpCmpEq => (JUMP_EQUAL, false),
        Operator::ScmpCmpNe => (JUMP_EQUAL, true),
        Operator::ScmpCmpGt => (JUMP_GREATER, false),
        Operator::ScmpCmpLe => (JUMP_GREATER, true),
        Operator::ScmpCmpGe => (JUMP_NOT_LESS, false),
        Operator::ScmpCmpLt => (JUMP_NOT_LESS, true),
        Operator::ScmpCmpMaskedEq => {
            return Instruction { code: JUMP_EQUAL, jt: 0, jf: after, k: low_word(condition.second) };
        }
    };
    if negated { Instruction { code, jt: after, jf: 0, k } } else { Instruction { code, jt: 0, jf: after, k } }
}

/// A test of 32 bits: the upper half of an argument means nothing to a 32-bit program.
fn narrow(condition: &Condition, after: u8) -> Program {
    let mut program = vec![plain(LOAD, ARGUMENTS + 8 * condition.index)];
    if condition.operator == Operator::ScmpCmpMaskedEq {
        program.push(plain(AND, low_word(condition.value)));
    }
    program.push(last(condition, after));
    program
}

/// A test of 64 bits, upper half first.
fn wide(condition: &Condition, after: u8) -> Program {
    let low = narrow(condition, after);
    let rest = u8::try_from(low.len()).unwrap_or(u8::MAX);
    let fail = after.saturating_add(rest);
    let k = high_word(condition.value);
    let mut program = vec![plain(LOAD, ARGUMENTS + 8 * condition.index + 4)];
    match condition.operator {
        Operator::ScmpCmpEq => program.push(Instruction { code: JUMP_EQUAL, jt: 0, jf: fail, k }),
        Operator::ScmpCmpNe => program.push(Instruction { code: JUMP_EQUAL, jt: 0, jf: rest, k }),
        Operator::ScmpCmpMaskedEq => {
            program.push(plain(AND, k));
            program.push(Instruction { code: JUMP_EQUAL, jt: 0, jf: fail, k: high_word(condition.second) });
        }
        Operator::ScmpCmpGt | Operator::ScmpCmpGe => {
            program.push(Instruction { code: JUMP_GREATER, jt: rest + 1, jf: 0, k });
            program.push(Instruction { code: JUMP_EQUAL, jt: 0, jf: fail, k });
        }
        Operator::ScmpCmpLt | Operator::ScmpCmpLe => {
            program.push(Instruction { code: JUMP_GREATER, jt: fail + 1, jf: 0, k });
            program.push(Instruction { code: JUMP_EQUAL, jt: 0, jf: rest, k });
        }
    }
    program.extend(low);
    program
}
