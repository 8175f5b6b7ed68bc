//! Hooks: when and where each runs, what it is told, and what its failure does.

use crate::Bundle;
use serde_json::{Value, json};
use std::fs;
use std::time::{Duration, Instant};

/// In the order of a container's life.
const STAGES: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// A hook of the host's shell.
fn shell(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]})
}

fn link(name: &str) -> String {
    fs::read_link(format!("/proc/self/ns/{name}")).expect("namespace").display().to_string()
}

#[test]
fn each_runs_once_in_its_namespaces_and_knows_the_state() {
    let mut bundle = Bundle::new("hooks", &["sh", "-c", "ls /"]);
    bundle.config["annotations"] = json!({"colour": "red"});
    let log = bundle.path("log").display().to_string();
    // What runs inside reaches the log by a volume.
    bundle.add_mount(json!({"destination": "/log", "type": "bind", "source": bundle.path("volume"), "options": ["rbind"]}));
    let mut hooks = json!({});
    for stage in STAGES {
        let (path, log) = if stage == "startContainer" { ("/bin/sh", "/log/inside") } else { ("/bin/sh", log.as_str()) };
        let script = format!(
            "echo {stage} $EXTRA $(pwd) $(readlink /proc/self/ns/mnt) $(readlink /proc/self/ns/uts) $(cat) >> {log}; \
             test {stage} != createContainer || touch rootfs/by-hook"
        );
        hooks[stage] = json!([{"path": path, "args": [if stage == "startContainer" { "sh" } else { stage }, "-c", script], "env": ["EXTRA=one", "PATH=/usr/bin:/bin"], "timeout": 20}]);
    }
    // The container's own shell has no applets by these names.
    for applet in ["readlink", "touch"] {
        fs::hard_link(bundle.path("lower/bin/busybox"), bundle.path("lower/bin").join(applet)).expect("link");
    }
    bundle.config["hooks"] = hooks;
    let (code, out, err) = bundle.run();
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("by-hook"), "a createContainer hook finds the root below the bundle: {out}");
    let mut text = fs::read_to_string(bundle.path("log")).expect("log");
    let inside = fs::read_to_string(bundle.path("volume/inside")).expect("log");
    let at = text.find("poststart").expect("poststart");
    text.insert_str(at, &inside);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), STAGES.len(), "{text}");
    for (line, stage) in lines.iter().zip(STAGES) {
        let words: Vec<&str> = line.splitn(6, ' ').collect();
        let [name, extra, directory, mount, uts, state] = words.as_slice() else { panic!("{line}") };
        assert_eq!((*name, *extra), (stage, "one"), "{line}");
        let host = (*mount == link("mnt"), *uts == link("uts"));
        let inside = ["createContainer", "startContainer"].contains(&stage);
        assert_eq!(host, (!inside, !inside), "{line}");
        let begins = if stage == "startContainer" { "/".to_owned() } else { bundle.directory.path().display().to_string() };
        assert_eq!(*directory, begins, "{line}");
        let state: Value = serde_json::from_str(state).expect(line);
        assert_eq!(state["id"], json!(bundle.id), "{line}");
        assert_eq!(state["bundle"], json!(bundle.directory.path()), "{line}");
        assert_eq!(state["annotations"], json!({"colour": "red"}), "{line}");
        let pid = state["pid"].as_u64().expect("pid");
        let status = state["status"].as_str().expect("status");
        match stage {
            "createContainer" | "startContainer" => assert_eq!((status, pid), ("created", 1), "{line}"),
            "poststart" => assert!(status == "running" && pid > 1, "{line}"),
            "poststop" => assert_eq!((status, pid), ("stopped", 0), "{line}"),
            _ => assert!(status == "created" && pid > 1, "{line}"),
        }
    }
}

