//! seccomp(2) with SECCOMP_SET_MODE_FILTER, Linux 3.17: `int seccomp(unsigned op, unsigned flags, struct sock_fprog *program)`. Errnos:
//! EACCES (neither CAP_SYS_ADMIN nor no_new_privs), EINVAL (the program or a flag is refused), ENOMEM (32768 instructions of all filters).

use rustix::io::Errno;

/// `struct sock_filter`: one instruction of a classic BPF program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    /// Class, mode and operation.
    pub code: u16,
    /// Instructions to skip when the comparison holds.
    pub jt: u8,
    /// Instructions to skip when it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// Loads a filter for the calling thread and all that it will execute. `flags`: SECCOMP_FILTER_FLAG_*.
pub fn load(program: &[Instruction], flags: libc::c_ulong) -> Result<(), Errno> {
    let len = u16::try_from(program.len()).map_err(|_| Errno::INVAL)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: `sock_fprog` points to `len` instructions of the kernel's layout (repr(C), the same fields) that live until the call
    // returns; the kernel copies them and writes nothing.
    match unsafe {
        libc::syscall(libc::SYS_seccomp, libc::c_long::from(libc::SECCOMP_SET_MODE_FILTER), flags, &raw const program)
    } {
        0 => Ok(()),
        // With TSYNC the thread that could not be synchronised; there is one thread only.
        -1 => Err(super::process::last_errno()),
        _ => Err(Errno::SRCH),
    }
}
