use super::*;
use windlass_proto::nri::{Hook, Hooks, OptionalInt64, OptionalUInt64, PosixRlimit};

fn creation() -> Creation {
    let container = Container {
        id: "c".into(),
        env: vec!["A=1".into(), "B=2".into()],
        annotations: [("kept".to_owned(), "x".to_owned())].into(),
        mounts: vec![mount("/proc", "proc"), mount("/data", "old")],
        ..Container::default()
    };
    Creation::new(CreateContainerRequest { pod: None, container: Some(container) })
}

fn mount(destination: &str, source: &str) -> Mount {
    Mount { destination: destination.into(), source: source.into(), ..Mount::default() }
}

fn env(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.into(), value: value.into() }
}

fn take(creation: &mut Creation, adjust: ContainerAdjustment, plugin: &str) -> Result<()> {
    creation.take(Some(adjust), Vec::new(), plugin)
}

fn shown(creation: &Creation) -> &Container {
    creation.request.container.as_ref().expect("a container")
}

#[test]
fn a_plugin_sees_what_those_before_it_have_changed() {
    let mut creation = creation();
    let first = ContainerAdjustment {
        env: vec![env("-A", ""), env("B", "3"), env("C", "4")],
        mounts: vec![mount("-/data", ""), mount("/data", "new"), mount("-/proc", "")],
        args: vec!["one".into()],
        annotations: [("-kept".to_owned(), String::new()), ("added".to_owned(), "y".to_owned())].into(),
        ..Default::default()
    };
    take(&mut creation, first, "00-a").expect("free");
    let seen = shown(&creation);
    assert_eq!(seen.env, ["B=3", "C=4"]);
    assert_eq!(seen.mounts, [mount("/data", "new")]);
    assert_eq!(seen.annotations, [("added".to_owned(), "y".to_owned())].into());
    assert_eq!(seen.args, ["one"]);
    let all = &creation.adjust;
    assert_eq!(all.env, [env("-A", ""), env("B", "3"), env("C", "4")]);
    assert_eq!(all.mounts, [mount("-/proc", ""), mount("/data", "new")], "what is replaced is not removed besides");
    assert_eq!(all.annotations.keys().collect::<Vec<_>>(), ["-kept", "added"]);
}

#[test]
fn what_one_plugin_has_set_another_may_only_replace() {
    let rlimit = || PosixRlimit { r#type: "RLIMIT_NOFILE".into(), hard: 1, soft: 1 };
    let shares = |value| LinuxResources {
        cpu: Some(LinuxCpu { shares: Some(OptionalUInt64 { value }), ..Default::default() }),
        ..Default::default()
    };
    let linux = |resources| ContainerAdjustment {
        linux: Some(LinuxContainerAdjustment { resources: Some(resources), ..Default::default() }),
        ..Default::default()
    };
    for (adjust, what) in [
        (ContainerAdjustment { env: vec![env("X", "1")], ..Default::default() }, "Env \"X\""),
        (ContainerAdjustment { args: vec!["x".into()], ..Default::default() }, "Args"),
        (ContainerAdjustment { mounts: vec![mount("/x", "y")], ..Default::default() }, "Mounts \"/x\""),
        (ContainerAdjustment { rlimits: vec![rlimit()], ..Default::default() }, "Rlimits \"RLIMIT_NOFILE\""),
        (linux(shares(2)), "CPUShares"),
    ] {
        let mut creation = creation();
        take(&mut creation, adjust.clone(), "00-a").expect("free");
        let error = take(&mut creation, adjust, "01-b").expect_err(what);
        assert!(error.message.contains(&format!("00-a and 01-b both set {what}")), "{error}");
    }
    let mut creation = creation();
    take(&mut creation, ContainerAdjustment { args: vec!["a".into()], env: vec![env("X", "1")], ..Default::default() }, "00-a")
        .expect("free");
    let replaced = ContainerAdjustment {
        args: vec![String::new(), "b".into()],
        env: vec![env("-X", ""), env("X", "2")],
        ..Default::default()
    };
    take(&mut creation, replaced, "01-b").expect("replaced");
    assert_eq!(
        (creation.adjust.args.as_slice(), creation.adjust.env.as_slice()),
        (["b".to_owned()].as_slice(), [env("X", "2")].as_slice())
    );
}

#[test]
fn hooks_of_several_plugins_run_in_their_order() {
    let hook =
        |path: &str| Hooks { create_runtime: vec![Hook { path: path.into(), ..Default::default() }], ..Default::default() };
    let mut creation = creation();
    for plugin in ["00-a", "01-b"] {
        take(&mut creation, ContainerAdjustment { hooks: Some(hook(plugin)), ..Default::default() }, plugin).expect("shared");
    }
    let paths: Vec<_> = creation.adjust.hooks.iter().flat_map(|hooks| &hooks.create_runtime).map(|hook| &hook.path).collect();
    assert_eq!(paths, ["00-a", "01-b"]);
}

#[test]
fn updates_of_one_container_are_one_update() {
    let limit = |id: &str, value: i64, ignore_failure| ContainerUpdate {
        container_id: id.into(),
        ignore_failure,
        linux: Some(LinuxContainerUpdate {
            resources: Some(LinuxResources {
                memory: Some(LinuxMemory { limit: Some(OptionalInt64 { value }), ..Default::default() }),
                ..Default::default()
            }),
        }),
    };
    let mut creation = creation();
    let error = creation.take(None, vec![limit("c", 1, false)], "00-a").expect_err("itself");
    assert!(error.message.contains("00-a updates container c while it is created"), "{error}");
    creation.take(None, vec![limit("d", 1, true), limit("e", 2, false)], "00-a").expect("free");
    creation.take(None, vec![limit("d", 3, true)], "01-b").expect("a failure that is ignored");
    creation.take(None, vec![limit("e", 3, false)], "01-b").expect_err("both set MemLimit");
    assert_eq!(creation.updates.list, [limit("d", 1, true), limit("e", 2, false)]);
    let mut updates = Updates::of("d", limit("d", 5, false).linux.and_then(|linux| linux.resources).expect("resources"));
    updates.take(vec![limit("d", 6, false)], "00-a").expect("what the request asks for is nobody's");
    assert_eq!(updates.list, [limit("d", 6, false)]);
}
