//! Published escapes from containers, each tried here: none of them works. Those whose tests are elsewhere:
//!
//! | published as | what it did | test |
//! |---|---|---|
//! | CVE-2021-30465, CVE-2024-45310 | a mount target or source that is swapped for a link meanwhile | `mounts::a_volume_with_links_that_change_never_leads_outside` |
//! | CVE-2023-28642, CVE-2019-19921 | /proc or /sys of the image is a link | `mounts::links_of_an_image_never_lead_outside`, and below |
//! | CVE-2022-23648, CVE-2025-47290, CVE-2018-15664 | layers and volumes of an image that lead outside | `image::tests::hostile_entries_stay_inside_or_are_refused`, `mounts::an_image_volume_*` |
//! | CVE-2022-0185, CVE-2022-0847 | kernel faults behind unshare and pipes | RuntimeDefault: `confined::the_default_profile_forbids_what_it_should` |

use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{collections::BTreeMap, fs, path::PathBuf};
use tonic::Code;
use windlass_integration::{
    client::{container, host_network, pod},
    daemon::Daemon,
    ground::Ground,
    image, node, setup,
};
use windlass_proto::cri;

/// An image that tries.
const HOSTILE: &str = "localhost/hostile:test";

/// A pod on a daemon whose hostile image has this layer on top, and these fields in its configuration.
fn ground(layer: Option<Vec<u8>>, fields: serde_json::Value) -> Result<Ground> {
    let mut layers = image::layers()?.to_vec();
    let plain = (image::BUSYBOX, layers.clone(), json!({}));
    layers.extend(layer);
    Ground::on(Daemon::start_with(vec![plain, (HOSTILE, layers, fields)])?)
}

/// Containers of the hostile image.
trait Hostile {
    fn hostile(&self, name: &str, command: &[&str]) -> cri::ContainerConfig;

    /// What a script in a new one prints.
    fn output(&self, name: &str, script: &str) -> Result<String>;
}

impl Hostile for Ground {
    fn hostile(&self, name: &str, command: &[&str]) -> cri::ContainerConfig {
        let mut wanted = container(&self.config, name, command);
        wanted.image = Some(cri::ImageSpec { image: HOSTILE.into(), ..Default::default() });
        wanted
    }

    fn output(&self, name: &str, script: &str) -> Result<String> {
        let id = self.launch(&self.hostile(name, &["sleep", "1000"]))?;
        let reply = self.client.exec(&id, &["/bin/sh", "-c", &format!("({script}) 2>&1")])?;
        Ok(String::from_utf8_lossy(&reply.stdout).trim().to_owned())
    }
}

/// CVE-2024-21626, CVE-2016-9962: a descriptor of the host's tree that is open when the working directory is entered.
#[test]
fn a_working_directory_behind_a_descriptor() -> Result<()> {
    node::run(|| {
        let ground = ground(None, json!({ "WorkingDir": "/proc/self/fd/9" }))?;
        let marker = ground.daemon.path("marker");
        fs::write(&marker, "of the host")?;
        let away = format!("../../../../../../../../../../..{}", marker.display());
        let script = format!("ls /proc/self/fd; cat {away} && echo escaped");
        for descriptor in 3..24 {
            let name = format!("fd-{descriptor}");
            let mut wanted = ground.hostile(&name, &["/bin/sh", "-c", &script]);
            if descriptor != 9 {
                wanted.working_dir = format!("/proc/self/fd/{descriptor}");
            }
            let Ok(id) = ground.launch(&wanted) else { continue };
            ground.client.exited(&id)?;
            let log = ground.log(&name);
            ensure!(!log.contains("escaped") && !log.contains("of the host"), "{name}: {log}");
        }
        // What a process of the container finds among its own descriptors: its streams, and the directory that ls reads.
        let mut wanted = ground.hostile("descriptors", &["/bin/sh", "-c", "echo have $(ls /proc/self/fd)"]);
        wanted.working_dir = "/".into();
        let id = ground.launch(&wanted)?;
        ground.client.exited(&id)?;
        ensure!(ground.log("descriptors").contains("have 0 1 2 3\n"), "{}", ground.log("descriptors"));
        ground.end()
    })
}

