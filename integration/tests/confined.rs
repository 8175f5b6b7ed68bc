//! What a container's process may do, on the real kernel: system calls, capabilities, identity; for its first process and for execs.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    fs,
    os::unix::fs::MetadataExt,
    time::{Duration, Instant},
};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    leak::Snapshot,
    node,
};
use windlass_proto::cri::{self, security_profile::ProfileType};

/// A daemon with one pod, and what was there before the pod.
struct Ground {
    daemon: Daemon,
    client: Client,
    before: Snapshot,
    config: cri::PodSandboxConfig,
    pod: String,
    serial: u32,
}

impl Ground {
    fn new() -> Result<Ground> {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let before = Snapshot::warm(&daemon, &client)?;
        let config = pod(&daemon.path("logs"));
        let pod = client.run(&config)?;
        Ok(Ground { daemon, client, before, config, pod, serial: 0 })
    }

    /// A container of `command` with this security context, not created yet.
    fn wanted(&mut self, command: &[&str], change: impl FnOnce(&mut cri::LinuxContainerSecurityContext)) -> cri::ContainerConfig {
        self.serial += 1;
        let mut wanted = container(&self.config, &format!("c{}", self.serial), command);
        change(wanted.linux.get_or_insert_default().security_context.get_or_insert_default());
        wanted
    }

    fn create(&mut self, wanted: &cri::ContainerConfig) -> std::result::Result<String, tonic::Status> {
        self.client.create(&self.pod, &self.config, wanted)
    }

    /// A running container that sleeps.
    fn sleeper(&mut self, change: impl FnOnce(&mut cri::LinuxContainerSecurityContext)) -> Result<String> {
        let wanted = self.wanted(&["sleep", "1000"], change);
        let id = self.create(&wanted)?;
        self.client.start(&id)?;
        Ok(id)
    }

    /// Runs a command as a container's first process; its exit code and output.
    fn first(&mut self, command: &[&str], change: impl FnOnce(&mut cri::LinuxContainerSecurityContext)) -> Result<(i32, String)> {
        let wanted = self.wanted(command, change);
        let id = self.create(&wanted)?;
        self.client.start(&id)?;
        self.ended(&id)
    }

    /// Waits for a container's end; its exit code and output.
    fn ended(&self, id: &str) -> Result<(i32, String)> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = loop {
            let status = self.client.container(id)?;
            if status.state() == cri::ContainerState::ContainerExited {
                break status;
            }
            ensure!(Instant::now() < deadline, "container {id} did not end within 10 s");
            std::thread::sleep(Duration::from_millis(2));
        };
        let log = fs::read_to_string(&status.log_path).unwrap_or_default();
        let lines = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        Ok((status.exit_code, lines.collect::<Vec<_>>().join("\n")))
    }

    /// /proc/self/status of the probe as a container's first process.
    fn status(&mut self, change: impl FnOnce(&mut cri::LinuxContainerSecurityContext)) -> Result<Value> {
        let (code, text) = self.first(&["/probe"], change)?;
        ensure!(code == 0, "the probe ended with {code}: {text}");
        let seen: Value = serde_json::from_str(&text.replace('\n', "")).with_context(|| format!("report {text:?}"))?;
        Ok(seen["status"].clone())
    }

    fn end(self) -> Result<()> {
        self.client.remove(&self.pod)?;
        self.before.expect_again(&self.daemon)
    }
}

fn profile(kind: ProfileType, path: &str) -> Option<cri::SecurityProfile> {
    Some(cri::SecurityProfile { profile_type: kind.into(), localhost_ref: path.into() })
}

fn int(value: i64) -> Option<cri::Int64Value> {
    Some(cri::Int64Value { value })
}

/// Adds and drops capabilities.
fn capabilities(security: &mut cri::LinuxContainerSecurityContext, add: &[&str], drop: &[&str], ambient: &[&str]) {
    let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    security.capabilities = Some(cri::Capability {
        add_capabilities: own(add),
        drop_capabilities: own(drop),
        add_ambient_capabilities: own(ambient),
    });
}

