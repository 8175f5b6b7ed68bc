//! Images: when kubelet pulls, and when it removes.

use crate::{Bench, sleeper, with};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use std::{fs, path::Path};
use windlass_integration::{
    guest_tests::prepared, image::BUSYBOX, kubelet::container_status, standin::Images, standin_registry::StandinRegistry,
};

/// A name that the stand-in registry has.
const PULLED: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
const IMAGES: &str = "images";

/// Leaves the images there for [`images`], which then needs no compiler.
pub(crate) fn prepare(directory: &Path) -> Result<()> {
    let images = directory.join(IMAGES);
    fs::create_dir(&images)?;
    Images::build()?.write_to(&images)
}

fn images() -> Result<Images> {
    prepared().map_or_else(Images::build, |directory| Images::read_from(&directory.join(IMAGES)))
}

fn of_image(name: &str, image: &str, policy: &str) -> Value {
    let pod = with(sleeper(name), "/spec/containers/0/image", json!(image));
    with(pod, "/spec/containers/0/imagePullPolicy", json!(policy))
}

fn waits_for(reason: &'static str) -> impl Fn(&Value) -> bool {
    move |pod| container_status(pod, "main").is_some_and(|status| status["state"]["waiting"]["reason"] == reason)
}

pub(crate) fn images_are_pulled_by_policy_and_removed_when_the_disk_is_full() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let registry = StandinRegistry::start(images()?)?;
    let mirrors = scratch.path().join("certs.d");
    registry.write_mirrors(&mirrors)?;
    let daemon = crate::daemon(&format!("[images]\nregistry_config_dir = {mirrors:?}\n"))?;
    let mut bench = Bench::over(daemon, json!({}))?;
    for pod in [
        of_image("present", BUSYBOX, "Never"),
        of_image("pulled", PULLED, "IfNotPresent"),
        of_image("always", PULLED, "Always"),
        of_image("never", "docker.io/library/absent:1", "Never"),
        of_image("absent", "docker.io/library/absent:1", "Always"),
        of_image("wrong", "localhost/UPPER:1", "Always"),
    ] {
        bench.kubelet.place(&pod)?;
    }
    for name in ["present", "pulled", "always"] {
        bench.kubelet.ready(name)?;
    }
    bench.kubelet.wait("never", "without its image", waits_for("ErrImageNeverPull"))?;
    bench.kubelet.wait("wrong", "of a wrong name", waits_for("InvalidImageName"))?;
    let failing = |pod: &Value| waits_for("ErrImagePull")(pod) || waits_for("ImagePullBackOff")(pod);
    bench.kubelet.wait("absent", "failing to pull", failing)?;
    bench.withdraw(&["present", "pulled", "always", "never", "absent", "wrong"])?;
    bench.end()?;
    // A disk that is "full" by this mark makes kubelet remove images that nobody uses, before it would end a pod.
    bench.kubelet.stop()?;
    let images = |bench: &Bench| -> Result<usize> { Ok(bench.client.list_images(Default::default())?.images.len()) };
    ensure!(images(&bench)? == 2, "{} images before", images(&bench)?);
    bench.kubelet.configure(json!({ "imageMinimumGCAge": "1s", "evictionHard": { "imagefs.available": "99.9%" } }))?;
    bench.kubelet.start()?;
    bench.eventually("unused images are gone", || {
        let left = images(&bench)?;
        ensure!(left == 0, "{left} images are left");
        Ok(())
    })
}
