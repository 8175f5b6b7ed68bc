//! `windlass doctor`: a healthy node, one with what pods left behind, one whose files are wrong, and one who is not root.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
};
use windlass_integration::{
    client::pod,
    daemon::{Daemon, cgroup_root},
    ground::{Ground, begin},
    node,
};

/// What the doctor found, and what it exits with.
struct Findings {
    list: Vec<Value>,
    code: i32,
}

impl Findings {
    fn of(daemon: &Daemon) -> Result<Findings> {
        Findings::from(&daemon.command(&["doctor", "--format", "json"])?.output()?)
    }

    fn from(output: &std::process::Output) -> Result<Findings> {
        let report: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))?;
        let list = report["findings"].as_array().cloned().context("findings")?;
        Ok(Findings { list, code: output.status.code().context("an exit code")? })
    }

    fn those(&self, area: &str, verdict: &str) -> Vec<&Value> {
        self.list.iter().filter(|one| one["area"] == area && one["verdict"] == verdict).collect()
    }

    /// One of them says all of these words, and what to do where something is wrong.
    fn says(&self, area: &str, verdict: &str, words: &[&str]) -> Result<()> {
        let text =
            |one: &Value| format!("{} -> {}", one["says"].as_str().unwrap_or_default(), one["next"].as_str().unwrap_or_default());
        let found = self.those(area, verdict).into_iter().find(|one| words.iter().all(|word| text(one).contains(word)));
        let found = found.with_context(|| format!("{area} {verdict} {words:?} in {:#?}", self.list))?;
        ensure!(verdict == "ok" || found["next"].as_str().is_some_and(|next| !next.is_empty()), "nothing to do: {found}");
        Ok(())
    }

    fn none(&self, area: &str, verdicts: &[&str]) -> Result<()> {
        let found: Vec<_> = verdicts.iter().flat_map(|verdict| self.those(area, verdict)).collect();
        ensure!(found.is_empty(), "{found:#?}");
        Ok(())
    }
}

#[test]
fn a_node_with_a_daemon_and_pods_is_well() -> Result<()> {
    node::run(|| {
        let ground = Ground::on(Daemon::start(&[])?)?;
        ground.start("main", &["sleep", "1000"], |_| {})?;
        let files = files(&ground.daemon)?;
        let found = Findings::of(&ground.daemon)?;
        for area in ["configuration", "kernel", "daemon", "leftovers", "registries", "programs"] {
            found.none(area, &["error", "unseen"])?;
        }
        found.none("leftovers", &["warning"])?;
        found.says("daemon", "ok", &["windlass", env!("CARGO_PKG_VERSION")])?;
        found.says("daemon", "ok", &["1 monitors, all of this version"])?;
        found.says("daemon", "ok", &["NetworkReady"])?;
        found.says("kernel", "ok", &["veth, bridge, ifb"])?;
        found.says("kernel", "ok", &["overlays", "lowerdir+"])?;
        found.says("network", "ok", &["built-in bridge", "10.57.0.0/16"])?;
        found.says("network", "ok", &["no forward chain drops"])?;
        found.says("directories", "ok", &["root ", "left"]).or_else(|_| found.says("directories", "warning", &["root "]))?;
        let missing = !fs::read_to_string(cgroup_root().join("cgroup.controllers"))?.contains("memory");
        if missing {
            found.says("cgroups", "warning", &["memory", "not enforced"])?;
        }
        let expected = if found.list.iter().any(|one| one["verdict"] == "error") {
            2
        } else {
            let has = |verdict: &str| found.list.iter().any(|one| one["verdict"] == verdict);
            if has("warning") { 1 } else { 3 * i32::from(has("unseen")) }
        };
        ensure!(found.code == expected, "exit code {}", found.code);
        ensure!(self::files(&ground.daemon)? == files, "the doctor left something");
        let said = ground.daemon.command(&["doctor"])?.output()?;
        let said = String::from_utf8(said.stdout)?;
        ensure!(
            said.contains("\nkernel\n")
                && said.lines().last().is_some_and(|line| line.contains("warning"))
                && !said.contains('\x1b'),
            "{said}"
        );
        let quiet = ground.daemon.command(&["doctor", "--quiet"])?.output()?;
        ensure!(!String::from_utf8(quiet.stdout)?.contains("  OK"));
        let quiet = Findings::from(&ground.daemon.command(&["doctor", "--quiet", "--format", "json"])?.output()?)?;
        ensure!(quiet.list.iter().all(|one| one["verdict"] != "ok") && quiet.code == found.code, "{:#?}", quiet.list);
        ground.end()
    })
}