fn expect(status: &Value, expected: &[(&str, &str)]) -> Result<()> {
    for (key, value) in expected {
        ensure!(status[*key] == *value, "{key} is {}, not {value}", status[*key]);
    }
    Ok(())
}

#[test]
fn the_default_profile_forbids_what_it_should() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::new()?;
        let new_user = ["unshare", "-U", "true"];
        let (code, text) = ground.first(&new_user, |_| ())?;
        ensure!(code == 0, "nil is unconfined: {text}");
        let (code, text) = ground.first(&new_user, |s| s.seccomp = profile(ProfileType::Unconfined, ""))?;
        ensure!(code == 0, "unconfined: {text}");
        for nnp in [false, true] {
            let default = |s: &mut cri::LinuxContainerSecurityContext| {
                s.seccomp = profile(ProfileType::RuntimeDefault, "");
                s.no_new_privs = nnp;
            };
            let (code, text) = ground.first(&new_user, default)?;
            ensure!(code != 0 && text.contains("Operation not permitted"), "nnp {nnp}: {code} {text}");
            let (code, text) = ground.first(&new_user, |s| {
                default(s);
                s.run_as_user = int(1000);
            })?;
            ensure!(code != 0 && text.contains("Operation not permitted"), "as a user, nnp {nnp}: {code} {text}");
            let id = ground.sleeper(default)?;
            let run = ground.client.exec(&id, &new_user)?;
            ensure!(run.exit_code != 0, "an exec is not confined: {run:?}");
            let status = ground.status(default)?;
            // The right to load a filter does not outlive it.
            expect(&status, &[("Seccomp", "2"), ("CapEff", "00000000a80425fb"), ("CapPrm", "00000000a80425fb")])?;
        }
        let (code, text) = ground.first(&new_user, |s| {
            s.seccomp = profile(ProfileType::RuntimeDefault, "");
            capabilities(s, &["SYS_ADMIN"], &[], &[]);
        })?;
        ensure!(code == 0, "a holder of CAP_SYS_ADMIN may: {text}");
        let status = ground.status(|s| {
            s.seccomp = profile(ProfileType::RuntimeDefault, "");
            s.privileged = true;
        })?;
        expect(&status, &[("Seccomp", "0")])?;
        #[expect(deprecated, reason = "older clients still send the deprecated field")]
        let status = ground.status(|s| s.seccomp_profile_path = "runtime/default".into())?;
        expect(&status, &[("Seccomp", "2")])?;
        ground.end()
    })
}

