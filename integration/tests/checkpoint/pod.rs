//! A pod with two containers: captured in one moment, and made again.

use super::{COUNTER, beyond, counts_on, daemon, ground, names, numbers, standing_in, with_criu};
use anyhow::{Context, Result, ensure};
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};
use tonic::Code;
use windlass_integration::{
    client::{container, pod},
    ground::Ground,
    leak::Snapshot,
};
use windlass_proto::cri;

fn request(pod: &str, output: &Path, ids: &[&str]) -> cri::CheckpointPodRequest {
    cri::CheckpointPodRequest {
        pod_sandbox_id: pod.into(),
        output_path: output.to_string_lossy().into_owned(),
        container_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        options: HashMap::new(),
    }
}

fn empty_directory(ground: &Ground, name: &str) -> Result<PathBuf> {
    let path = ground.daemon.path(name);
    fs::create_dir_all(&path)?;
    Ok(path)
}

fn two(ground: &Ground) -> Result<[String; 2]> {
    let one = ground.start("one", &["sh", "-c", COUNTER], |_| {})?;
    let other = ground.start("other", &["sh", "-c", COUNTER], |_| {})?;
    beyond(ground, "one", 10)?;
    beyond(ground, "other", 10)?;
    Ok([one, other])
}

/// What makes the pod again: a new identity, the same containers.
fn again(ground: &Ground, from: &Path) -> cri::RestorePodRequest {
    let config = pod(&ground.daemon.path("logs"));
    let configs = ["one", "other"].map(|name| container(&config, name, &["sh", "-c", COUNTER]));
    cri::RestorePodRequest {
        checkpoint_path: from.to_string_lossy().into_owned(),
        config: Some(config),
        runtime_handler: String::new(),
        options: HashMap::new(),
        container_configs: configs.to_vec(),
    }
}

#[test]
fn a_pod_is_captured_while_it_runs_and_made_again() -> Result<()> {
    with_criu(|| {
        let mut ground = ground()?;
        let [one, other] = two(&ground)?;
        let output = empty_directory(&ground, "checkpoint")?;
        ground.client.checkpoint_pod(request(&ground.pod, &output, &[&one, &other]))?;
        let reached = ["one", "other"].map(|name| numbers(&ground.log(name)).unwrap_or_default().last().copied().unwrap_or(0));
        counts_on(&ground, "one")?;
        counts_on(&ground, "other")?;
        let before = tree(&output);

        let wanted = again(&ground, &output);
        let reply = ground.client.restore_pod(wanted.clone())?;
        ensure!(tree(&output) == before, "the checkpoint was changed");
        let mut names: Vec<&str> = reply.restored_containers.iter().map(|restored| restored.name.as_str()).collect();
        names.sort_unstable();
        ensure!(names == ["one", "other"] && reply.pod_sandbox_id != ground.pod, "{reply:?}");
        ground.client.remove(&ground.pod)?;
        ground.pod = reply.pod_sandbox_id;
        ground.config = wanted.config.context("a pod")?;
        for restored in &reply.restored_containers {
            let status = ground.client.container(&restored.container_id)?;
            ensure!(
                status.state() == cri::ContainerState::ContainerCreated && ground.log(&restored.name).is_empty(),
                "{status:?}"
            );
        }
        for (restored, reached) in reply.restored_containers.iter().zip(reached) {
            ground.client.start(&restored.container_id)?;
            let first = beyond(&ground, &restored.name, reached)?.first().copied().context("a line")?;
            ensure!(first > 10 && first <= reached + 1, "{} goes on at {first}, it had come to {reached}", restored.name);
            counts_on(&ground, &restored.name)?;
            ground.client.stop(&restored.container_id, 20)?;
            ensure!(ground.client.container(&restored.container_id)?.exit_code == 7, "its own exit code");
        }
        ground.end()
    })
}

/// Every file with its length.
fn tree(directory: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let length = entry.metadata().map_or(0, |metadata| metadata.len());
        found.push((entry.path(), length));
        found.extend(tree(&entry.path()));
    }
    found.sort();
    found
}

#[test]
fn all_containers_are_held_until_the_last_is_written() -> Result<()> {
    with_criu(|| {
        let scratch = tempfile::tempdir()?;
        // Notes when each capture begins and ends, as seen from outside of CRIU.
        let log = scratch.path().join("log");
        let script = format!(
            "if [ \"$1\" = swrk ]; then cat $STATES > /dev/null 2>&1; sleep 0.3; fi; echo $(cat {}/*/cgroup.freeze) >> {}; exec $CRIU \"$@\"",
            scratch.path().join("cgroups").display(),
            log.display()
        );
        let ground = Ground::on(daemon(Some(&standing_in(scratch.path(), &script)?))?)?;
        let [one, other] = two(&ground)?;
        let cgroups = scratch.path().join("cgroups");
        fs::create_dir(&cgroups)?;
        for id in [&one, &other] {
            std::os::unix::fs::symlink(ground.daemon.cgroup_directory().join(id), cgroups.join(id))?;
        }
        let output = empty_directory(&ground, "checkpoint")?;
        let done = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let watching = scope.spawn(|| {
                // From the first moment in which one is held to the last: never one alone.
                let mut states = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let state =
                        [&one, &other].map(|id| fs::read_to_string(cgroups.join(id).join("cgroup.freeze")).unwrap_or_default());
                    states.push(state.map(|text| text.trim() == "1"));
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                states
            });
            let captured = ground.client.checkpoint_pod(request(&ground.pod, &output, &[&one, &other]));
            done.store(true, Ordering::Relaxed);
            captured.map(|_| watching.join().expect("no panic"))
        })?;
        let both = seen.iter().filter(|state| **state == [true, true]).count();
        ensure!(both > 10, "they were held together for {both} ms only");
        let begun = fs::read_to_string(&log)?;
        ensure!(begun.lines().filter(|line| *line == "1 1").count() == 2, "when CRIU began, held were: {begun}");
        counts_on(&ground, "one")?;
        counts_on(&ground, "other")?;
        ground.end()
    })
}

