//! A monitor runs the hooks of its containers' bundles, and goes on with everything else while they run.

use crate::{Pod, TIMEOUT};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Instant;
use windlass_proto::monitor::{DeleteRequest, StartRequest, StateRequest, frame::Body};

fn shell(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]})
}

fn set_hooks(bundle: &str, hooks: Value) {
    let path = Path::new(bundle).join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["hooks"] = hooks;
    std::fs::write(&path, config.to_string()).unwrap();
}

fn start() -> Body {
    Body::Start(StartRequest { container_id: "c".into() })
}

fn delete() -> Body {
    Body::Delete(DeleteRequest { container_id: "c".into() })
}

#[test]
fn every_hook_runs_once_and_in_order() {
    let mut pod = Pod::start("hooks");
    pod.set_up();
    let request = pod.create_request("c", "exit 7");
    let log = pod.directory.path().join("order");
    let tell = |stage: &str| json!([shell(&format!("echo {stage} >> {}", log.display()))]);
    // What runs inside has another tree: it is seen by its failure elsewhere.
    let mut hooks = json!({"startContainer": [{"path": "/bin/busybox", "args": ["true"]}]});
    let stages = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
    for stage in stages {
        hooks[stage] = tell(stage);
    }
    set_hooks(&request.bundle, hooks);
    pod.client.call(Body::Create(request)).unwrap();
    let so_far = || std::fs::read_to_string(&log).unwrap_or_default();
    assert_eq!(so_far(), "prestart\ncreateRuntime\ncreateContainer\n");
    pod.client.call(start()).unwrap();
    assert!(so_far().ends_with("poststart\n"), "the start was answered before its hooks had ended");
    assert_eq!(pod.client.container_exit().code, 7);
    pod.client.call(delete()).unwrap();
    assert_eq!(so_far(), stages.map(|stage| format!("{stage}\n")).concat());
    pod.end();
}

#[test]
fn a_failed_hook_fails_its_request_and_ends_the_container() {
    let mut pod = Pod::start("failed-hooks");
    pod.set_up();
    let after = pod.directory.path().join("after");
    let poststop = json!([shell(&format!("echo >> {}", after.display()))]);
    let ran = || std::fs::read_to_string(&after).map_or(0, |text| text.lines().count());
    for (times, stage) in (1..).zip(["createRuntime", "createContainer", "poststart"]) {
        let request = pod.create_request("c", "sleep 100");
        set_hooks(&request.bundle, json!({stage: [shell("echo no way; exit 5")], "poststop": poststop}));
        let created = pod.client.call(Body::Create(request));
        let failure = if stage == "poststart" { pod.client.call(start()).unwrap_err() } else { created.unwrap_err() };
        assert_eq!(failure.step, "run hook", "{failure:?}");
        assert!(failure.object.starts_with(stage) && failure.message == "exit code 5: no way", "{failure:?}");
        pod.client.call(delete()).unwrap();
        crate::wait_until("its poststop hook", || ran() == times);
    }
    pod.end();
}

#[test]
fn a_slow_hook_holds_up_its_own_request_alone() {
    let mut pod = Pod::start("slow-hooks");
    pod.set_up();
    let request = pod.create_request("c", "exit 3");
    let (go, gone) = (pod.directory.path().join("go"), pod.directory.path().join("gone"));
    let wait_for = |path: &Path| shell(&format!("until test -e {}; do sleep 0.01; done", path.display()));
    set_hooks(&request.bundle, json!({"poststart": [wait_for(&go)], "poststop": [wait_for(&gone), shell("exit 1")]}));
    pod.client.call(Body::Create(request)).unwrap();
    let starting = pod.client.send(start());
    let begun = Instant::now();
    // The program has ended long ago; that is told when its start was.
    for _ in 0..20 {
        assert!(matches!(pod.client.call(Body::State(StateRequest {})).unwrap(), Body::StateReply(_)));
    }
    pod.run("other", "exit 0");
    assert!(begun.elapsed() < TIMEOUT);
    assert_eq!(pod.client.container_exit().code, 0, "the other container's end");
    std::fs::write(&go, "").unwrap();
    pod.client.reply(starting).unwrap();
    assert_eq!(pod.client.container_exit().code, 3);
    let deleting = pod.client.send(delete());
    pod.delete("other");
    std::fs::write(&gone, "").unwrap();
    // A failed poststop hook is a warning.
    pod.client.reply(deleting).unwrap();
    pod.end();
}