#[test]
fn a_local_profile_is_obeyed_in_every_action() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::new()?;
        let path = ground.daemon.path("profile.json");
        let file = path.to_string_lossy().into_owned();
        let local = |s: &mut cri::LinuxContainerSecurityContext| s.seccomp = profile(ProfileType::Localhost, &file);
        let entry = |action: &str| {
            format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["mkdir","mkdirat","no_such_call"],{action}}}]}}"#
            )
        };
        for (action, expected) in [
            (r#""action":"SCMP_ACT_ERRNO""#, (1, "Operation not permitted")),
            (r#""action":"SCMP_ACT_ERRNO","errnoRet":28"#, (1, "No space left")),
            (r#""action":"SCMP_ACT_KILL_PROCESS""#, (159, "")),
            (r#""action":"SCMP_ACT_KILL""#, (159, "")),
            (r#""action":"SCMP_ACT_TRAP""#, (159, "")),
            (r#""action":"SCMP_ACT_TRACE","errnoRet":1"#, (1, "Function not implemented")),
            (r#""action":"SCMP_ACT_LOG""#, (0, "")),
            // The mode is an argument: 0777 is what the tool asks for.
            (r#""action":"SCMP_ACT_ERRNO","args":[{"index":1,"value":511,"op":"SCMP_CMP_EQ"}]"#, (1, "Operation not permitted")),
            (r#""action":"SCMP_ACT_ERRNO","args":[{"index":1,"value":511,"op":"SCMP_CMP_GT"}]"#, (0, "")),
        ] {
            fs::write(&path, entry(action))?;
            let (code, text) = ground.first(&["mkdir", "/made"], local)?;
            ensure!(code == expected.0 && text.contains(expected.1), "{action}: {code} {text:?}");
        }
        fs::write(&path, entry(r#""action":"SCMP_ACT_ERRNO""#))?;
        let id = ground.sleeper(|s| {
            local(s);
            s.run_as_user = int(1000);
        })?;
        let run = ground.client.exec(&id, &["mkdir", "/tmp/made"])?;
        ensure!(run.exit_code == 1 && String::from_utf8_lossy(&run.stderr).contains("not permitted"), "{run:?}");
        ground.end()
    })
}

/// A profile of an allow list need not name what the runtime itself calls.
#[test]
fn a_profile_may_allow_next_to_nothing() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::new()?;
        let path = ground.daemon.path("profile.json");
        let names = r#"["execve","exit_group","arch_prctl","brk","set_tid_address","set_robust_list","rseq","prlimit64","readlink",
            "readlinkat","getrandom","mprotect","getuid","geteuid","getgid","getegid","setuid","setgid","prctl","uname","fstat","newfstatat"]"#;
        let text =
            format!(r#"{{"defaultAction":"SCMP_ACT_KILL_PROCESS","syscalls":[{{"names":{names},"action":"SCMP_ACT_ALLOW"}}]}}"#);
        fs::write(&path, text)?;
        for nnp in [false, true] {
            let (code, text) = ground.first(&["/bin/true"], |s| {
                s.seccomp = profile(ProfileType::Localhost, &path.to_string_lossy());
                s.no_new_privs = nnp;
                s.run_as_user = int(1000);
            })?;
            ensure!(code == 0, "nnp {nnp}: {code} {text}");
        }
        ground.end()
    })
}

#[test]
fn a_profile_that_cannot_be_served_is_named() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::new()?;
        let path = ground.daemon.path("profile.json");
        let file = path.to_string_lossy().into_owned();
        for (text, word) in [
            (r#"{"defaultAction":"SCMP_ACT_DENY"}"#, "SCMP_ACT_DENY"),
            (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["read"],"action":"SCMP_ACT_KILL","errnoRet":3}]}"#,
                "takes no errnoRet",
            ),
        ] {
            fs::write(&path, text)?;
            let wanted = ground.wanted(&["true"], |s| s.seccomp = profile(ProfileType::Localhost, &file));
            let error = ground.create(&wanted).expect_err(text);
            ensure!(error.code() == tonic::Code::InvalidArgument && error.message().contains(word), "{text}: {error}");
        }
        for missing in ["/no/such/profile.json", "relative.json", ""] {
            let wanted = ground.wanted(&["true"], |s| s.seccomp = profile(ProfileType::Localhost, missing));
            let error = ground.create(&wanted).expect_err(missing);
            ensure!(
                error.code() == tonic::Code::InvalidArgument && error.message().contains("localhost_ref"),
                "{missing}: {error}"
            );
        }
        ground.end()
    })
}

