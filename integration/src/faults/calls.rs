//! Which calls are watched, how one is told from the others, and which errors it may plausibly have.

use super::filter::Notice;
use nix::{errno::Errno, libc};
use rustix::net::{AddressFamily, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::{fmt, fs, os::unix::fs::FileExt, path::Path};

/// Longest text that is read from a caller, in bytes.
const TEXT_MAX: usize = 256;

/// What comes before a part of a name that is made by chance: a test's directory, its bridge.
const BY_CHANCE: [&str; 2] = ["windlass-test-", "/wlt"];
const CHANCE_LENGTH: usize = 6;

/// What a call's argument tells of its object.
#[derive(Clone, Copy)]
enum Object {
    Nothing,
    /// A path, at this place of the arguments.
    Path(usize),
    /// A path below the descriptor before it.
    At(usize),
    /// A descriptor.
    Descriptor(usize),
    /// A descriptor and, as the next argument, a command.
    Command(usize),
    /// A number that says what is done.
    Number(usize),
    /// A descriptor, a command and a key.
    Fsconfig,
    /// What epoll is to do, and the descriptor that it is done to.
    Watch,
    /// The flags of clone(2).
    Task,
    /// Those of clone3(2).
    Task3,
}

use Errno::{EAGAIN, EBUSY, EINTR, EIO, EMFILE, ENOBUFS, ENOMEM, ENOSPC, EPERM};
use Object::{At, Command, Descriptor, Fsconfig, Nothing, Number, Path as AtPath, Task, Task3, Watch};

/// Number, name, object and errors.
type Row = (i64, &'static str, Object, &'static [Errno]);

macro_rules! rows {
    ($($name:ident $object:expr, [$($errno:ident),*];)*) => {
        &[$((const { paste(libc::$name) }, stringify!($name), $object, &[$($errno),*])),*]
    };
}

/// Numbers as the table has them, whatever their type.
const fn paste(number: libc::c_long) -> i64 {
    number
}

const ROWS: &[Row] = rows! {
    SYS_openat At(1), [EMFILE, EIO];
    SYS_openat2 At(1), [EMFILE, EIO];
    SYS_mkdirat At(1), [ENOSPC, EIO];
    SYS_mknodat At(1), [ENOSPC, EPERM];
    SYS_unlinkat At(1), [EIO, EBUSY];
    SYS_renameat At(1), [ENOSPC, EIO];
    SYS_renameat2 At(1), [ENOSPC, EIO];
    SYS_linkat At(1), [ENOSPC, EIO];
    SYS_symlinkat At(2), [ENOSPC, EIO];
    SYS_readlinkat At(1), [EIO];
    SYS_fchownat At(1), [EIO, EPERM];
    SYS_fchmodat At(1), [EIO, EPERM];
    SYS_newfstatat At(1), [EIO];
    SYS_statx At(1), [EIO];
    SYS_utimensat At(1), [EIO];
    SYS_chdir AtPath(0), [EIO];
    SYS_statfs AtPath(0), [EIO];
    SYS_fchown Descriptor(0), [EIO, EPERM];
    SYS_fchmod Descriptor(0), [EIO, EPERM];
    SYS_fchdir Descriptor(0), [EIO];
    SYS_fstatfs Descriptor(0), [EIO];
    SYS_ftruncate Descriptor(0), [ENOSPC, EIO];
    SYS_fallocate Descriptor(0), [ENOSPC, EIO];
    SYS_fsync Descriptor(0), [EIO, ENOSPC];
    SYS_fdatasync Descriptor(0), [EIO, ENOSPC];
    SYS_syncfs Descriptor(0), [EIO, ENOSPC];
    SYS_getdents64 Descriptor(0), [EIO];
    SYS_read Descriptor(0), [EIO];
    SYS_pread64 Descriptor(0), [EIO];
    SYS_readv Descriptor(0), [EIO];
    SYS_write Descriptor(0), [ENOSPC, EIO];
    SYS_pwrite64 Descriptor(0), [ENOSPC, EIO];
    SYS_writev Descriptor(0), [ENOSPC, EIO];
    SYS_copy_file_range Descriptor(0), [ENOSPC, EIO];
    SYS_sendfile Descriptor(0), [ENOSPC, EIO];
    SYS_setxattr AtPath(0), [ENOSPC, EPERM];
    SYS_lsetxattr AtPath(0), [ENOSPC, EPERM];
    SYS_fsetxattr Descriptor(0), [ENOSPC, EPERM];
    SYS_mount AtPath(1), [ENOMEM, EPERM];
    SYS_umount2 AtPath(0), [EBUSY, ENOMEM];
    SYS_pivot_root AtPath(0), [EBUSY];
    SYS_open_tree At(1), [ENOMEM, EMFILE];
    SYS_move_mount At(1), [ENOMEM, EPERM];
    SYS_fsopen AtPath(0), [ENOMEM, EMFILE];
    SYS_fsconfig Fsconfig, [ENOMEM, EPERM];
    SYS_fsmount Descriptor(0), [ENOMEM, EMFILE];
    SYS_fspick At(1), [ENOMEM];
    SYS_mount_setattr At(1), [ENOMEM, EPERM];
    SYS_clone Task, [EAGAIN];
    SYS_clone3 Task3, [EAGAIN];
    SYS_unshare Number(0), [ENOSPC, ENOMEM];
    SYS_setns Number(1), [ENOMEM, EPERM];
    SYS_execve AtPath(0), [ENOMEM, EIO];
    SYS_execveat At(1), [ENOMEM, EIO];
    SYS_pidfd_open Nothing, [EMFILE, ENOMEM];
    SYS_pidfd_getfd Nothing, [EMFILE];
    SYS_pidfd_send_signal Number(1), [EPERM];
    SYS_kill Number(1), [EPERM];
    SYS_prctl Number(0), [EPERM];
    SYS_setsid Nothing, [EPERM];
    SYS_setresuid Nothing, [EAGAIN];
    SYS_setresgid Nothing, [EPERM];
    SYS_setgroups Nothing, [ENOMEM];
    SYS_capset Nothing, [EPERM];
    SYS_prlimit64 Number(1), [EPERM];
    SYS_seccomp Nothing, [ENOMEM];
    SYS_bpf Number(0), [ENOMEM, EPERM];
    SYS_keyctl Number(0), [ENOMEM];
    SYS_sethostname Nothing, [EPERM];
    SYS_setdomainname Nothing, [EPERM];
    SYS_close_range Nothing, [ENOMEM];
    SYS_pipe2 Nothing, [EMFILE];
    SYS_eventfd2 Nothing, [EMFILE];
    SYS_memfd_create Nothing, [EMFILE, ENOMEM];
    SYS_timerfd_create Nothing, [EMFILE];
    SYS_signalfd4 Nothing, [EMFILE];
    SYS_epoll_create1 Nothing, [EMFILE];
    SYS_epoll_ctl Watch, [ENOSPC, ENOMEM];
    SYS_inotify_init1 Nothing, [EMFILE];
    SYS_inotify_add_watch AtPath(1), [ENOSPC];
    SYS_fcntl Command(0), [EMFILE];
    SYS_dup Descriptor(0), [EMFILE];
    SYS_dup3 Nothing, [EMFILE];
    SYS_ioctl Command(0), [EIO];
    SYS_flock Descriptor(0), [EINTR, ENOMEM];
    SYS_socket Number(0), [EMFILE, ENOBUFS];
    SYS_socketpair Number(0), [EMFILE];
    SYS_bind Descriptor(0), [ENOMEM];
    SYS_listen Descriptor(0), [ENOBUFS];
    SYS_accept4 Descriptor(0), [EMFILE, EINTR];
    SYS_connect Descriptor(0), [ENOBUFS, EINTR];
    SYS_setsockopt Descriptor(0), [ENOBUFS];
    SYS_getsockopt Descriptor(0), [ENOBUFS];
    SYS_getsockname Descriptor(0), [ENOBUFS];
    SYS_sendto Descriptor(0), [ENOBUFS, EINTR];
    SYS_sendmsg Descriptor(0), [ENOBUFS, EINTR];
    SYS_recvfrom Descriptor(0), [ENOMEM, EINTR];
    SYS_recvmsg Descriptor(0), [ENOMEM, EINTR];
};

/// Calls that newer architectures have in the form with a descriptor alone.
#[cfg(target_arch = "x86_64")]
const OLD_ROWS: &[Row] = rows! {
    SYS_open AtPath(0), [EMFILE, EIO];
    SYS_mkdir AtPath(0), [ENOSPC, EIO];
    SYS_mknod AtPath(0), [ENOSPC, EPERM];
    SYS_rmdir AtPath(0), [EIO, EBUSY];
    SYS_unlink AtPath(0), [EIO, EBUSY];
    SYS_rename AtPath(0), [ENOSPC, EIO];
    SYS_link AtPath(0), [ENOSPC, EIO];
    SYS_symlink AtPath(1), [ENOSPC, EIO];
    SYS_readlink AtPath(0), [EIO];
    SYS_chown AtPath(0), [EIO, EPERM];
    SYS_lchown AtPath(0), [EIO, EPERM];
    SYS_chmod AtPath(0), [EIO, EPERM];
    SYS_stat AtPath(0), [EIO];
    SYS_lstat AtPath(0), [EIO];
    SYS_dup2 Nothing, [EMFILE];
    SYS_fork Nothing, [EAGAIN];
    SYS_vfork Nothing, [EAGAIN];
};
#[cfg(not(target_arch = "x86_64"))]
const OLD_ROWS: &[Row] = &[];

fn row(number: i64) -> Option<&'static Row> {
    ROWS.iter().chain(OLD_ROWS).find(|row| row.0 == number)
}