/// Names in the daemon's directories.
fn files(daemon: &Daemon) -> Result<String> {
    let (root, state) = (daemon.root(), daemon.state());
    node::output_of("find", &[root.to_str().context("root")?, state.to_str().context("state")?, "/run/netns"])
}

#[test]
fn what_a_pod_left_is_named_and_how_to_remove_it() -> Result<()> {
    node::run(|| {
        let (mut daemon, client, before) = begin()?;
        let id = client.run(&pod(&daemon.path("logs")))?;
        let other = client.run(&windlass_integration::client::host_network(pod(&daemon.path("logs"))))?;
        let monitor = |daemon: &Daemon, id: &str| {
            let of = |pid: &i32| {
                fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(id))
            };
            daemon.monitors().into_iter().find(of)
        };
        // A root that is not the daemon's tells nothing of its pods.
        elsewhere(&daemon, "root = ")?;
        drop(client);
        daemon.kill9()?;
        let found = Findings::of(&daemon)?;
        found.says("daemon", "warning", &["no daemon serves", "systemctl start windlass"])?;
        found.none("leftovers", &["warning", "error"])?;

        elsewhere(&daemon, "is not there")?;
        let config = fs::read_to_string(daemon.path("config.toml"))?;
        fs::write(daemon.path("config.toml"), "[metrik]\n")?;
        let found = Findings::of(&daemon)?;
        found.says("leftovers", "unseen", &["the configuration does not say"])?;
        found.none("leftovers", &["warning", "error"])?;
        fs::write(daemon.path("config.toml"), config)?;
        forged(&daemon)?;

        // As if its record were lost.
        let record = daemon.root().join("pods").join(&id);
        let aside = daemon.path("aside");
        fs::rename(&record, &aside)?;
        let process = monitor(&daemon, &id).context("a monitor")?.to_string();
        let found = Findings::of(&daemon)?;
        found.says(
            "leftovers",
            "warning",
            &[&format!("process {process} is the monitor of pod {id}"), &format!("kill {process}")],
        )?;
        found.says(
            "leftovers",
            "warning",
            &[&format!("cgroup {}/{id} (1 processes)", daemon.cgroup_directory().display()), "held by process", &process],
        )?;
        found.says("leftovers", "warning", &[&format!("/run/netns/windlass-{}", &id[..32]), "held by process", &process])?;
        found.says("leftovers", "warning", &[&format!("{}/pods/{id}", daemon.state().display()), "rm -r"])?;
        ensure!(found.code >= 1 && found.those("leftovers", "warning").len() == 4, "{:#?}", found.list);

        // Records that tell nothing: a newer version's, and one that is damaged.
        fs::rename(&aside, &record)?;
        let text = fs::read_to_string(record.join("record.json"))?;
        fs::write(record.join("record.json"), text.replacen("\"version\":1", "\"version\":99", 1))?;
        let found = Findings::of(&daemon)?;
        found.says("leftovers", "warning", &["version 99", &format!("process {process}"), "/run/netns/", "newer package"])?;
        ensure!(found.those("leftovers", "warning").len() == 1, "{:#?}", found.list);
        fs::write(record.join("record.json"), "{")?;
        let found = Findings::of(&daemon)?;
        found.says("leftovers", "warning", &[&format!("process {process}"), "has a record that cannot be read"])?;
        found.says("leftovers", "warning", &["/run/netns/", "has a record that cannot be read"])?;

        // Its monitor gone, and then its record back.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.parse()?), nix::sys::signal::Signal::SIGKILL)?;
        windlass_integration::wait::until("the monitor's end", || Ok(monitor(&daemon, &id).is_none().then_some(())))?;
        let found = Findings::of(&daemon)?;
        found.says(
            "leftovers",
            "warning",
            &[&format!("cgroup {}/{id} (0 processes)", daemon.cgroup_directory().display()), "cgroup.kill"],
        )?;
        found.says("leftovers", "warning", &[&format!("/run/netns/windlass-{}", &id[..32]), "umount"])?;
        found.says("leftovers", "warning", &[&format!("link wl{}", &id[..11]), "ip link delete"])?;
        fs::write(record.join("record.json"), text)?;
        let found = Findings::of(&daemon)?;
        found.says(
            "leftovers",
            "warning",
            &[&format!("pod {id} is recorded as ready, and its monitor is gone"), "systemctl restart windlass"],
        )?;
        // A container whose making was cut off, and a mount where none belongs.
        let cut = daemon.root().join("containers").join("c".repeat(64));
        fs::create_dir_all(cut.join("upper"))?;
        node::run_command("mount", &["-t", "tmpfs", "none", cut.join("upper").to_str().context("a path")?])?;
        let found = Findings::of(&daemon)?;
        found.says("leftovers", "warning", &[&format!("{} has no record", cut.display())])?;
        found.says("leftovers", "warning", &[&format!("something is mounted at {}/upper", cut.display()), "umount"])?;
        node::run_command("umount", &[cut.join("upper").to_str().context("a path")?])?;

        daemon.serve()?;
        let client = windlass_integration::client::Client::connect(&daemon)?;
        client.remove(&id)?;
        client.remove(&other)?;
        Findings::of(&daemon)?.none("leftovers", &["warning", "error"])?;
        before.without("descriptor").expect_same(&windlass_integration::leak::Snapshot::take(&daemon)?.without("descriptor"))
    })
}

