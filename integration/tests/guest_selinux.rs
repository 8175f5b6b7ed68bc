//! SELinux labels under a small enforcing policy, in a guest whose kernel has SELinux: one that `integration/guest/build.sh` built. Says so and
//! does nothing where the guest's kernel has none, or where `secilc` (Debian package of that name) is missing.

use anyhow::{Context, Result, ensure};
use std::{
    env,
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use windlass_integration::{
    client::{Client, container, pod},
    daemon::Daemon,
    guest,
    leak::Snapshot,
    node, setup,
};
use windlass_proto::cri;

/// Set inside the guest: the directory with the compiled policy.
const PREPARED: &str = "WINDLASS_GUEST_SELINUX";
const LIMIT: Duration = Duration::from_secs(120);
const NAME: &str = "containers_are_labelled_and_kept_apart";

/// The initial identifiers of the kernel, in its order.
const SIDS: &str = "kernel security unlabeled fs file file_labels init any_socket port netif netmsg node igmp_packet icmp_socket tcp_socket \
    sysctl_modprobe sysctl sysctl_fs sysctl_kernel sysctl_net sysctl_net_unix sysctl_vm sysctl_dev kmod policy scmp_packet devnull";

/// A policy in CIL that knows one thing: a container writes files of its own label's type whose categories are its own.
const RULES: &str = "
(handleunknown allow) (mls true)
(class process (transition dyntransition)) (class file (write))
(class dir (quotaon)) (class lnk_file (quotaon)) (class chr_file (quotaon)) (classorder (process file dir lnk_file chr_file))
(user system_u) (role system_r) (role object_r) (userrole system_u system_r) (userrole system_u object_r)
(type kernel_t) (type container_t) (type other_t) (type container_file_t) (type file_t)
(typeattribute domain) (typeattributeset domain (kernel_t container_t other_t))
(typeattribute labelled) (typeattributeset labelled (kernel_t container_t other_t container_file_t file_t))
(roletype system_r domain) (roletype object_r container_file_t) (roletype object_r file_t)
(sensitivity s0) (sensitivityorder (s0)) (sensitivitycategory s0 (range c0 c1023))
(level low (s0)) (level high (s0 (range c0 c1023))) (levelrange all_levels (low high))
(userlevel system_u low) (userrange system_u all_levels)
(context kernel_context (system_u system_r kernel_t all_levels)) (context file_context (system_u object_r file_t (low low)))
(allow kernel_t labelled (file (write))) (allow kernel_t domain (process (transition dyntransition)))
(allow domain container_file_t (file (write)))
(mlsconstrain (file (write)) (dom h1 h2))
(fsuse xattr overlay file_context) (fsuse trans tmpfs file_context) (fsuse trans devpts file_context) (fsuse trans mqueue file_context)
(fsuse task pipefs file_context) (fsuse task sockfs file_context) (genfscon proc \"/\" file_context) (genfscon sysfs \"/\" file_context)
(genfscon cgroup2 \"/\" file_context) (genfscon selinuxfs \"/\" file_context) (genfscon hostfs \"/\" file_context)
";

fn policy() -> String {
    let mut text = String::from(RULES);
    let mut order = String::new();
    for number in 0..1024 {
        // Writing to a String cannot fail.
        let _ = write!(text, "(category c{number})");
        let _ = write!(order, " c{number}");
    }
    let _ = writeln!(text, "(categoryorder ({order}))");
    for sid in SIDS.split_whitespace() {
        let context = if matches!(sid, "kernel" | "init") { "kernel_context" } else { "file_context" };
        let _ = writeln!(text, "(sid {sid}) (sidcontext {sid} {context})");
    }
    let _ = writeln!(text, "(sidorder ({SIDS}))");
    text
}

#[test]
fn containers_are_labelled_and_kept_apart() -> Result<()> {
    if let Some(directory) = env::var_os(PREPARED).map(PathBuf::from) {
        return node::run(move || check(&directory));
    }
    if !guest::kernel_knows("selinuxfs")? {
        println!("not tested: the guest's kernel has no SELinux; build it with integration/guest/build.sh");
        return Ok(());
    }
    let directory = guest::scratch()?;
    let (source, compiled) = (directory.path().join("policy.cil"), directory.path().join("policy"));
    fs::write(&source, policy())?;
    let status =
        Command::new("secilc").args(["-M", "true", "-c", "31", "-f", "/dev/null", "-o"]).arg(&compiled).arg(&source).status();
    match status {
        Ok(status) => ensure!(status.success(), "secilc ended with {status}"),
        Err(error) => {
            println!("not tested: secilc: {error}");
            return Ok(());
        }
    }
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (program, prepared, programs) = (text(&env::current_exe()?), text(directory.path()), text(&setup::programs()?));
    let log = env::var("WINDLASS_TEST_LOG").unwrap_or_default();
    let mut environment = vec![(PREPARED, prepared.as_str()), ("WINDLASS_BIN_DIR", &programs)];
    if !log.is_empty() {
        environment.push(("WINDLASS_TEST_LOG", &log));
    }
    let command = [&program, "--exact", NAME, "--test-threads", "1"];
    let outcome = guest::run_with(directory.path(), &command, &environment, LIMIT, &["lsm=selinux", "selinux=1"])?;
    ensure!(outcome.code == 0, "in the guest:\n{}", outcome.output);
    Ok(())
}

/// Loads the policy, enforces it, and writes what a distribution's policy says about containers. The guest is thrown away.
fn enforce(directory: &Path) -> Result<()> {
    node::run_command("mount", &["-t", "selinuxfs", "selinuxfs", "/sys/fs/selinux"])?;
    fs::write("/sys/fs/selinux/load", fs::read(directory.join("policy"))?).context("load the policy")?;
    fs::write("/sys/fs/selinux/enforce", "1").context("enforce the policy")?;
    fs::create_dir_all("/etc/selinux/small/contexts")?;
    fs::write("/etc/selinux/config", "SELINUX=enforcing\nSELINUXTYPE=small\n")?;
    let contexts = "process = \"system_u:system_r:container_t:s0\"\nfile = \"system_u:object_r:container_file_t:s0\"\n";
    Ok(fs::write("/etc/selinux/small/contexts/lxc_contexts", contexts)?)
}

/// Runs a container in a pod of its own for the length of `look`.
fn with<T>(
    (daemon, client): (&Daemon, &Client),
    change: impl FnOnce(&mut cri::ContainerConfig),
    look: impl FnOnce(&str) -> Result<T>,
) -> Result<T> {
    let config = pod(&daemon.path("logs"));
    let id = client.run(&config)?;
    let mut wanted = container(&config, "main", &["sleep", "1000"]);
    change(&mut wanted);
    let created = client.create(&id, &config, &wanted);
    let looked = created.map_err(Into::into).and_then(|created| {
        client.start(&created)?;
        look(&created)
    });
    client.remove(&id)?;
    looked
}

fn output(client: &Client, id: &str, script: &str) -> Result<String> {
    let seen = client.exec(id, &["sh", "-c", script])?;
    ensure!(seen.exit_code == 0, "{script}: {seen:?}");
    Ok(String::from_utf8(seen.stdout)?.trim_matches(['\0', '\n']).to_owned())
}

/// The label of the first process, which an exec must share.
fn label(client: &Client, id: &str) -> Result<String> {
    let first = output(client, id, "cat /proc/1/attr/current")?;
    let exec = output(client, id, "cat /proc/self/attr/current")?;
    ensure!(first == exec, "first {first:?}, exec {exec:?}");
    Ok(first)
}

fn options(config: &mut cri::ContainerConfig, typ: &str, level: &str) {
    let asked = cri::SeLinuxOption { r#type: typ.into(), level: level.into(), ..Default::default() };
    config.linux.get_or_insert_default().security_context.get_or_insert_default().selinux_options = Some(asked);
}

fn check(directory: &Path) -> Result<()> {
    enforce(directory)?;
    let daemon = Daemon::start(&[])?;
    let client = Client::connect(&daemon)?;
    let both = (&daemon, &client);
    with(both, |_| {}, |_| Ok(()))?;
    let before = Snapshot::take(&daemon)?;
    labels(both)?;
    volumes(both)?;
    before.expect_again(&daemon)
}

fn labels(both: (&Daemon, &Client)) -> Result<()> {
    let client = both.1;
    let own = |id: &str| -> Result<String> {
        let found = label(client, id)?;
        let (typ, level) = found.split_at("system_u:system_r:container_t:s0:".len());
        ensure!(typ == "system_u:system_r:container_t:s0:" && level.split(',').count() == 2, "{found}");
        let mounts = output(client, id, "cat /proc/1/mountinfo")?;
        let context = format!("context=system_u:object_r:container_file_t:s0:{level}");
        for place in ["/", "/dev", "/dev/shm", "/dev/pts"] {
            let line = mounts.lines().find(|line| line.split(' ').nth(4) == Some(place)).context(place)?;
            ensure!(line.replace(['"', '\\'], "").contains(&context), "{line}: no {context}");
        }
        ensure!(output(client, id, "echo x >/file; cat /file; echo y >/dev/shm/file; cat /dev/shm/file")? == "x\ny");
        Ok(found)
    };
    let (first, second) = (with(both, |_| {}, own)?, with(both, |_| {}, own)?);
    ensure!(first != second, "two pods are both {first}");
    let asked = with(both, |config| options(config, "other_t", "s0:c5,c9"), |id| label(client, id))?;
    ensure!(asked == "system_u:system_r:other_t:s0:c5,c9", "{asked}");
    let privileged = with(
        both,
        |config| config.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true,
        |id| label(client, id),
    )?;
    ensure!(privileged.contains(":kernel_t:"), "{privileged}");
    let error = with(both, |config| options(config, "unknown_t", ""), |_| Ok(())).err().context("an unknown type")?;
    let status: &tonic::Status = error.downcast_ref().context("a status")?;
    ensure!(status.code() == tonic::Code::InvalidArgument && status.message().contains("selinux_options"), "{status}");
    Ok(())
}

/// A volume that is relabelled for a container is its own; another pod's container cannot write it.
fn volumes(both: (&Daemon, &Client)) -> Result<()> {
    let client = both.1;
    let volume = both.0.path("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("file"), "old\n")?;
    let mount = |relabel: bool| cri::Mount {
        container_path: "/volume".into(),
        host_path: volume.to_string_lossy().into_owned(),
        selinux_relabel: relabel,
        ..Default::default()
    };
    let refused = |id: &str| -> Result<()> {
        let seen = client.exec(id, &["sh", "-c", "echo new >/volume/file"])?;
        ensure!(seen.exit_code != 0, "written without its label");
        Ok(())
    };
    with(both, |config| config.mounts.push(mount(false)), refused)?;
    with(
        both,
        |config| config.mounts.push(mount(true)),
        |id| {
            ensure!(output(client, id, "echo new >/volume/file; cat /volume/file")? == "new");
            let hosts = output(client, id, "echo 10.9.9.9 other >>/etc/hosts; tail -n 1 /etc/hosts")?;
            ensure!(hosts == "10.9.9.9 other", "the pod's own files are not its own: {hosts}");
            with(both, |config| config.mounts.push(mount(false)), refused)
        },
    )
}
