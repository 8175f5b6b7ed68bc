//! Which devices the processes of a cgroup may open or make: OCI device rules as a program that the kernel asks. (cgroup v2 has no
//! files for it; see BPF_PROG_TYPE_CGROUP_DEVICE in bpf(2) and the OCI runtime specification, "Device Cgroup List".)
//!
//! The last rule that covers a device decides, for each of read, write and mknod by itself; nothing covers it: denied. What every
//! container has is added at the end. A list that lets everything through needs no program.

use crate::process::{Context, Kind, StepError};
use crate::sys::bpf::{Instruction, attach_device_filter, load_device_filter};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};
use rustix::fs::{Mode, OFlags, open};
use std::os::fd::AsFd;
use std::path::Path;

/// Most rules in one list; the kernel takes 4096 instructions from an unprivileged caller, and this keeps far below it.
const RULES_MAX: usize = 500;

// From linux/bpf.h: struct bpf_cgroup_dev_ctx.access_type is access << 16 | type.
const BLOCK: u32 = 1;
const CHAR: u32 = 2;
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// One rule; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    const fn allow(kind: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Rule {
        Rule { allow: true, kind: Some(kind), major, minor, access }
    }

    const fn covers_everything(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none() && self.access == ALL
    }
}

/// Of every container: making any node (opening it is another matter), null, zero, full, tty, random, urandom, ptmx and terminals.
const STANDARD: [Rule; 10] = [
    Rule::allow(CHAR, None, None, MKNOD),
    Rule::allow(BLOCK, None, None, MKNOD),
    Rule::allow(CHAR, Some(1), Some(3), ALL),
    Rule::allow(CHAR, Some(1), Some(5), ALL),
    Rule::allow(CHAR, Some(1), Some(7), ALL),
    Rule::allow(CHAR, Some(5), Some(0), ALL),
    Rule::allow(CHAR, Some(1), Some(8), ALL),
    Rule::allow(CHAR, Some(1), Some(9), ALL),
    Rule::allow(CHAR, Some(5), Some(2), ALL),
    Rule::allow(CHAR, Some(136), None, ALL),
];

/// Enforces `rules` on a cgroup and all below it. To be called once, before anything runs there that must obey.
///
/// # Errors
/// A rule that makes no sense, or a kernel that does not take the program: a container is never run with weaker rules.
pub fn restrict(cgroup: &Path, rules: &[LinuxDeviceCgroup]) -> Result<(), StepError> {
    let rules = parse(rules)?;
    let Some(program) = compile(&rules) else { return Ok(()) };
    let step = "restrict devices of";
    let program = load_device_filter(&program).context("load the device filter of", cgroup.display())?;
    let directory = open(cgroup, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    attach_device_filter(directory.context(step, cgroup.display())?.as_fd(), program.as_fd()).context(step, cgroup.display())
}

fn parse(rules: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, StepError> {
    let invalid = |object: String, why: &str| Err(StepError::because(Kind::Invalid, "restrict devices", object, why));
    if rules.len() > RULES_MAX {
        return invalid(format!("{} rules", rules.len()), &format!("the limit is {RULES_MAX}"));
    }
    let mut parsed = Vec::with_capacity(rules.len() + STANDARD.len());
    for rule in rules {
        let kind = match rule.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHAR),
            Some(LinuxDeviceType::P) => return invalid("type p".into(), "a fifo is no device"),
        };
        let (Ok(major), Ok(minor)) = (number(rule.major()), number(rule.minor())) else {
            return invalid(format!("{:?}:{:?}", rule.major(), rule.minor()), "not a device number");
        };
        let mut access = 0;
        for letter in rule.access().as_deref().unwrap_or_default().chars() {
            access |= match letter {
                'r' => READ,
                'w' => WRITE,
                'm' => MKNOD,
                _ => return invalid(format!("access {:?}", rule.access()), "not made of r, w and m"),
            };
        }
        parsed.push(Rule { allow: rule.allow(), kind, major, minor, access });
    }
    Ok(parsed)
}

/// A negative number is any, as for mknod's wildcard in the v1 interface.
fn number(value: Option<i64>) -> Result<Option<u32>, std::num::TryFromIntError> {
    match value {
        None | Some(..0) => Ok(None),
        Some(value) => u32::try_from(value).map(Some),
    }
}

/// The program, or nothing where everything is allowed. Registers: 2 the type, 3 the access bits not yet allowed, 4 major, 5 minor.
fn compile(rules: &[Rule]) -> Option<Vec<Instruction>> {
    let last_word = rules.iter().rposition(Rule::covers_everything);
    let after = last_word.map_or(rules, |at| rules.get(at..).unwrap_or_default());
    if last_word.is_some() && after.iter().all(|rule| rule.allow) {
        return None;
    }
    let mut program = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
        instruction(MOVE, 3, 2, 0, 0),
        instruction(SHIFT_RIGHT_BY, 3, 0, 0, 16),
        instruction(AND_WITH, 2, 0, 0, 0xffff),
    ];
    for rule in STANDARD.iter().rev().chain(after.iter().rev()) {
        block(&mut program, rule);
    }
    program.extend([instruction(MOVE_CONSTANT, 0, 0, 0, 0), instruction(EXIT, 0, 0, 0, 0)]);
    Some(program)
}

