//! Logs through kubelet, and their rotation while the container writes.

use crate::{under_kubelet, with};
use anyhow::{Result, ensure};
use serde_json::json;
use std::{collections::BTreeSet, fs, path::PathBuf};
use windlass_integration::kubelet::pod;

const LINES: u32 = 40_000;

pub(crate) fn a_log_is_rotated_and_no_line_is_lost() -> Result<()> {
    let fields = json!({ "containerLogMaxSize": "256Ki", "containerLogMaxFiles": 20, "containerLogMonitorInterval": "3s" });
    under_kubelet(fields, |bench| {
        // Slow enough to be rotated in its middle.
        let script = format!(
            "i=0; while [ $i -lt {LINES} ]; do echo line-$i; i=$((i+1)); [ $((i % 4000)) -ne 0 ] || sleep 1; done; \
             trap 'exit 0' TERM; while :; do sleep 0.1; done"
        );
        bench.kubelet.place(&with(pod("writes", &script), "/spec/terminationGracePeriodSeconds", json!(3)))?;
        bench.kubelet.ready("writes")?;
        let files = || -> Result<Vec<PathBuf>> {
            let mut found = Vec::new();
            for pod in fs::read_dir("/var/log/pods")?.flatten() {
                for container in fs::read_dir(pod.path())?.flatten() {
                    found.extend(fs::read_dir(container.path())?.flatten().map(|entry| entry.path()));
                }
            }
            Ok(found)
        };
        bench.eventually("every line is in one file or another", || {
            let (files, mut seen, mut count) = (files()?, BTreeSet::new(), 0);
            ensure!(files.len() > 2, "not rotated yet: {files:?}");
            for file in &files {
                let packed = file.extension().is_some_and(|end| end == "gz");
                let program = if packed { "zcat" } else { "cat" };
                let text = windlass_integration::node::output_of(program, &[&file.to_string_lossy()])?;
                for line in text.lines().filter_map(|line| line.split_once(" F line-")) {
                    seen.insert(line.1.parse::<u32>()?);
                    count += 1;
                }
            }
            ensure!(seen.len() == LINES as usize && count == seen.len(), "{count} lines, {} different", seen.len());
            Ok(())
        })?;
        // In the middle of a rotation there is no file under the log's name.
        bench.eventually("the log through kubelet", || {
            let log = bench.kubelet.container_log("writes", "main")?;
            ensure!(log.lines().all(|line| line.starts_with("line-")), "the log through kubelet: {log:.200}");
            Ok(())
        })?;
        bench.withdraw(&["writes"])
    })
}
