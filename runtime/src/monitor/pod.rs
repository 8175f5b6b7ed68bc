//! What a pod has besides containers: the monitor's place, the namespaces, the shared memory, the built-in init. Each is made
//! here and given back by [`Pod::release`]; only the network namespace has a name outside (its pin).

use super::note::note;
use super::sysctl::{self, Home};
use crate::cgroup::Cgroup;
use crate::namespace::user::{self, Mapping};
use crate::process::{Context, Kind, PodNamespaces, StepError};
use crate::sys::{self, clone::Forked};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use windlass_proto::monitor::{IdMapping, SetupRequest};

/// Size of /dev/shm without a wish.
const SHM_DEFAULT_BYTES: u64 = 64 << 20;

/// How long the built-in init may take to be ready, and to go.
const INIT_TIMEOUT: Duration = Duration::from_secs(5);

static ASTRAY: AtomicBool = AtomicBool::new(false);

#[derive(Default)]
pub(super) struct Pod {
    pub(super) id: String,
    pin: Option<PathBuf>,
    user: Option<OwnedFd>,
    net: Option<OwnedFd>,
    ipc: Option<OwnedFd>,
    uts: Option<OwnedFd>,
    shm: Option<OwnedFd>,
    init: Option<Init>,
    init_cgroup: Option<Cgroup>,
}

struct Init {
    pid: Pid,
    pidfd: OwnedFd,
    namespace: OwnedFd,
}

impl Pod {
    /// Makes everything that is asked for, or nothing. With a network namespace, a NETLINK_ROUTE socket in it.
    pub(super) fn setup(request: &SetupRequest) -> Result<(Pod, Option<OwnedFd>), StepError> {
        let mut pod = Pod { id: request.pod_id.clone(), ..Pod::default() };
        let built = pod.build(request);
        if built.is_err() {
            pod.release();
        }
        built.map(|socket| (pod, socket))
    }

    fn build(&mut self, request: &SetupRequest) -> Result<Option<OwnedFd>, StepError> {
        let mut socket = None;
        if !request.uid_mappings.is_empty() {
            self.user = Some(user::make(&mappings(&request.uid_mappings), &mappings(&request.gid_mappings))?);
        }
        if !request.netns_path.is_empty() {
            let pin = PathBuf::from(&request.netns_path);
            let (net, made) = inside_new(self.user.as_ref(), CloneFlags::CLONE_NEWNET, "net", || {
                loopback_up()?;
                sysctl::write_net_defaults()?;
                if self.user.is_none() {
                    sysctl::write(&request.sysctls, Home::Net, request.sysctls_again)?;
                }
                let socket = route_socket()?;
                make_pin(&pin)?;
                self.pin = Some(pin);
                Ok(socket)
            })?;
            (self.net, socket) = (Some(net), Some(made));
        }
        if request.ipc {
            let user = self.user.as_ref();
            let write = || if user.is_none() { sysctl::write(&request.sysctls, Home::Ipc, false) } else { Ok(()) };
            let (ipc, ()) = inside_new(user, CloneFlags::CLONE_NEWIPC, "ipc", write)?;
            self.ipc = Some(ipc);
            self.shm = Some(shared_memory(request)?);
        }
        if request.uts {
            let name = &request.hostname;
            let set = || rustix::system::sethostname(name.as_bytes()).context("set hostname", name);
            self.uts = Some(inside_new(self.user.as_ref(), CloneFlags::CLONE_NEWUTS, "uts", set)?.0);
        }
        self.write_sysctls_inside(request)?;
        if request.shared_pid {
            self.init_cgroup = Some(Cgroup::create(Path::new(&request.init_cgroup))?);
            self.init = Some(start_init(Path::new(&request.init_cgroup), self.user.as_ref())?);
        }
        Ok(socket)
    }

    /// The pod's sysctls as root of its user namespace: ids in them are the pod's, and the kernel asks for that root.
    fn write_sysctls_inside(&self, request: &SetupRequest) -> Result<(), StepError> {
        let Some(user) = self.user.as_ref().filter(|_| !request.sysctls.is_empty()) else { return Ok(()) };
        let spaces = [(&self.net, CloneFlags::CLONE_NEWNET), (&self.ipc, CloneFlags::CLONE_NEWIPC)];
        let others: Vec<_> = spaces.into_iter().filter_map(|(fd, flag)| Some((fd.as_ref()?.as_fd(), flag))).collect();
        user::inside(user.as_fd(), &others, || {
            sysctl::write(&request.sysctls, Home::Net, request.sysctls_again)?;
            sysctl::write(&request.sysctls, Home::Ipc, false).map(|()| Vec::new())
        })
        .map(drop)
    }

