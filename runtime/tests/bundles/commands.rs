//! The commands around a container's life.

use crate::{Bundle, OCI};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn ok(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

/// The error of a command that must fail.
fn refused(output: Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    text(&output.stderr)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

fn status(bundle: &Bundle) -> String {
    let state: Value = serde_json::from_slice(&bundle.verb("state").stdout).unwrap_or_default();
    state["status"].as_str().unwrap_or_default().to_owned()
}

/// Created and started.
fn running(name: &str, arguments: &[&str]) -> Bundle {
    let bundle = Bundle::new(name, arguments);
    ok(bundle.verb("create"));
    ok(bundle.verb("start"));
    bundle
}

#[test]
fn containers_are_listed_with_their_processes() {
    let bundle = running("list", &["sh", "-c", "sleep 100 & wait"]);
    wait_until("both processes", || ok(bundle.oci(&["ps", "--format", "json", &bundle.id])).matches(',').count() == 1);
    let listed: Value = serde_json::from_str(&ok(bundle.oci(&["list", "--format", "json"]))).expect("JSON");
    assert_eq!(listed[0]["id"], json!(bundle.id));
    assert_eq!(listed[0]["status"], "running");
    assert_eq!(listed[0]["bundle"], json!(bundle.directory.path()));
    assert!(listed[0]["created"].as_str().expect("time").ends_with('Z'), "{listed}");
    let table = ok(bundle.oci(&["list"]));
    assert!(table.starts_with("ID") && table.contains(&format!("{}   ", bundle.id)) && table.contains("running"), "{table}");
    assert_eq!(ok(bundle.oci(&["list", "-q"])), format!("{}\n", bundle.id));
    let pids: Vec<i64> = serde_json::from_str(&ok(bundle.oci(&["ps", "-f", "json", &bundle.id]))).expect("JSON");
    assert!(pids.contains(&listed[0]["pid"].as_i64().expect("pid")), "{pids:?}");
    let table = ok(bundle.oci(&["ps", &bundle.id]));
    assert!(table.contains("CMD") && table.contains("sleep 100"), "{table}");
    assert!(refused(bundle.oci(&["ps", "-f", "xml", &bundle.id])).contains("xml"));
    assert!(refused(bundle.oci(&["ps", "nobody"])).contains("does not exist"));
}

#[test]
fn a_paused_container_stands_still_until_it_is_resumed() {
    let bundle = running("pause", &["sh", "-c", "while true; do echo >> /ticks; done"]);
    let ticks = || fs::metadata(bundle.path("upper/ticks")).map(|found| found.len()).unwrap_or(0);
    wait_until("ticks", || ticks() > 0);
    assert!(refused(bundle.verb("resume")).contains("the container is running"));
    ok(bundle.verb("pause"));
    assert_eq!(status(&bundle), "paused");
    let before = ticks();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(ticks(), before, "it went on");
    assert!(refused(bundle.verb("pause")).contains("the container is paused"));
    assert!(refused(bundle.oci(&["exec", &bundle.id, "true"])).contains("the container is paused"));
    ok(bundle.verb("resume"));
    assert_eq!(status(&bundle), "running");
    wait_until("more ticks", || ticks() > before);
    ok(bundle.verb("pause"));
    // A frozen container can be killed.
    ok(bundle.oci(&["kill", &bundle.id, "KILL"]));
    wait_until("its end", || status(&bundle) == "stopped");
    ok(bundle.verb("delete"));
}

#[test]
fn limits_that_this_host_cannot_enforce_are_named() {
    let bundle = running("update", &["sleep", "100"]);
    let cgroup = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(|root| Path::new(root).join(&bundle.id));
    let cgroup = cgroup.iter().find(|path| path.exists()).expect("its cgroup");
    let file = bundle.path("resources.json");
    fs::write(&file, r#"{"memory": {"limit": 100000000}}"#).expect("resources");
    let file = file.display().to_string();
    for flags in [["--memory", "100000000"], ["--resources", &file]] {
        let output = bundle.oci(&["update", flags[0], flags[1], &bundle.id]);
        if cgroup.join("memory.max").exists() {
            ok(output);
            assert_eq!(fs::read_to_string(cgroup.join("memory.max")).expect("limit"), "99999744\n");
        } else {
            assert!(refused(output).contains("no controller for: memory"), "{flags:?}");
        }
    }
    let check = |words: &[&str], expected: &str| {
        let error = refused(bundle.oci(&[&["update"], words, &[bundle.id.as_str()]].concat()));
        assert!(error.contains(expected), "{words:?}: {expected:?} is missing in {error}");
    };
    check(&["--memory", "much"], "--memory");
    check(&["--memory", "1", "--resources", &file], "the limits come from a file");
    check(&["--kernel-memory", "5"], "--kernel-memory");
    check(&["--no-such", "5"], "no such flag");
    check(&["--memory-swap", "5"], "swap 5");
    ok(bundle.oci(&["update", &bundle.id]));
}

#[test]
fn an_exec_is_who_and_where_its_flags_say() {
    let bundle = running("exec", &["sleep", "100"]);
    let script = "echo $(busybox id -u):$(busybox id -g) $(busybox pwd) $COLOUR; busybox id -G; busybox grep -E 'CapEff|NoNewPrivs' /proc/self/status";
    let words =
        ["exec", "--user", "7:8", "-g", "9", "--cwd", "/proc", "-e", "COLOUR=red", "--no-new-privs", "--cap", "CAP_NET_RAW"];
    let out = ok(bundle.oci(&[&words[..], &[&bundle.id, "sh", "-c", script]].concat()));
    assert!(out.starts_with("7:8 /proc red\n8 9\n"), "{out}");
    assert!(out.contains("NoNewPrivs:\t1"), "{out}");
    assert!(refused(bundle.oci(&["exec", "--cap", "CAP_FLY", &bundle.id, "true"])).contains("CAP_FLY"));
    assert!(refused(bundle.oci(&["exec", "--user", "root", &bundle.id, "true"])).contains("root"));
    assert!(refused(bundle.oci(&["exec", &bundle.id])).contains("needs a program"));
    let pid_file = bundle.path("exec.pid").display().to_string();
    // What is detached keeps the caller's streams.
    let detached = Command::new(OCI)
        .args(["--root", &bundle.path("state").display().to_string(), "exec", "--detach", "--pid-file", &pid_file, &bundle.id])
        .args(["sh", "-c", "sleep 50"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(detached.expect("windlass-oci").success());
    let pid: i64 = fs::read_to_string(&pid_file).expect("pid").parse().expect("number");
    let pids: Vec<i64> = serde_json::from_str(&ok(bundle.oci(&["ps", "-f", "json", &bundle.id]))).expect("JSON");
    assert!(pids.contains(&pid), "{pid} is not in {pids:?}");
    ok(bundle.oci(&["kill", "--all", &bundle.id, "KILL"]));
    wait_until("its end", || status(&bundle) == "stopped");
    ok(bundle.verb("delete"));
}

#[test]
fn errors_are_logged_as_managers_read_them() {
    let bundle = Bundle::new("log", &["true"]);
    let log = bundle.path("log.json").display().to_string();
    let words = ["--log", &log, "--log-format", "json"];
    let with = |rest: &[&str]| refused(bundle.oci(&[&words[..], rest].concat()));
    with(&["state", "nobody"]);
    with(&["--systemd-cgroup", "list"]);
    with(&["start", ".."]);
    let lines: Vec<Value> =
        fs::read_to_string(&log).expect("log").lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    for (line, expected) in lines.iter().zip(["does not exist", "--systemd-cgroup", "not a container id"]) {
        assert_eq!(line["level"], "error", "{line}");
        assert!(line["msg"].as_str().expect("msg").contains(expected), "{expected:?} is missing in {line}");
        assert!(line["time"].as_str().expect("time").ends_with('Z'), "{line}");
    }
    assert_eq!(lines.len(), 3);
    assert!(refused(bundle.oci(&["--log-format", "xml", "list"])).contains("xml"));
}

#[test]
fn what_it_can_do_is_told() {
    let bundle = Bundle::new("features", &["true"]);
    let features: Value = serde_json::from_str(&ok(bundle.oci(&["features"]))).expect("JSON");
    assert_eq!(features["hooks"].as_array().map(Vec::len), Some(6));
    assert_eq!(features["linux"]["cgroup"]["v1"], false);
    for option in ["ro", "rro", "rbind", "idmap", "nosymfollow"] {
        assert!(features["mountOptions"].as_array().expect("options").contains(&json!(option)), "{option}");
    }
    assert!(ok(bundle.oci(&["--version"])).starts_with("windlass-oci version "));
    assert!(ok(bundle.oci(&["--help"])).contains("features"));
    assert!(ok(bundle.oci(&["exec", "--help"])).contains("--console-socket"));
}

#[test]
fn a_terminal_goes_to_the_console_socket() {
    let mut bundle = Bundle::new("console", &["sh", "-c", "busybox tty; read line; echo got $line"]);
    bundle.config["process"]["terminal"] = json!(true);
    let socket = bundle.path("console.sock");
    let listener = UnixListener::bind(&socket).expect("socket");
    let path = socket.display().to_string();
    assert!(!bundle.verb("create").status.success(), "a terminal without a console socket");
    let directory = bundle.directory.path().display().to_string();
    let pid_file = bundle.path("pid").display().to_string();
    ok(bundle.oci(&["create", "--bundle", &directory, "--console-socket", &path, "--pid-file", &pid_file, &bundle.id]));
    let state: Value = serde_json::from_slice(&bundle.verb("state").stdout).expect("state");
    assert_eq!(fs::read_to_string(&pid_file).expect("pid"), state["pid"].to_string());
    let mut master = fs::File::from(receive(&listener));
    ok(bundle.verb("start"));
    master.write_all(b"word\n").expect("typed");
    let printed = read_until(&mut master, "got word");
    assert!(printed.contains("/dev/pts/0") || printed.contains("/dev/console"), "{printed}");
    wait_until("its end", || status(&bundle) == "stopped");
    ok(bundle.verb("delete"));
}

#[test]
fn an_exec_has_a_terminal_if_it_is_asked_for() {
    let bundle = running("tty", &["sleep", "100"]);
    let socket = bundle.path("console.sock");
    let listener = UnixListener::bind(&socket).expect("socket");
    let path = socket.display().to_string();
    assert!(refused(bundle.oci(&["exec", "-d", "-t", &bundle.id, "sh"])).contains("--console-socket"));
    assert!(refused(bundle.oci(&["exec", "--console-socket", &path, &bundle.id, "sh"])).contains("no terminal"));
    ok(bundle.oci(&["exec", "--detach", "--tty", "--console-socket", &path, &bundle.id, "sh", "-c", "test -t 0 && echo yes"]));
    let mut master = fs::File::from(receive(&listener));
    read_until(&mut master, "yes");
    // In the foreground the terminal's output comes through.
    let out = ok(bundle.oci(&["exec", "--tty", &bundle.id, "sh", "-c", "test -t 1 && echo shown"]));
    assert_eq!(out, "shown\r\n");
}

#[test]
fn a_run_passes_signals_on_and_may_be_detached() {
    let bundle = Bundle::new("signals", &["sh", "-c", "trap 'exit 9' TERM; echo ready; while true; do sleep 0.1; done"]);
    fs::write(bundle.path("config.json"), bundle.config.to_string()).expect("config");
    let (root, directory) = (bundle.path("state").display().to_string(), bundle.directory.path().display().to_string());
    let mut run = Command::new(OCI)
        .args(["--root", &root, "run", "--bundle", &directory, &bundle.id])
        .stdout(Stdio::piped())
        .spawn()
        .expect("windlass-oci");
    let mut ready = [0u8; 6];
    run.stdout.as_mut().expect("output").read_exact(&mut ready).expect("ready");
    let pid = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signal");
    assert_eq!(run.wait().expect("end").code(), Some(9));
    assert!(!bundle.verb("state").status.success(), "it was not deleted");
    let bundle = Bundle::new("detached", &["sleep", "100"]);
    fs::write(bundle.path("config.json"), bundle.config.to_string()).expect("config");
    let (root, directory) = (bundle.path("state").display().to_string(), bundle.directory.path().display().to_string());
    let detached = Command::new(OCI)
        .args(["--root", &root, "run", "--detach", "--bundle", &directory, &bundle.id])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    assert!(detached.expect("windlass-oci").success());
    assert_eq!(status(&bundle), "running");
    ok(bundle.oci(&["delete", "--force", &bundle.id]));
}

/// The master that comes through a console socket.
fn receive(listener: &UnixListener) -> OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (stream, _) = listener.accept().expect("connection");
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0u8; 64];
    recvmsg(&stream, &mut [std::io::IoSliceMut::new(&mut name)], &mut ancillary, RecvFlags::CMSG_CLOEXEC).expect("message");
    let mut rights = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    rights.next().and_then(|mut fds| fds.next()).expect("a descriptor")
}

fn read_until(master: &mut fs::File, expected: &str) -> String {
    let mut printed = String::new();
    let mut buffer = [0u8; 256];
    while !printed.contains(expected) {
        let count = master.read(&mut buffer).unwrap_or(0);
        assert!(count > 0, "{expected:?} is missing in {printed:?}");
        printed.push_str(&text(&buffer[..count]));
    }
    printed
}