/// CVE-2019-5736: the runtime's own program, executed in the container by /proc/self/exe, and then written to.
#[test]
fn the_runtimes_program_cannot_be_changed_from_inside() -> Result<()> {
    node::run(|| {
        let layer = image::programs_layer(&[("evil", b"#!/proc/self/exe\n")])?;
        let ground = ground(Some(layer), json!({}))?;
        let programs: Vec<PathBuf> = ["windlass", "windlass-monitor", "windlass-oci"]
            .into_iter()
            .map(|name| Ok(setup::programs()?.join(name)))
            .collect::<Result<_>>()?;
        let contents = || -> Result<Vec<Vec<u8>>> { programs.iter().map(|path| Ok(fs::read(path)?)).collect() };
        let original = contents()?;
        // Any process whose program is not the container's own shell is written to, as soon as it is seen.
        let hunt = "while :; do for p in /proc/[0-9]*; do case \"$(readlink $p/exe)\" in /bin/*|'') ;; *) \
                    echo \"seen $p\"; (echo hacked > $p/exe) && echo escaped;; esac; done; done 2>/dev/null";
        let id = ground.launch(&ground.hostile("hunter", &["/bin/sh", "-c", hunt]))?;
        for _ in 0..30 {
            let reply = ground.client.exec(&id, &["/evil"]);
            ensure!(!reply.is_ok_and(|reply| reply.exit_code == 0), "/proc/self/exe was something that could run");
        }
        ground.client.stop(&id, 0)?;
        ensure!(!ground.log("hunter").contains("escaped"), "{}", ground.log("hunter"));
        ensure!(contents()? == original, "a program of the runtime was changed");
        ground.end()
    })
}

/// CVE-2025-31133, CVE-2025-52565, CVE-2023-27561: /dev/null, /dev/console, /dev/pts or /proc of the image are links, so that masking and
/// terminals go elsewhere.
#[test]
fn masked_paths_and_the_console_with_links_in_the_image() -> Result<()> {
    node::run(|| {
        let (null, console) = ("dev/null", "dev/console");
        let layer = image::links_layer(&[
            (null, "/proc/sysrq-trigger"),
            (console, "/proc/sys/kernel/core_pattern"),
            ("dev/pts", "/proc"),
        ])?;
        let ground = ground(Some(layer), json!({}))?;
        let core_pattern = fs::read_to_string("/proc/sys/kernel/core_pattern")?;
        let seen = ground.output(
            "masked",
            "stat -c %F /dev/null; head -c 1 /proc/kcore | wc -c; ls /sys/firmware | wc -l; (echo x > /proc/sys/kernel/core_pattern) || echo kept; \
             (echo b > /proc/sysrq-trigger) || echo kept",
        )?;
        let lines: Vec<&str> = seen.lines().filter(|line| !line.contains(':')).collect();
        ensure!(lines == ["character special file", "0", "0", "kept", "kept"], "{seen}");
        let mut wanted = ground.hostile("terminal", &["/bin/sh", "-c", "stat -c %F /dev/console; stat -f -c %T /dev/console"]);
        wanted.tty = true;
        let id = ground.launch(&wanted)?;
        ground.client.exited(&id)?;
        let log = ground.log("terminal");
        ensure!(log.contains("character special file") && !log.contains("proc"), "{log}");
        ensure!(fs::read_to_string("/proc/sys/kernel/core_pattern")? == core_pattern);
        ground.end()
    })
}

/// CVE-2025-52881: writes of the runtime to /proc of the container (labels, sysctls) that are led elsewhere; here /proc itself is a link.
#[test]
fn writes_to_proc_are_not_led_elsewhere() -> Result<()> {
    node::run(|| {
        let layer = image::links_layer(&[("proc", "/tmp/led"), ("sys", "/tmp")])?;
        let ground = ground(Some(layer), json!({}))?;
        let outside = PathBuf::from("/tmp/led");
        ensure!(!outside.exists(), "/tmp/led is in the way of this test");
        // Whether it runs is its own affair; if it does, what is masked must be.
        if let Ok(id) = ground.launch(&ground.hostile("led", &["/bin/sleep", "1000"])) {
            let script = "head -c 1 /proc/kcore | wc -c; (echo x > /proc/sys/kernel/core_pattern) && echo written";
            let reply = ground.client.exec(&id, &["/bin/sh", "-c", script])?;
            let seen = String::from_utf8_lossy(&reply.stdout).trim().to_owned();
            ensure!(seen == "0", "{seen}");
        }
        ensure!(!outside.exists(), "made on the host");
        ground.end()
    })
}

