//! How much is fetched at a time, and what is not fetched at all.

use crate::{
    Ground, directories,
    proxy::{Fault, Proxy},
    servers::{INDEX, Image, MANIFEST, Server, Ways, described, digest},
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::time::Duration;
use tonic::Code;
use windlass_integration::{go, image, node};

#[test]
fn two_pulls_fetch_no_more_layers_at_a_time_than_the_node_may() -> Result<()> {
    node::run(|| {
        let (directory, storage) = directories()?;
        let registry = Server::distribution(directory.path(), &storage, Ways::default())?;
        let mut images = Vec::new();
        for one in 0..2u64 {
            let layer = |seed: u64| image::files_layer(&[(&format!("file{seed}"), 0o644, &image::noise(seed, 50_000))]);
            let layers = (one * 5..one * 5 + 5).map(layer).collect::<Result<Vec<_>>>()?;
            let image = Image::new(&layers, json!({}))?;
            registry.push(&format!("team/image{one}"), "v1", &image)?;
            images.push(image);
        }
        let blobs: Vec<String> = images.iter().flat_map(|image| &image.layers).map(|layer| digest(layer)).collect();
        let proxy = Proxy::start(&registry.address)?;
        for limit in [1, 3] {
            let ground = Ground::new(&format!("max_parallel_layers = {limit}\n"))?;
            proxy.set(&blobs, &[Fault::Drip(4, Duration::from_millis(20))], true);
            std::thread::scope(|scope| -> Result<()> {
                let pulls: Vec<_> = (0..2)
                    .map(|one| {
                        let (name, daemon) = (format!("{}/team/image{one}:v1", proxy.address), &ground.daemon);
                        scope.spawn(move || daemon.windlass(&["image", "pull", &name]))
                    })
                    .collect();
                pulls.into_iter().try_for_each(|pull| pull.join().ok().context("a pull")?.map(drop))
            })?;
            ensure!(proxy.most() == limit, "{} layers at a time, {limit} are allowed", proxy.most());
            ensure!(blobs.iter().all(|blob| proxy.seen(blob).len() == 1), "a layer was fetched twice");
            ground.expect_sound(10)?;
        }
        Ok(())
    })
}

#[test]
fn layers_that_are_elsewhere_are_refused_clearly() -> Result<()> {
    let program = go::registry()?;
    node::run(move || {
        let (directory, _) = directories()?;
        let registry = Server::containerregistry(directory.path(), &program, None, None, None)?;
        let image = Image::new(&image::layers()?[..1], json!({}))?;
        registry.push("team/busybox", "v1", &image)?;
        let ground = Ground::new("")?;
        for (tag, kind) in [
            ("docker", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
            ("oci", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
        ] {
            let mut manifest: Value = serde_json::from_slice(&image.manifest)?;
            manifest["layers"][0]["mediaType"] = json!(kind);
            manifest["layers"][0]["urls"] = json!(["https://elsewhere.example/layer"]);
            registry.push_manifest("team/busybox", tag, MANIFEST, manifest.to_string().as_bytes())?;
            let error = ground.pull(&registry.name(&format!("team/busybox:{tag}")), None).expect_err("a foreign layer");
            let layer = digest(&image.layers[0]);
            ensure!(error.code() == Code::FailedPrecondition, "{error:?}");
            for word in [layer.as_str(), "foreign", kind] {
                ensure!(error.message().contains(word), "{word}: {error}");
            }
            ensure!(ground.images()?.is_empty() && ground.kept_bytes() == 0);
        }
        ground.expect_finished()
    })
}

/// As build tools publish them: attestations beside each image, machines that nobody has, and processors that not everybody has.
#[test]
fn an_index_with_attestations_and_unknown_platforms() -> Result<()> {
    let program = go::registry()?;
    node::run(move || {
        let (directory, storage) = directories()?;
        let servers = [
            Server::containerregistry(directory.path(), &program, None, None, None)?,
            Server::distribution(directory.path(), &storage, Ways::default())?,
        ];
        let own = Image::new(&image::layers()?, json!({ "User": "www-data:33" }))?;
        let other = Image::new(&[image::files_layer(&[("other", 0o644, b"other machine")])?], json!({}))?;
        let mut entries = Vec::new();
        for (os, architecture, variant) in [
            ("unknown", "unknown", ""),
            ("linux", "s390x", ""),
            ("linux", image::ARCHITECTURE, "v9"),
            ("windows", image::ARCHITECTURE, ""),
            ("linux", image::ARCHITECTURE, "own"),
            ("linux", image::ARCHITECTURE, ""),
        ] {
            let mut entry = described(MANIFEST, if variant == "own" { &own.manifest } else { &other.manifest });
            entry["platform"] = json!({ "os": os, "architecture": architecture });
            if !["", "own"].contains(&variant) {
                entry["platform"]["variant"] = json!(variant);
            }
            if os == "unknown" {
                entry["annotations"] = json!({
                    "vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": own.digest()
                });
            }
            entries.push(entry);
        }
        let index =
            |entries: &[Value]| json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries }).to_string().into_bytes();
        let (whole, without) = (index(&entries), index(&entries[..2]));
        let ground = Ground::new("")?;
        for registry in &servers {
            for image in [&own, &other] {
                registry.push("team/app", &image.digest(), image)?;
            }
            registry.push_manifest("team/app", "v1", INDEX, &whole)?;
            registry.push_manifest("team/app", "none", INDEX, &without)?;
            let error = ground.pull(&registry.name("team/app:none"), None).expect_err("nothing for this machine");
            ensure!(error.code() == Code::FailedPrecondition && error.message().contains("no image for platform"), "{error:?}");
            ensure!(ground.pull(&registry.name("team/app:v1"), None)? == own.id());
            let listed = ground.images()?;
            let by_digest = registry.name(&format!("team/app@{}", digest(&whole)));
            ensure!(listed.len() == 1 && listed[0].repo_digests == [by_digest.clone()], "{listed:?}");
            ensure!(listed[0].username == "www-data" && listed[0].uid.is_none(), "{listed:?}");
            ground.expect_runs(&own.id())?;
            ground.remove(&by_digest)?;
            // By the digest of its own manifest, too.
            let exact = registry.name(&format!("team/app@{}", own.digest()));
            ensure!(ground.pull(&exact, None)? == own.id() && ground.images()?[0].repo_digests == [exact.clone()]);
            ground.remove(&exact)?;
        }
        ground.expect_finished()
    })
}
