//! Volumes that only a control plane can fill.

use crate::{FOREVER, eventually, pod};
use anyhow::{Result, ensure};
use serde_json::json;
use windlass_integration::{cluster::Kubectl, node::output_of};

pub(crate) fn what_is_projected_is_there_and_changes(kubectl: &Kubectl) -> Result<()> {
    kubectl.run(&["create", "configmap", "settings", "--from-literal=colour=red", "--from-literal=size=7"])?;
    kubectl.run(&["create", "secret", "generic", "hidden", "--from-literal=word=anchor"])?;
    let mut wanted = pod("reader", FOREVER);
    wanted["spec"]["volumes"] = json!([
        { "name": "all", "projected": { "defaultMode": 0o440, "sources": [
            { "configMap": { "name": "settings", "items": [{ "key": "colour", "path": "config/colour" }] } },
            { "secret": { "name": "hidden" } },
            { "downwardAPI": { "items": [{ "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } }] } },
            { "serviceAccountToken": { "path": "token", "audience": "somebody", "expirationSeconds": 600 } },
        ] } },
        { "name": "map", "configMap": { "name": "settings" } },
        { "name": "secret", "secret": { "secretName": "hidden" } },
    ]);
    wanted["spec"]["containers"][0]["volumeMounts"] = json!([
        { "name": "all", "mountPath": "/all", "readOnly": true },
        { "name": "map", "mountPath": "/map" },
        { "name": "map", "mountPath": "/etc/size", "subPath": "size" },
        { "name": "secret", "mountPath": "/secret" },
    ]);
    wanted["spec"]["containers"][0]["envFrom"] = json!([{ "configMapRef": { "name": "settings" } }]);
    wanted["spec"]["containers"][0]["env"] =
        json!([{ "name": "WORD", "valueFrom": { "secretKeyRef": { "name": "hidden", "key": "word" } } }]);
    kubectl.create(&wanted)?;
    kubectl.ready("reader")?;
    let shell = |script: &str| kubectl.run(&["exec", "reader", "--", "sh", "-c", script]);
    let seen = shell(
        "cat /all/config/colour /all/word /map/colour /etc/size /secret/word; echo $colour$size$WORD; grep -c app= /all/labels; stat -L -c %a /all/word; stat -f -c %T /secret",
    )?;
    ensure!(seen == "redanchorred7anchorred7anchor\n1\n440\ntmpfs\n", "in the pod: {seen:?}");
    ensure!(shell("wc -c < /all/token")?.trim().parse::<u32>()? > 300, "no token");
    ensure!(shell("touch /all/new 2>&1 || true")?.contains("Read-only"), "the volume is writable");
    kubectl.run(&["patch", "configmap", "settings", "--patch", r#"{"data":{"colour":"blue","size":"8"}}"#])?;
    kubectl.run(&["patch", "secret", "hidden", "--patch", r#"{"stringData":{"word":"chain"}}"#])?;
    // kubelet looks at its pods now if one of them changes.
    kubectl.run(&["label", "pod/reader", "look=now"])?;
    eventually("the changes are seen", || {
        let seen = shell(
            "cat /map/colour /all/config/colour /map/size /etc/size /secret/word /all/word; grep -c look=.now /all/labels",
        )?;
        // A single file that is mounted stays what it was.
        ensure!(seen == "blueblue87chainchain1\n", "{seen:?}");
        Ok(())
    })
}

pub(crate) fn a_service_account_s_token_is_good_at_the_apiserver(kubectl: &Kubectl) -> Result<()> {
    kubectl.create(&pod("client", FOREVER))?;
    kubectl.run(&["create", "role", "reader", "--verb=get", "--resource=pods"])?;
    let account = format!("--serviceaccount={}:default", kubectl.namespace());
    kubectl.run(&["create", "rolebinding", "reader", "--role=reader", &account])?;
    kubectl.ready("client")?;
    let at = "/var/run/secrets/kubernetes.io/serviceaccount";
    let read = |name: &str| kubectl.run(&["exec", "client", "--", "cat", &format!("{at}/{name}")]);
    ensure!(read("namespace")? == kubectl.namespace(), "namespace: {:?}", read("namespace")?);
    let scratch = tempfile::tempdir()?;
    let authority = scratch.path().join("ca.crt");
    std::fs::write(&authority, read("ca.crt")?)?;
    let header = format!("Authorization: Bearer {}", read("token")?);
    let url = format!("https://127.0.0.1:6443/api/v1/namespaces/{}/pods/client", kubectl.namespace());
    let answer = output_of("curl", &["-sSf", "--max-time", "10", "--cacert", &authority.to_string_lossy(), "-H", &header, &url])?;
    ensure!(answer.contains("\"name\": \"client\""), "the apiserver said {answer}");
    // The apiserver's address within the cluster, from the pod.
    let script = "nc -w 3 $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT < /dev/null && echo reached";
    let reached = eventually("the apiserver is reached", || kubectl.run(&["exec", "client", "--", "sh", "-c", script]))?;
    ensure!(reached == "reached\n", "{reached:?}");
    Ok(())
}
