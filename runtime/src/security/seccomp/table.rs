//! Architectures and the numbers of their system calls, from `syscalls.txt`. Only data.

use oci_spec::runtime::Arch;

/// `name x86_64 x32 x86 aarch64 arm`, sorted by name.
const TABLE: &str = include_str!("syscalls.txt");

/// What sets a number of x32 apart from one of x86_64.
pub(super) const X32_BIT: u32 = 0x4000_0000;

/// An architecture that a process of this kernel can use. The order is that of the columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Architecture {
    X86_64,
    X32,
    X86,
    Aarch64,
    Arm,
}

impl Architecture {
    /// The one that this program was built for.
    pub(super) const NATIVE: Architecture =
        if cfg!(target_arch = "aarch64") { Architecture::Aarch64 } else { Architecture::X86_64 };

    /// `None` for what this table does not know; no process here is of it.
    pub(super) fn of(arch: Arch) -> Option<Architecture> {
        match arch {
            Arch::ScmpArchX86_64 => Some(Architecture::X86_64),
            Arch::ScmpArchX32 => Some(Architecture::X32),
            Arch::ScmpArchX86 => Some(Architecture::X86),
            Arch::ScmpArchAarch64 => Some(Architecture::Aarch64),
            Arch::ScmpArchArm => Some(Architecture::Arm),
            Arch::ScmpArchNative => Some(Architecture::NATIVE),
            _ => None,
        }
    }

    /// Its column.
    pub(super) fn of_all(self, numbers: [Option<u32>; 5]) -> Option<u32> {
        numbers.get(self as usize).copied().flatten()
    }

    /// AUDIT_ARCH_* of linux/audit.h. x86_64 and x32 share theirs.
    pub(super) fn audit(self) -> u32 {
        match self {
            Architecture::X86_64 | Architecture::X32 => 0xc000_003e,
            Architecture::X86 => 0x4000_0003,
            Architecture::Aarch64 => 0xc000_00b7,
            Architecture::Arm => 0x4000_0028,
        }
    }

    /// Whether arguments have 64 bits.
    pub(super) fn is_wide(self) -> bool {
        !matches!(self, Architecture::X86 | Architecture::Arm)
    }
}

/// Calls of [`TABLE`].
const COUNT: usize = 483;

/// Names in order, with their numbers; read when this program is compiled, so that a container's start need not.
static CALLS: [(&str, [Option<u32>; 5]); COUNT] = read_table();

const fn read_table() -> [(&'static str, [Option<u32>; 5]); COUNT] {
    let mut calls = [("", [None; 5]); COUNT];
    let (bytes, mut at, mut call) = (TABLE.as_bytes(), 0, 0);
    while at < bytes.len() {
        let start = at;
        while !matches!(bytes[at], b' ') {
            at += 1;
        }
        if bytes[start] != b'#' {
            calls[call].0 = TABLE.split_at(at).0.split_at(start).1;
            let mut column = 0;
            while bytes[at] != b'\n' {
                at += 1;
                let mut number = None;
                while bytes[at].is_ascii_digit() {
                    number = Some(
                        match number {
                            Some(before) => before * 10,
                            None => 0,
                        } + (bytes[at] - b'0') as u32,
                    );
                    at += 1;
                }
                if bytes[at] == b'-' {
                    at += 1;
                }
                calls[call].1[column] = number;
                column += 1;
            }
            call += 1;
        }
        while bytes[at] != b'\n' {
            at += 1;
        }
        at += 1;
    }
    assert!(call == COUNT, "COUNT is not the number of calls");
    calls
}

/// The numbers of a call by architecture, `None` where it has none. x32's without its bit. An unknown name has none at all.
pub(super) fn numbers(name: &str) -> [Option<u32>; 5] {
    let found = CALLS.binary_search_by_key(&name, |(name, _)| name).ok().and_then(|index| CALLS.get(index));
    found.map_or([None; 5], |(_, numbers)| *numbers)
}

/// The number of a call for one architecture.
#[cfg(test)]
pub(super) fn number(name: &str, architecture: Architecture) -> Option<u32> {
    architecture.of_all(numbers(name))
}

/// The calls of 32-bit x86 that socketcall(2) or ipc(2) also make: which of both, and its first argument.
pub(super) fn multiplexed(name: &str) -> Option<(&'static str, u64)> {
    const SOCKET: [&str; 20] = [
        "socket",
        "bind",
        "connect",
        "listen",
        "accept",
        "getsockname",
        "getpeername",
        "socketpair",
        "send",
        "recv",
        "sendto",
        "recvfrom",
        "shutdown",
        "setsockopt",
        "getsockopt",
        "sendmsg",
        "recvmsg",
        "accept4",
        "recvmmsg",
        "sendmmsg",
    ];
    const IPC: [(&str, u64); 12] = [
        ("semop", 1),
        ("semget", 2),
        ("semctl", 3),
        ("semtimedop", 4),
        ("msgsnd", 11),
        ("msgrcv", 12),
        ("msgget", 13),
        ("msgctl", 14),
        ("shmat", 21),
        ("shmdt", 22),
        ("shmget", 23),
        ("shmctl", 24),
    ];
    let socket = SOCKET.iter().zip(1..).find(|(known, _)| **known == name).map(|(_, call)| ("socketcall", call));
    let ipc = || IPC.iter().find(|(known, _)| *known == name).map(|(_, call)| ("ipc", *call));
    socket.or_else(ipc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_complete_and_right_for_this_machine() {
        assert!(CALLS.is_sorted_by_key(|(name, _)| *name));
        assert!(TABLE.lines().skip(2).all(|line| line.split(' ').count() == 6), "a name and five columns");
        for (name, known) in [("read", libc::SYS_read), ("clone3", libc::SYS_clone3), ("unshare", libc::SYS_unshare)] {
            assert_eq!(number(name, Architecture::NATIVE).map(i64::from), Some(known), "{name}");
        }
        for (name, architecture, expected) in [
            ("socketcall", Architecture::X86, Some(102)),
            ("socketcall", Architecture::X86_64, None),
            ("execve", Architecture::X32, Some(520)),
            ("execve", Architecture::Aarch64, Some(221)),
            ("set_tls", Architecture::Arm, Some(0xf0005)),
            ("no_such_call", Architecture::X86, None),
        ] {
            assert_eq!(number(name, architecture), expected, "{name}");
        }
    }
}
