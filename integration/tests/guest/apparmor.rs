//! AppArmor profiles as the CRI asks for them: ours, others by name, none.

use crate::{Bench, in_guest};
use anyhow::{Context, Result, ensure};
use std::{
    io::Write,
    process::{Command, Stdio},
};
use windlass_integration::client::container;
use windlass_proto::cri::{self, LinuxContainerSecurityContext as Security, SecurityProfile, security_profile::ProfileType};

const OURS: &str = "windlass-default";
/// A profile of somebody else's: everything but writes below /tmp.
const NO_TMP: &str = "profile test-no-tmp flags=(attach_disconnected) { file, network, capability, signal, deny /tmp/** w, }";

fn profile(kind: ProfileType, name: &str) -> Security {
    let apparmor = SecurityProfile { profile_type: kind.into(), localhost_ref: name.into() };
    Security { apparmor: Some(apparmor), ..Default::default() }
}

fn load(text: &str) -> Result<()> {
    let mut parser = Command::new("apparmor_parser").args(["-r", "-K"]).stdin(Stdio::piped()).spawn()?;
    parser.stdin.take().context("its input")?.write_all(text.as_bytes())?;
    ensure!(parser.wait()?.success(), "apparmor_parser");
    Ok(())
}

/// Runs a container with these security options for the length of `look`.
fn with(bench: &Bench, security: Security, look: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    let config = bench.pod();
    let pod = bench.client.run(&config)?;
    let created = bench.client.create(&pod, &config, &secured(container(&config, "main", &["sleep", "1000"]), security));
    let looked = created.map_err(Into::into).and_then(|id| {
        bench.client.start(&id)?;
        look(&id)
    });
    bench.client.remove(&pod)?;
    looked
}

fn secured(mut config: cri::ContainerConfig, security: Security) -> cri::ContainerConfig {
    if let Some(linux) = config.linux.as_mut() {
        let namespaces = linux.security_context.take().and_then(|security| security.namespace_options);
        linux.security_context = Some(Security { namespace_options: namespaces, ..security });
    }
    config
}

/// The profile of the first process and of an exec, which must be the same.
fn confinement(bench: &Bench, id: &str) -> Result<String> {
    let seen = bench.client.exec(id, &["cat", "/proc/1/attr/current", "/proc/self/attr/current"])?;
    let text = String::from_utf8(seen.stdout)?;
    let mut lines = text.lines();
    let (first, exec) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    ensure!(first == exec && !first.is_empty(), "first {first:?}, exec {exec:?}");
    Ok(first.to_owned())
}

fn run(bench: &Bench, id: &str, script: &str) -> Result<i32> {
    Ok(bench.client.exec(id, &["sh", "-c", script])?.exit_code)
}

#[test]
fn a_container_runs_in_our_profile_unless_it_says_otherwise() -> Result<()> {
    in_guest("a_container_runs_in_our_profile_unless_it_says_otherwise", |bench| {
        for security in [Security::default(), profile(ProfileType::RuntimeDefault, "")] {
            with(bench, security, |id| {
                let seen = confinement(bench, id)?;
                ensure!(seen == format!("{OURS} (enforce)"), "{seen}");
                Ok(())
            })?;
        }
        for security in [profile(ProfileType::Unconfined, ""), Security { privileged: true, ..Default::default() }] {
            with(bench, security, |id| {
                let seen = confinement(bench, id)?;
                ensure!(seen == "unconfined", "{seen}");
                Ok(())
            })?;
        }
        Ok(())
    })
}

#[test]
fn our_profile_denies_mounts_and_the_machines_settings_only() -> Result<()> {
    in_guest("our_profile_denies_mounts_and_the_machines_settings_only", |bench| {
        let mut powerful = profile(ProfileType::RuntimeDefault, "");
        powerful.capabilities = Some(cri::Capability { add_capabilities: vec!["ALL".into()], ..Default::default() });
        // Nothing but the profile stands between these and their success.
        powerful.readonly_paths = vec!["/proc/acpi".into()];
        powerful.masked_paths = vec!["/proc/acpi".into()];
        let scripts = [
            ("mount -t tmpfs none /tmp", false),
            ("echo 1 >/proc/sys/vm/drop_caches", false),
            ("echo core >/proc/sys/kernel/core_pattern", false),
            ("echo h >/proc/sysrq-trigger", false),
            ("echo 1 >/proc/sys/kernel/shm_rmid_forced", true),
            ("echo x >/tmp/file && cat /tmp/file && rm /tmp/file", true),
            ("kill -0 1 && sleep 0 & wait", true),
            ("ping -c 1 127.0.0.1", true),
            ("chown 1000 /tmp && su user -c id", true),
        ];
        with(bench, powerful.clone(), |id| {
            for (script, allowed) in scripts {
                ensure!((run(bench, id, script)? == 0) == allowed, "{script}: allowed is not {allowed}");
            }
            Ok(())
        })?;
        powerful.apparmor = profile(ProfileType::Unconfined, "").apparmor;
        with(bench, powerful, |id| {
            ensure!(run(bench, id, "mount -t tmpfs none /tmp")? == 0, "unconfined, with all capabilities, could not mount");
            Ok(())
        })
    })
}

#[test]
fn a_profile_of_the_host_is_entered_by_name() -> Result<()> {
    in_guest("a_profile_of_the_host_is_entered_by_name", |bench| {
        load(NO_TMP)?;
        #[expect(deprecated, reason = "older clients still send the deprecated field")]
        let old = Security { apparmor_profile: "localhost/test-no-tmp".into(), ..Default::default() };
        for mut security in
            [profile(ProfileType::Localhost, "test-no-tmp"), profile(ProfileType::Localhost, "localhost/test-no-tmp"), old]
        {
            security.no_new_privs = true;
            with(bench, security, |id| {
                let seen = confinement(bench, id)?;
                ensure!(seen == "test-no-tmp (enforce)", "{seen}");
                ensure!(run(bench, id, "echo x >/tmp/file")? != 0, "the profile does not hold");
                ensure!(run(bench, id, "echo x >/root/file")? == 0, "the profile denies too much");
                Ok(())
            })?;
        }
        let error = with(bench, profile(ProfileType::Localhost, "not-loaded"), |_| Ok(())).err().context("not loaded")?;
        let status: &tonic::Status = error.downcast_ref().context("a status")?;
        ensure!(status.code() == tonic::Code::InvalidArgument, "{status}");
        ensure!(status.message().contains("security_context.apparmor") && status.message().contains("not-loaded"), "{status}");
        Ok(())
    })
}
