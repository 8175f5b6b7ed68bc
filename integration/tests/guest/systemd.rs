//! The systemd driver, with Debian's systemd as the guest's first process: pods are scopes in kubelet's slices, limits hold in them and stay
//! when systemd reads its units again, and nothing is left of a pod.

use crate::{Bench, GUEST_LIMIT, TREE, counter, expect, in_guest, read, with_resources};
use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};
use windlass_integration::{
    client::{Client, container},
    daemon::Daemon,
    guest_tests::GuestTests,
    node::{self, output_of, run_command},
    wait::until,
};
use windlass_proto::cri::{self, LinuxContainerResources as Resources, PodSandboxState};

const MIB: i64 = 1 << 20;

static GUEST: GuestTests = GuestTests::some(GUEST_LIMIT, "systemd::", |_| Ok(())).under_systemd();

/// A test with nothing prepared, in the guest whose first process is systemd.
fn in_its_guest(name: &str, body: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    GUEST.test(name, || node::run(body))
}

/// A test with a daemon under systemd; fails if a unit or anything else is left of what it made.
fn under_systemd(name: &str, body: impl FnOnce(&mut Bench) -> Result<()> + Send + 'static) -> Result<()> {
    in_its_guest(name, || {
        let mut bench = Bench::of(Daemon::start(&[])?.in_its_slice())?;
        let before = units()?;
        body(&mut bench)?;
        bench.end()?;
        // systemd forgets a unit a moment after it has removed its cgroup.
        until("no unit more than before", || Ok((units()? == before).then_some(()))).with_context(|| {
            let left: Vec<String> = units().unwrap_or_default().difference(&before).cloned().collect();
            format!("left: {left:?}")
        })
    })
}

/// Has the daemon use this driver from its next start on.
fn choose(daemon: &Daemon, driver: &str) -> Result<()> {
    let path = daemon.path("config.toml");
    let text = fs::read_to_string(&path)?;
    let others = text.lines().filter(|line| !line.starts_with("driver = ")).collect::<Vec<_>>().join("\n");
    Ok(fs::write(path, others.replace("[cgroup]", &format!("[cgroup]\ndriver = {driver:?}")) + "\n")?)
}

/// Scopes and slices that systemd knows, failed ones too.
fn units() -> Result<BTreeSet<String>> {
    let listed = output_of("systemctl", &["list-units", "--all", "--plain", "--no-legend", "--type=scope,slice"])?;
    Ok(listed.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect())
}

/// A property of a unit as systemctl shows it.
fn shown(unit: &str, property: &str) -> Result<String> {
    Ok(output_of("systemctl", &["show", "--value", "-p", property, unit])?.trim().to_owned())
}

/// Kubelet's slice of a pod, made as kubelet makes it. Stopped when dropped.
struct Slice(String);

impl Slice {
    fn make(uid: &str, memory: i64) -> Result<Slice> {
        let name = format!("kubepods-burstable-pod{}.slice", uid.replace('-', "_"));
        let call = ["call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"];
        let unit = ["StartTransientUnit", "ssa(sv)a(sa(sv))", &name, "replace"];
        let memory = memory.to_string();
        let properties = ["3", "DefaultDependencies", "b", "false", "MemoryMax", "t", &memory, "CPUWeight", "t", "50", "0"];
        run_command("busctl", &[&call[..], &unit, &properties].concat())?;
        let slice = Slice(name);
        until("kubelet's slice", || Ok(slice.directory().exists().then_some(())))?;
        Ok(slice)
    }

    /// As kubelet names it to the runtime.
    fn path(&self) -> String {
        format!("/kubepods.slice/kubepods-burstable.slice/{}", self.0)
    }

    fn directory(&self) -> PathBuf {
        Path::new(TREE).join(self.path().trim_start_matches('/'))
    }
}

impl Drop for Slice {
    fn drop(&mut self) {
        let _ = run_command("systemctl", &["stop", &self.0, "kubepods.slice"]);
    }
}

/// A pod of kubelet's, and its slice.
fn kubelets(bench: &Bench, memory: i64) -> Result<(cri::PodSandboxConfig, Slice)> {
    let mut config = bench.pod();
    let slice = Slice::make(&config.metadata.clone().unwrap_or_default().uid, memory)?;
    config.linux.as_mut().context("linux")?.cgroup_parent = slice.path();
    Ok((config, slice))
}

fn scope(pod: &str) -> String {
    format!("windlass-{pod}.scope")
}

