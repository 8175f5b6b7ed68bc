//! The real monitor over its socket, with a busybox root. Needs root, a cgroup v2 tree and a static busybox.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod hooks;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::collections::VecDeque;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use windlass_proto::frame;
use windlass_proto::monitor::{
    CreateRequest, DeleteRequest, ExecRequest, Exit, Failure, Frame, KillExecRequest, KillRequest, ReopenLogRequest,
    SetupRequest, ShutdownRequest, SignalRequest, StartRequest, StateReply, StateRequest, container_state,
    create_request::PidMode, failure, frame::Body,
};

const TIMEOUT: Duration = Duration::from_secs(20);

/// A connection as the daemon has one.
struct Client {
    socket: UnixStream,
    input: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    events: VecDeque<Body>,
    last_id: u64,
}

impl Client {
    fn new(socket: UnixStream) -> Client {
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        Client { socket, input: Vec::new(), fds: VecDeque::new(), events: VecDeque::new(), last_id: 0 }
    }

    fn next(&mut self) -> Frame {
        loop {
            if let Some(frame) = frame::decode(&mut self.input).unwrap() {
                return frame;
            }
            let mut bytes = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let got = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
            assert_ne!(got.bytes, 0, "the monitor closed the connection");
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(fds) = message {
                    self.fds.extend(fds);
                }
            }
            self.input.extend_from_slice(&bytes[..got.bytes]);
        }
    }

    fn send(&mut self, body: Body) -> u64 {
        self.last_id += 1;
        self.socket.write_all(&frame::encode(&Frame { id: self.last_id, body: Some(body) }).unwrap()).unwrap();
        self.last_id
    }

    fn reply(&mut self, id: u64) -> Result<Body, Failure> {
        loop {
            let frame = self.next();
            match frame.body.unwrap() {
                Body::Failure(failure) if frame.id == id => return Err(failure),
                body if frame.id == id => return Ok(body),
                event => self.events.push_back(event),
            }
        }
    }

    fn call(&mut self, body: Body) -> Result<Body, Failure> {
        let id = self.send(body);
        self.reply(id)
    }

    fn event(&mut self) -> Body {
        self.events.pop_front().unwrap_or_else(|| self.next().body.unwrap())
    }

    fn container_exit(&mut self) -> Exit {
        loop {
            if let Body::ContainerExited(exited) = self.event() {
                return exited.exit.unwrap();
            }
        }
    }

    fn exec_exit(&mut self) -> Exit {
        loop {
            if let Body::ExecExited(exited) = self.event() {
                return exited.exit.unwrap();
            }
        }
    }

    fn state(&mut self) -> StateReply {
        match self.call(Body::State(StateRequest {})).unwrap() {
            Body::StateReply(state) => state,
            other => panic!("{other:?}"),
        }
    }
}

/// A monitor in a run directory and a cgroup of its own.
struct Pod {
    directory: tempfile::TempDir,
    cgroup: PathBuf,
    monitor: Child,
    client: Client,
}

impl Pod {
    fn start(name: &str) -> Pod {
        let directory = tempfile::tempdir().unwrap();
        let cgroup =
            windlass_runtime::cgroup::mount_point().unwrap().join(format!("windlass-test-{}-{name}", std::process::id()));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let program = std::env::var("WINDLASS_MONITOR").unwrap_or_else(|_| env!("CARGO_BIN_EXE_windlass-monitor").into());
        let stdin = OwnedFd::from(theirs);
        let listener = UnixListener::bind(directory.path().join(frame::SOCKET_FILE)).unwrap();
        let mut command = Command::new(program);
        command.arg("--dir").arg(directory.path()).stdin(stdin).stderr(OwnedFd::from(listener));
        let monitor = command.spawn().unwrap();
        Pod { directory, cgroup, monitor, client: Client::new(ours) }
    }

    fn pin(&self) -> PathBuf {
        self.directory.path().join("netns/pod")
    }

    /// Process id of the monitor, once it is set up.
    fn pid(&self) -> i32 {
        let procs = std::fs::read_to_string(self.cgroup.join("monitor/cgroup.procs")).unwrap();
        procs.trim().parse().expect("one process in the monitor's cgroup")
    }

    fn request(&self, own_net: bool) -> SetupRequest {
        SetupRequest {
            protocol_version: 1,
            pod_id: "pod".into(),
            monitor_cgroup: self.cgroup.join("monitor").display().to_string(),
            netns_path: if own_net { self.pin().display().to_string() } else { String::new() },
            ipc: true,
            uts: own_net,
            hostname: "windlass-test".into(),
            init_cgroup: self.cgroup.join("init").display().to_string(),
            ..SetupRequest::default()
        }
    }