#[test]
fn capabilities_are_what_was_asked_for() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::new()?;
        let none = "0000000000000000";
        let bind = "0000000000000400";
        let status = ground.status(|s| capabilities(s, &[], &["ALL"], &[]))?;
        expect(&status, &[("CapBnd", none), ("CapEff", none), ("CapPrm", none), ("CapInh", none), ("CapAmb", none)])?;
        let status = ground.status(|s| capabilities(s, &["cap_net_bind_service"], &["all"], &[]))?;
        expect(&status, &[("CapBnd", bind), ("CapEff", bind), ("CapPrm", bind), ("CapInh", none), ("CapAmb", none)])?;
        for nnp in [false, true] {
            let ambient = |s: &mut cri::LinuxContainerSecurityContext| {
                capabilities(s, &[], &["ALL"], &["NET_BIND_SERVICE"]);
                s.run_as_user = int(1000);
                s.no_new_privs = nnp;
                s.seccomp = profile(ProfileType::RuntimeDefault, "");
            };
            let status = ground.status(ambient)?;
            expect(&status, &[("CapEff", bind), ("CapPrm", bind), ("CapInh", bind), ("CapAmb", bind), ("CapBnd", bind)])?;
            let id = ground.sleeper(ambient)?;
            let run = ground.client.exec(&id, &["grep", "CapEff", "/proc/self/status"])?;
            ensure!(String::from_utf8_lossy(&run.stdout).trim().ends_with(bind), "{run:?}");
        }
        // Without ambient ones a user holds nothing, though the bounding set has them.
        let status = ground.status(|s| {
            capabilities(s, &["NET_BIND_SERVICE"], &["ALL"], &[]);
            s.run_as_user = int(1000);
        })?;
        expect(&status, &[("CapEff", none), ("CapPrm", none), ("CapAmb", none), ("CapBnd", bind)])?;
        let own = fs::read_to_string("/proc/self/status")?;
        let own = own.lines().find_map(|line| line.strip_prefix("CapBnd:")).context("CapBnd")?.trim().to_owned();
        let status = ground.status(|s| s.privileged = true)?;
        expect(&status, &[("CapBnd", &own), ("CapEff", &own), ("CapPrm", &own)])?;
        let wanted = ground.wanted(&["true"], |s| capabilities(s, &["CAP_NO_SUCH"], &[], &[]));
        let error = ground.create(&wanted).expect_err("unknown");
        ensure!(
            error.code() == tonic::Code::InvalidArgument
                && error.message().contains("NO_SUCH")
                && error.message().contains("add_"),
            "{error}"
        );
        ground.end()
    })
}

#[test]
fn a_user_is_who_the_request_says() -> Result<()> {
    use cri::SupplementalGroupsPolicy::{Merge, Strict};
    node::run(|| {
        let mut ground = Ground::new()?;
        // Request: user, name, group, more groups, policy. Expected: uid, gid, groups, home.
        type Row<'a> =
            (Option<i64>, &'a str, Option<i64>, &'a [i64], cri::SupplementalGroupsPolicy, i64, i64, &'a [i64], &'a str);
        let rows: [Row<'_>; 7] = [
            (None, "", None, &[], Merge, 0, 0, &[0], "/root"),
            (None, "user", None, &[], Merge, 1000, 1000, &[1000, 50000], "/home/user"),
            (Some(1000), "", None, &[7], Merge, 1000, 1000, &[7, 1000, 50000], "/home/user"),
            (Some(1000), "", None, &[7], Strict, 1000, 1000, &[7, 1000], "/home/user"),
            (None, "user", Some(33), &[], Merge, 1000, 33, &[33, 50000], "/home/user"),
            (Some(33), "", None, &[], Merge, 33, 33, &[33], "/var/www"),
            (Some(4242), "", Some(77), &[9], Merge, 4242, 77, &[9, 77], "/"),
        ];
        for (user, name, group, more, policy, uid, gid, groups, home) in rows {
            let wanted = ground.wanted(&["sleep", "1000"], |s| {
                s.run_as_user = user.and_then(int);
                s.run_as_username = name.into();
                s.run_as_group = group.and_then(int);
                s.supplemental_groups = more.to_vec();
                s.supplemental_groups_policy = policy.into();
            });
            let id = ground.create(&wanted)?;
            ground.client.start(&id)?;
            let told = ground.client.container(&id)?.user.and_then(|user| user.linux).context("user")?;
            ensure!((told.uid, told.gid, told.supplemental_groups.as_slice()) == (uid, gid, groups), "{told:?}");
            let numbers = groups.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            let script =
                "sed -n 's/^Uid:\\s*//p;s/^Gid:\\s*//p;s/^Groups:\\s*//p' /proc/self/status | tr -s '\\t ' '  '; echo $HOME";
            let run = ground.client.exec(&id, &["sh", "-c", script])?;
            let text = String::from_utf8_lossy(&run.stdout).into_owned();
            let seen: Vec<&str> = text.lines().map(str::trim).collect();
            let four = |id: i64| [id.to_string(), id.to_string(), id.to_string(), id.to_string()].join(" ");
            ensure!(
                seen == [four(uid).as_str(), &four(gid), &numbers, home],
                "{seen:?} for {user:?} {name:?} {group:?} {more:?}"
            );
            ground.client.stop(&id, 0)?;
        }
        for (group, user, name, field) in [
            (int(5), None, "", "run_as_group"),
            (None, int(5), "user", "run_as_username"),
            (None, int(1 << 31), "", "run_as_user"),
            (None, None, "nobody-here", "nobody-here"),
        ] {
            let wanted = ground.wanted(&["true"], |s| {
                s.run_as_group = group;
                s.run_as_user = user;
                s.run_as_username = name.into();
            });
            let error = ground.create(&wanted).expect_err(field);
            ensure!(error.code() == tonic::Code::InvalidArgument && error.message().contains(field), "{error}");
        }
        ground.end()
    })
}