#[test]
fn a_failed_hook_ends_the_container_and_its_output_is_told() {
    for stage in ["prestart", "createRuntime", "createContainer", "startContainer", "poststart"] {
        let mut bundle = Bundle::new(&format!("fail-{stage}"), &["sh", "-c", "echo ran; sleep 100"]);
        let (after, stopped) = (bundle.path("after").display().to_string(), bundle.path("stopped").display().to_string());
        let fails = shell("echo no such thing; echo twice >&2; exit 3");
        bundle.config["hooks"] =
            json!({ stage: [fails, shell(&format!("touch {after}"))], "poststop": [shell(&format!("touch {stopped}"))] });
        let begun = Instant::now();
        let (code, out, err) = bundle.run();
        assert_eq!(code, 255, "{stage}: {out}{err}");
        for expected in [stage, "exit code 3: no such thing\ntwice"] {
            assert!(err.contains(expected), "{stage}: {expected:?} is missing in {err}");
        }
        assert!(stage == "poststart" || out.is_empty(), "{stage}: the program ran");
        assert!(!bundle.path("after").exists(), "{stage}: the next hook ran");
        assert!(bundle.path("stopped").exists(), "{stage}: poststop did not run");
        assert!(begun.elapsed() < Duration::from_secs(20), "{stage}");
        assert!(!bundle.verb("state").status.success(), "{stage}: the container is still there");
    }
}

#[test]
fn a_failed_poststop_hook_is_a_warning_and_the_others_run() {
    let mut bundle = Bundle::new("poststop", &["true"]);
    let after = bundle.path("after");
    bundle.config["hooks"] = json!({"poststop": [shell("exit 1"), shell(&format!("touch {}", after.display()))]});
    let (code, out, err) = bundle.run();
    assert_eq!(code, 0, "{out}{err}");
    assert!(err.contains("poststop /bin/sh: exit code 1"), "{err}");
    assert!(after.exists());
}

#[test]
fn a_hook_that_hangs_is_ended_with_what_it_started() {
    for (stage, script) in
        [("createRuntime", "sleep 1000 & sleep 1000"), ("createContainer", "cat /dev/zero"), ("poststart", "sleep 1000")]
    {
        let mut bundle = Bundle::new(&format!("hang-{stage}"), &["sleep", "100"]);
        let mut hook = shell(script);
        hook["timeout"] = json!(1);
        bundle.config["hooks"] = json!({ stage: [hook] });
        let begun = Instant::now();
        let (code, _, err) = bundle.run();
        assert_eq!(code, 255, "{stage}: {err}");
        assert!(err.contains("did not end in 1 s"), "{stage}: {err}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{stage}");
    }
}

#[test]
fn hooks_that_cannot_be_run_are_named() {
    for (hook, expected) in [
        (json!({"path": "bin/sh"}), "must be absolute"),
        (json!({"path": "/no/such/hook"}), "No such file"),
        (json!({"path": "/bin/true", "timeout": 0}), "greater than zero"),
    ] {
        let mut bundle = Bundle::new("bad-hook", &["true"]);
        bundle.config["hooks"] = json!({"createRuntime": [hook]});
        let (code, _, err) = bundle.run();
        assert_eq!(code, 255, "{err}");
        assert!(err.contains("run hook createRuntime") && err.contains(expected), "{expected:?} is missing in {err}");
    }
}

#[test]
fn a_hook_may_leave_its_input_unread_and_a_process_behind() {
    let mut bundle = Bundle::new("quiet", &["true"]);
    bundle.config["annotations"] = json!({"long": "x".repeat(200_000)});
    bundle.config["hooks"] = json!({"createRuntime": [shell("sleep 40 & exit 0")], "poststop": [{"path": "/bin/true"}]});
    let begun = Instant::now();
    let (code, _, err) = bundle.run();
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(begun.elapsed() < Duration::from_secs(30), "the hook's child held it up");
}

#[test]
fn a_container_with_users_of_its_own_has_hooks_too() {
    let mut bundle = Bundle::new("user-hooks", &["sh", "-c", "ls /"]);
    let ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    bundle.config["linux"]["uidMappings"] = ids.clone();
    bundle.config["linux"]["gidMappings"] = ids;
    bundle.config["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({"type": "user"}));
    let log = bundle.path("log").display().to_string();
    fs::set_permissions(bundle.directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    bundle.config["hooks"] = json!({
        "createRuntime": [shell(&format!("cat > {log}"))],
        "createContainer": [shell("touch rootfs/by-hook")],
        "startContainer": [{"path": "/bin/busybox", "args": ["touch", "/by-start"]}],
    });
    let (code, out, err) = bundle.run();
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("by-hook") && out.contains("by-start"), "{out}{err}");
    let state: Value = serde_json::from_str(&fs::read_to_string(&log).expect("log")).expect("state");
    assert!(state["pid"].as_u64().expect("pid") > 1, "{state}");
}
