//! What an image is called, in each field and by each request, as kubelet and crictl rely on it.

use crate::{
    Ground, directories,
    servers::{Image, MANIFEST, Server, Ways},
    spec,
};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use tonic::Code;
use windlass_integration::{
    client::{container, host_network, pod},
    go, image, node,
};
use windlass_proto::cri;

fn status(ground: &Ground, name: &str) -> Result<Option<cri::Image>> {
    let request = cri::ImageStatusRequest { image: spec(name), verbose: false };
    Ok(ground.client.image_status(request).with_context(|| format!("status of {name}"))?.image)
}

/// One image in two registries is one image, whatever it is asked for by; containers say which of its names they were made of.
#[test]
fn one_image_of_two_registries_by_every_name() -> Result<()> {
    let program = go::registry()?;
    node::run(move || {
        let (directory, storage) = directories()?;
        let first = Server::distribution(directory.path(), &storage, Ways::default())?;
        let second = Server::containerregistry(directory.path(), &program, None, None, None)?;
        let image = Image::new(&image::layers()?, json!({}))?;
        for registry in [&first, &second] {
            registry.push("team/app", "v1", &image)?;
        }
        second.push_manifest("team/app", "v2", MANIFEST, &image.manifest)?;
        let ground = Ground::new("")?;
        let tags = [first.name("team/app:v1"), second.name("team/app:v1"), second.name("team/app:v2")];
        let digests = [&first, &second].map(|registry| registry.name(&format!("team/app@{}", image.digest())));
        let id = image.id();
        let pull_all = || -> Result<()> {
            for tag in &tags {
                ensure!(ground.pull(tag, None)? == id);
            }
            let listed = ground.images()?;
            let sorted = |names: &[String]| {
                let mut names = names.to_vec();
                names.sort();
                names
            };
            ensure!(listed.len() == 1 && listed[0].id == id, "{listed:?}");
            ensure!(listed[0].repo_tags == sorted(&tags) && listed[0].repo_digests == sorted(&digests), "{listed:?}");
            Ok(())
        };
        pull_all()?;
        let hex = &id["sha256:".len()..];
        let both = format!("{}@{}", tags[1], image.digest());
        let [one, two, three] = &tags;
        let names = [one, two, three, &digests[0], &digests[1], &both, &id, hex, &hex[..12], &id[..20]];
        for (number, name) in names.iter().enumerate() {
            ensure!(status(&ground, name)?.is_some_and(|image| image.id == id), "{name}");
            let filter = Some(cri::ImageFilter { image: spec(name) });
            let listed = ground.client.list_images(cri::ListImagesRequest { filter })?.images;
            ensure!(listed.len() == 1 && listed[0].id == id, "a list of {name}: {listed:?}");
            // Each of them names what is to be removed, which is the whole image.
            ground.remove(name)?;
            ensure!(ground.images()?.is_empty(), "{name} was removed: {:?}", ground.images()?);
            ensure!(status(&ground, &id)?.is_none() && status(&ground, name)?.is_none(), "{name}");
            ground.remove(name)?;
            if number + 1 < names.len() {
                pull_all()?;
            }
        }
        // By tag and digest together it is the digest that says what comes; the tag stays whose it is.
        ensure!(ground.pull(&both, None)? == id);
        let listed = ground.images()?;
        ensure!(listed[0].repo_tags.is_empty() && listed[0].repo_digests == [digests[1].clone()], "{listed:?}");
        pull_all()?;
        containers(&ground, &id, &tags, &digests)
    })
}

/// The names in a container's fields; and its image goes while it runs.
fn containers(ground: &Ground, id: &str, tags: &[String; 3], digests: &[String; 2]) -> Result<()> {
    let sandbox = host_network(pod(&ground.daemon.path("logs")));
    let pod_id = ground.client.run(&sandbox)?;
    let mut made = Vec::new();
    for (name, image, user_specified, said, image_ref) in [
        // As kubelet asks: by id, and what the pod's author wrote.
        ("kubelet", id, tags[1].as_str(), &tags[1], &digests[1]),
        ("digest", id, &digests[0], &digests[0], &digests[0]),
        ("tag", &tags[2], "", &tags[2], &digests[1]),
        ("first", &tags[0], "", &tags[0], &digests[0]),
    ] {
        let mut wanted = container(&sandbox, name, &["sleep", "1000"]);
        let asked = cri::ImageSpec { image: image.into(), user_specified_image: user_specified.into(), ..Default::default() };
        wanted.image = Some(asked);
        let created = ground.client.create(&pod_id, &sandbox, &wanted)?;
        ground.client.start(&created)?;
        let status = ground.client.container(&created)?;
        let listed = ground.client.list_containers(cri::ListContainersRequest::default())?.containers;
        let listed = listed.into_iter().find(|one| one.id == created).context("listed")?;
        ensure!(status.image_id == id && listed.image_id == id, "{name}: {status:?} {listed:?}");
        ensure!(status.image_ref == *image_ref && listed.image_ref == *image_ref, "{name}: {status:?} {listed:?}");
        let spec = status.image.clone().unwrap_or_default();
        ensure!(spec.image == *said && spec.user_specified_image == user_specified, "{name}: {spec:?}");
        let spec = listed.image.clone().unwrap_or_default();
        ensure!(spec.image == image && spec.user_specified_image == user_specified, "{name}: {spec:?}");
        made.push(created);
    }
    ground.remove(id)?;
    ensure!(ground.images()?.is_empty());
    let seen = ground.client.exec(&made[0], &["cat", "/etc/passwd"])?;
    ensure!(seen.exit_code == 0 && seen.stdout.starts_with(b"root:"), "the image is gone, its layers are used: {seen:?}");
    ensure!(ground.client.container(&made[0])?.image_id == id);
    let mut wanted = container(&sandbox, "late", &["true"]);
    wanted.image = spec(id);
    let error = ground.client.create(&pod_id, &sandbox, &wanted).expect_err("the image is gone");
    ensure!(error.code() == Code::NotFound, "{error:?}");
    ground.client.remove(&pod_id)?;
    ground.expect_finished()
}