/// CVE-2022-0492, and the classic release_agent: control groups of the host that can be written or mounted anew.
#[test]
fn control_groups_cannot_be_written_or_mounted() -> Result<()> {
    node::run(|| {
        let ground = ground(None, json!({}))?;
        let seen = ground.output(
            "cgroup",
            "(echo 1 > /sys/fs/cgroup/cgroup.procs) 2>/dev/null && echo written; (echo 1 > /sys/fs/cgroup/cgroup.freeze) 2>/dev/null && echo written; \
             mkdir /tmp/c; for kind in cgroup cgroup2 proc sysfs tmpfs debugfs; do mount -t $kind none /tmp/c 2>/dev/null && echo mounted $kind; done; \
             mount -o remount,rw /sys/fs/cgroup 2>/dev/null && echo remounted; find / -name release_agent 2>/dev/null; echo end",
        )?;
        ensure!(seen == "end", "{seen}");
        ground.end()
    })
}

/// CVE-2024-40635, CVE-2019-16884: numbers of users beyond 32 bits that come around to 0.
#[test]
fn numbers_of_users_do_not_come_around() -> Result<()> {
    node::run(|| {
        let ground = ground(None, json!({ "User": "4294967296:4294967296" }))?;
        let wanted = ground.hostile("image", &["id"]);
        let error = ground.client.create(&ground.pod, &ground.config, &wanted).expect_err("refused");
        ensure!(error.message().contains("4294967296"), "{error}");
        for value in [4_294_967_296, 4_294_967_295, -1, i64::MIN] {
            let mut wanted = container(&ground.config, "number", &["id"]);
            let security = wanted.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.run_as_user = Some(cri::Int64Value { value });
            let error = ground.client.create(&ground.pod, &ground.config, &wanted).expect_err("refused");
            ensure!(error.code() == Code::InvalidArgument && error.message().contains(&value.to_string()), "{error}");
        }
        ground.end()
    })
}

/// CVE-2022-24769, CVE-2022-29162: inheritable capabilities that nobody asked for, in the container and in an exec.
#[test]
fn nothing_is_inheritable() -> Result<()> {
    node::run(|| {
        let ground = ground(None, json!({}))?;
        let seen = ground
            .output("caps", "grep -h CapInh /proc/1/status /proc/self/status; grep -h CapAmb /proc/1/status /proc/self/status")?;
        let values: Vec<&str> = seen.split_whitespace().filter(|word| !word.contains(':')).collect();
        ensure!(values == ["0000000000000000"; 4], "{seen}");
        ground.end()
    })
}

/// CVE-2020-15257: sockets of the runtime in the abstract space, which a pod on the host's network reaches.
#[test]
fn no_socket_of_the_runtime_is_in_reach_of_the_hosts_network() -> Result<()> {
    node::run(|| {
        let ground = ground(None, json!({}))?;
        let config = host_network(pod(&ground.daemon.path("host-logs")));
        let id = ground.client.run(&config)?;
        let main = ground.client.create(&id, &config, &container(&config, "main", &["sleep", "1000"]))?;
        ground.client.start(&main)?;
        let reply = ground.client.exec(&main, &["cat", "/proc/net/unix"])?;
        let table = String::from_utf8_lossy(&reply.stdout).into_owned();
        ensure!(table.contains("windlass"), "the table is the host's: {table}");
        let abstracts: Vec<&str> =
            table.lines().filter_map(|line| line.split_whitespace().nth(7)).filter(|name| name.starts_with('@')).collect();
        ensure!(!abstracts.iter().any(|name| name.contains("windlass") || name.contains("monitor")), "{abstracts:?}");
        ensure!(ground.client.exec(&main, &["ls", &ground.daemon.socket().to_string_lossy()])?.exit_code != 0);
        ground.client.remove(&id)?;
        ground.end()
    })
}

