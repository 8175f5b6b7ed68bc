//! bpf(2) for device filters of cgroups: BPF_PROG_TYPE_CGROUP_DEVICE, Linux 4.15.
//! Errnos to expect: EPERM (no CAP_BPF or CAP_SYS_ADMIN, or a parent cgroup whose program allows none below), EINVAL (the kernel was
//! built without CGROUP_BPF, or the verifier refuses the program), E2BIG (too many instructions, or 64 programs on one cgroup).

use super::process::last_errno;
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

// From linux/bpf.h, where the enumerations are part of the interface.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Programs of this cgroup and of its parents all have to agree.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// `struct bpf_insn`: operation, registers (source in the high four bits), jump or memory offset, immediate value.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Class, operation and operand kind.
    pub code: u8,
    /// Destination register, and source register << 4.
    pub registers: u8,
    /// Instructions to skip, or bytes into memory.
    pub offset: i16,
    /// The constant.
    pub immediate: i32,
}

/// The part of `union bpf_attr` that loading uses.
#[repr(C)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The part of `union bpf_attr` that attaching uses.
#[repr(C)]
struct Attach {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
    replace_bpf_fd: u32,
}

/// Loads a device filter. It lives as long as its descriptor or a cgroup that it is attached to.
pub fn load_device_filter(program: &[Instruction]) -> Result<OwnedFd, Errno> {
    let mut prog_name = [0; 16];
    prog_name[..8].copy_from_slice(b"windlass");
    let attr = Load {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: u32::try_from(program.len()).map_err(|_| Errno::TOOBIG)?,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: BPF_CGROUP_DEVICE,
    };
    // SAFETY: `attr` has the kernel's layout and the given size; the program and the licence outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of::<Load>()) };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the kernel has just made this descriptor (close-on-exec) and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Attaches a device filter to a cgroup, for it and all below.
pub fn attach_device_filter(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<(), Errno> {
    let attr = Attach {
        target_fd: cgroup.as_raw_fd().cast_unsigned(),
        attach_bpf_fd: program.as_raw_fd().cast_unsigned(),
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI,
        replace_bpf_fd: 0,
    };
    // SAFETY: `attr` has the kernel's layout and the given size and lives through the call.
    match unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of::<Attach>()) } {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}
