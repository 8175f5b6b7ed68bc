//! The filter and its notifications, as the kernel has them.

use super::calls;
use anyhow::{Context, Result, ensure};
use nix::{errno::Errno, libc};
use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

/// Where the calls of a filter arrive.
pub(super) struct Listener(OwnedFd);

/// A call that waits for an answer.
pub(super) struct Notice {
    id: u64,
    /// Thread that calls.
    pub(super) thread: u32,
    pub(super) number: i64,
    pub(super) arguments: [u64; 6],
}

/// Puts the filter on the calling thread alone; what it starts has it too.
pub(super) fn install() -> Result<Listener> {
    let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    let give = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    // struct seccomp_data: number at 0, architecture at 4.
    let mut program = vec![step(load, 4, 0, 0), step(equal, ARCHITECTURE, 1, 0), step(give, libc::SECCOMP_RET_ALLOW, 0, 0)];
    program.push(step(load, 0, 0, 0));
    for number in calls::watched() {
        program.push(step(equal, u32::try_from(number)?, 0, 1));
        program.push(step(give, libc::SECCOMP_RET_USER_NOTIF, 0, 0));
    }
    program.push(step(give, libc::SECCOMP_RET_ALLOW, 0, 0));
    let program = libc::sock_fprog { len: u16::try_from(program.len())?, filter: program.as_mut_ptr() };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the program and its steps live to the end of this function, and the kernel copies them.
    let made = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    ensure!(made >= 0, "install a seccomp filter with a listener: {}", io::Error::last_os_error());
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(Listener(unsafe { OwnedFd::from_raw_fd(i32::try_from(made).context("descriptor")?) }))
}

impl Listener {
    /// The next call; none when nobody has the filter any more.
    pub(super) fn next(&self) -> Option<Notice> {
        loop {
            let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd, for the length of the call.
            unsafe { libc::poll(&raw mut poll, 1, -1) };
            if poll.revents & libc::POLLIN == 0 && poll.revents & libc::POLLHUP != 0 {
                return None;
            }
            // SAFETY: the structure is plain numbers; the kernel wants them zero.
            let mut notice: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the kernel writes one such structure.
            let taken = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV as _, &raw mut notice) };
            // ENOENT: the caller was killed meanwhile.
            if taken == 0 {
                let data = notice.data;
                return Some(Notice { id: notice.id, thread: notice.pid, number: data.nr.into(), arguments: data.args });
            }
        }
    }

    /// Lets the call go on, or fail.
    pub(super) fn answer(&self, notice: &Notice, errno: Option<Errno>) {
        let flags = if errno.is_some() { 0 } else { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 };
        let error = errno.map_or(0, |errno| -(errno as i32));
        let mut answer = libc::seccomp_notif_resp { id: notice.id, val: 0, error, flags };
        // SAFETY: the kernel reads one such structure. A caller that is gone needs no answer.
        unsafe { libc::ioctl(self.0.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut answer) };
    }
}