/// Numbers of the calls that the filter asks about.
pub(super) fn watched() -> impl Iterator<Item = i64> {
    ROWS.iter().chain(OLD_ROWS).map(|row| row.0)
}

/// Who calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    Daemon,
    Monitor,
    /// What a monitor has forked, before it executes another program.
    Child,
}

/// Where a call is made: by whom, and what of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub program: Program,
    pub(super) number: i64,
    /// Without what differs between two runs.
    pub object: String,
}

impl Place {
    /// The call's name.
    pub fn name(&self) -> &'static str {
        row(self.number).map_or("call", |row| row.1.trim_start_matches("SYS_"))
    }

    /// Errors that the kernel may give here. None where there is nobody to whom it would matter, and none of a test's own connection.
    pub fn errors(&self) -> Vec<Errno> {
        let object = self.object.as_str();
        let errors = row(self.number).map_or(&[][..], |row| row.3);
        let stream = object.starts_with("pipe:") || object.starts_with("unix") || object.starts_with("inet");
        match self.name() {
            // What loads a program is not the program's own.
            _ if ["/usr/lib/", "/lib/", "/etc/ld.so"].iter().any(|of| object.starts_with(of)) => Vec::new(),
            // Where the program lies is told by another way then.
            "readlink" | "readlinkat" if object == "/proc/self/exe" => Vec::new(),
            _ if object.starts_with("test") || object.starts_with("anon_inode:[event") => Vec::new(),
            // These fail by what they are given, not by what is short.
            "fcntl" if !object.ends_with(&format!(" {}", libc::F_DUPFD_CLOEXEC)) => Vec::new(),
            // Making a descriptor wait or not cannot fail.
            "ioctl" if object.ends_with(&format!(" {}", libc::FIONBIO)) => Vec::new(),
            "read" | "write" | "readv" | "writev" | "recvfrom" | "recvmsg" if stream => vec![EINTR],
            "getsockopt" | "setsockopt" | "prctl" if self.program == Program::Daemon => Vec::new(),
            // Only adding takes memory.
            "epoll_ctl" if !object.starts_with(&format!("{} ", libc::EPOLL_CTL_ADD)) || object.ends_with(" test") => Vec::new(),
            _ => errors.to_vec(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} {}", self.program, self.name(), self.object)
    }
}

