//! The program against a naive reading of the profile, by an interpreter of the instructions that are used.

use super::program::{self, compile};
use super::rules::Rules;
use super::table::{Architecture, X32_BIT, multiplexed, number};
use crate::sys::seccomp::Instruction;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompOperator as Operator};
use proptest::prelude::*;
use serde_json::{Value, json};

/// `struct seccomp_data` without the instruction pointer.
#[derive(Debug, Clone, Copy)]
struct Call {
    number: u32,
    audit: u32,
    arguments: [u64; 6],
}

/// What the kernel would do with the program.
fn interpret(program: &[Instruction], call: &Call) -> u32 {
    let load = |offset: u32| match offset {
        0 => call.number,
        4 => call.audit,
        _ => {
            let word = (offset - 16) / 4;
            let argument = call.arguments[word as usize / 2];
            (if word.is_multiple_of(2) { argument } else { argument >> 32 }) as u32
        }
    };
    let (mut at, mut accumulator) = (0, 0u32);
    loop {
        let Instruction { code, jt, jf, k } = program[at];
        let branch = |holds: bool| usize::from(if holds { jt } else { jf });
        at += 1;
        match code {
            program::LOAD => accumulator = load(k),
            program::AND => accumulator &= k,
            program::JUMP => at += k as usize,
            program::JUMP_EQUAL => at += branch(accumulator == k),
            program::JUMP_GREATER => at += branch(accumulator > k),
            program::JUMP_NOT_LESS => at += branch(accumulator >= k),
            program::RETURN => return k,
            other => panic!("instruction {other:#x} is not used"),
        }
    }
}

fn value(action: Action, errno: Option<u32>) -> u32 {
    match action {
        Action::ScmpActKill | Action::ScmpActKillThread => 0,
        Action::ScmpActKillProcess => 0x8000_0000,
        Action::ScmpActTrap => 0x30000,
        Action::ScmpActErrno => 0x50000 + errno.unwrap_or(1),
        Action::ScmpActTrace => 0x7ff0_0000 + errno.unwrap_or(1),
        Action::ScmpActLog => 0x7ffc_0000,
        Action::ScmpActAllow => 0x7fff_0000,
        Action::ScmpActNotify => panic!("never compiled"),
    }
}

fn holds(argument: u64, operator: Operator, value: u64, second: u64, wide: bool) -> bool {
    let cut = |number: u64| if wide { number } else { number & 0xffff_ffff };
    let (argument, value, second) = (cut(argument), cut(value), cut(second));
    match operator {
        Operator::ScmpCmpNe => argument != value,
        Operator::ScmpCmpLt => argument < value,
        Operator::ScmpCmpLe => argument <= value,
        Operator::ScmpCmpEq => argument == value,
        Operator::ScmpCmpGe => argument >= value,
        Operator::ScmpCmpGt => argument > value,
        Operator::ScmpCmpMaskedEq => argument & value == second,
    }
}

/// A naive reading: every entry of the profile in its order, nothing prepared.
fn evaluate(profile: &LinuxSeccomp, call: &Call) -> u32 {
    let covered: Vec<Architecture> = std::iter::once(Architecture::NATIVE)
        .chain(profile.architectures().iter().flatten().filter_map(|arch| Architecture::of(*arch)))
        .collect();
    let is_x32 = call.audit == Architecture::X32.audit() && (X32_BIT..u32::MAX).contains(&call.number);
    let found =
        covered.iter().find(|architecture| architecture.audit() == call.audit && (**architecture == Architecture::X32) == is_x32);
    let Some(architecture) = found.copied() else { return 0 };
    let own = if is_x32 && call.number < 0x8000_0000 { call.number & !X32_BIT } else { call.number };
    let default = value(profile.default_action(), profile.default_errno_ret());
    let mut newest = None;
    let (mut always, mut sometimes) = (None, None);
    for entry in profile.syscalls().iter().flatten() {
        let action = value(entry.action(), entry.errno_ret());
        let arguments = entry.args().clone().unwrap_or_default();
        let passes = matches!(entry.action(), Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace);
        for name in entry.names() {
            newest = newest.max(number(name, architecture));
            if action == default {
                continue;
            }
            if number(name, architecture) == Some(own) {
                let results: Vec<bool> = arguments
                    .iter()
                    .map(|arg| {
                        let given = call.arguments[arg.index()];
                        holds(given, arg.op(), arg.value(), arg.value_two().unwrap_or(0), architecture.is_wide())
                    })
                    .collect();
                let repeated =
                    arguments.iter().any(|arg| arguments.iter().filter(|other| other.index() == arg.index()).count() > 1);
                let matched = if repeated { results.iter().any(|one| *one) } else { results.iter().all(|one| *one) };
                if arguments.is_empty() {
                    always = always.or(Some(action));
                } else if matched {
                    sometimes = sometimes.or(Some(action));
                }
            }
            if architecture == Architecture::X86
                && let Some((other, wanted)) = multiplexed(name)
                && number(other, architecture) == Some(own)
                && call.arguments[0] & 0xffff == wanted
                && (arguments.is_empty() || !passes)
            {
                sometimes = sometimes.or(Some(action));
            }
        }
    }
    let open = matches!(profile.default_action(), Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace);
    let unnamed = match newest {
        Some(newest) if own > newest && !open => 0x50000 + 38,
        _ => default,
    };
    always.or(sometimes).unwrap_or(unnamed)
}

