//! What cannot be captured is refused, and what fails on the way leaves the container running and nothing else.

use super::{COUNTER, beyond, checkpoint, counts_on, daemon, ground, names, restored, standing_in, with_criu};
use anyhow::{Result, ensure};
use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};
use tonic::Code;
use windlass_integration::{client::container, ground::Ground, wait::until};
use windlass_proto::cri;

/// Nothing is left of a checkpoint that failed.
fn no_trace(ground: &Ground, directory: &Path) -> Result<()> {
    let left = [names(directory), names(&ground.daemon.root().join("checkpoints"))];
    ensure!(left.iter().all(Vec::is_empty), "left behind: {left:?}");
    Ok(())
}

#[test]
fn what_cannot_be_captured_is_refused_by_name() -> Result<()> {
    with_criu(|| {
        let ground = ground()?;
        let directory = ground.daemon.path("archives");
        fs::create_dir_all(&directory)?;
        let place = directory.join("one.tar");
        let id = ground.start("counter", &["sh", "-c", COUNTER], |_| {})?;
        let created = ground.client.create(&ground.pod, &ground.config, &container(&ground.config, "created", &["sh"]))?;
        let shared = ground.start("shared", &["sh", "-c", COUNTER], |config| {
            let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
            security.namespace_options.get_or_insert_default().pid = cri::NamespaceMode::Node.into();
        })?;
        let refused = |id: &str, location: &Path, code: Code, part: &str| -> Result<()> {
            let error = checkpoint(&ground.client, id, location, 0).expect_err(part);
            ensure!(error.code() == code && error.message().contains(part), "{part}: {error}");
            no_trace(&ground, &directory)
        };
        refused("nobody", &place, Code::NotFound, "nobody")?;
        refused(&created, &place, Code::FailedPrecondition, "is not running")?;
        refused(&shared, &place, Code::FailedPrecondition, "namespace_options.pid")?;
        refused(&id, Path::new("relative.tar"), Code::InvalidArgument, "relative.tar")?;
        refused(&id, &directory.join("absent/one.tar"), Code::InvalidArgument, "does not exist")?;
        let error = checkpoint(&ground.client, &id, &place, -1).expect_err("negative");
        ensure!(error.code() == Code::InvalidArgument && error.message().contains("timeout -1"), "{error}");
        fs::write(&place, "somebody's")?;
        let error = checkpoint(&ground.client, &id, &place, 0).expect_err("a file is there");
        ensure!(error.code() == Code::InvalidArgument && error.message().contains("there is a file already"), "{error}");
        ensure!(fs::read_to_string(&place)? == "somebody's", "the file that was there");
        for (name, part) in [("absent.tar", "no checkpoint archive"), ("archives/one.tar", "checkpoint")] {
            let wanted = restored(&ground.config, "none", &ground.daemon.path(name));
            let error = ground.client.create(&ground.pod, &ground.config, &wanted).expect_err(name);
            ensure!(error.message().contains(part), "{name}: {error}");
        }
        counts_on(&ground, "counter")?;
        ground.end()
    })
}

#[test]
fn without_criu_the_answer_says_what_to_install() -> Result<()> {
    with_criu(|| {
        let ground = Ground::on(daemon(Some(Path::new("/nonexistent/criu")))?)?;
        let id = ground.start("counter", &["sh", "-c", COUNTER], |_| {})?;
        let error = checkpoint(&ground.client, &id, &ground.daemon.path("one.tar"), 0).expect_err("no CRIU");
        let message = error.message();
        ensure!(error.code() == Code::FailedPrecondition, "{error}");
        ensure!(message.contains("/nonexistent/criu") && message.contains("Debian's package criu"), "{error}");
        ensure!(!ground.daemon.path("one.tar").exists(), "an archive of nothing");
        counts_on(&ground, "counter")?;
        ground.end()
    })
}