    /// The network's sysctls once more, now that its interfaces are there.
    pub(super) fn write_net_sysctls(&self, sysctls: &HashMap<String, String>) -> Result<(), StepError> {
        let none = || StepError::because(Kind::Invalid, "set sysctls", "", "the pod uses the host's network namespace");
        let net = self.net.as_ref().ok_or_else(none)?;
        if let Some(user) = &self.user {
            let write = || sysctl::write(sysctls, Home::Net, false).map(|()| Vec::new());
            return user::inside(user.as_fd(), &[(net.as_fd(), CloneFlags::CLONE_NEWNET)], write).map(drop);
        }
        let host = open_namespace("/proc/self/ns/net")?;
        setns(net, CloneFlags::CLONE_NEWNET).context("join namespace", "net")?;
        let written = sysctl::write(sysctls, Home::Net, false);
        come_back(&host, CloneFlags::CLONE_NEWNET, "net")?;
        written
    }

    /// Leaves it to the daemon to unpin the network namespace.
    pub(super) fn leave_pin(&mut self) {
        self.pin = None;
    }

    /// Undoes [`Pod::setup`] but for the monitor's own place. What fails is noted: there is nobody to do it better.
    pub(super) fn release(&mut self) {
        if let Some(init) = self.init.take() {
            let _ = rustix::process::pidfd_send_signal(&init.pidfd, Signal::KILL);
            readable_within(init.pidfd.as_fd(), INIT_TIMEOUT);
            let _ = rustix::process::waitpid(Some(init.pid), WaitOptions::NOHANG);
        }
        if let Some(cgroup) = self.init_cgroup.take() {
            let emptied = cgroup.kill().and_then(|()| cgroup.wait_empty(INIT_TIMEOUT)).and_then(|_| cgroup.remove());
            if let Err(error) = emptied {
                note(format_args!("remove the init's cgroup: {error}"));
            }
        }
        if let Some(pin) = self.pin.take() {
            remove_pin(&pin);
        }
        (self.net, self.ipc, self.uts, self.shm) = (None, None, None, None);
        self.user = None;
    }

    /// What containers join.
    pub(super) fn namespaces(&self) -> PodNamespaces<'_> {
        let held = [&self.user, &self.net, &self.ipc, &self.uts, &self.shm];
        let [user, net, ipc, uts, shm] = held.map(|fd| fd.as_ref().map(AsFd::as_fd));
        PodNamespaces { user, net, ipc, uts, shm, layers: None }
    }

    /// Unconnected TCP sockets of the pod's network, IPv4 and where there is IPv6 that too. A socket stays in the namespace that it was made in.
    pub(super) fn tcp_sockets(&self) -> Result<Vec<OwnedFd>, StepError> {
        let Some(net) = &self.net else { return tcp_sockets() };
        let host = open_namespace("/proc/self/ns/net")?;
        setns(net, CloneFlags::CLONE_NEWNET).context("join namespace", "net")?;
        let made = tcp_sockets();
        come_back(&host, CloneFlags::CLONE_NEWNET, "net")?;
        made
    }

    /// Whether containers live in a user namespace.
    pub(super) fn has_user(&self) -> bool {
        self.user.is_some()
    }

    /// The shared pid namespace.
    pub(super) fn pid_namespace(&self) -> Option<BorrowedFd<'_>> {
        self.init.as_ref().map(|init| init.namespace.as_fd())
    }

    /// Process id of the built-in init, 0 without one.
    pub(super) fn init_pid(&self) -> i32 {
        self.init.as_ref().map_or(0, |init| init.pid.as_raw_nonzero().get())
    }
}

fn mappings(listed: &[IdMapping]) -> Vec<Mapping> {
    let one = |id: &IdMapping| Mapping { inside: id.container_id, outside: id.host_id, length: id.length };
    listed.iter().map(one).collect()
}

/// Runs `work` in a new namespace, which `user` owns, and comes back. A failed return ends the monitor.
fn inside_new<T>(
    user: Option<&OwnedFd>,
    flag: CloneFlags,
    kind: &str,
    work: impl FnOnce() -> Result<T, StepError>,
) -> Result<(OwnedFd, T), StepError> {
    let path = format!("/proc/self/ns/{kind}");
    let host = open_namespace(&path)?;
    match user {
        Some(user) => {
            for made in user::make_owned(user.as_fd(), &[(flag, kind)])? {
                setns(&made, flag).context("join namespace", kind)?;
            }
        }
        None => unshare(flag).context("unshare", kind)?,
    }
    let done = open_namespace(&path).and_then(|made| Ok((made, work()?)));
    come_back(&host, flag, kind)?;
    done
}

