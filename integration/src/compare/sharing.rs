//! What many containers of one image share: page cache of its files, and memory of their processes.

use super::{
    Peer, config,
    images::SHARED,
    life::{Running, down, wait_for_line},
    rival::{Ground, Kind, Network},
    table::Table,
};
use crate::client;
use anyhow::{Context, Result};
use std::{fs, path::Path, time::Duration};
use windlass_proto::cri;

const PODS: usize = 50;
/// Until Windlass has let go of what the kernel keeps twice, and a little more.
const SETTLE: Duration = Duration::from_secs(75);

/// Reads all files of a large layer, says so, and waits.
const SCRIPT: &str = "find /usr/lib/gcc -type f -exec cat {} + >/dev/null; echo ready; trap 'exit 0' TERM; sleep 3600 & wait";

/// Measures one runtime after the other, Windlass with both forms of layers; prints the table. Empties the machine's page cache.
pub(super) fn measure(ground: &Ground<'_>, kinds: &[Kind]) -> Result<()> {
    let mut table = Table::default();
    for kind in kinds.iter().copied().filter(|kind| *kind != Kind::ContainerdCrun) {
        let forms: &[&'static str] = if kind == Kind::Windlass { &["erofs", "directory"] } else { &["auto"] };
        for form in forms {
            let ground = Ground { layers: form, ..*ground };
            let title = if *form == "auto" { kind.name().to_owned() } else { format!("{}, {form}", kind.name()) };
            one(&ground, kind, &title, &mut table).with_context(|| title.clone())?;
        }
    }
    println!("\n{PODS} pods of one image, each reads the same 125 MB\n\n{}", table.markdown());
    Ok(())
}

fn one(ground: &Ground<'_>, kind: Kind, title: &str, table: &mut Table) -> Result<()> {
    let peer = Peer::start(ground, kind, Network::Own)?;
    let image = format!("{}/{SHARED}", ground.registry.host());
    peer.pull(&image)?;
    peer.pull(&format!("{}/{}", ground.registry.host(), config::PAUSE))?;
    empty_cache()?;
    let logs = tempfile::tempdir()?;
    let before = cached_mb()?;
    let grown = |what: &str, table: &mut Table| -> Result<()> {
        let grown = cached_mb()? - before;
        println!("{title}: page cache {what}: {grown:.0} MB");
        table.add(&format!("MB of page cache {what}"), title, grown);
        Ok(())
    };
    let mut pods = vec![up(&peer, &image, logs.path())?];
    grown("after the first pod", table)?;
    while pods.len() < PODS {
        pods.push(up(&peer, &image, logs.path())?);
    }
    grown(&format!("after {PODS} pods"), table)?;
    let all = peer.rival.containers_pss_kib();
    table.add("KiB PSS of a container's own processes", title, all as f64 / PODS as f64);
    if kind == Kind::Windlass {
        std::thread::sleep(SETTLE);
        grown(&format!("{} s later", SETTLE.as_secs()), table)?;
    }
    for running in &pods {
        down(&peer.client, running, &mut |_, _| ())?;
    }
    peer.rival.stop()
}

fn up(peer: &Peer, image: &str, logs: &Path) -> Result<Running> {
    let config = client::pod(logs);
    fs::create_dir_all(&config.log_directory)?;
    let mut container = client::container(&config, "main", &["/bin/sh", "-c", SCRIPT]);
    container.image = Some(cri::ImageSpec { image: image.into(), user_specified_image: image.into(), ..Default::default() });
    let pod = peer.client.run(&config).context("RunPodSandbox")?;
    let id = peer.client.create(&pod, &config, &container).context("CreateContainer")?;
    peer.client.start(&id).context("StartContainer")?;
    wait_for_line(&Path::new(&config.log_directory).join("main.log"))?;
    Ok(Running { pod, container: id })
}

fn empty_cache() -> Result<()> {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("empty the page cache")
}

/// Of files: what lies in memory alone does not count.
fn cached_mb() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let of = |name: &str| -> Result<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("{name} of /proc/meminfo"))?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0 / 1e6)
    };
    Ok(of("Cached:")? - of("Shmem:")?)
}