// Class, operation and operand of the instructions used (linux/bpf_common.h, linux/bpf.h); arithmetic and jumps of 32 bits.
const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbc;
const MOVE_CONSTANT: u8 = 0xb7;
const SHIFT_RIGHT_BY: u8 = 0x74;
const AND_WITH: u8 = 0x54;
const JUMP_UNLESS_EQUAL: u8 = 0x56;
const JUMP_IF_ANY_BIT: u8 = 0x46;
const JUMP: u8 = 0x05;
const EXIT: u8 = 0x95;

const fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset, immediate: immediate.cast_signed() }
}

/// A rule that is not about this device is jumped over. One that denies ends the matter if it covers any access asked for; one
/// that allows takes its accesses off, and when none is left the matter is settled.
fn block(program: &mut Vec<Instruction>, rule: &Rule) {
    let tests = [(2, rule.kind), (4, rule.major), (5, rule.minor)];
    let mut left: i16 = tests.iter().filter(|(_, wanted)| wanted.is_some()).count() as i16;
    let decision: Vec<Instruction> = if rule.allow {
        vec![
            instruction(AND_WITH, 3, 0, 0, !rule.access),
            instruction(JUMP_UNLESS_EQUAL, 3, 0, 2, 0),
            instruction(MOVE_CONSTANT, 0, 0, 0, 1),
            instruction(EXIT, 0, 0, 0, 0),
        ]
    } else {
        vec![
            instruction(JUMP_IF_ANY_BIT, 3, 0, 1, rule.access),
            instruction(JUMP, 0, 0, 2, 0),
            instruction(MOVE_CONSTANT, 0, 0, 0, 0),
            instruction(EXIT, 0, 0, 0, 0),
        ]
    };
    for (register, wanted) in tests {
        if let Some(wanted) = wanted {
            left -= 1;
            program.push(instruction(JUMP_UNLESS_EQUAL, register, 0, left + decision.len() as i16, wanted));
        }
    }
    program.extend(decision);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the few instructions that are used, as the kernel would.
    fn decide(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let (mut registers, mut at) = ([0u32; 10], 0usize);
        for _ in 0..10_000 {
            let now = program[at];
            let (to, from) = (usize::from(now.registers & 15), usize::from(now.registers >> 4));
            let immediate = now.immediate.cast_unsigned();
            at += 1;
            let jump = match now.code {
                LOAD_WORD => {
                    registers[to] = context[now.offset as usize / 4];
                    false
                }
                MOVE => {
                    registers[to] = registers[from];
                    false
                }
                MOVE_CONSTANT => {
                    registers[to] = immediate;
                    false
                }
                SHIFT_RIGHT_BY => {
                    registers[to] >>= immediate;
                    false
                }
                AND_WITH => {
                    registers[to] &= immediate;
                    false
                }
                JUMP_UNLESS_EQUAL => registers[to] != immediate,
                JUMP_IF_ANY_BIT => registers[to] & immediate != 0,
                JUMP => true,
                EXIT => return registers[0] == 1,
                code => panic!("instruction {code:#x}"),
            };
            if jump {
                at = at.checked_add_signed(now.offset.into()).expect("forward");
            }
        }
        panic!("no end")
    }

    fn rules(json: &str) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_str(json).expect(json)
    }

    #[test]
    fn the_last_rule_decides_each_access() {
        let list = rules(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":10,"access":"rw"},
                {"allow":false,"type":"c","major":10,"minor":229,"access":"w"},{"allow":true,"type":"b","major":8,"minor":0,"access":"r"}]"#,
        );
        let program = compile(&parse(&list).unwrap()).unwrap();
        for (kind, access, major, minor, expected) in [
            (CHAR, READ, 1, 3, true),
            (CHAR, READ | WRITE, 136, 7, true),
            (CHAR, READ, 1, 1, false),
            (BLOCK, READ, 1, 3, false),
            (CHAR, MKNOD, 1, 1, true),
            (CHAR, MKNOD | READ, 1, 1, false),
            (CHAR, READ | WRITE, 10, 200, true),
            (CHAR, READ, 10, 229, true),
            (CHAR, READ | WRITE, 10, 229, false),
            (BLOCK, READ, 8, 0, true),
            (BLOCK, READ | WRITE, 8, 0, false),
            (BLOCK, READ, 8, 1, false),
        ] {
            assert_eq!(decide(&program, kind, access, major, minor), expected, "{kind} {access} {major}:{minor}");
        }
    }

    #[test]
    fn a_list_that_allows_everything_needs_no_program() {
        let all = r#"{"allow":true,"access":"rwm"}"#;
        let some = r#"{"allow":false,"type":"c","major":10,"access":"rwm"}"#;
        assert!(compile(&parse(&rules(&format!("[{some},{all}]"))).unwrap()).is_none());
        assert!(compile(&parse(&rules(&format!("[{all},{some}]"))).unwrap()).is_some());
        assert!(compile(&[]).is_some());
        let program = compile(&parse(&rules(&format!("[{all},{some}]"))).unwrap()).unwrap();
        assert!(decide(&program, BLOCK, READ | WRITE, 8, 0) && !decide(&program, CHAR, READ, 10, 1));
    }

    #[test]
    fn rules_that_make_no_sense_are_refused() {
        for json in [r#"[{"allow":true,"access":"x"}]"#, r#"[{"allow":true,"type":"p","access":"r"}]"#] {
            assert_eq!(parse(&rules(json)).unwrap_err().kind, Kind::Invalid, "{json}");
        }
    }

    #[test]
    fn the_kernel_takes_the_longest_list() {
        let rule = Rule { allow: false, kind: Some(CHAR), major: Some(10), minor: Some(1), access: ALL };
        load_device_filter(&compile(&[rule; RULES_MAX]).unwrap()).expect("loads");
    }
}
