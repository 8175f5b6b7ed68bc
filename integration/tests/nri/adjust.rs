//! What plugins change of containers, as it is seen inside.

use crate::{adjusting, ground, run, shell};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{fs, os::unix::fs::PermissionsExt};
use tonic::Code;
use windlass_integration::{client::container, ground::Ground, leak::Snapshot, nri::Plugin};
use windlass_proto::cri;

#[test]
fn adjustments_are_what_the_program_finds() {
    run(|| {
        let directory = tempfile::tempdir()?;
        fs::write(directory.path().join("file"), "of a plugin\n")?;
        let marks = directory.path().join("marks");
        let hook = directory.path().join("hook");
        fs::write(&hook, format!("#!/bin/sh\ncat >/dev/null; echo \"$1 $MARK\" >> {}\n", marks.display()))?;
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
        let stage =
            |name: &str| json!([{ "path": hook, "args": ["hook", name], "env": ["MARK=here"], "timeout": { "value": 10 } }]);
        let adjustment = json!({
            "annotations": { "from": "plugin", "-gone": "" },
            "args": ["sh", "-c", "trap exit TERM; while :; do sleep 0.05; done", "adjusted"],
            "env": [{ "key": "ADDED", "value": "a=b c" }, { "key": "-DROPPED" }, { "key": "KEPT", "value": "changed" }],
            "mounts": [
                { "destination": "/plugin", "type": "bind", "source": directory.path(), "options": ["bind", "ro"] },
                { "destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "size=1m"] },
                { "destination": "-/dropped" },
            ],
            "hooks": { "create_runtime": stage("runtime"), "poststart": stage("poststart"), "poststop": stage("poststop") },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": "2000", "soft": "1500" }, { "type": "RLIMIT_CORE", "hard": "0", "soft": "0" }],
            "linux": {
                "devices": [{ "path": "/dev/granted", "type": "c", "major": 10, "minor": 229, "file_mode": { "value": 0o640 }, "uid": { "value": 7 } }],
                "oom_score_adj": { "value": 321 },
                "sysctl": { "net.ipv4.ip_default_ttl": "77" },
                "io_priority": { "class": "IOPRIO_CLASS_BE", "priority": 6 },
                "scheduler": { "policy": "SCHED_BATCH", "nice": 5 },
                "resources": {
                    "cpu": { "shares": { "value": "333" } },
                    "memory": { "limit": { "value": "67108864" } },
                    "devices": [{ "allow": false, "type": "c", "major": { "value": "10" }, "minor": { "value": "229" }, "access": "w" }],
                },
            },
        });
        let (ground, plugin) = ground(&json!({ "Adjust": { "main": adjustment } }))?;
        let dropped = directory.path().join("dropped");
        fs::create_dir(&dropped)?;
        let id = ground.start("main", &["sleep", "1000"], |config| {
            let env = |key: &str, value: &str| cri::KeyValue { key: key.into(), value: value.into() };
            config.envs = vec![env("DROPPED", "x"), env("KEPT", "as asked")];
            config.annotations = [("gone".to_owned(), "x".to_owned())].into();
            let mount = |path: &str| cri::Mount {
                container_path: path.into(),
                host_path: dropped.to_string_lossy().into(),
                ..Default::default()
            };
            config.mounts = vec![mount("/dropped"), mount("/stays")];
        })?;
        let check = |script: &str, expected: &str| -> Result<()> {
            let found = shell(&ground.client, &id, script)?;
            ensure!(found == expected, "{script}: {found:?}, not {expected:?}");
            Ok(())
        };
        check("tr '\\0' ' ' < /proc/1/cmdline | grep -c adjusted", "1")?;
        check("echo \"$ADDED|${DROPPED-none}|$KEPT\"", "a=b c|none|changed")?;
        check("cat /plugin/file; (echo x > /plugin/file) 2>/dev/null || echo read-only", "of a plugin\nread-only")?;
        check(
            "grep -c ' /scratch tmpfs .*size=1024k' /proc/mounts; test -e /stays && ls -d /dropped 2>/dev/null || echo none",
            "1\nnone",
        )?;
        check("ulimit -Sn; ulimit -Hn; ulimit -c", "1500\n2000\n0")?;
        check("cat /proc/1/oom_score_adj", "321").or_else(|error| {
            // Where the daemon may not lower a score, a higher one stays.
            let own: i32 = fs::read_to_string("/proc/self/oom_score_adj")?.trim().parse()?;
            if own > 321 { Ok(()) } else { Err(error) }
        })?;
        check("stat -c '%t %T %a %u' /dev/granted", "a e5 640 7")?;
        check("(: < /dev/granted) && echo read; (: > /dev/granted) 2>/dev/null || echo refused", "read\nrefused")?;
        check("cat /proc/sys/net/ipv4/ip_default_ttl", "77")?;
        check("cut -d' ' -f19,41 /proc/1/stat", "5 3")?;
        let details = plugin.wait("PostCreateContainer")?["container"].clone();
        ensure!(details["annotations"]["from"] == "plugin" && details["annotations"]["gone"].is_null(), "{details}");
        let limits = ground.client.container(&id)?.resources.context("resources")?.linux.context("linux")?;
        ensure!(limits.cpu_shares == 333 && limits.memory_limit_in_bytes == 67_108_864, "{limits:?}");
        ensure!(ground.client.container(&id)?.annotations.contains_key("gone"), "CRI's own are as they were");
        ground.client.stop(&id, 5)?;
        ground.client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
        let marks = fs::read_to_string(&marks)?;
        ensure!(marks == "runtime here\npoststart here\npoststop here\n", "{marks}");
        ground.end()
    });
}

#[test]
fn a_seccomp_policy_and_a_cdi_device_of_a_plugin() {
    run(|| {
        let policy = json!({
            "default_action": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errno_ret": { "value": 38 } }],
        });
        let adjustment = json!({ "linux": { "seccomp_policy": policy }, "CDI_devices": [{ "name": "test.example/thing=one" }] });
        let (ground, _plugin) = ground(&adjusting("main", adjustment))?;
        let cdi = ground.daemon.path("cdi");
        fs::create_dir_all(&cdi)?;
        let spec = json!({
            "cdiVersion": "0.6.0", "kind": "test.example/thing",
            "devices": [{ "name": "one", "containerEdits": { "env": ["THING=one"], "deviceNodes": [{ "path": "/dev/thing", "hostPath": "/dev/fuse" }] } }],
        });
        fs::write(cdi.join("thing.json"), spec.to_string())?;
        let id = ground.start("main", &["sleep", "1000"], |_| {})?;
        let seen = shell(
            &ground.client,
            &id,
            "mkdir /tmp/x 2>&1 | grep -c 'not implemented'; echo $THING; (: < /dev/thing) && echo opened",
        )?;
        ensure!(seen == "1\none\nopened", "{seen}");
        ground.end()
    });
}

#[test]
fn what_cannot_be_applied_is_refused_by_name_and_leaves_nothing() {
    run(|| {
        let linux = |field: &str, value: Value| (json!({ "linux": { field: value } }), format!("linux.{field}"));
        let resources = |value: Value, named: &str| (json!({ "linux": { "resources": value } }), named.to_owned());
        let unserved = [
            linux("memory_policy", json!({ "mode": "MPOL_BIND", "nodes": "0" })),
            linux("net_devices", json!({ "eth9": { "name": "eth1" } })),
            linux("rdt", json!({ "clos_id": { "value": "x" } })),
            linux("cgroups_path", json!("/somewhere/else")),
            linux("namespaces", json!([{ "type": "network", "path": "/proc/1/ns/net" }])),
            linux("namespaces", json!([{ "type": "-network" }])),
            resources(json!({ "rdt_class": { "value": "x" } }), "linux.resources.rdt_class"),
            resources(json!({ "memory": { "swappiness": { "value": "10" } } }), "linux.resources.memory.swappiness"),
            resources(
                json!({ "memory": { "disable_oom_killer": { "value": true } } }),
                "linux.resources.memory.disableOOMKiller",
            ),
            resources(json!({ "devices": [{ "type": "c", "major": { "value": "1" }, "access": "rwm" }] }), "device c 1:*"),
            resources(json!({ "cpu": { "realtime_runtime": { "value": "10" } } }), "linux.resources.cpu.realtimeRuntime"),
        ];
        let invalid = [
            (json!({ "env": [{ "key": "A=B", "value": "x" }] }), "env: \"A=B\"".to_owned()),
            (json!({ "rlimits": [{ "type": "RLIMIT_FILES", "hard": "1", "soft": "1" }] }), "RLIMIT_FILES".to_owned()),
            (json!({ "rlimits": [{ "type": "RLIMIT_CORE", "hard": "1", "soft": "2" }] }), "soft 2 is above hard 1".to_owned()),
            (json!({ "mounts": [{ "destination": "/x", "type": "bind", "source": "/no/such" }] }), "/no/such".to_owned()),
            (json!({ "mounts": [{ "destination": "relative", "type": "tmpfs" }] }), "relative".to_owned()),
            (json!({ "hooks": { "prestart": [{ "path": "hook" }] } }), "hooks.prestart".to_owned()),
            (json!({ "CDI_devices": [{ "name": "no.such/thing=x" }] }), "no.such/thing=x".to_owned()),
            linux("oom_score_adj", json!({ "value": 2000 })),
            linux("devices", json!([{ "path": "/dev/x", "type": "x" }])),
            linux("seccomp_policy", json!({ "default_action": "SCMP_ACT_NOTIFY" })),
            resources(json!({ "blockio_class": { "value": "slow" } }), "block I/O class \"slow\""),
            resources(json!({ "cpu": { "shares": { "value": "18446744073709551615" } } }), "cpu.shares"),
            (
                json!({ "linux": { "io_priority": { "class": "IOPRIO_CLASS_BE", "priority": 9 } } }),
                "process.ioPriority".to_owned(),
            ),
        ];
        let all = unserved.iter().map(|case| (case, Some(Code::Unimplemented))).chain(invalid.iter().map(|case| (case, None)));
        let mut adjust = serde_json::Map::new();
        let cases: Vec<_> = all
            .enumerate()
            .map(|(index, ((adjustment, named), code))| {
                adjust.insert(format!("case-{index}"), adjustment.clone());
                (format!("case-{index}"), named.clone(), code)
            })
            .collect();
        let (ground, _plugin) = ground(&json!({ "Events": "CreateContainer", "Adjust": adjust }))?;
        let before = Snapshot::take(&ground.daemon)?;
        for (name, named, code) in cases {
            let error = create(&ground, &name).err().with_context(|| format!("{named} is refused"))?;
            ensure!(error.message().contains(&named), "{named}: {error}");
            ensure!(code.is_none_or(|code| error.code() == code), "{named}: {error}");
            ensure!(code.is_some() || error.code() == Code::InvalidArgument, "{named}: {error}");
        }
        before.expect_again(&ground.daemon)?;
        ground.end()
    });
}

fn create(ground: &Ground, name: &str) -> Result<String, tonic::Status> {
    ground.client.create(&ground.pod, &ground.config, &container(&ground.config, name, &["sleep", "1000"]))
}

#[test]
fn several_plugins_adjust_one_container() {
    run(|| {
        let (ground, _first) = ground(&adjusting("main", json!({ "env": [{ "key": "A", "value": "1" }] })))?;
        let second = json!({ "Adjust": { "main": { "env": [{ "key": "B", "value": "2" }] } } });
        let second = Plugin::connect(&ground.daemon, "20-second", &second)?;
        let id = ground.start("main", &["sleep", "1000"], |_| {})?;
        ensure!(shell(&ground.client, &id, "echo $A$B")? == "12");
        let seen = second.wait("CreateContainer")?["container"]["env"].clone();
        ensure!(seen.as_array().is_some_and(|env| env.iter().any(|entry| entry == "A=1")), "{seen}");
        let judged = second.wait("ValidateContainerAdjustment")?["request"].clone();
        let owners = &judged["owners"]["owners"][&id]["compound"]["6"]["owners"];
        ensure!(owners["A"] == "10-test" && owners["B"] == "20-second", "{judged}");
        ensure!(judged["plugins"].as_array().is_some_and(|all| all.len() == 2), "{judged}");
        ground.end()
    });
}
