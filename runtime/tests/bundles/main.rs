//! Containers on the real kernel, driven through `windlass-oci`. Needs root, a cgroup v2 tree and Debian's busybox-static.
//! Each test has a directory, a cgroup and a mount namespace that end with it.

mod commands;
mod hooks;

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

const OCI: &str = env!("CARGO_BIN_EXE_windlass-oci");

/// A bundle on an overlay of busybox, and its container. Dropping it deletes the container and compares the host's mounts.
struct Bundle {
    directory: tempfile::TempDir,
    config: Value,
    id: String,
    mounts: String,
}

fn host_mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").expect("mountinfo")
}

impl Bundle {
    fn new(name: &str, arguments: &[&str]) -> Bundle {
        let directory = tempfile::tempdir().expect("temporary directory");
        let at = |path: &str| directory.path().join(path);
        for path in ["lower/bin", "lower/proc", "upper", "work", "volume"] {
            fs::create_dir_all(at(path)).expect("directory");
        }
        fs::copy("/bin/busybox", at("lower/bin/busybox")).expect("busybox-static is needed");
        for applet in ["sh", "true", "sleep", "cat", "ls", "mount", "umount"] {
            fs::hard_link(at("lower/bin/busybox"), at("lower/bin").join(applet)).expect("link");
        }
        let plan = json!({"version": 1, "lower": [at("lower")], "upper": at("upper"), "work": at("work"), "volatile": true});
        fs::write(at("rootfs.json"), plan.to_string()).expect("plan");
        let id = format!("windlass-test-{name}-{}", std::process::id());
        let config = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs"},
            "hostname": "inside",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": arguments, "env": ["PATH=/bin"], "cwd": "/",
                "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
                "noNewPrivileges": true, "oomScoreAdj": 100,
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "ro"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{id}"),
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"},
                               {"type": "network"}],
                "maskedPaths": ["/proc/kcore", "/sys/firmware", "/proc/timer_list", "/proc/no-such"],
                "readonlyPaths": ["/proc/sys", "/proc/bus"],
            },
        });
        Bundle { directory, config, id, mounts: host_mounts() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    fn oci(&self, words: &[&str]) -> Output {
        fs::write(self.path("config.json"), self.config.to_string()).expect("config");
        let mut command = Command::new(OCI);
        command.arg("--root").arg(self.path("state")).args(words);
        if words.first() == Some(&"create") {
            // The container keeps the streams, so reading them to their end would wait for it.
            let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("windlass-oci");
            return Output { status, stdout: Vec::new(), stderr: Vec::new() };
        }
        command.output().expect("windlass-oci")
    }

    fn verb(&self, verb: &str) -> Output {
        let bundle = self.directory.path().display().to_string();
        match verb {
            "create" | "run" => self.oci(&[verb, "--bundle", &bundle, &self.id]),
            _ => self.oci(&[verb, &self.id]),
        }
    }

    fn run(&self) -> (i32, String, String) {
        let output = self.verb("run");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    fn add_mount(&mut self, mount: Value) {
        self.config["mounts"].as_array_mut().expect("mounts").push(mount);
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.oci(&["delete", "--force", &self.id]);
        let id = &self.id;
        let left = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].iter().any(|root| Path::new(root).join(id).exists());
        if !std::thread::panicking() {
            assert!(!left, "{id}: its cgroup is left");
            let name = self.directory.path().display().to_string();
            assert!(!host_mounts().contains(&name), "{id}: a mount is left; before: {}", self.mounts);
        }
    }
}

#[test]
fn a_program_sees_its_own_namespaces_and_its_exit_code_comes_back() {
    let script = "echo pid $$; busybox hostname; busybox grep -E '^(CapEff|CapBnd|NoNewPrivs|SigIgn)' /proc/self/status; \
                  ls -l /dev/null /dev/fd /dev/ptmx; ls /sys/class/net; cat /proc/self/cgroup; busybox touch /new; \
                  ls /proc/self/fd; busybox grep -c . /proc/self/mountinfo; exit 7";
    let bundle = Bundle::new("own", &["sh", "-c", script]);
    let (code, out, err) = bundle.run();
    assert_eq!(code, 7, "{out}{err}");
    for expected in ["pid 1\n", "inside\n", "CapEff:\t0000000000000020", "CapBnd:\t0000000000000020", "NoNewPrivs:\t1", "0::/\n"]
    {
        assert!(out.contains(expected), "{expected:?} is missing in {out}{err}");
    }
    assert!(out.contains("SigIgn:\t0000000000000000"), "{out}");
    assert!(out.contains("\n0\n1\n2\n3\n") && !out.contains("\n4\n"), "descriptors leaked: {out}");
    assert!(bundle.path("upper/new").exists() && !bundle.path("lower/new").exists());
}