/// Where a call is made; none in programs that are not the runtime's.
pub(super) fn place(notice: &Notice) -> Option<Place> {
    let program = program(notice.thread)?;
    let object = object(notice, row(notice.number)?.2).unwrap_or_default();
    Some(Place { program, number: notice.number, object })
}

/// Who a thread is, of what the kernel says of its process alone: numbers are used again, and parents end.
fn program(thread: u32) -> Option<Program> {
    let path = fs::read_link(format!("/proc/{thread}/exe")).ok()?;
    match path.file_name()?.to_str()?.trim_end_matches(" (deleted)") {
        "windlass" => Some(Program::Daemon),
        "windlass-monitor" => Some(if is_forked(thread)? || is_init(thread) { Program::Child } else { Program::Monitor }),
        _ => None,
    }
}

/// Whether its process runs what its parent ran: it has not executed a program itself.
fn is_forked(thread: u32) -> Option<bool> {
    /// `PF_FORKNOEXEC` of the kernel's include/linux/sched.h.
    const FORKED: u32 = 0x40;
    let stat = fs::read_to_string(format!("/proc/{}/stat", process_of(thread)?)).ok()?;
    // proc_pid_stat(5): the flags are the ninth field, the name in brackets the second.
    let flags: u32 = stat.rsplit_once(") ")?.1.split(' ').nth(6)?.parse().ok()?;
    Some(flags & FORKED != 0)
}

/// Whether it is a pod's first process.
fn is_init(thread: u32) -> bool {
    second_word(thread) == b"--init"
}

