//! Image volumes: mounts of a request whose source is an image of this node. Looks images up and checks what is asked of them;
//! the monitor's child composes them.

use super::text;
use crate::{
    error::{Error, Kind, Result},
    image::{Image, Layer},
    node::Node,
};
use serde_json::{Value, json};
use std::{
    path::{Component, Path, PathBuf},
    sync::Arc,
};
use windlass_proto::cri::{ContainerConfig, Mount, MountPropagation};

/// An image that one or more mounts of a container show.
pub(super) struct ImageVolume {
    /// Its place in `config.mounts`.
    index: usize,
    pub(super) image: Arc<Image>,
    sub_path: String,
}

/// Whether this mount is of an image.
pub(super) fn is_image(mount: &Mount) -> bool {
    mount.image.is_some()
}

/// The directory of the bundle that stands for the image volume at this place of `config.mounts`.
pub(super) fn source(bundle: &Path, index: usize) -> PathBuf {
    bundle.join("volumes").join(index.to_string())
}

/// Finds the images of all image volumes. Kubelet counts failures by the prefix of their message.
pub(super) fn find(node: &Node, config: &ContainerConfig) -> Result<Vec<ImageVolume>> {
    let mounts = config.mounts.iter().enumerate().filter(|(_, mount)| is_image(mount));
    mounts.map(|(index, mount)| find_one(node, index, mount)).collect()
}

/// Writes the images' ids where the container's status tells them.
pub(super) fn tell(config: &mut ContainerConfig, volumes: &[ImageVolume]) {
    for volume in volumes {
        if let Some(image) = config.mounts.get_mut(volume.index).and_then(|mount| mount.image.as_mut()) {
            image.image_ref.clone_from(&volume.image.id);
        }
    }
}

fn find_one(node: &Node, index: usize, mount: &Mount) -> Result<ImageVolume> {
    let target = &mount.container_path;
    let invalid = |why: String| Err(Error::invalid(format!("config.mounts: {target}: {why}")));
    let failed = |why: String| Error::new(Kind::Prefixed, format!("ImageVolumeMountFailed: {target}: {why}"));
    let name = mount.image.as_ref().map(|image| image.image.as_str()).unwrap_or_default();
    if name.is_empty() {
        return invalid("image.image is empty".into());
    }
    if !mount.host_path.is_empty() {
        return invalid(format!("image {name:?} and host_path {:?} exclude each other", mount.host_path));
    }
    if mount.propagation() != MountPropagation::PropagationPrivate {
        return invalid("an image volume has private propagation".into());
    }
    let sub_path = &mount.image_sub_path;
    let plain = Path::new(sub_path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if !plain {
        return invalid(format!("image_sub_path {sub_path:?} is not a path below the image's root"));
    }
    let image = node.images.get(name).ok_or_else(|| failed(format!("image {name:?} is not on this node; pull it first")))?;
    if !sub_path.is_empty() && !image.has_path(sub_path).map_err(|error| failed(error.to_string()))? {
        return Err(failed(format!("image_sub_path {sub_path:?} is not in image {name:?}")));
    }
    Ok(ImageVolume { index, image, sub_path: sub_path.clone() })
}

impl ImageVolume {
    /// The volume in `rootfs.json`.
    pub(super) fn plan(&self, bundle: &Path) -> Result<Value> {
        let mut plan = json!({ "source": text(&source(bundle, self.index)), "lower": layers(&self.image)? });
        if !self.sub_path.is_empty() {
            plan["sub_path"] = json!(self.sub_path);
        }
        Ok(plan)
    }

    /// Its directory in the bundle.
    pub(super) fn source(&self, bundle: &Path) -> PathBuf {
        source(bundle, self.index)
    }
}

/// Layers, topmost first, as overlayfs takes them. They are mounted where they are images, so that containers share the mount.
pub(super) fn layers(image: &Image) -> Result<Vec<String>> {
    let mounted = |layer: &Layer| layer.root().map(|_| text(&layer.path)).map_err(Error::of_image);
    image.layers.iter().rev().map(mounted).collect()
}