/// Another root than the daemon's: what runs is not told to be left over.
fn elsewhere(daemon: &Daemon, why: &str) -> Result<()> {
    let mut command = std::process::Command::new(windlass_integration::setup::programs()?.join("windlass"));
    command.args(["doctor", "--format", "json", "--config"]).arg(daemon.path("config.toml"));
    command.arg("--root").arg(daemon.path("elsewhere")).arg("--state").arg(daemon.state());
    let found = Findings::from(&command.output()?)?;
    found.says("leftovers", "unseen", &[why, "--root"])?;
    found.none("leftovers", &["warning", "error"])
}

/// A process that calls itself a monitor is none, and writes nothing into the report.
fn forged(daemon: &Daemon) -> Result<()> {
    let mut liars = Vec::new();
    for id in ["f".repeat(64), "x\n  ERROR  forged\x1b[2J".to_owned()] {
        let mut command = std::process::Command::new("bash");
        command.arg0("windlass-monitor").args(["-c", "read line", "--", "--dir"]).arg(daemon.state().join("pods").join(id));
        liars.push(command.stdin(std::process::Stdio::piped()).spawn()?);
    }
    let found = Findings::of(daemon)?;
    let report = daemon.command(&["doctor"])?.output()?;
    for mut liar in liars {
        liar.kill()?;
        liar.wait()?;
    }
    found.none("leftovers", &["warning", "error"])?;
    let report = String::from_utf8(report.stdout)?;
    ensure!(!report.contains('\x1b') && !report.contains("forged"), "{report}");
    Ok(())
}