fn second_word(thread: u32) -> Vec<u8> {
    let line = fs::read(format!("/proc/{thread}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).nth(1).unwrap_or_default().to_vec()
}

/// The process that a thread is of.
fn process_of(thread: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:"))?.trim().parse().ok()
}

fn object(notice: &Notice, kind: Object) -> Option<String> {
    let argument = |index: usize| notice.arguments.get(index).copied();
    let descriptor = |index: usize| Some(descriptor(notice.thread, argument(index)? as i32));
    let text = |index: usize| text(notice.thread, argument(index)?);
    Some(match kind {
        Nothing => String::new(),
        Object::Path(index) => uniform(&text(index)?),
        At(index) => {
            let path = text(index)?;
            if path.starts_with('/') || argument(index - 1)? as i32 == libc::AT_FDCWD {
                uniform(&path)
            } else {
                format!("{}/{}", descriptor(index - 1)?, uniform(&path))
            }
        }
        Descriptor(index) => descriptor(index)?,
        Command(index) => format!("{} {}", descriptor(index)?, argument(index + 1)?),
        Number(index) => argument(index)?.to_string(),
        Fsconfig => format!("{} {} {}", descriptor(0)?, argument(1)?, text(2).unwrap_or_default()),
        Watch => format!("{} {}", argument(1)?, descriptor(2)?),
        Task => kind_of_task(argument(0)?),
        Task3 => kind_of_task(word(notice.thread, argument(0)?)?),
    })
}

fn kind_of_task(flags: u64) -> String {
    if flags & libc::CLONE_THREAD as u64 != 0 { "thread" } else { "process" }.to_owned()
}

fn word(thread: u32, address: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    fs::File::open(format!("/proc/{thread}/mem")).ok()?.read_exact_at(&mut bytes, address).ok()?;
    Some(u64::from_ne_bytes(bytes))
}

fn text(thread: u32, address: u64) -> Option<String> {
    if address == 0 {
        return None;
    }
    let memory = fs::File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut bytes = [0; TEXT_MAX];
    let count = memory.read_at(&mut bytes, address).ok()?;
    let text = bytes.get(..count)?.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned())
}

fn descriptor(thread: u32, number: i32) -> String {
    let path = format!("/proc/{thread}/fd/{number}");
    let Ok(target) = fs::read_link(Path::new(&path)) else { return "none".to_owned() };
    let target = target.to_string_lossy().into_owned();
    if target.starts_with("socket:") { socket(thread, number).unwrap_or(target) } else { uniform(&target) }
}

/// A socket by its family, and by whether its other end is a test.
fn socket(thread: u32, number: i32) -> Option<String> {
    let process = Pid::from_raw(process_of(thread)?.cast_signed())?;
    let process = pidfd_open(process, PidfdFlags::empty()).ok()?;
    let socket = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).ok()?;
    Some(match sockopt::socket_domain(&socket).ok()? {
        AddressFamily::UNIX => {
            let peer = sockopt::socket_peercred(&socket).map(|peer| peer.pid);
            let own = peer.is_ok_and(|peer| peer == rustix::process::getpid() || is_command(peer));
            if own { "test" } else { "unix" }.to_owned()
        }
        AddressFamily::NETLINK => "netlink".to_owned(),
        AddressFamily::INET | AddressFamily::INET6 => "inet".to_owned(),
        other => format!("{other:?}"),
    })
}

/// Whether it is a command that a test runs: `windlass image`.
fn is_command(process: Pid) -> bool {
    second_word(process.as_raw_nonzero().get().cast_unsigned()) == b"image"
}

/// The text with `*` for ids and chance, and `#` for numbers.
fn uniform(text: &str) -> String {
    let mut made = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let run = |keep: fn(char) -> bool| rest.find(|letter| !keep(letter)).unwrap_or(rest.len());
        if let Some(prefix) = BY_CHANCE.into_iter().find(|prefix| rest.starts_with(prefix)) {
            made.push_str(prefix);
            rest = rest.get(prefix.len() + CHANCE_LENGTH..).unwrap_or_default();
            continue;
        }
        let (id, number) = (run(|letter| letter.is_ascii_hexdigit()), run(|letter| letter.is_ascii_digit()));
        let (sign, length) = match (id, number) {
            (12.., _) => ("*", id),
            (_, 1..) => ("#", number),
            _ => ("", first.len_utf8()),
        };
        let (taken, left) = rest.split_at(length);
        made.push_str(if sign.is_empty() { taken } else { sign });
        rest = left;
    }
    made
}
