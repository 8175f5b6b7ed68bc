//! Requests that must fail: each with a clear error and the right code, and each leaving nothing behind.

use anyhow::{Context, Result, ensure};
use tonic::Code;
use windlass_integration::{
    client::{container, pod},
    daemon::Daemon,
    ground::Ground,
    leak::Snapshot,
    node,
};
use windlass_proto::cri;

/// A pod, and what there is beside it.
fn ground() -> Result<(Ground, Snapshot)> {
    let ground = Ground::on(Daemon::start(&[])?)?;
    let before = Snapshot::take(&ground.daemon)?;
    Ok((ground, before))
}

/// Creation of a container changed by `change` must fail with `code` and a message that contains `words`.
fn refused(code: Code, words: &[&str], change: impl FnOnce(&mut cri::ContainerConfig) + Send + 'static) -> Result<()> {
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    node::run(move || {
        let (ground, before) = ground()?;
        let mut wanted = container(&ground.config, "main", &["sleep", "1000"]);
        change(&mut wanted);
        let error = ground.client.create(&ground.pod, &ground.config, &wanted).expect_err("refused");
        ensure!(error.code() == code, "{error:?}");
        for word in &words {
            ensure!(error.message().contains(word), "{word:?} in {:?}", error.message());
        }
        before.expect_again(&ground.daemon)
    })
}

fn security(config: &mut cri::ContainerConfig) -> &mut cri::LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

#[test]
fn an_image_that_is_not_there() -> Result<()> {
    refused(Code::NotFound, &["nothing:latest", "pull it first"], |config| {
        config.image = Some(cri::ImageSpec { image: "nothing:latest".into(), ..Default::default() });
    })
}

#[test]
fn a_mount_source_that_cannot_be_made() -> Result<()> {
    refused(Code::InvalidArgument, &["/proc/no/such", "/data"], |config| {
        config.mounts =
            vec![cri::Mount { container_path: "/data".into(), host_path: "/proc/no/such".into(), ..Default::default() }];
    })
}

#[test]
fn an_unknown_user() -> Result<()> {
    refused(Code::InvalidArgument, &["no-such-user", "/etc/passwd"], |config| {
        security(config).run_as_username = "no-such-user".into()
    })
}

#[test]
fn a_group_without_a_user() -> Result<()> {
    refused(Code::InvalidArgument, &["run_as_group"], |config| security(config).run_as_group = Some(cri::Int64Value { value: 7 }))
}

#[test]
fn a_privileged_container_of_a_pod_that_was_not_declared_so() -> Result<()> {
    node::run(|| {
        let (ground, before) = ground()?;
        let mut wanted = container(&ground.config, "main", &["sleep", "1000"]);
        security(&mut wanted).privileged = true;
        let mut debugged = ground.config.clone();
        debugged.linux.get_or_insert_default().security_context.get_or_insert_default().privileged = true;
        for (sandbox_config, served) in [(None, false), (Some(ground.config.clone()), false), (Some(debugged), true)] {
            let request =
                cri::CreateContainerRequest { pod_sandbox_id: ground.pod.clone(), config: Some(wanted.clone()), sandbox_config };
            match ground.client.create_container(request) {
                Ok(reply) => {
                    ensure!(served, "created");
                    ground.client.remove_container(cri::RemoveContainerRequest { container_id: reply.container_id })?;
                }
                Err(error) => {
                    ensure!(!served && error.code() == Code::InvalidArgument, "{error:?}");
                    ensure!(error.message().contains("security_context.privileged"), "{error}");
                }
            }
        }
        before.expect_again(&ground.daemon)
    })
}

#[test]
fn an_unknown_capability() -> Result<()> {
    refused(Code::InvalidArgument, &["CAP_FLY"], |config| {
        security(config).capabilities = Some(cri::Capability { add_capabilities: vec!["CAP_FLY".into()], ..Default::default() });
    })
}

#[test]
fn a_security_profile_that_is_not_served_is_never_left_out() -> Result<()> {
    refused(Code::InvalidArgument, &["seccomp", "/no/such/profile.json"], |config| {
        let (profile_type, localhost_ref) =
            (cri::security_profile::ProfileType::Localhost.into(), "/no/such/profile.json".into());
        security(config).seccomp = Some(cri::SecurityProfile { profile_type, localhost_ref });
    })
}

#[test]
fn labels_and_profiles_that_this_node_cannot_apply() -> Result<()> {
    refused(Code::InvalidArgument, &["security_context.selinux_options"], |config| {
        // Neither a kernel without SELinux nor any policy takes this one.
        security(config).selinux_options = Some(cri::SeLinuxOption { user: "not:a:user".into(), ..Default::default() });
    })?;
    refused(Code::InvalidArgument, &["security_context.apparmor"], |config| {
        let (profile_type, localhost_ref) = (cri::security_profile::ProfileType::Localhost.into(), "windlass-no-such".into());
        security(config).apparmor = Some(cri::SecurityProfile { profile_type, localhost_ref });
    })
}