#[test]
fn the_life_of_a_container_by_the_commands() {
    let bundle = Bundle::new("life", &["sleep", "100"]);
    let state = || -> Value { serde_json::from_slice(&bundle.verb("state").stdout).unwrap_or_default() };
    let created = bundle.verb("create");
    assert!(created.status.success(), "{created:?}");
    assert_eq!(state()["status"], "created");
    let pid = state()["pid"].as_i64().expect("a pid");
    assert_eq!(fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("alive"), "100\n");
    assert!(!bundle.verb("create").status.success(), "a second one of the same name");
    let started = bundle.verb("start");
    assert!(started.status.success(), "{started:?}");
    assert_eq!(state()["status"], "running");
    assert!(!bundle.verb("start").status.success());
    assert!(!bundle.verb("delete").status.success(), "deleted while running");
    let exec = bundle.oci(&["exec", &bundle.id, "sh", "-c", "echo $$; cat /proc/1/comm; exit 3"]);
    assert_eq!(exec.status.code(), Some(3), "{exec:?}");
    assert!(String::from_utf8_lossy(&exec.stdout).ends_with("sleep\n"), "{exec:?}");
    let missing = bundle.oci(&["exec", &bundle.id, "nothing"]);
    assert!(String::from_utf8_lossy(&missing.stderr).contains("executable file not found in PATH"), "{missing:?}");
    assert!(bundle.oci(&["kill", &bundle.id, "KILL"]).status.success());
    let deadline = Instant::now() + std::time::Duration::from_secs(60);
    while state()["status"] != "stopped" {
        assert!(Instant::now() < deadline, "{:?}", state());
    }
    let deleted = bundle.verb("delete");
    assert!(deleted.status.success(), "{deleted:?}");
    assert!(!bundle.verb("state").status.success());
}

#[test]
fn failures_say_what_and_why() {
    let check = |name: &str, change: &dyn Fn(&mut Value), expected: &[&str]| {
        let mut bundle = Bundle::new(name, &["true"]);
        change(&mut bundle.config);
        let (code, _, err) = bundle.run();
        assert_eq!(code, 255, "{name}: {err}");
        for text in expected {
            assert!(err.contains(text), "{name}: {text:?} is missing in {err}");
        }
    };
    check("path", &|config| config["process"]["args"] = json!(["nothing"]), &["nothing", "executable file not found in PATH"]);
    check("abs", &|config| config["process"]["args"] = json!(["/no/such"]), &["/no/such", "not found"]);
    check("dir", &|config| config["process"]["args"] = json!(["/bin"]), &["/bin", "is a directory"]);
    check("file", &|config| config["process"]["args"] = json!(["/proc/version"]), &["not executable"]);
    check(
        "seccomp",
        &|config| config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
        &["seccomp", "SCMP_ACT_NOTIFY"],
    );
    check("sysctl", &|config| config["linux"]["sysctl"] = json!({"kernel.panic": "1"}), &["kernel.panic", "no namespace"]);
    let bind = json!([{"destination": "/data", "type": "bind", "source": "/no/such/source", "options": ["rbind"]}]);
    check("bind", &|config| config["mounts"] = bind.clone(), &["/no/such/source on /data", "No such file"]);
}

#[test]
fn a_hostile_image_reaches_nothing_of_the_host() {
    let mut bundle = Bundle::new("hostile", &["/bin/sh", "-c", "ls /"]);
    let outside = bundle.path("outside");
    fs::create_dir(&outside).expect("outside");
    for name in ["dev", "sys", "data"] {
        symlink(outside.join(name), bundle.path("lower").join(name)).expect("link");
    }
    bundle.add_mount(json!({"destination": "/data/x/y", "type": "bind", "source": bundle.path("volume"), "options": ["bind"]}));
    let (code, out, err) = bundle.run();
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(fs::read_dir(&outside).expect("outside").count(), 0, "the host was written to");
}

#[test]
fn masked_and_read_only_paths_hold() {
    let script = "cat /proc/kcore | busybox wc -c; ls /sys/firmware | busybox wc -l; echo 1 > /proc/sys/net/ipv4/ip_forward || echo refused; \
                  busybox touch /x || echo rootro; busybox touch /data/x || echo volumero";
    let mut bundle = Bundle::new("mask", &["sh", "-c", script]);
    bundle.config["root"]["readonly"] = json!(true);
    bundle
        .add_mount(json!({"destination": "/data", "type": "bind", "source": bundle.path("volume"), "options": ["rbind", "rro"]}));
    let (code, out, err) = bundle.run();
    assert_eq!((code, out.as_str()), (0, "0\n0\nrefused\nrootro\nvolumero\n"), "{err}");
}

#[test]
fn a_shared_volume_carries_mounts_to_the_host_and_a_private_one_does_not() {
    for (options, reaches) in [("rshared", true), ("rprivate", false)] {
        let script = "mount -t tmpfs windlass-inner /data/inner; busybox touch /data/inner/seen";
        let mut bundle = Bundle::new(options, &["sh", "-c", script]);
        for set in ["bounding", "effective", "permitted"] {
            bundle.config["process"]["capabilities"][set] = json!(["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
        }
        let volume = bundle.path("volume");
        let source = json!({"destination": "/data", "type": "bind", "source": volume, "options": ["rbind", options]});
        bundle.add_mount(source);
        // A mount namespace of the test's own: what the container mounts stays out of the machine's.
        fs::write(bundle.path("config.json"), bundle.config.to_string()).expect("config");
        let script = format!(
            "mount --make-rprivate / && mount -t tmpfs vol {v} && mount --make-shared {v} && mkdir {v}/inner && \
             {OCI} --root {s} run --bundle {b} {id} && test -e {v}/inner/seen && echo reached",
            v = volume.display(),
            s = bundle.path("state").display(),
            b = bundle.directory.path().display(),
            id = bundle.id,
        );
        let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().expect("unshare");
        assert_eq!(String::from_utf8_lossy(&output.stdout).contains("reached"), reaches, "{options}: {output:?}");
        assert!(reaches || output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn a_seccomp_profile_binds_the_program() {
    let mut bundle = Bundle::new("filter", &["sh", "-c", "mkdir /a; echo $?; chmod 755 /bin; echo $?"]);
    bundle.config["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30}],
    });
    let (code, out, err) = bundle.run();
    assert_eq!((code, out.as_str()), (0, "1\n0\n"), "{err}");
    assert!(err.contains("Read-only file system"), "{err}");
}
