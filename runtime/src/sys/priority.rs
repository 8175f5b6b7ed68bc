//! sched_setattr(2) and ioprio_set(2) of the calling thread, for which libc has no functions. Errnos: EPERM (a real-time class without
//! CAP_SYS_NICE), EINVAL (numbers that the policy does not have), EBUSY (no room for a deadline).

use rustix::io::Errno;

/// Sets policy and parameters of the calling thread. Linux 3.14.
pub fn set_scheduler(attributes: &libc::sched_attr) -> Result<(), Errno> {
    let itself: libc::pid_t = 0;
    let flags: libc::c_uint = 0;
    // SAFETY: the kernel reads `size` bytes of the structure, which has that size, and keeps no reference to it.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, itself, std::ptr::from_ref(attributes), flags) } {
        -1 => Err(super::process::last_errno()),
        _ => Ok(()),
    }
}

/// Sets class and level of the calling thread's input and output. `class`: 1 real-time, 2 best effort, 3 idle.
pub fn set_io_priority(class: u8, level: u8) -> Result<(), Errno> {
    const WHO_PROCESS: libc::c_int = 1;
    const CLASS_SHIFT: u32 = 13;
    let (itself, value): (libc::c_int, libc::c_int) = (0, i32::from(class) << CLASS_SHIFT | i32::from(level));
    // SAFETY: three integers.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, itself, value) } {
        -1 => Err(super::process::last_errno()),
        _ => Ok(()),
    }
}
