//! Containers at the limits, and containers that behave badly: each has the expected outcome, and nothing is left.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::{fs, path::Path, time::Duration};
use windlass_integration::{daemon::Daemon, ground::Ground, image, node, setup};
use windlass_proto::cri;

/// Layers above busybox and the probe; with them there are 127, the most that Docker's tools make.
const LAYERS: usize = 125;

fn ground(more: Vec<Vec<u8>>) -> Result<Ground> {
    let mut layers = image::layers()?.to_vec();
    layers.extend(more);
    Ground::on(Daemon::start_with(vec![(image::BUSYBOX, layers, json!({}))])?)
}

/// A field of /proc/PID/status in KiB.
fn kibibytes(pid: u32, field: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("{field} of {pid}"))?;
    Ok(line.trim_start_matches(':').trim().trim_end_matches(" kB").parse()?)
}

#[test]
fn an_image_of_127_layers() -> Result<()> {
    node::run(|| {
        let names: Vec<String> = (0..LAYERS).map(|number| format!("layers/{number}")).collect();
        let layers: Vec<Vec<u8>> = names
            .iter()
            .map(|name| image::files_layer(&[(name.as_str(), 0o644, b"one"), ("top", 0o644, name.as_bytes())]))
            .collect::<Result<_>>()?;
        let ground = ground(layers)?;
        let id = ground.start("main", &["sleep", "1000"], |_| {})?;
        let seen = ground
            .client
            .shell(&id, "ls /layers | wc -l; cat /top; rm /top /layers/7; ls /layers | wc -l; [ -e /top ] || echo gone")?;
        ensure!(seen == format!("{LAYERS}\nlayers/{}{}\ngone", LAYERS - 1, LAYERS - 1), "{seen}");
        let again = ground.start("again", &["sleep", "1000"], |_| {})?;
        ensure!(ground.client.shell(&again, "cat /top")? == format!("layers/{}", LAYERS - 1), "the layers were changed");
        ground.end()
    })
}

#[test]
fn ten_thousand_variables_and_a_thousand_mounts() -> Result<()> {
    node::run(|| {
        let ground = ground(Vec::new())?;
        let volume = ground.daemon.path("volume");
        fs::create_dir(&volume)?;
        let id = ground.start("main", &["sleep", "1000"], |config| {
            let variable = |number: u32| cri::KeyValue { key: format!("V{number}"), value: number.to_string().into_bytes() };
            config.envs = (0..10_000).map(variable).collect();
            let mount = |number: u32| cri::Mount {
                container_path: format!("/volumes/{number}"),
                host_path: volume.to_string_lossy().into_owned(),
                ..Default::default()
            };
            config.mounts = (0..1000).map(mount).collect();
        })?;
        let seen = ground.client.shell(&id, "tr '\\0' '\\n' < /proc/1/environ | grep -c ^V; env | grep -c ^V; grep -c ' /volumes/' /proc/1/mountinfo; echo $V9999")?;
        ensure!(seen == "10000\n10000\n1000\n9999", "{seen}");
        ground.end()
    })
}

#[test]
fn a_program_that_closes_its_streams_lives_on() -> Result<()> {
    node::run(|| {
        let ground = ground(Vec::new())?;
        let script = "echo said; exec <&- >&- 2>&-; while [ ! -e /tmp/go ]; do sleep 0.02; done; exit 9";
        let id = ground.start("main", &["sh", "-c", script], |_| {})?;
        std::thread::sleep(Duration::from_millis(300));
        ensure!(ground.client.container(&id)?.state() == cri::ContainerState::ContainerRunning);
        ground.client.shell(&id, "touch /tmp/go")?;
        ensure!(ground.client.exited(&id)?.exit_code == 9);
        let log = fs::read_to_string(Path::new(&ground.config.log_directory).join("main.log"))?;
        ensure!(log.lines().count() == 1 && log.contains(" stdout F said"), "{log}");
        ground.end()
    })
}

#[test]
fn a_flood_is_logged_whole_and_held_nowhere() -> Result<()> {
    node::run(|| {
        let ground = ground(Vec::new())?;
        let flood: u64 = 64 << 20;
        let daemon = ground.daemon.pid().context("daemon")?;
        let monitors: Vec<u32> = ground.daemon.monitors().into_iter().map(i32::unsigned_abs).collect();
        let before = kibibytes(daemon, "VmHWM")?;
        let id = ground.start("main", &["/probe", "flood", &flood.to_string()], |_| {})?;
        ensure!(ground.client.exited(&id)?.exit_code == 0);
        for monitor in &monitors {
            let peak = kibibytes(*monitor, "VmHWM")?;
            ensure!(peak < 4096, "the monitor grew to {peak} KiB");
        }
        let grown = kibibytes(daemon, "VmHWM")?.saturating_sub(before);
        ensure!(grown < 2048 && !monitors.is_empty(), "the daemon grew by {grown} KiB");
        let log = fs::read(Path::new(&ground.config.log_directory).join("main.log"))?;
        let content: usize = log
            .split(|byte| *byte == b'\n')
            .map(|line| line.splitn(4, |byte| *byte == b' ').nth(3).unwrap_or_default().len())
            .sum();
        ensure!(content as u64 == flood, "{content} bytes of {flood}");
        ground.end()
    })
}

#[test]
fn a_set_user_id_program_gains_nothing_where_that_is_forbidden() -> Result<()> {
    node::run(|| {
        let probe = fs::read(setup::programs()?.join("probe"))?;
        let ground = ground(vec![image::files_layer(&[("become-root", 0o4755, &probe)])?])?;
        for (name, forbidden, expected) in [("open", false, "1000 0 0 0"), ("forbidden", true, "1000 1000 1000 1000")] {
            let id = ground.start(name, &["/become-root"], |config| {
                let security = config.linux.get_or_insert_default().security_context.get_or_insert_default();
                security.run_as_user = Some(cri::Int64Value { value: 1000 });
                security.no_new_privs = forbidden;
            })?;
            ground.client.exited(&id)?;
            let log = fs::read_to_string(Path::new(&ground.config.log_directory).join(format!("{name}.log")))?;
            ensure!(log.contains(&format!("\"Uid\":\"{expected}\"")), "{name}: {log}");
        }
        ground.end()
    })
}