fn start(bench: &Bench, pod: &str, config: &cri::PodSandboxConfig, limits: Resources, words: &[&str]) -> Result<String> {
    let id = bench.client.create(pod, config, &with_resources(container(config, "main", words), limits))?;
    bench.client.start(&id)?;
    Ok(id)
}

fn names(directory: &Path) -> Result<BTreeSet<String>> {
    let listing = fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?.flatten();
    Ok(listing.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
}

#[test]
fn a_pod_is_a_scope_in_kubelets_slice() -> Result<()> {
    under_systemd("a_pod_is_a_scope_in_kubelets_slice", |bench| {
        let told = bench.client.runtime_config(cri::RuntimeConfigRequest {})?.linux.context("linux")?;
        ensure!(told.cgroup_driver() == cri::CgroupDriver::Systemd, "{told:?}");
        let (mut config, slice) = kubelets(bench, 64 * MIB)?;
        for parent in [slice.path(), slice.0.clone()] {
            config.linux.as_mut().context("linux")?.cgroup_parent = parent;
            let pod = bench.client.run(&config)?;
            let id = start(
                bench,
                &pod,
                &config,
                Resources { memory_limit_in_bytes: 16 * MIB, ..Default::default() },
                &["sleep", "1000"],
            )?;
            let (unit, group) = (scope(&pod), slice.directory().join(scope(&pod)));
            for (property, value) in [
                ("Slice", slice.0.as_str()),
                ("Delegate", "yes"),
                ("DefaultDependencies", "no"),
                ("CollectMode", "inactive-or-failed"),
                ("TasksMax", "infinity"),
                ("ActiveState", "active"),
                ("Transient", "yes"),
                ("ControlGroup", &format!("{}/{unit}", slice.path())),
            ] {
                let found = shown(&unit, property)?;
                ensure!(found == value, "{property} of {unit} is {found:?}, not {value:?}");
            }
            let found = names(&group)?;
            ensure!(found == BTreeSet::from(["monitor".to_owned(), id.clone()]), "in the scope: {found:?}");
            expect(&group, "cgroup.procs", "")?;
            for controller in ["cpu", "memory", "pids", "cpuset", "io"] {
                ensure!(read(&group, "cgroup.subtree_control")?.contains(controller), "{controller} is not given on");
            }
            ensure!(read(&group.join("monitor"), "cgroup.procs")?.lines().count() == 1, "the monitor is alone in its group");
            ensure!(read(&group.join(&id), "cgroup.procs")?.lines().count() == 1, "the container's group has its first process");
            expect(&group.join(&id), "memory.max", &(16 * MIB).to_string())?;
            expect(&slice.directory(), "memory.max", &(64 * MIB).to_string())?;
            bench.client.remove(&pod)?;
            let left = names(&slice.directory())?;
            ensure!(left.is_empty(), "left in kubelet's slice: {left:?}");
        }
        Ok(())
    })
}

#[test]
fn limits_hold_in_a_scope() -> Result<()> {
    under_systemd("limits_hold_in_a_scope", |bench| {
        let (config, slice) = kubelets(bench, 96 * MIB)?;
        let pod = bench.client.run(&config)?;
        let group = slice.directory().join(scope(&pod));
        // Over its own limit.
        let limits = Resources { memory_limit_in_bytes: 32 * MIB, ..Default::default() };
        let id = start(bench, &pod, &config, limits, &["/probe", "hold-mem", "64"])?;
        let ended = bench.exited(&id)?;
        ensure!(ended.exit_code == 137 && ended.reason == "OOMKilled", "{ended:?}");
        bench.client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
        // Over the pod's, which is the slice's.
        let id = start(bench, &pod, &config, Resources::default(), &["/probe", "hold-mem", "128"])?;
        let ended = bench.exited(&id)?;
        ensure!(ended.exit_code == 137 && ended.reason == "OOMKilled", "{ended:?}");
        bench.client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
        ensure!(bench.client.pod(&pod)?.state() == PodSandboxState::SandboxReady, "the pod has gone with a container");
        ensure!(shown(&scope(&pod), "ActiveState")? == "active", "systemd has ended the scope");
        // Processes.
        let limits = Resources { unified: [("pids.max".to_owned(), "4".to_owned())].into(), ..Default::default() };
        let script = "for i in 1 2 3 4 5 6; do sleep 1000 & done; wait";
        let id = start(bench, &pod, &config, limits, &["sh", "-c", script])?;
        until("a refused fork", || Ok((counter(&group.join(&id), "pids.events", "max ")? > 0).then_some(())))?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn limits_and_containers_stay_when_systemd_reads_its_units_again() -> Result<()> {
    under_systemd("limits_and_containers_stay_when_systemd_reads_its_units_again", |bench| {
        let (config, slice) = kubelets(bench, 128 * MIB)?;
        let pod = bench.client.run(&config)?;
        let limits = Resources { memory_limit_in_bytes: 64 * MIB, cpu_quota: 50_000, cpu_period: 100_000, ..Default::default() };
        let id = start(bench, &pod, &config, limits, &["sleep", "1000"])?;
        let leaf = slice.directory().join(scope(&pod)).join(&id);
        let linux = Resources {
            memory_limit_in_bytes: 96 * MIB,
            cpu_quota: 20_000,
            cpu_shares: 2048,
            unified: [("pids.max".to_owned(), "77".to_owned())].into(),
            ..Default::default()
        };
        let request = cri::UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux), ..Default::default() };
        bench.client.update_container_resources(request)?;
        let files = ["memory.max", "cpu.max", "cpu.weight", "pids.max", "cgroup.procs"];
        let now = |leaf: &Path| files.iter().map(|file| read(leaf, file)).collect::<Result<Vec<_>>>();
        let before = now(&leaf)?;
        ensure!(before[0] == (96 * MIB).to_string() && before[1].starts_with("20000 ") && before[3] == "77", "{before:?}");
        for command in ["daemon-reload", "daemon-reexec"] {
            run_command("systemctl", &[command])?;
            // Others make units beside it, which lets systemd look at the slices again.
            run_command("systemd-run", &["--quiet", "--scope", "--slice=kubepods-burstable", "-p", "MemoryMax=1G", "true"])?;
            let after = now(&leaf)?;
            ensure!(after == before, "after {command}: {after:?}, before {before:?}");
            expect(&slice.directory(), "memory.max", &(128 * MIB).to_string())?;
            let seen = bench.client.exec(&id, &["cat", "/sys/fs/cgroup/memory.max"])?;
            ensure!(seen.stdout == format!("{}\n", 96 * MIB).as_bytes(), "{seen:?}");
            // The daemon's connection goes on, or is made again.
            let other = bench.client.run(&bench.pod())?;
            bench.client.remove(&other)?;
        }
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn execs_and_statistics_are_the_scopes() -> Result<()> {
    under_systemd("execs_and_statistics_are_the_scopes", |bench| {
        // A pod of no slice of its own: the scope is what it uses.
        let (pod, id) = bench
            .limited(Resources::default(), &["sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; sleep 1000"])?;
        let group = bench.daemon.cgroup_directory().join(scope(&pod));
        ensure!(shown(&scope(&pod), "Slice")? == bench.daemon.cgroup.trim_start_matches('/'), "not in the default slice");
        let long = bench.client.exec(&id, &["sh", "-c", "cat /proc/self/cgroup; sleep 30 >/dev/null 2>&1 &"])?;
        ensure!(long.exit_code == 0, "{long:?}");
        let below = names(&group.join(&id))?;
        ensure!(below.len() == 1 && below.iter().all(|name| name.starts_with("exec-")), "below the container: {below:?}");
        until("processor time", || Ok((counter(&group.join(&id), "cpu.stat", "usage_usec ")? > 200_000).then_some(())))?;
        let stats = bench.client.pod_sandbox_stats(cri::PodSandboxStatsRequest { pod_sandbox_id: pod.clone() })?;
        let linux = stats.stats.and_then(|stats| stats.linux).context("statistics")?;
        let used = linux.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).context("processor time")?.value;
        let (whole, part) = (counter(&group, "cpu.stat", "usage_usec ")?, counter(&group.join(&id), "cpu.stat", "usage_usec ")?);
        ensure!(
            used / 1000 <= whole && used / 1000 >= part.saturating_sub(200_000),
            "{used} ns of {whole} us, the container's {part} us"
        );
        ensure!(linux.memory.is_some() && linux.containers.len() == 1, "a part is missing");
        let metrics = windlass_integration::metrics::Metrics::take(&bench.client)?;
        let limit = metrics.value("container_processes", &[("name", &id)]);
        ensure!(limit.is_ok(), "no metric of the container: {limit:?}");
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn pods_of_shared_namespaces_are_in_their_scope_too() -> Result<()> {
    under_systemd("pods_of_shared_namespaces_are_in_their_scope_too", |bench| {
        let options = |config: &mut cri::PodSandboxConfig, options: cri::NamespaceOption| {
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.namespace_options = Some(options);
        };
        let mut shared = bench.pod();
        options(&mut shared, cri::NamespaceOption { pid: cri::NamespaceMode::Pod.into(), ..Default::default() });
        let mut users = bench.pod();
        let ids = vec![cri::IdMapping { container_id: 0, host_id: 200_000, length: 65_536 }];
        let mapped = cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids: ids.clone(), gids: ids };
        options(
            &mut users,
            cri::NamespaceOption {
                pid: cri::NamespaceMode::Container.into(),
                userns_options: Some(mapped),
                ..Default::default()
            },
        );
        for (config, own) in [(shared, &["init", "monitor"][..]), (users, &["monitor"])] {
            let pod = bench.client.run(&config)?;
            let limits = Resources { memory_limit_in_bytes: 32 * MIB, ..Default::default() };
            let id = start(bench, &pod, &config, limits, &["sleep", "1000"])?;
            let group = bench.daemon.cgroup_directory().join(scope(&pod));
            let mut expected: BTreeSet<String> = own.iter().map(|name| (*name).to_owned()).collect();
            expected.insert(id.clone());
            ensure!(names(&group)? == expected, "in the scope: {:?}", names(&group)?);
            expect(&group.join(&id), "memory.max", &(32 * MIB).to_string())?;
            ensure!(bench.client.exec(&id, &["true"])?.exit_code == 0);
            bench.client.remove(&pod)?;
        }
        Ok(())
    })
}

#[test]
fn a_scope_outlives_daemons_and_goes_with_its_pod() -> Result<()> {
    under_systemd("a_scope_outlives_daemons_and_goes_with_its_pod", |bench| {
        let (config, slice) = kubelets(bench, 128 * MIB)?;
        let pod = bench.client.run(&config)?;
        let id =
            start(bench, &pod, &config, Resources { memory_limit_in_bytes: 64 * MIB, ..Default::default() }, &["sleep", "1000"])?;
        let leaf = slice.directory().join(scope(&pod)).join(&id);
        let processes = read(&leaf, "cgroup.procs")?;
        // Killed, ended in order, and with another driver than the pod was made by.
        for (kill, driver) in [(true, "auto"), (false, "systemd"), (true, "cgroupfs"), (true, "auto")] {
            if kill {
                bench.daemon.kill9()?
            } else {
                bench.daemon.stop()?
            }
            choose(&bench.daemon, driver)?;
            bench.daemon.serve()?;
            bench.client = Client::connect(&bench.daemon)?;
            ensure!(bench.client.pod(&pod)?.state() == PodSandboxState::SandboxReady, "{driver}: not ready");
            ensure!(bench.client.container(&id)?.state() == cri::ContainerState::ContainerRunning, "{driver}: not running");
            ensure!(read(&leaf, "cgroup.procs")? == processes, "{driver}: another process");
            ensure!(shown(&scope(&pod), "ActiveState")? == "active", "{driver}: the scope has ended");
            ensure!(bench.client.exec(&id, &["true"])?.exit_code == 0);
        }
        bench.client.remove(&pod)?;
        ensure!(names(&slice.directory())?.is_empty(), "left in kubelet's slice");
        // One that a daemon of the other driver removes.
        let pod = bench.client.run(&config)?;
        bench.daemon.kill9()?;
        choose(&bench.daemon, "cgroupfs")?;
        bench.daemon.serve()?;
        bench.client = Client::connect(&bench.daemon)?;
        bench.client.remove(&pod)?;
        ensure!(names(&slice.directory())?.is_empty(), "left in kubelet's slice");
        bench.daemon.stop()?;
        choose(&bench.daemon, "auto")?;
        bench.daemon.serve()?;
        // What a first pod makes.
        bench.client = Client::connect(&bench.daemon)?;
        let pod = bench.client.run(&bench.pod())?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn a_killed_monitor_takes_its_scope_with_it() -> Result<()> {
    under_systemd("a_killed_monitor_takes_its_scope_with_it", |bench| {
        let (pod, id) = bench.limited(Resources::default(), &["sleep", "1000"])?;
        let group = bench.daemon.cgroup_directory().join(scope(&pod));
        let monitor = read(&group.join("monitor"), "cgroup.procs")?.parse()?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(monitor), nix::sys::signal::Signal::SIGKILL)?;
        let ended = bench.exited(&id)?;
        ensure!(ended.exit_code == 255, "{ended:?}");
        until(
            "the pod is not ready",
            || Ok((bench.client.pod(&pod)?.state() == PodSandboxState::SandboxNotready).then_some(())),
        )?;
        until("the scope has ended", || Ok((!group.exists()).then_some(())))?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn a_pod_that_cannot_be_run_leaves_no_unit() -> Result<()> {
    under_systemd("a_pod_that_cannot_be_run_leaves_no_unit", |bench| {
        let mut config = bench.pod();
        config.linux.as_mut().context("linux")?.sysctls = [("net.ipv4.no_such_thing".to_owned(), "1".to_owned())].into();
        let error = bench.client.run(&config).err().context("it was run")?;
        ensure!(error.message().contains("no_such_thing"), "{error}");
        for (parent, named) in
            [("/other/a-b.slice", "systemd has a-b.slice at /a.slice/a-b.slice"), ("a--b.slice", "no slice of this name")]
        {
            let mut config = bench.pod();
            config.linux.as_mut().context("linux")?.cgroup_parent = parent.into();
            let error = bench.client.run(&config).err().context("it was run")?;
            ensure!(error.code() == tonic::Code::InvalidArgument && error.message().contains(named), "{error}");
        }
        // In a slice that systemd does not start.
        fs::write("/run/systemd/system/refused.slice", "[Unit]\nAssertPathExists=/there/is/no/such/path\n")?;
        run_command("systemctl", &["daemon-reload"])?;
        let mut config = bench.pod();
        config.linux.as_mut().context("linux")?.cgroup_parent = "refused.slice".into();
        let error = bench.client.run(&config).err().context("it was run")?;
        ensure!(error.message().contains("systemd: StartTransientUnit windlass-"), "{error}");
        fs::remove_file("/run/systemd/system/refused.slice")?;
        run_command("systemctl", &["daemon-reload"])?;
        let _ = run_command("systemctl", &["reset-failed", "refused.slice"]);
        Ok(())
    })
}

#[test]
fn slices_that_are_not_there_are_started_and_the_pods_own_is_stopped() -> Result<()> {
    under_systemd("slices_that_are_not_there_are_started_and_the_pods_own_is_stopped", |bench| {
        let mut config = bench.pod();
        let uid = config.metadata.clone().unwrap_or_default().uid.replace('-', "_");
        let linux = config.linux.as_mut().context("linux")?;
        linux.cgroup_parent = format!("made-pod{uid}.slice");
        linux.resources = Some(Resources { memory_limit_in_bytes: 64 * MIB, cpu_shares: 512, ..Default::default() });
        let pod = bench.client.run(&config)?;
        let group = Path::new(TREE).join(format!("made.slice/made-pod{uid}.slice/{}", scope(&pod)));
        expect(&group, "memory.max", &(64 * MIB).to_string())?;
        expect(&group, "cpu.weight", "59")?;
        let resources = Some(Resources { memory_limit_in_bytes: 80 * MIB, cpu_quota: 50_000, ..Default::default() });
        let request = cri::UpdatePodSandboxResourcesRequest { pod_sandbox_id: pod.clone(), resources, ..Default::default() };
        bench.client.update_pod_sandbox_resources(request)?;
        run_command("systemctl", &["daemon-reload"])?;
        let other = bench.client.run(&bench.pod())?;
        expect(&group, "memory.max", &(80 * MIB).to_string())?;
        expect(&group, "cpu.max", "50000 100000")?;
        bench.client.remove(&other)?;
        bench.client.remove(&pod)?;
        ensure!(!group.parent().context("slice")?.exists(), "the pod's slice is left");
        run_command("systemctl", &["stop", "made.slice"])
    })
}

#[test]
fn a_parent_of_the_other_syntax_holds_the_pod_too() -> Result<()> {
    under_systemd("a_parent_of_the_other_syntax_holds_the_pod_too", |bench| {
        let mut config = bench.pod();
        let uid = config.metadata.clone().unwrap_or_default().uid;
        config.linux.as_mut().context("linux")?.cgroup_parent = format!("/plain/pod{uid}");
        let pod = bench.client.run(&config)?;
        let id =
            start(bench, &pod, &config, Resources { memory_limit_in_bytes: 32 * MIB, ..Default::default() }, &["sleep", "1000"])?;
        let parent = Path::new(TREE).join(format!("plain/pod{uid}"));
        expect(&parent.join(&id), "memory.max", &(32 * MIB).to_string())?;
        ensure!(!units()?.contains(&scope(&pod)), "it has a scope");
        bench.client.remove(&pod)?;
        ensure!(!parent.exists(), "the pod's group is left");
        Ok(fs::remove_dir(Path::new(TREE).join("plain"))?)
    })
}

#[test]
fn a_message_bus_that_was_restarted_or_is_absent_hinders_nothing() -> Result<()> {
    under_systemd("a_message_bus_that_was_restarted_or_is_absent_hinders_nothing", |bench| {
        run_command("systemctl", &["restart", "dbus.service"])?;
        let pod = bench.client.run(&bench.pod())?;
        ensure!(shown(&scope(&pod), "ActiveState")? == "active");
        // Without one, over systemd's own socket: the daemon that runs, and one that starts.
        run_command("systemctl", &["stop", "dbus.socket", "dbus.service"])?;
        for start in [false, true] {
            if start {
                bench.daemon.kill9()?;
                bench.daemon.serve()?;
                bench.client = Client::connect(&bench.daemon)?;
            }
            let other = bench.client.run(&bench.pod())?;
            ensure!(shown(&scope(&other), "ActiveState")? == "active", "not a scope over systemd's own socket");
            let mut root = bench.pod();
            root.linux.as_mut().context("linux")?.cgroup_parent = "-.slice".into();
            let at_root = bench.client.run(&root)?;
            ensure!(shown(&scope(&at_root), "ControlGroup")? == format!("/{}", scope(&at_root)));
            bench.client.remove(&at_root)?;
            bench.client.remove(&other)?;
        }
        bench.client.remove(&pod)?;
        run_command("systemctl", &["start", "dbus.socket"])?;
        let pod = bench.client.run(&bench.pod())?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

#[test]
fn a_systemd_that_goes_away_fails_what_needs_it_alone() -> Result<()> {
    under_systemd("a_systemd_that_goes_away_fails_what_needs_it_alone", |bench| {
        let pod = bench.client.run(&bench.pod())?;
        // Only for this test's daemon: its mounts are its own.
        run_command("systemctl", &["stop", "dbus.socket", "dbus.service"])?;
        run_command("mount", &["--bind", "/dev/null", "/run/systemd/private"])?;
        let error = bench.client.run(&bench.pod()).err().context("it was run without systemd")?;
        let named = ["over the message bus", "over /run/systemd/private"];
        ensure!(error.code() == tonic::Code::Unavailable && named.iter().all(|name| error.message().contains(name)), "{error}");
        // A scope ends by itself.
        bench.client.remove(&pod)?;
        run_command("umount", &["/run/systemd/private"])?;
        run_command("systemctl", &["start", "dbus.socket"])?;
        let pod = bench.client.run(&bench.pod())?;
        bench.client.remove(&pod)?;
        Ok(())
    })
}

/// Serves with this driver and is stopped again; gives what it says.
fn said_of(driver: &str) -> Result<(bool, String)> {
    let mut daemon = Daemon::prepare(&[])?;
    choose(&daemon, driver)?;
    let served = daemon.serve().is_ok();
    let log = daemon.log();
    if served {
        daemon.stop()?;
    }
    Ok((served, log))
}

#[test]
fn a_systemd_that_does_not_answer_is_an_error_or_left_out() -> Result<()> {
    in_its_guest("a_systemd_that_does_not_answer_is_an_error_or_left_out", || {
        run_command("mount", &["-t", "tmpfs", "none", "/run/dbus"])?;
        run_command("mount", &["--bind", "/dev/null", "/run/systemd/private"])?;
        let (served, log) = said_of("systemd")?;
        let named = ["cgroup.driver = \"systemd\"", "over the message bus", "over /run/systemd/private"];
        ensure!(!served && named.iter().all(|text| log.contains(text)), "{log}");
        let (served, log) = said_of("auto")?;
        ensure!(served && log.contains("cgroup.driver is cgroupfs"), "{log}");
        Ok(())
    })
}

#[test]
fn without_systemd_its_driver_is_refused() -> Result<()> {
    in_guest("without_systemd_its_driver_is_refused", |bench| {
        let told = bench.client.runtime_config(cri::RuntimeConfigRequest {})?.linux.context("linux")?;
        ensure!(told.cgroup_driver() == cri::CgroupDriver::Cgroupfs, "{told:?}");
        let (served, log) = said_of("systemd")?;
        ensure!(!served && log.contains("cgroup.driver = \"systemd\": systemd is not the first process here"), "{log}");
        Ok(())
    })
}