/// CVE-2022-0811: settings of the kernel smuggled in by the value or name of an allowed one.
#[test]
fn settings_of_the_kernel_cannot_be_smuggled_in() -> Result<()> {
    node::run(|| {
        let ground = ground(None, json!({}))?;
        let core_pattern = fs::read_to_string("/proc/sys/kernel/core_pattern")?;
        for (name, value) in [
            ("kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil"),
            ("kernel.shm_rmid_forced+kernel.core_pattern", "1"),
            ("net.ipv4/../../kernel/core_pattern", "|/evil"),
            ("net.ipv4.....kernel.core_pattern", "|/evil"),
            ("net//../kernel.core_pattern", "|/evil"),
            ("kernel.core_pattern", "|/evil"),
        ] {
            let mut config = pod(&ground.daemon.path("smuggled"));
            config.linux.get_or_insert_default().sysctls = [(name.to_owned(), value.to_owned())].into();
            let error = ground.client.run(&config).expect_err(name);
            ensure!(error.code() == Code::InvalidArgument, "{name}: {error:?}");
        }
        ensure!(fs::read_to_string("/proc/sys/kernel/core_pattern")? == core_pattern);
        ground.end()
    })
}

/// Files that the runtime writes for the pod, and the log: links in the image, and links that the container makes later.
#[test]
fn files_of_the_pod_are_not_written_through_links() -> Result<()> {
    node::run(|| {
        let victim = tempfile::tempdir()?;
        let marker = victim.path().join("marker");
        fs::write(&marker, "untouched")?;
        let away = marker.to_string_lossy().into_owned();
        let up = format!("../../../../../../../../../..{away}");
        let layer = image::links_layer(&[("etc/hosts", &away), ("etc/resolv.conf", &up), ("etc/hostname", "/etc/hostname")])?;
        let ground = ground(Some(layer), json!({}))?;
        let mut started = BTreeMap::new();
        for name in ["first", "second"] {
            if let Ok(id) = ground.launch(&ground.hostile(name, &["/bin/sleep", "1000"])) {
                let script =
                    format!("echo x > /etc/hosts; rm -f /tmp/l; ln -s {away} /tmp/l; echo x > /tmp/l; cat {away} | head -c 9");
                let reply = ground.client.exec(&id, &["/bin/sh", "-c", &script])?;
                started.insert(name, String::from_utf8_lossy(&reply.stdout).into_owned());
            }
        }
        ensure!(!started.values().any(|seen| seen.contains("untouched")), "{started:?}");
        ensure!(fs::read_to_string(&marker)? == "untouched");
        ensure!(fs::read_dir(victim.path())?.count() == 1);
        // The log's place is kubelet's; a name that leads out of it is refused.
        let mut wanted = ground.hostile("log", &["/bin/true"]);
        for path in [away.as_str(), "../marker", "a/../../marker"] {
            wanted.log_path = path.into();
            let error = ground.client.create(&ground.pod, &ground.config, &wanted).expect_err("refused");
            ensure!(error.message().contains("log_path"), "{error}");
        }
        ground.end()
    })
}

/// A container that kills, traces or reads what is not its own.
#[test]
fn processes_of_the_host_are_not_in_view() -> Result<()> {
    node::run(|| {
        let ground = ground(None, json!({}))?;
        let seen = ground.output(
            "processes",
            "ls -d /proc/[0-9]* | wc -l; kill -0 1 && cat /proc/1/comm; ls /proc/1/root/bin/busybox; \
             dmesg >/dev/null 2>&1 && echo log; mknod /tmp/d b 8 0 && (head -c 1 /tmp/d >/dev/null 2>&1) && echo disk; echo end",
        )?;
        let lines: Vec<&str> = seen.lines().collect();
        let count: u32 = lines.first().context("a count")?.parse()?;
        ensure!(count < 8 && lines[1..3] == ["sleep", "/proc/1/root/bin/busybox"] && lines.last() == Some(&"end"), "{seen}");
        ensure!(!seen.contains("disk"), "{seen}");
        ground.end()
    })
}
