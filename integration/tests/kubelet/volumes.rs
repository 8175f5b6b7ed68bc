//! Volumes of every kind that a static pod may have, and pods with users of their own.

use crate::{under_kubelet, with};
use anyhow::{Result, ensure};
use serde_json::json;
use std::fs;
use windlass_integration::{
    image::BUSYBOX,
    kubelet::{container, pod},
};

pub(crate) fn volumes_of_every_kind_are_where_the_pod_wants_them() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        let directory = bench.daemon.path("from-the-host");
        fs::create_dir(&directory)?;
        fs::write(directory.join("file"), "of the host\n")?;
        let script = "set -e; cat /host/file; cat /api/labels; echo; test -x /image/bin/busybox; ! touch /host/new 2>/dev/null; \
                      ! touch /image/new 2>/dev/null; stat -f -c %T /memory; touch /memory/f /empty/main; \
                      until test -e /empty/other; do sleep 0.1; done; echo done; trap 'exit 0' TERM; while :; do sleep 0.1; done";
        let mut wanted = pod("volumes", script);
        wanted["spec"]["volumes"] = json!([
            { "name": "host", "hostPath": { "path": directory, "type": "Directory" } },
            { "name": "empty", "emptyDir": {} },
            { "name": "memory", "emptyDir": { "medium": "Memory", "sizeLimit": "1Mi" } },
            { "name": "image", "image": { "reference": BUSYBOX, "pullPolicy": "Never" } },
            // A projected volume needs a control plane, even for this.
            { "name": "api", "downwardAPI": { "items": [{ "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } }] } },
        ]);
        wanted["spec"]["containers"][0]["volumeMounts"] = json!([
            { "name": "host", "mountPath": "/host", "readOnly": true },
            { "name": "empty", "mountPath": "/empty" },
            { "name": "memory", "mountPath": "/memory" },
            { "name": "image", "mountPath": "/image" },
            { "name": "api", "mountPath": "/api" },
        ]);
        let mut other = container("other", "touch /empty/other; trap 'exit 0' TERM; while :; do sleep 0.1; done");
        other["volumeMounts"] = json!([{ "name": "empty", "mountPath": "/empty" }]);
        bench.kubelet.place(&with(wanted, "/spec/containers/1", other))?;
        bench.kubelet.ready("volumes")?;
        bench.eventually("the container has seen its volumes", || {
            let log = bench.kubelet.container_log("volumes", "main")?;
            ensure!(log == "of the host\napp=\"volumes\"\ntmpfs\ndone\n", "log: {log:?}");
            Ok(())
        })?;
        bench.withdraw(&["volumes"])
    })
}

pub(crate) fn a_pod_with_users_of_its_own_runs_under_a_kubelet() -> Result<()> {
    under_kubelet(json!({}), |bench| {
        let script = "id -u; cat /proc/self/uid_map; touch /empty/f && stat -c %u /empty/f; trap 'exit 0' TERM; \
                      while :; do sleep 0.1; done";
        let mut wanted = with(pod("users", script), "/spec/hostUsers", json!(false));
        wanted["spec"]["volumes"] = json!([{ "name": "empty", "emptyDir": {} }]);
        wanted["spec"]["containers"][0]["volumeMounts"] = json!([{ "name": "empty", "mountPath": "/empty" }]);
        bench.kubelet.place(&wanted)?;
        bench.kubelet.ready("users")?;
        bench.eventually("the container has told its users", || {
            let log = bench.kubelet.container_log("users", "main")?;
            let words: Vec<&str> = log.split_whitespace().collect();
            ensure!(words.len() == 5 && words[0] == "0" && words[4] == "0", "log: {log:?}");
            ensure!(words[1] == "0" && words[2] != "0" && words[3] == "65536", "map: {log:?}");
            Ok(())
        })?;
        bench.withdraw(&["users"])
    })
}