    fn set_up(&mut self) {
        let request = self.request(true);
        assert!(matches!(self.client.call(Body::Setup(request)), Ok(Body::SetupReply(_))));
        assert_eq!(self.client.fds.drain(..).count(), 1, "one netlink socket");
    }

    fn create_request(&self, id: &str, script: &str) -> CreateRequest {
        let bundle = self.directory.path().join(format!("bundle-{id}"));
        write_bundle(&bundle, &["sh", "-c", script]);
        CreateRequest {
            runtime: String::new(),
            container_id: id.into(),
            bundle: bundle.display().to_string(),
            cgroup: self.cgroup.join(id).display().to_string(),
            log_path: self.log(id).display().to_string(),
            ..CreateRequest::default()
        }
    }

    fn log(&self, id: &str) -> PathBuf {
        self.directory.path().join(format!("{id}.log"))
    }

    fn run(&mut self, id: &str, script: &str) {
        let request = self.create_request(id, script);
        self.client.call(Body::Create(request)).expect("created");
        self.client.call(Body::Start(StartRequest { container_id: id.into() })).expect("started");
    }

    fn delete(&mut self, id: &str) {
        self.client.call(Body::Delete(DeleteRequest { container_id: id.into() })).expect("deleted");
        assert!(!self.cgroup.join(id).exists());
    }