#[test]
fn a_user_may_use_its_terminal_streams_and_devices() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::new()?;
        for terminal in [false, true] {
            let script = "set -e; echo one > /dev/stdout; echo two > /proc/self/fd/1; echo > /dev/null; head -c 1 /dev/urandom | wc -c; \
                 echo x > /dev/shm/f; cat /dev/shm/f; pwd; ls -ld /made/here | cut -c1-10; if [ -t 0 ]; then echo three > /dev/tty; fi";
            let mut wanted = ground.wanted(&["sh", "-c", script], |s| s.run_as_user = int(1000));
            wanted.tty = terminal;
            wanted.working_dir = "/made/here".into();
            let id = ground.create(&wanted)?;
            ground.client.start(&id)?;
            let (status, text) = ground.ended(&id)?;
            let expected = format!("one\ntwo\n1\nx\n/made/here\ndrwxr-xr-x{}", if terminal { "\nthree" } else { "" });
            ensure!(status == 0 && text.replace('\r', "") == expected, "terminal {terminal}: {status} {text:?}");
        }
        ground.end()
    })
}

/// What lies in the directory of compiled profiles: name, inode, number of instructions.
fn programs(daemon: &Daemon) -> Result<Vec<(String, u64, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(daemon.state().join("seccomp"))? {
        let (name, data) = entry.and_then(|entry| Ok((entry.file_name(), entry.metadata()?)))?;
        found.push((name.to_string_lossy().into_owned(), data.ino(), (data.len() - 8) / 8));
    }
    Ok(found)
}

