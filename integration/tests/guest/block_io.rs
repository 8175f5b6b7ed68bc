//! Classes of block I/O, on the guest's disk.

use crate::{expect, in_guest_with, read};
use anyhow::{Context, Result, ensure};
use std::{fs, time::Instant};
use windlass_integration::{client::container, node::run_command};
use windlass_proto::cri;

const CLASSES: &str = r#"
[block_io_classes.slow]
[[block_io_classes.slow.devices]]
path = "/dev/ubda"
write_bytes_per_second = 2097152
reads_per_second = 1000
[block_io_classes.lost]
[[block_io_classes.lost.devices]]
path = "/dev/null"
"#;
/// What the container writes, in MiB; at the class's 2 MiB a second it takes four seconds.
const WRITTEN: &str = "8";

#[test]
fn a_class_of_block_io_holds() -> Result<()> {
    in_guest_with("a_class_of_block_io_holds", CLASSES, |bench| {
        let disk = bench.daemon.path("disk");
        fs::create_dir(&disk)?;
        let text = disk.to_string_lossy();
        run_command("mkfs.ext4", &["-q", "-F", "/dev/ubda"])?;
        run_command("mount", &["-t", "ext4", "/dev/ubda", &text])?;
        let mut config = bench.pod();
        config.annotations.insert("blockio.resources.beta.kubernetes.io/container.slow".into(), "slow".into());
        config.annotations.insert("blockio.resources.beta.kubernetes.io/container.lost".into(), "lost".into());
        config.annotations.insert("blockio.resources.beta.kubernetes.io/container.unknown".into(), "fast".into());
        config.annotations.insert("rdt.resources.beta.kubernetes.io/container.rdt".into(), "gold".into());
        let pod = bench.client.run(&config)?;
        let create = |name: &str| {
            let mut wanted = container(&config, name, &["sleep", "1000"]);
            let mount = cri::Mount { container_path: "/disk".into(), host_path: text.clone().into_owned(), ..Default::default() };
            wanted.mounts.push(mount);
            bench.client.create(&pod, &config, &wanted)
        };
        let mut took = Vec::new();
        for name in ["slow", "free"] {
            let id = create(name)?;
            bench.client.start(&id)?;
            let begun = Instant::now();
            bench.client.shell(&id, &format!("dd if=/dev/zero of=/disk/{name} bs=1M count={WRITTEN} conv=fsync"))?;
            took.push(begun.elapsed().as_secs_f64());
            match name {
                "slow" => ensure!(
                    read(&bench.leaf(&id), "io.max")?.ends_with(" rbps=max wbps=2097152 riops=1000 wiops=max"),
                    "io.max: {}",
                    read(&bench.leaf(&id), "io.max")?
                ),
                _ => expect(&bench.leaf(&id), "io.max", "")?,
            }
        }
        println!("{WRITTEN} MiB took {took:?} s, first in the class");
        ensure!(took[0] > 3.0 && took[1] < took[0], "{WRITTEN} MiB took {took:?} s, first in the class");
        for (name, named) in [("unknown", "\"fast\""), ("lost", "/dev/null is no block device"), ("rdt", "RDT class \"gold\"")] {
            let refusal = create(name).err().with_context(|| format!("{name} was created"))?;
            ensure!(refusal.message().contains(named), "{name}: {refusal:?}");
        }
        bench.client.remove(&pod)?;
        run_command("umount", &[&text])
    })
}