    fn exec(&mut self, id: &str, exec_id: &str, script: &str) -> Result<Body, Failure> {
        let process = serde_json::json!({
            "user": {"uid": 0, "gid": 0}, "args": ["/bin/sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"]
        });
        self.client.call(Body::Exec(ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: process.to_string(),
            stdout: true,
            ..ExecRequest::default()
        }))
    }

    /// Shuts down and checks that nothing is left.
    fn end(mut self) {
        self.client.call(Body::Shutdown(ShutdownRequest::default())).expect("shut down");
        // What was started ended when the monitor went on in its cgroup.
        assert!(self.monitor.wait().unwrap().success());
        let procs = self.cgroup.join("monitor/cgroup.procs");
        wait_until("the monitor ends", || std::fs::read_to_string(&procs).is_ok_and(|text| text.is_empty()));
        assert!(!self.pin().exists() && !self.directory.path().join(frame::SOCKET_FILE).exists());
        std::fs::remove_dir(self.cgroup.join("monitor")).unwrap();
        std::fs::remove_dir(&self.cgroup).expect("no other cgroup is left");
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
        clean(&self.cgroup);
        let _ = rustix::mount::unmount(self.pin(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// Kills and removes a cgroup with everything below, where there is one.
fn clean(cgroup: &Path) {
    if let Ok(left) = windlass_runtime::cgroup::Cgroup::open(cgroup) {
        let _ = left.kill();
        let _ = left.wait_empty(TIMEOUT);
        let _ = left.remove();
    }
}

fn write_bundle(bundle: &Path, args: &[&str]) {
    let root = bundle.join("root");
    for directory in ["bin", "proc", "dev", "sys", "tmp"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
    for applet in ["sh", "sleep", "echo", "cat", "true", "seq", "usleep", "hostname", "head"] {
        let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(applet));
    }
    let config = serde_json::json!({
        "ociVersion": "1.2.0",
        "root": {"path": root},
        "process": {"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/", "env": ["PATH=/bin"]},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
    });
    std::fs::write(bundle.join("config.json"), config.to_string()).unwrap();
}

fn contents(log: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap();
    text.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap().to_owned()).collect()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read_all(fd: OwnedFd) -> String {
    let mut text = String::new();
    std::fs::File::from(fd).read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_container_runs_logs_and_ends() {
    let mut pod = Pod::start("life");
    pod.set_up();
    pod.run("c", "echo out; echo err >&2; hostname; printf tail; exit 7");
    let exit = pod.client.container_exit();
    assert_eq!((exit.code, exit.signal, exit.oom_killed), (7, 0, false));
    let mut lines = contents(&pod.log("c"));
    lines.sort();
    assert_eq!(lines, ["err", "out", "tail", "windlass-test"]);
    let text = std::fs::read_to_string(pod.log("c")).unwrap();
    assert!(text.contains(" stderr F err\n") && text.contains(" stdout P tail\n"), "{text}");
    let record = std::fs::read(pod.directory.path().join("exits/c.json")).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    assert_eq!((&record["version"], &record["code"]), (&1.into(), &7.into()));
    let reopened = pod.client.call(Body::ReopenLog(ReopenLogRequest { container_id: "c".into() }));
    assert_eq!(reopened.unwrap_err().kind(), failure::Kind::WrongState);
    pod.delete("c");
    pod.delete("c");
    pod.end();
}

#[test]
fn an_entrypoint_that_is_not_there_is_128() {
    let mut pod = Pod::start("entry");
    pod.set_up();
    let request = pod.create_request("c", "");
    write_bundle(Path::new(&request.bundle), &["/bin/absent"]);
    let made = pod.client.call(Body::Create(request));
    let failed = match made {
        Ok(_) => {
            let failed = pod.client.call(Body::Start(StartRequest { container_id: "c".into() })).unwrap_err();
            assert_eq!(pod.client.container_exit().code, 128);
            pod.delete("c");
            failed
        }
        Err(failed) => failed,
    };
    assert_eq!(failed.kind(), failure::Kind::Entrypoint, "{failed:?}");
    pod.end();
}

#[test]
fn execs_answer_with_descriptors_and_are_killed_whole() {
    let mut pod = Pod::start("exec");
    pod.set_up();
    pod.run("c", "sleep 1000");
    pod.exec("c", "a", "echo hello; exit 3").expect("runs");
    let stdout = pod.client.fds.pop_front().unwrap();
    assert_eq!(read_all(stdout), "hello\n");
    assert_eq!(pod.client.exec_exit().code, 3);
    pod.exec("c", "b", "sleep 1000 & sleep 1000").expect("runs");
    let stdout = pod.client.fds.pop_front().unwrap();
    pod.client.call(Body::KillExec(KillExecRequest { exec_id: "b".into(), signal: 0 })).expect("killed");
    assert_eq!(read_all(stdout), "", "both hold the pipe, both must end");
    assert_eq!(pod.client.exec_exit().signal, 9);
    let leaf = pod.cgroup.join("c");
    wait_until("exec cgroups go", || !leaf.join("exec-a").exists() && !leaf.join("exec-b").exists());
    pod.client.call(Body::Signal(SignalRequest { container_id: "c".into(), signal: 9 })).expect("signalled");
    assert_eq!(pod.client.container_exit().signal, 9);
    assert_eq!(pod.exec("c", "d", "true").unwrap_err().kind(), failure::Kind::WrongState);
    pod.end();
}

#[test]
fn a_reopen_under_load_loses_and_doubles_nothing() {
    let mut pod = Pod::start("reopen");
    pod.set_up();
    pod.run("c", "i=0; while [ $i -lt 1000 ]; do i=$((i+1)); echo $i; usleep 1000; done");
    let log = pod.log("c");
    let mut files = Vec::new();
    for index in 0..10 {
        wait_until("a line comes", || std::fs::metadata(&log).is_ok_and(|meta| meta.len() > 100));
        let old = log.with_extension(format!("log.{index}"));
        std::fs::rename(&log, &old).unwrap();
        pod.client.call(Body::ReopenLog(ReopenLogRequest { container_id: "c".into() })).expect("reopened");
        files.push(old);
    }
    assert_eq!(pod.client.container_exit().code, 0);
    files.push(log);
    let lines: Vec<String> = files.iter().flat_map(|file| contents(file)).collect();
    let expected: Vec<String> = (1..=1000).map(|number| number.to_string()).collect();
    assert_eq!(lines, expected);
    pod.end();
}

#[test]
fn a_new_connection_takes_over_and_a_broken_one_harms_nobody() {
    let mut pod = Pod::start("again");
    pod.set_up();
    pod.run("c", "sleep 1000");
    let connect = || Client::new(UnixStream::connect(pod.directory.path().join(frame::SOCKET_FILE)).unwrap());
    let mut second = connect();
    second.socket.write_all(&[255; 64]).unwrap();
    assert_eq!(second.socket.read(&mut [0; 1]).unwrap_or(0), 0);
    let third = connect();
    pod.client = third;
    let state = pod.client.state();
    assert_eq!((state.pod_id.as_str(), state.containers.len()), ("pod", 1));
    assert_eq!(state.containers[0].phase(), container_state::Phase::Running);
    pod.client.call(Body::Kill(KillRequest { container_id: "c".into() })).expect("killed");
    assert_eq!(pod.client.container_exit().code, 137);
    pod.end();
}

#[test]
fn a_failed_setup_leaves_nothing_and_can_be_repeated() {
    let mut pod = Pod::start("undo");
    for name in ["kernel.hostname", "vm.swappiness", "net.ipv4.absent"] {
        let mut request = pod.request(true);
        request.sysctls.insert(name.into(), "1".into());
        let failed = pod.client.call(Body::Setup(request)).unwrap_err();
        assert!(failed.kind() == failure::Kind::Invalid && failed.object.contains(name), "{failed:?}");
        assert!(!pod.pin().exists() && !pod.cgroup.join("init").exists());
    }
    pod.set_up();
    pod.end();
}

#[test]
fn a_shared_pid_namespace_has_the_init_first() {
    let mut pod = Pod::start("shared");
    let request = SetupRequest { shared_pid: true, ..pod.request(true) };
    let Ok(Body::SetupReply(reply)) = pod.client.call(Body::Setup(request)) else { panic!("not set up") };
    assert!(reply.init_pid > 0);
    let mut request = pod.create_request("c", "echo $$; sleep 1000 & exit 0");
    request.pid_mode = PidMode::Pod.into();
    pod.client.call(Body::Create(request)).expect("created");
    pod.client.call(Body::Start(StartRequest { container_id: "c".into() })).expect("started");
    assert_eq!(pod.client.container_exit().code, 0);
    assert_ne!(contents(&pod.log("c")), ["1"]);
    let procs = std::fs::read_to_string(pod.cgroup.join("c/cgroup.procs")).unwrap();
    assert_eq!(procs, "", "what the container left behind is dead before its exit is published");
    pod.end();
}

#[test]
fn a_killed_monitor_leaves_only_cgroups() {
    let mut pod = Pod::start("lost");
    pod.set_up();
    pod.run("c", "sleep 1000");
    let pid = pod.client.state().containers[0].pid;
    let monitor = rustix::process::Pid::from_raw(pod.pid()).unwrap();
    rustix::process::kill_process(monitor, rustix::process::Signal::KILL).unwrap();
    clean(&pod.cgroup);
    assert!(!pod.cgroup.exists() && !Path::new(&format!("/proc/{pid}/ns")).join("net").exists());
}

fn median_us(mut times: Vec<Duration>) -> u128 {
    times.sort();
    times[times.len() / 2].as_micros()
}

/// Prints medians over the socket; fails only where something is an order of magnitude off. `WINDLASS_MONITOR` names another build.
#[test]
fn times_over_the_socket() {
    let mut times: [Vec<Duration>; 5] = Default::default();
    for round in 0..50 {
        let mut pod = Pod::start(&format!("time-{round}"));
        let own_net = round % 2 == 0;
        pod.client.state();
        let request = pod.request(own_net);
        let mut begin = Instant::now();
        let mut lap = |index: usize| {
            times[index].push(begin.elapsed());
            begin = Instant::now();
        };
        pod.client.call(Body::Setup(request)).expect("set up");
        lap(usize::from(own_net));
        let request = pod.create_request("c", "while :; do sleep 1000; done");
        pod.client.call(Body::Create(request)).expect("created");
        lap(2);
        pod.client.call(Body::Start(StartRequest { container_id: "c".into() })).expect("started");
        lap(3);
        pod.exec("c", "e", "true").expect("runs");
        pod.client.exec_exit();
        lap(4);
        pod.end();
    }
    let [host, net, create, start, exec] = times.map(median_us);
    println!("median us: setup host network {host}, own network {net}, create {create}, start {start}, exec to exit {exec}");
}

/// Prints the memory of 20 monitors that each hold a running container.
#[test]
fn memory_of_twenty_monitors() {
    let mut pods: Vec<Pod> = (0..20).map(|number| Pod::start(&format!("mem-{number}"))).collect();
    for pod in &mut pods {
        pod.set_up();
        pod.run("c", "echo started; while :; do sleep 1000; done");
        let log = pod.log("c");
        wait_until("a line", || std::fs::metadata(&log).is_ok_and(|meta| meta.len() > 0));
    }
    let field = |pod: &Pod, name: &str| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", pod.pid())).unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let average = |name: &str| pods.iter().map(|pod| field(pod, name)).sum::<u64>() / 20;
    let (pss, dirty) = (average("Pss:"), average("Private_Dirty:"));
    println!("KiB for a monitor: PSS {pss}, private dirty {dirty}");
    assert!(dirty < 1024, "private dirty {dirty} KiB");
    pods.into_iter().for_each(Pod::end);
}