#[test]
fn what_criu_cannot_write_fails_with_its_reason_and_runs_on() -> Result<()> {
    with_criu(|| {
        let ground = ground()?;
        let directory = ground.daemon.path("archives");
        fs::create_dir_all(&directory)?;
        // An open file of a file system in user space is what CRIU has no form for.
        let script = format!("exec 3<>/dev/fuse; {COUNTER}");
        let id = ground.start("counter", &["sh", "-c", &script], |config| {
            config.devices.push(cri::Device {
                container_path: "/dev/fuse".into(),
                host_path: "/dev/fuse".into(),
                permissions: "rw".into(),
            });
        })?;
        beyond(&ground, "counter", 3)?;
        for _ in 0..2 {
            let error = checkpoint(&ground.client, &id, &directory.join("one.tar"), 0).expect_err("not to be written");
            ensure!(error.code() == Code::Internal && error.message().contains("criu: Can't dump file"), "{error}");
            no_trace(&ground, &directory)?;
            counts_on(&ground, "counter")?;
        }
        ground.end()
    })
}

#[test]
fn a_checkpoint_that_takes_too_long_is_given_up() -> Result<()> {
    with_criu(|| {
        let scratch = tempfile::tempdir()?;
        // Waits before it does anything, and then goes through with it: the caller has gone by then.
        let slow = standing_in(scratch.path(), "[ \"$1\" = swrk ] && sleep 3; exec $CRIU \"$@\"")?;
        let ground = Ground::on(daemon(Some(&slow))?)?;
        let directory = ground.daemon.path("archives");
        fs::create_dir_all(&directory)?;
        let id = ground.start("counter", &["sh", "-c", COUNTER], |_| {})?;
        beyond(&ground, "counter", 3)?;
        let begun = Instant::now();
        let error = checkpoint(&ground.client, &id, &directory.join("one.tar"), 1).expect_err("too long");
        ensure!(error.code() == Code::DeadlineExceeded, "{error}");
        ensure!(begun.elapsed() < Duration::from_secs(20), "it was given up after {:?}", begun.elapsed());
        // When the answer comes it runs again.
        counts_on(&ground, "counter")?;
        no_trace(&ground, &directory)?;
        checkpoint(&ground.client, &id, &directory.join("two.tar"), 30)?;
        counts_on(&ground, "counter")?;
        ground.end()
    })
}

#[test]
fn a_daemon_that_is_killed_meanwhile_leaves_nothing_frozen() -> Result<()> {
    with_criu(|| {
        let scratch = tempfile::tempdir()?;
        let slow = standing_in(scratch.path(), "[ \"$1\" = swrk ] && sleep 2; exec $CRIU \"$@\"")?;
        let ground = Ground::on(daemon(Some(&slow))?)?;
        let id = ground.start("counter", &["sh", "-c", COUNTER], |_| {})?;
        beyond(&ground, "counter", 3)?;
        let Ground { mut daemon, client, config, pod, before } = ground;
        let freeze = daemon.cgroup_directory().join(&id).join("cgroup.freeze");
        let archive = daemon.path("one.tar");
        let error = std::thread::scope(|scope| {
            let writing = scope.spawn(|| checkpoint(&client, &id, &archive, 0));
            let frozen = || Ok((fs::read_to_string(&freeze)?.trim() == "1").then_some(()));
            until("the container is held", frozen)?;
            daemon.kill9()?;
            Ok::<_, anyhow::Error>(writing.join().expect("no panic").expect_err("the daemon is gone"))
        })?;
        ensure!(error.code() != Code::Ok, "{error}");
        until("the container goes on", || Ok((fs::read_to_string(&freeze)?.trim() == "0").then_some(())))?;
        daemon.serve()?;
        drop(client);
        let client = windlass_integration::client::Client::connect(&daemon)?;
        let ground = Ground { daemon, client, config, pod, before };
        counts_on(&ground, "counter")?;
        ensure!(!archive.exists(), "an archive of an unfinished checkpoint");
        no_trace(&ground, &ground.daemon.path("none"))?;
        ground.client.remove(&ground.pod).map_err(Into::into)
    })
}