#[test]
fn a_profile_is_compiled_once_for_all_its_containers() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::new()?;
        let default = |s: &mut cri::LinuxContainerSecurityContext| s.seccomp = profile(ProfileType::RuntimeDefault, "");
        let first = ground.sleeper(default)?;
        let kept = programs(&ground.daemon)?;
        ensure!(kept.len() == 1 && kept.iter().all(|(name, _, length)| name.len() == 64 && *length > 100), "{kept:?}");
        let second = ground.sleeper(default)?;
        for id in [&first, &second] {
            let run = ground.client.exec(id, &["unshare", "-U", "true"])?;
            ensure!(run.exit_code != 0, "an exec is not confined: {run:?}");
        }
        ensure!(programs(&ground.daemon)? == kept, "the same profile: {:?}", programs(&ground.daemon)?);
        // The one that is read is the one that holds: allow everything in its place.
        let path = ground.daemon.state().join("seccomp").join(&kept[0].0);
        let allow = [b"wl-bpf-1".as_slice(), &[6, 0, 0, 0, 0, 0, 0xff, 0x7f]].concat();
        fs::write(&path, allow)?;
        let run = ground.client.exec(&first, &["unshare", "-U", "true"])?;
        ensure!(run.exit_code == 0, "the kept program was not read: {run:?}");
        fs::remove_file(&path)?;
        let run = ground.client.exec(&first, &["unshare", "-U", "true"])?;
        ensure!(run.exit_code != 0 && programs(&ground.daemon)?.len() == 1, "compiled again: {run:?}");

        // Never more than 64.
        let file = ground.daemon.path("profile.json");
        for errno in 1..=70 {
            let text = serde_json::json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{ "names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno }],
            });
            fs::write(&file, text.to_string())?;
            let local = |s: &mut cri::LinuxContainerSecurityContext| {
                s.seccomp = profile(ProfileType::Localhost, &file.to_string_lossy());
            };
            let wanted = ground.wanted(&["true"], local);
            let id = ground.create(&wanted)?;
            ground.client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
        }
        ensure!(programs(&ground.daemon)?.len() == 64, "{} programs are kept", programs(&ground.daemon)?.len());
        ground.end()
    })
}

/// Every line that a shell printed, as a container's first process and as an exec.
fn both(ground: &mut Ground, script: &str, change: impl Fn(&mut cri::ContainerConfig)) -> Result<[String; 2]> {
    let mut wanted = ground.wanted(&["sh", "-c", script], |_| ());
    change(&mut wanted);
    let id = ground.create(&wanted)?;
    ground.client.start(&id)?;
    let (code, first) = ground.ended(&id)?;
    ensure!(code == 0, "{script}: {code}: {first}");
    let mut wanted = ground.wanted(&["sleep", "1000"], |_| ());
    change(&mut wanted);
    let id = ground.create(&wanted)?;
    ground.client.start(&id)?;
    let run = ground.client.exec(&id, &["sh", "-c", script])?;
    ensure!(run.exit_code == 0, "{script}: {run:?}");
    Ok([first, String::from_utf8(run.stdout)?.trim_end().to_owned()])
}

#[test]
fn shared_memory_limits_and_scores() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::new()?;
        let own = fs::read_to_string("/proc/self/limits")?;
        let own = own.lines().find(|line| line.starts_with("Max open files")).context("limits")?;
        let own_hard: u64 = own.split_whitespace().nth(4).context("hard limit")?.parse()?;
        let script = "df -k /dev/shm | tail -n 1 | awk '{print $2}'; ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj";
        let score = |score: i64| {
            move |wanted: &mut cri::ContainerConfig| {
                wanted.linux.get_or_insert_default().resources.get_or_insert_default().oom_score_adj = score;
            }
        };
        for seen in both(&mut ground, script, score(987))? {
            let hard = own_hard.min(524_288);
            ensure!(seen == format!("65536\n{}\n{hard}\n987", hard.min(1024)), "{seen}");
        }
        // Below the daemon's own: applied where the daemon may, else the nearest that it may, and never a failed start.
        let mut own: i64 = fs::read_to_string("/proc/self/oom_score_adj")?.trim().parse()?;
        let status = fs::read_to_string("/proc/self/status")?;
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).context("CapEff")?;
        const SYS_RESOURCE: u32 = 24;
        if u64::from_str_radix(effective.trim(), 16)? & (1 << SYS_RESOURCE) != 0 {
            own = own.min(-998);
        }
        for seen in both(&mut ground, "cat /proc/self/oom_score_adj", score(-998))? {
            ensure!(seen == own.to_string(), "{seen}, not {own}");
        }
        // A volume in memory takes the place of the pod's.
        let volume = |wanted: &mut cri::ContainerConfig| {
            wanted.mounts.push(cri::Mount { container_path: "/dev/shm".into(), host_path: "/dev".into(), ..Default::default() });
        };
        let listed = both(&mut ground, "test -e /dev/shm/full && echo volume", volume)?;
        ensure!(listed.iter().all(|seen| seen == "volume"), "{listed:?}");
        ground.end()
    })
}