/// Back from a namespace of the pod's. A process that cannot come back must not go on: it would make the next things there.
fn come_back(host: &OwnedFd, flag: CloneFlags, kind: &str) -> Result<(), StepError> {
    setns(host, flag).context("return to the host's namespace", kind).inspect_err(|error| {
        note(error);
        ASTRAY.store(true, Ordering::Relaxed);
    })
}

/// Whether the monitor has to end, having said why, because it is in a namespace of its pod.
pub(super) fn is_astray() -> bool {
    ASTRAY.load(Ordering::Relaxed)
}

fn open_namespace(path: &str) -> Result<OwnedFd, StepError> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).context("open namespace", path)
}

/// Binds the caller's network namespace onto a new file.
fn make_pin(pin: &Path) -> Result<(), StepError> {
    if let Some(directory) = pin.parent() {
        std::fs::create_dir_all(directory).context("create", directory.display())?;
    }
    let flags = OFlags::RDONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    rustix::fs::open(pin, flags, Mode::from_raw_mode(0o444)).context("create", pin.display())?;
    rustix::mount::mount_bind("/proc/self/ns/net", pin).context("bind network namespace", pin.display()).inspect_err(|_| {
        let _ = std::fs::remove_file(pin);
    })
}

fn remove_pin(pin: &Path) {
    if let Err(errno) = rustix::mount::unmount(pin, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        note(format_args!("unmount {}: {errno}", pin.display()));
    }
    if let Err(error) = std::fs::remove_file(pin) {
        note(format_args!("remove {}: {error}", pin.display()));
    }
}

fn route_socket() -> Result<OwnedFd, StepError> {
    // No protocol is protocol 0, which is NETLINK_ROUTE.
    rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)
        .context("open socket", "NETLINK_ROUTE")
}

fn tcp_sockets() -> Result<Vec<OwnedFd>, StepError> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let make = |family| rustix::net::socket_with(family, SocketType::STREAM, flags, None);
    let first = make(AddressFamily::INET).context("open socket", "TCP")?;
    // A kernel may be without IPv6.
    Ok(std::iter::once(first).chain(make(AddressFamily::INET6).ok()).collect())
}

/// Sets IFF_UP on link 1, which is lo in every network namespace. The socket is used once: a socket that has sent is bound, and
/// the one that is passed on shall not be.
fn loopback_up() -> Result<(), StepError> {
    const LENGTH: u32 = 32;
    let socket = route_socket()?;
    let mut request = Vec::with_capacity(LENGTH as usize);
    request.extend_from_slice(&LENGTH.to_ne_bytes());
    request.extend_from_slice(&libc::RTM_NEWLINK.to_ne_bytes());
    request.extend_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    request.extend_from_slice(&[0; 8]); // sequence, port
    request.extend_from_slice(&[0; 4]); // ifinfomsg: family, padding, type
    request.extend_from_slice(&1i32.to_ne_bytes());
    request.extend_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
    request.extend_from_slice(&(libc::IFF_UP as u32).to_ne_bytes());
    rustix::net::send(&socket, &request, SendFlags::empty()).context("bring up", "lo")?;
    let mut reply = [0u8; 256];
    let (count, _) = rustix::net::recv(&socket, &mut reply, RecvFlags::empty()).context("bring up", "lo")?;
    // nlmsghdr, then nlmsgerr whose first field is 0 or -errno.
    let code = reply.get(16..20).filter(|_| count >= 20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(StepError::errno("bring up", "lo", -code)),
        None => Err(StepError::because(Kind::Internal, "bring up", "lo", "short netlink reply")),
    }
}

/// A tmpfs that is mounted nowhere; it lives as long as its descriptor and its clones.
fn shared_memory(request: &SetupRequest) -> Result<OwnedFd, StepError> {
    let label = request.mount_label.as_str();
    let size = if request.shm_size_bytes == 0 { SHM_DEFAULT_BYTES } else { request.shm_size_bytes };
    let root = |ids: &[IdMapping]| ids.iter().find(|id| id.container_id == 0).map(|id| id.host_id.to_string());
    let (uid, gid) = (root(&request.uid_mappings), root(&request.gid_mappings));
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).context("make", "/dev/shm")?;
    let size = size.to_string();
    let mut options = vec![("source", "shm"), ("mode", "1777"), ("size", size.as_str())];
    options.extend(uid.as_deref().map(|uid| ("uid", uid)));
    options.extend(gid.as_deref().map(|gid| ("gid", gid)));
    options.extend(Some(("context", label)).filter(|_| !label.is_empty()));
    for (key, value) in options {
        rustix::mount::fsconfig_set_string(&context, key, value).context("make /dev/shm with", format_args!("{key}={value}"))?;
    }
    rustix::mount::fsconfig_create(&context).context("make", "/dev/shm")?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).context("make", "/dev/shm")
}

