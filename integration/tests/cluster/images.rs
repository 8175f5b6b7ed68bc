//! Images that only some may pull.

use crate::{FOREVER, pod};
use anyhow::Result;
use serde_json::{Value, json};
use windlass_integration::{
    cluster::Kubectl,
    image,
    kubelet::container_status,
    registry::{CREDENTIALS, Guard, Registry},
};

pub(crate) fn a_pull_secret_opens_a_registry(kubectl: &Kubectl) -> Result<()> {
    let registry = Registry::start()?;
    let config = json!({ "architecture": image::ARCHITECTURE, "os": "linux", "config": { "Cmd": ["sh"], "Env": ["PATH=/bin"] } });
    registry.add("private/busybox", "v1", &image::layers()?, &config)?;
    registry.set_guard(Guard::Token);
    let (user, password) = CREDENTIALS;
    let server = format!("--docker-server=http://{}", registry.host());
    let secret = ["create", "secret", "docker-registry"];
    kubectl.run(
        &[&secret[..], &["right", &server, &format!("--docker-username={user}"), &format!("--docker-password={password}")]]
            .concat(),
    )?;
    kubectl.run(&[&secret[..], &["wrong", &server, &format!("--docker-username={user}"), "--docker-password=other"]].concat())?;
    let of = |name: &str, secrets: Value| {
        let mut wanted = pod(name, FOREVER);
        wanted["spec"]["containers"][0]["image"] = json!(format!("{}/private/busybox:v1", registry.host()));
        wanted["spec"]["containers"][0]["imagePullPolicy"] = json!("IfNotPresent");
        wanted["spec"]["imagePullSecrets"] = secrets;
        wanted
    };
    let refused = |name: &str| {
        crate::eventually("the pull is refused", || {
            let pod = kubectl.get(&format!("pod/{name}"))?;
            let waiting = container_status(&pod, "main").map(|status| status["state"]["waiting"].clone()).unwrap_or_default();
            anyhow::ensure!(matches!(waiting["reason"].as_str(), Some("ErrImagePull" | "ImagePullBackOff")), "{waiting}");
            Ok(())
        })
    };
    kubectl.create(&of("none", json!([])))?;
    kubectl.create(&of("wrong", json!([{ "name": "wrong" }])))?;
    refused("none")?;
    refused("wrong")?;
    kubectl.create(&of("right", json!([{ "name": "right" }])))?;
    kubectl.ready("right")?;
    // That the image is there now opens it to nobody: kubelet asks who has the secret.
    kubectl.create(&of("late", json!([])))?;
    refused("late")?;
    kubectl.run(&["delete", "pod", "none", "wrong", "late", "--now"]).map(drop)
}