#[test]
fn a_pods_checkpoint_that_fails_leaves_its_directory_empty() -> Result<()> {
    with_criu(|| {
        let ground = ground()?;
        let [one, other] = two(&ground)?;
        let output = empty_directory(&ground, "checkpoint")?;
        let refused = |request: cri::CheckpointPodRequest, code: Code, part: &str| -> Result<()> {
            let error = ground.client.checkpoint_pod(request).expect_err(part);
            ensure!(error.code() == code && error.message().contains(part), "{part}: {error}");
            ensure!(names(&output).is_empty(), "{part}: left {:?}", names(&output));
            Ok(())
        };
        refused(request("nobody", &output, &[&one]), Code::NotFound, "nobody")?;
        refused(request(&ground.pod, &output, &[]), Code::InvalidArgument, "container_ids is empty")?;
        refused(request(&ground.pod, &output, &[&one, &one]), Code::InvalidArgument, "twice")?;
        refused(request(&ground.pod, Path::new("relative"), &[&one]), Code::InvalidArgument, "not absolute")?;
        refused(request(&ground.pod, &output.join("absent"), &[&one]), Code::InvalidArgument, "no directory")?;
        let mut unknown = request(&ground.pod, &output, &[&one]);
        unknown.options.insert("compression".into(), "none".into());
        refused(unknown, Code::InvalidArgument, "\"compression\"")?;
        let elsewhere = ground.client.run(&pod(&ground.daemon.path("logs")))?;
        refused(request(&elsewhere, &output, &[&one]), Code::InvalidArgument, "none of pod")?;
        ground.client.remove(&elsewhere)?;

        // One of three cannot be written: nothing is, and all go on.
        let bad = ground.start("bad", &["sh", "-c", &format!("exec 3<>/dev/fuse; {COUNTER}")], |config| {
            config.devices.push(cri::Device {
                container_path: "/dev/fuse".into(),
                host_path: "/dev/fuse".into(),
                permissions: "rw".into(),
            });
        })?;
        beyond(&ground, "bad", 3)?;
        refused(request(&ground.pod, &output, &[&one, &other, &bad]), Code::Internal, "criu: Can't dump file")?;
        for name in ["one", "other", "bad"] {
            counts_on(&ground, name)?;
        }
        fs::write(output.join("mine"), "kept")?;
        let error = ground.client.checkpoint_pod(request(&ground.pod, &output, &[&one])).expect_err("not empty");
        ensure!(error.code() == Code::InvalidArgument && names(&output) == ["mine"], "{error}");
        ground.end()
    })
}

#[test]
fn a_restore_that_fails_leaves_no_pod() -> Result<()> {
    with_criu(|| {
        let ground = ground()?;
        let [one, other] = two(&ground)?;
        let output = empty_directory(&ground, "checkpoint")?;
        ground.client.checkpoint_pod(request(&ground.pod, &output, &[&one, &other]))?;
        let before = Snapshot::take(&ground.daemon)?;
        let refused = |change: &dyn Fn(&mut cri::RestorePodRequest), code: Code, part: &str| -> Result<()> {
            let mut wanted = again(&ground, &output);
            change(&mut wanted);
            let error = ground.client.restore_pod(wanted).expect_err(part);
            ensure!(error.code() == code && error.message().contains(part), "{part}: {error}");
            before.expect_again(&ground.daemon).with_context(|| part.to_owned())
        };
        let invalid = Code::InvalidArgument;
        refused(&|wanted| wanted.container_configs.truncate(1), invalid, "the checkpoint has")?;
        refused(&|wanted| wanted.container_configs.clear(), invalid, "container_configs is empty")?;
        refused(&|wanted| drop(wanted.options.insert("lazy".into(), "yes".into())), invalid, "\"lazy\"")?;
        refused(&|wanted| wanted.checkpoint_path = "/nonexistent".into(), invalid, "/nonexistent")?;
        refused(&|wanted| wanted.runtime_handler = "other".into(), invalid, "\"other\" is not configured")?;
        refused(&|wanted| wanted.config = None, invalid, "config is missing")?;
        let second = |wanted: &mut cri::RestorePodRequest| wanted.container_configs.last_mut().cloned().unwrap_or_default();
        refused(
            &|wanted| {
                let mut changed = second(wanted);
                changed.command.push("more".into());
                wanted.container_configs[1] = changed;
            },
            invalid,
            "command and args",
        )?;
        refused(
            &|wanted| {
                let mut changed = second(wanted);
                changed.mounts.push(cri::Mount { host_path: "/etc".into(), container_path: "/new".into(), ..Default::default() });
                wanted.container_configs[1] = changed;
            },
            invalid,
            "/new: the configuration has a mount there",
        )?;
        let same = ground.config.clone();
        refused(&move |wanted| wanted.config = Some(same.clone()), Code::AlreadyExists, "the same metadata")?;
        counts_on(&ground, "one")?;
        ground.end()
    })
}
