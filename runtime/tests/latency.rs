//! Prints the medians of create to gate and gate to exec. Single-threaded (no test harness): it forks with the library itself.

use serde_json::json;
use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use windlass_runtime::cgroup::{Cgroup, mount_point};
use windlass_runtime::process::{Message, PidNamespace, PodNamespaces, Report, Spawn, Stdio, create};

const ROUNDS: usize = 100;

fn wait(report: &mut Report) -> Message {
    loop {
        match report.receive().expect("report") {
            Message::WouldBlock => {
                let mut polled = [rustix::event::PollFd::new(&*report, rustix::event::PollFlags::IN)];
                rustix::event::poll(&mut polled, None).expect("poll");
            }
            message => return message,
        }
    }
}

fn main() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let at = |path: &str| directory.path().join(path);
    for path in ["lower/bin", "upper", "work"] {
        fs::create_dir_all(at(path)).expect("directory");
    }
    fs::copy("/bin/busybox", at("lower/bin/true")).expect("busybox-static is needed");
    let plan = json!({"version": 1, "lower": [at("lower")], "upper": at("upper"), "work": at("work")});
    fs::write(at("rootfs.json"), plan.to_string()).expect("plan");
    let config = json!({
        "ociVersion": "1.2.0", "root": {"path": "rootfs"},
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/true"], "cwd": "/"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
        ],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"}],
                  "maskedPaths": ["/proc/kcore", "/sys/firmware"], "readonlyPaths": ["/proc/sys"]},
    });
    fs::write(at("config.json"), config.to_string()).expect("config");
    let path = mount_point().expect("cgroup v2").join(format!("windlass-latency-{}", std::process::id()));
    let (mut to_gate, mut to_exec) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let cgroup = Cgroup::create(&path).expect("cgroup");
        let begun = Instant::now();
        let mut child = create(Spawn {
            bundle: directory.path(),
            cgroup: cgroup.as_fd(),
            cgroup_path: &path,
            pid: PidNamespace::New,
            namespaces: PodNamespaces::default(),
            stdio: Stdio::Null,
            id: "latency",
        })
        .expect("created");
        let message = wait(&mut child.report);
        assert!(matches!(message, Message::Ready { .. }), "{message:?}");
        to_gate.push(begun.elapsed());
        let begun = Instant::now();
        child.report.open_gate().expect("open");
        let message = wait(&mut child.report);
        assert!(matches!(message, Message::Executed), "{message:?}");
        to_exec.push(begun.elapsed());
        let options = rustix::process::WaitIdOptions::EXITED;
        let ended = rustix::process::waitid(rustix::process::WaitId::PidFd(child.pidfd.as_fd()), options).expect("reaped");
        assert_eq!(ended.and_then(|ended| ended.exit_status()), Some(0));
        assert!(cgroup.wait_empty(Duration::from_secs(60)).expect("waited"));
        cgroup.remove().expect("removed");
    }
    for (name, times) in [("create to gate", &mut to_gate), ("gate to exec", &mut to_exec)] {
        times.sort();
        println!("{name}: median {:?} of {ROUNDS}, best {:?}", times[ROUNDS / 2], times[0]);
    }
}