const NAMES: [&str; 14] = [
    "read",
    "write",
    "open",
    "socket",
    "connect",
    "socketcall",
    "ipc",
    "shmctl",
    "clone",
    "clone3",
    "execve",
    "mseal",
    "no_such",
    "set_tls",
];
const VALUES: [u64; 9] = [0, 1, 2, 40, 0xffff_ffff, 0x1_0000_0000, 0x1_0000_0028, 0x7e02_0000, u64::MAX];

fn a_value() -> impl Strategy<Value = u64> {
    prop_oneof![4 => proptest::sample::select(VALUES.as_slice()), 1 => any::<u64>()]
}

fn an_action() -> impl Strategy<Value = (&'static str, Option<u32>)> {
    prop_oneof![
        Just(("SCMP_ACT_ALLOW", None)),
        Just(("SCMP_ACT_ERRNO", None)),
        Just(("SCMP_ACT_ERRNO", Some(38))),
        Just(("SCMP_ACT_KILL", None)),
        Just(("SCMP_ACT_KILL_PROCESS", None)),
        Just(("SCMP_ACT_TRAP", None)),
        Just(("SCMP_ACT_TRACE", Some(7))),
        Just(("SCMP_ACT_LOG", None)),
    ]
}

fn an_entry() -> impl Strategy<Value = Value> {
    let operators =
        ["SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"];
    let argument = (0usize..6, a_value(), a_value(), proptest::sample::select(operators.to_vec()))
        .prop_map(|(index, value, second, op)| json!({ "index": index, "value": value, "valueTwo": second, "op": op }));
    let names = proptest::collection::vec(proptest::sample::select(NAMES.as_slice()), 1..4);
    (names, an_action(), proptest::collection::vec(argument, 0..4))
        .prop_map(|(names, (action, errno), args)| json!({ "names": names, "action": action, "errnoRet": errno, "args": args }))
}

fn a_profile() -> impl Strategy<Value = LinuxSeccomp> {
    let arches = proptest::sample::subsequence(
        vec!["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32", "SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"],
        0..5,
    );
    (an_action(), arches, proptest::collection::vec(an_entry(), 0..12)).prop_map(|((action, errno), arches, entries)| {
        let profile = json!({ "defaultAction": action, "defaultErrnoRet": errno, "architectures": arches, "syscalls": entries });
        serde_json::from_value(profile).expect("a profile")
    })
}

fn a_call() -> impl Strategy<Value = Call> {
    let architectures = [Architecture::X86_64, Architecture::X32, Architecture::X86, Architecture::Aarch64, Architecture::Arm];
    let chosen = (proptest::sample::select(architectures.to_vec()), proptest::sample::select(NAMES.as_slice()), -1i64..2);
    let known = chosen.prop_map(|(architecture, name, off)| {
        let bit = if architecture == Architecture::X32 { X32_BIT } else { 0 };
        let number = number(name, architecture).unwrap_or(5000) | bit;
        (architecture.audit(), number.wrapping_add_signed(off as i32))
    });
    let wild = (prop_oneof![Just(0xc000_003e_u32), any::<u32>()], prop_oneof![Just(u32::MAX), 0u32..600, any::<u32>()]);
    let arguments = proptest::array::uniform6(a_value());
    (prop_oneof![6 => known, 1 => wild], arguments).prop_map(|((audit, number), arguments)| Call { number, audit, arguments })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_program_decides_as_the_profile_reads(profile in a_profile(), calls in proptest::collection::vec(a_call(), 40)) {
        let program = compile(&Rules::new(&profile).expect("valid")).expect("short enough");
        for call in calls {
            prop_assert_eq!(interpret(&program, &call), evaluate(&profile, &call), "{:?}", call);
        }
    }
}

fn refused(profile: Value) -> String {
    let parsed: LinuxSeccomp = serde_json::from_value(profile).expect("a profile");
    Rules::new(&parsed).expect_err("refused").to_string()
}

#[test]
fn what_cannot_be_served_is_named() {
    let entry = |entry: Value| json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [entry] });
    for (profile, word) in [
        (json!({ "defaultAction": "SCMP_ACT_NOTIFY" }), "SCMP_ACT_NOTIFY"),
        (entry(json!({ "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5000 })), "errnoRet 5000"),
        (entry(json!({ "names": ["read"], "action": "SCMP_ACT_KILL", "errnoRet": 5 })), "takes no errnoRet"),
        (
            entry(
                json!({ "names": ["read"], "action": "SCMP_ACT_LOG", "args": [{ "index": 6, "value": 0, "op": "SCMP_CMP_EQ" }] }),
            ),
            "args.index 6",
        ),
    ] {
        let text = refused(profile);
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn a_profile_that_is_too_long_is_refused() {
    let args: Vec<Value> = (0..1500).map(|number| json!({ "index": 0, "value": number, "op": "SCMP_CMP_EQ" })).collect();
    let profile = json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{ "names": ["read"], "action": "SCMP_ACT_ALLOW", "args": args }] });
    let parsed: LinuxSeccomp = serde_json::from_value(profile).expect("a profile");
    let error = compile(&Rules::new(&parsed).expect("valid")).expect_err("too long");
    assert!(error.to_string().contains("4096"), "{error}");
}