#[test]
fn files_that_are_wrong_are_named_with_their_remedy() -> Result<()> {
    node::run(|| {
        let mut daemon = Daemon::prepare(&[])?;
        let (hosts, auth, policy) =
            (daemon.path("certs.d/registry.example"), daemon.path("auth.json"), daemon.path("policy.json"));
        daemon.configure(&format!(
            "[images]\nregistry_config_dir = {:?}\nauth_file = {auth:?}\npolicy = {policy:?}\n[handlers.runc]\npath = \"/no/such/runc\"\n",
            daemon.path("certs.d")
        ))?;
        fs::create_dir_all(&hosts)?;
        fs::write(hosts.join("hosts.toml"), "[host.\"https://mirror.example\"]\ncapabilities = 7\n")?;
        fs::write(&auth, "{ \"auths\": [] }")?;
        fs::set_permissions(&auth, fs::Permissions::from_mode(0o644))?;
        fs::write(&policy, "{}")?;
        let cni = daemon.path("cni");
        fs::create_dir_all(&cni)?;
        fs::write(cni.join("00-bad.conflist"), "{ \"name\": \"x\" }")?;
        fs::write(
            cni.join("10-good.conflist"),
            "{ \"cniVersion\": \"1.0.0\", \"name\": \"good\", \"plugins\": [ { \"type\": \"no-such-plugin\" } ] }",
        )?;
        // In the mount namespace of this test alone.
        node::run_command("mount", &["-t", "tmpfs", "none", "/var/lib"])?;
        fs::create_dir_all("/var/lib/kubelet")?;
        fs::write(
            "/var/lib/kubelet/config.yaml",
            "kind: KubeletConfiguration\ncontainerRuntimeEndpoint: unix:///run/containerd/containerd.sock\ncgroupDriver: other\n",
        )?;
        fs::write(
            "/var/lib/kubelet/kubeadm-flags.env",
            "KUBELET_KUBEADM_ARGS=\"--container-runtime-endpoint=unix:///run/crio/crio.sock --x=y\"\n",
        )?;
        node::run_command(
            "nft",
            &["add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }"],
        )?;

        let found = Findings::of(&daemon)?;
        found.says("registries", "error", &["hosts.toml", "capabilities"])?;
        found.says("registries", "error", &["auth.json"])?;
        found.says("registries", "warning", &["auth.json can be read by everybody", "chmod 600"])?;
        found.says("registries", "error", &["policy.json", "default"])?;
        found.says("programs", "error", &["handler runc: /no/such/runc", "handlers.runc.path"])?;
        found.says("network", "warning", &["00-bad.conflist", "cniVersion"])?;
        found.says("network", "error", &["10-good.conflist", "no-such-plugin", "network.cni_bin_dir"])?;
        found.says("network", "warning", &["ip filter FORWARD", "Docker", "iptables"])?;
        found.says("kubelet", "warning", &["/run/containerd/containerd.sock", "drain"])?;
        found.says("kubelet", "warning", &["cgroupDriver: other"])?;
        found.says("kubelet", "warning", &["PodAndContainerStatsFromCRI"])?;
        found.says("kubelet", "warning", &["kubeadm-flags.env", "/run/crio/crio.sock", "criSocket"])?;
        ensure!(found.code == 2);

        // What the daemon was started with, and what the file says since.
        fs::remove_file(cni.join("10-good.conflist"))?;
        fs::write(&policy, "{ \"default\": [ { \"type\": \"insecureAcceptAnything\" } ] }")?;
        daemon.serve()?;
        daemon.configure("[metrics]\naddress = \"127.0.0.1:0\"\n")?;
        fs::set_permissions(daemon.socket(), fs::Permissions::from_mode(0o666))?;
        let found = Findings::of(&daemon)?;
        found.says("daemon", "warning", &["changed after the daemon's start", "metrics.address", "disturbs no pod"])?;
        found.says("directories", "error", &["windlass.sock has mode 666", "chmod"])?;
        daemon.configure("[metrik]\n")?;
        let found = Findings::of(&daemon)?;
        found.says("configuration", "error", &["metrik", "did you mean \"metrics\"?"])?;
        daemon.stop()
    })
}

#[test]
fn somebody_who_is_not_root_sees_what_there_is_to_see() -> Result<()> {
    node::run(|| {
        let (daemon, _client, _before) = begin()?;
        let program = windlass_integration::setup::programs()?.join("windlass");
        let mut command = std::process::Command::new(program);
        command.args(["doctor", "--format", "json", "--root", "/nonexistent", "--socket"]).arg(daemon.socket());
        let output = command.uid(65_534).gid(65_534).output()?;
        let found = Findings::from(&output)?;
        found.says("kernel", "unseen", &["veth", "run as root"])?;
        found.says("network", "unseen", &["forward chains"])?;
        found.says("daemon", "unseen", &["windlass.sock", "run as root"])?;
        found.says("kernel", "ok", &["pidfd"])?;
        ensure!(found.code != 0 && Path::new("/proc/self").exists());
        Ok(())
    })
}