#[test]
fn users_pins_absent_names_and_tags_that_move() -> Result<()> {
    let program = go::registry()?;
    node::run(move || {
        let (directory, _) = directories()?;
        let registry = Server::containerregistry(directory.path(), &program, None, None, None)?;
        let layer = image::files_layer(&[("file", 0o644, b"content")])?;
        let pinned = [registry.name("system/base:v1"), registry.name("team/*")].map(|name| format!("{name:?}")).join(", ");
        let ground = Ground::new(&format!("pinned = [{pinned}]\n"))?;
        for (number, (user, uid, username)) in [
            ("", None, ""),
            ("0", Some(0), ""),
            ("1000", Some(1000), ""),
            ("1000:50", Some(1000), ""),
            ("1000:staff", Some(1000), ""),
            ("www-data", None, "www-data"),
            ("www-data:33", None, "www-data"),
            ("user1000", None, "user1000"),
            (":33", None, ""),
            ("99999999999999999999", None, "99999999999999999999"),
        ]
        .into_iter()
        .enumerate()
        {
            let image = Image::new(std::slice::from_ref(&layer), json!({ "User": user }))?;
            registry.push("users/app", &format!("v{number}"), &image)?;
            let id = ground.pull(&registry.name(&format!("users/app:v{number}")), None)?;
            let found = status(&ground, &id)?.context("the image")?;
            ensure!(found.uid.as_ref().map(|uid| uid.value) == uid && found.username == username, "{user:?}: {found:?}");
            ensure!(!found.pinned && found.size > 0, "{found:?}");
            ground.remove(&id)?;
        }
        let old = Image::new(std::slice::from_ref(&layer), json!({ "User": "1" }))?;
        let new = Image::new(std::slice::from_ref(&layer), json!({ "User": "2" }))?;
        for (name, pinned) in
            [("system/base:v1", true), ("system/base:v2", false), ("team/deep/app:v1", true), ("teams/app:v1", false)]
        {
            let (repository, tag) = name.split_once(':').context("a tag")?;
            registry.push(repository, tag, &old)?;
            let id = ground.pull(&registry.name(name), None)?;
            ensure!(ground.images()?[0].pinned == pinned, "{name}");
            ensure!(status(&ground, &id)?.is_some_and(|image| image.pinned == pinned), "{name}");
            ground.remove(&id)?;
        }
        // What is not here, and what is no name: neither is an error of a question or a removal.
        for absent in ["none", "registry.example/none:v1", "UPPER CASE", "sha256:12", &old.id()] {
            ensure!(status(&ground, absent)?.is_none(), "{absent}");
            ground.remove(absent)?;
        }
        for empty in [None, spec("")] {
            let request = cri::ImageStatusRequest { image: empty.clone(), verbose: false };
            ensure!(ground.client.image_status(request).is_err_and(|error| error.code() == Code::InvalidArgument));
            let request = cri::RemoveImageRequest { image: empty };
            ensure!(ground.client.remove_image(request).is_err_and(|error| error.code() == Code::InvalidArgument));
        }
        let name = registry.name("move/app:v1");
        for image in [&old, &new] {
            registry.push("move/app", "v1", image)?;
            ensure!(ground.pull(&name, None)? == image.id());
        }
        ensure!(status(&ground, &name)?.is_some_and(|image| image.id == new.id()));
        let dangling = status(&ground, &old.id())?.context("the image that had the tag")?;
        let by_digest = registry.name(&format!("move/app@{}", old.digest()));
        ensure!(dangling.repo_tags.is_empty() && dangling.repo_digests == [by_digest.clone()], "{dangling:?}");
        ground.remove(&by_digest)?;
        let left = ground.images()?;
        ensure!(left.len() == 1 && left[0].id == new.id() && left[0].repo_tags == [name], "{left:?}");
        ground.expect_finished()
    })
}