#[test]
fn numbers_of_no_enumeration() -> Result<()> {
    refused(Code::InvalidArgument, &["config.stop_signal 999 is unknown"], |config| config.stop_signal = 999)?;
    refused(Code::InvalidArgument, &["/data: propagation 7 is unknown"], |config| {
        let (container_path, host_path) = ("/data".into(), "/tmp".into());
        config.mounts = vec![cri::Mount { container_path, host_path, propagation: 7, ..Default::default() }];
    })?;
    refused(Code::InvalidArgument, &["security_context.namespace_options.pid 9 is unknown"], |config| {
        security(config).namespace_options.get_or_insert_default().pid = 9;
    })?;
    node::run(|| {
        let (ground, before) = ground()?;
        for field in ["network", "pid", "ipc", "userns_options.mode"] {
            let mut config = pod(&ground.daemon.path("logs"));
            let context = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            let options = context.namespace_options.get_or_insert_default();
            match field {
                "network" => options.network = 9,
                "pid" => options.pid = 9,
                "ipc" => options.ipc = 9,
                _ => options.userns_options = Some(cri::UserNamespace { mode: 9, ..Default::default() }),
            }
            let error = ground.client.run(&config).expect_err("refused");
            let words = format!("namespace_options.{field} 9 is unknown");
            ensure!(error.code() == Code::InvalidArgument && error.message().contains(&words), "{error:?}");
        }
        let state = Some(cri::PodSandboxStateValue { state: 9 });
        let filter = Some(cri::PodSandboxFilter { state, ..Default::default() });
        let pods = ground.client.list_pod_sandbox(cri::ListPodSandboxRequest { filter }).map(drop);
        let state = Some(cri::ContainerStateValue { state: 9 });
        let filter = Some(cri::ContainerFilter { state, ..Default::default() });
        let containers = ground.client.list_containers(cri::ListContainersRequest { filter }).map(drop);
        for outcome in [pods, containers] {
            let error = outcome.expect_err("refused");
            let named = error.message().contains("filter.state 9 is unknown");
            ensure!(error.code() == Code::InvalidArgument && named, "{error:?}");
        }
        before.expect_again(&ground.daemon)
    })
}

#[test]
fn a_log_path_that_leaves_its_directory() -> Result<()> {
    refused(Code::InvalidArgument, &["log_path"], |config| config.log_path = "../../escape.log".into())
}

#[test]
fn a_log_path_without_the_pods_directory() -> Result<()> {
    node::run(|| {
        let ground = Ground::with_handler(Daemon::start(&[])?, "", |config| config.log_directory = String::new())?;
        let mut wanted = container(&ground.config, "main", &["sleep", "1000"]);
        let error = ground.client.create(&ground.pod, &ground.config, &wanted).expect_err("refused");
        ensure!(error.code() == Code::InvalidArgument, "{error:?}");
        ensure!(error.message().contains("config.log_path \"main.log\"") && error.message().contains("log_directory"), "{error}");
        wanted.log_path = String::new();
        ground.client.create(&ground.pod, &ground.config, &wanted).context("no log is asked for")?;
        ground.end()
    })
}

#[test]
fn a_limit_of_the_wrong_sign() -> Result<()> {
    refused(Code::InvalidArgument, &["cpu_shares"], |config| {
        let resources = cri::LinuxContainerResources { cpu_shares: -5, ..Default::default() };
        config.linux.get_or_insert_default().resources = Some(resources);
    })
}

#[test]
fn an_entrypoint_that_is_not_there_is_an_exited_container() -> Result<()> {
    node::run(|| {
        let (ground, before) = ground()?;
        let wanted = container(&ground.config, "main", &["/no/such/entrypoint"]);
        let outcome = ground.client.create(&ground.pod, &ground.config, &wanted).map_err(anyhow::Error::from);
        let id = outcome.context("creation does not look at the entrypoint")?;
        let error = ground.client.start(&id).expect_err("no such entrypoint");
        ensure!(error.message().contains("/no/such/entrypoint"), "{error}");
        let status = ground.client.container(&id)?;
        ensure!(status.state() == cri::ContainerState::ContainerExited, "{status:?}");
        ensure!(status.exit_code == 128 && status.reason == "StartError", "{status:?}");
        ground.client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
        before.expect_again(&ground.daemon)
    })
}

#[test]
fn a_working_directory_that_cannot_be_used_is_an_exited_container() -> Result<()> {
    node::run(|| {
        let (ground, before) = ground()?;
        let mut wanted = container(&ground.config, "main", &["true"]);
        wanted.working_dir = "/etc/passwd".into();
        let id = ground.client.create(&ground.pod, &ground.config, &wanted)?;
        let error = ground.client.start(&id).expect_err("not a directory");
        ensure!(error.message().contains("directory /etc/passwd"), "{error}");
        let status = ground.client.container(&id)?;
        ensure!(status.state() == cri::ContainerState::ContainerExited, "{status:?}");
        ensure!(status.exit_code == 128 && status.reason == "StartError", "{status:?}");
        ground.client.remove_container(cri::RemoveContainerRequest { container_id: id })?;
        before.expect_again(&ground.daemon)
    })
}

#[test]
fn an_unknown_runtime_handler() -> Result<()> {
    node::run(|| {
        let (ground, before) = ground()?;
        let config = pod(&ground.daemon.path("logs"));
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: "kata".into() };
        let error = ground.client.run_pod_sandbox(request).expect_err("unknown handler");
        ensure!(error.code() == Code::InvalidArgument && error.message().contains("kata"), "{error}");
        before.expect_again(&ground.daemon)
    })
}

#[test]
fn a_sysctl_of_the_host() -> Result<()> {
    node::run(|| {
        let (ground, before) = ground()?;
        let mut config = pod(&ground.daemon.path("logs"));
        config.linux.get_or_insert_default().sysctls = [("vm.swappiness".to_owned(), "10".to_owned())].into();
        let error = ground.client.run(&config).expect_err("not namespaced");
        ensure!(error.code() == Code::InvalidArgument && error.message().contains("vm.swappiness"), "{error}");
        before.expect_again(&ground.daemon)
    })
}