/// Starts the built-in init as process 1 of a new pid namespace, which `user` owns, and waits until it is ready.
fn start_init(cgroup: &Path, user: Option<&OwnedFd>) -> Result<Init, StepError> {
    let words = match user {
        Some(user) => user::inside(user.as_fd(), &[], || spawn_init().map(|pid| vec![pid.to_string()]))?,
        None => vec![spawn_init_from_here()?.to_string()],
    };
    let unknown = || StepError::because(Kind::Internal, "start", "the pod's init", "it has no process id");
    let number = words.first().and_then(|word| word.parse::<i32>().ok());
    let pid = number.and_then(Pid::from_raw).ok_or_else(unknown)?;
    let built = std::fs::write(cgroup.join("cgroup.procs"), pid.to_string())
        .context("move the pod's init to", cgroup.display())
        .and_then(|()| rustix::process::pidfd_open(pid, PidfdFlags::empty()).context("open pidfd", "of the pod's init"))
        .and_then(|pidfd| Ok(Init { pid, pidfd, namespace: open_namespace(&format!("/proc/{pid}/ns/pid"))? }));
    if built.is_err() {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
        let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
    }
    built
}

fn spawn_init_from_here() -> Result<Pid, StepError> {
    let host = open_namespace("/proc/self/ns/pid")?;
    let spawned = spawn_init();
    let back = come_back(&host, CloneFlags::CLONE_NEWPID, "pid");
    if let (Err(_), Ok(pid)) = (&back, &spawned) {
        let _ = rustix::process::kill_process(*pid, Signal::KILL);
    }
    back.and(spawned)
}

/// Starts the init in a new pid namespace, as root of the caller's user namespace: an exec by anybody else would lose the rights over it. End of file on its output says that it is ready, or has ended. The caller's later children
/// are born there too.
fn spawn_init() -> Result<Pid, StepError> {
    unshare(CloneFlags::CLONE_NEWPID).context("unshare", "pid")?;
    let spawned = Command::new("/proc/self/exe")
        .arg("--init")
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn();
    let mut child = spawned.context("start", "the pod's init")?;
    let came = child.stdout.take().is_some_and(|pipe| readable_within(pipe.as_fd(), INIT_TIMEOUT));
    if came && matches!(child.try_wait(), Ok(None)) {
        return Ok(Pid::from_child(&child));
    }
    let _ = child.kill();
    let _ = child.wait();
    Err(StepError::because(Kind::Internal, "start", "the pod's init", "it ended or hangs"))
}

/// Whether something can be read (or the other end was closed) in time.
fn readable_within(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let limit = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
    matches!(rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&limit)), Ok(1))
}

/// Refuses what cannot be made, before anything is made.
pub(super) fn check(request: &SetupRequest) -> Result<(), StepError> {
    sysctl::check(&request.sysctls, !request.netns_path.is_empty(), request.ipc)
}

/// Makes the monitor's leaf and goes on there as a new process, a copy of this one, which ends. Being born in a cgroup costs a
/// fork; a migration waits up to 20 ms for the kernel (a grace period of RCU under `cgroup_threadgroup_rwsem`), and what
/// the pod's first requests would wait for is this. Signal descriptors and the reaper's role are the caller's to take up again.
pub(super) fn settle(cgroup: &Path) -> Result<(), StepError> {
    // In a scope of systemd's, which puts the monitor into the group that its leaf and the containers' are made in.
    let (leaf, inside) = Cgroup::create_beside_own(cgroup)?;
    // SAFETY: the monitor has one thread.
    match unsafe { sys::clone::fork_into(leaf.as_fd(), false) }.context("go on in cgroup", cgroup.display()) {
        Ok(Forked::Child) => {
            rustix::process::setsid().context("make session", "")?;
            rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("become the pod's reaper", "")?;
            if inside { leaf.enable_when_alone() } else { Ok(()) }
        }
        Ok(Forked::Parent { .. }) => sys::process::exit_now(0),
        Err(error) => {
            if let Err(undo) = leaf.remove() {
                note(format_args!("undo setup: {undo}"));
            }
            Err(error)
        }
    }
}