#[test]
fn configured_shared_memory_and_limits() -> Result<()> {
    node::run(|| {
        let more = "[containers]\nshm_size_bytes = 1048576\n[containers.default_ulimits]\ncore = { soft = 0, hard = 0 }\n\
                    nofile = { soft = 77, hard = 99 }\n";
        let daemon = Daemon::configured(more)?;
        let client = Client::connect(&daemon)?;
        let config = pod(&daemon.path("logs"));
        let id = client.run(&config)?;
        let created = client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
        client.start(&created)?;
        let script = "df -k /dev/shm | tail -n 1 | awk '{print $2}'; ulimit -Sn; ulimit -Hn; ulimit -Hc";
        let run = client.exec(&created, &["sh", "-c", script])?;
        ensure!(run.stdout == b"1024\n77\n99\n0\n", "{run:?}");
        client.remove(&id)?;
        Ok(())
    })
}

#[test]
fn a_proc_that_is_not_masked_is_for_pods_with_users_of_their_own() -> Result<()> {
    node::run(|| {
        let daemon = Daemon::start(&[])?;
        let client = Client::connect(&daemon)?;
        let ids = || vec![cri::IdMapping { container_id: 0, host_id: 1 << 20, length: 1 << 16 }];
        let users = || cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids: ids(), gids: ids() };
        // A second proc may be mounted in a namespace of users only where nothing of the first is covered.
        let nested = ["unshare", "-Urpfm", "mount", "-t", "proc", "proc", "/proc"];
        for (own_users, lists, covered, mountable) in
            [(false, false, true, false), (true, false, false, true), (true, true, true, false)]
        {
            let mut config = pod(&daemon.path("logs"));
            let mut options = cri::NamespaceOption { pid: cri::NamespaceMode::Container.into(), ..Default::default() };
            options.userns_options = own_users.then(users);
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.namespace_options = Some(options.clone());
            let id = client.run(&config)?;
            let mut wanted = container(&config, "main", &["sleep", "1000"]);
            let security = wanted.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.namespace_options = Some(options);
            if lists {
                security.masked_paths = vec!["/proc/kcore".into()];
                security.readonly_paths = vec!["/proc/sys".into()];
            }
            let main = client.create(&id, &config, &wanted)?;
            client.start(&main)?;
            let mounts = client.exec(&main, &["cat", "/proc/self/mountinfo"])?;
            let seen = String::from_utf8(mounts.stdout)?.lines().any(|line| line.contains(" /proc/"));
            ensure!(seen == covered, "own users {own_users}, lists {lists}: parts of /proc are covered: {seen}");
            let run = client.exec(&main, &nested)?;
            ensure!((run.exit_code == 0) == mountable, "own users {own_users}, lists {lists}: {run:?}");
            client.remove(&id)?;
        }
        Ok(())
    })
}

/// As many pods of Kubernetes' conformance tests have it, whatever the node's kernel.
#[test]
fn a_level_of_selinux_is_taken_with_and_without_selinux() -> Result<()> {
    node::run(|| {
        let mut ground = Ground::new()?;
        let level = || Some(cri::SeLinuxOption { level: "s0:c0,c1".into(), ..Default::default() });
        let (code, text) = ground.first(&["true"], |security| security.selinux_options = level())?;
        ensure!(code == 0, "ended with {code}: {text}");
        ground.config.metadata.get_or_insert_default().uid = "labelled".into();
        let linux = ground.config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().selinux_options = level();
        let labelled = ground.client.run(&ground.config)?;
        ground.client.remove(&labelled)?;
        ground.end()
    })
}
