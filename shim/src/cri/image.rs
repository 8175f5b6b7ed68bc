//! ImageService.

use super::{
    Service, status,
    stream::{Batches, batches},
    view,
};
use crate::{
    image::{Image, Reference, RegistryAuth},
    node::now_ns,
};
use std::collections::HashMap;
use tonic::{Request, Response, Status};
use windlass_proto::cri::{self, image_service_server::ImageService};

type Reply<T> = Result<Response<T>, Status>;

/// The reference of a request, by which a message can name the field.
fn reference(spec: Option<cri::ImageSpec>) -> Result<String, Status> {
    match spec {
        Some(spec) if !spec.image.is_empty() => Ok(spec.image),
        _ => Err(Status::invalid_argument("image.image is empty")),
    }
}

/// What a request brings to log in with. Credentials for another registry than the image's are not for this pull.
fn credentials(auth: Option<cri::AuthConfig>, image: &str) -> Result<Option<RegistryAuth>, Status> {
    let Some(auth) = auth else { return Ok(None) };
    if !auth.server_address.is_empty() && !is_for(&auth.server_address, image) {
        tracing::debug!(server_address = auth.server_address, image, "credentials of another registry are not used");
        return Ok(None);
    }
    if !auth.registry_token.is_empty() {
        return Ok(Some(RegistryAuth::Bearer { token: auth.registry_token }));
    }
    if !auth.identity_token.is_empty() {
        return Ok(Some(RegistryAuth::Identity { token: auth.identity_token }));
    }
    if !auth.auth.is_empty() {
        let pair = RegistryAuth::basic(&auth.auth);
        return pair.map(Some).ok_or_else(|| Status::invalid_argument("auth.auth is not base64 of user:password"));
    }
    if auth.username.is_empty() {
        return Ok(None);
    }
    Ok(Some(RegistryAuth::Basic { username: auth.username, password: auth.password }))
}

/// Whether a server's address, with or without a scheme and a path, is that of the image's registry.
fn is_for(server: &str, image: &str) -> bool {
    let server = server.split_once("://").map_or(server, |(_, rest)| rest);
    let server = server.split('/').next().unwrap_or_default();
    let docker = |name: &str| matches!(name, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    image.parse::<Reference>().is_ok_and(|image| server == image.registry() || (docker(server) && docker(image.registry())))
}

impl Service {
    /// The reference of a request that names a handler of this node, or none. All handlers have the same images.
    fn reference_for_handler(&self, spec: Option<cri::ImageSpec>) -> Result<String, Status> {
        let handler = spec.as_ref().map(|spec| spec.runtime_handler.as_str()).unwrap_or_default();
        if self.node.config.handler(handler).is_none() {
            return Err(Status::invalid_argument(format!("image.{}", self.node.config.unknown_handler(handler))));
        }
        reference(spec)
    }

    fn view(&self, image: &Image) -> cri::Image {
        view::image(image, self.node.images.is_pinned(image))
    }

    fn image_list(&self, filter: Option<cri::ImageFilter>) -> Vec<cri::Image> {
        let wanted = filter.and_then(|filter| filter.image).map(|spec| spec.image).unwrap_or_default();
        let images = match wanted.as_str() {
            "" => self.node.images.list(),
            name => self.node.images.get(name).into_iter().collect(),
        };
        images.iter().map(|image| self.view(image)).collect()
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(&self, request: Request<cri::ListImagesRequest>) -> Reply<cri::ListImagesResponse> {
        Ok(Response::new(cri::ListImagesResponse { images: self.image_list(request.into_inner().filter) }))
    }

    type StreamImagesStream = Batches<cri::StreamImagesResponse>;

    async fn stream_images(&self, request: Request<cri::StreamImagesRequest>) -> Reply<Self::StreamImagesStream> {
        Ok(batches(self.image_list(request.into_inner().filter), |images| cri::StreamImagesResponse { images }))
    }

    async fn image_status(&self, request: Request<cri::ImageStatusRequest>) -> Reply<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let image = self.node.images.get(&self.reference_for_handler(request.image)?);
        let mut info = HashMap::new();
        if let (Some(image), true) = (&image, request.verbose) {
            let chain: Vec<&str> = image.layers.iter().map(|layer| layer.chain_id.as_str()).collect();
            info.insert("info".to_owned(), serde_json::json!({ "imageSpec": image.config, "chainIDs": chain }).to_string());
        }
        Ok(Response::new(cri::ImageStatusResponse { image: image.map(|image| self.view(&image)), info }))
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Reply<cri::PullImageResponse> {
        let request = request.into_inner();
        let name = self.reference_for_handler(request.image)?;
        let started = std::time::Instant::now();
        let namespace = request.sandbox_config.and_then(|pod| pod.metadata).map(|meta| meta.namespace).unwrap_or_default();
        let pulled = self.node.images.pull_for(&name, credentials(request.auth, &name)?, &namespace).await;
        crate::telemetry::pulled(pulled.is_ok(), started.elapsed());
        match pulled {
            Ok(image) => {
                tracing::info!(image = %name, id = %image.id, elapsed_ms = started.elapsed().as_millis() as u64, "image pulled");
                Ok(Response::new(cri::PullImageResponse { image_ref: image.id.clone() }))
            }
            Err(error) => {
                tracing::warn!(image = %name, %error, "image not pulled");
                Err(status::of_image(error))
            }
        }
    }

    async fn remove_image(&self, request: Request<cri::RemoveImageRequest>) -> Reply<cri::RemoveImageResponse> {
        let name = reference(request.into_inner().image)?;
        self.node.images.remove(&name).map_err(status::of_image)?;
        tracing::info!(image = %name, "image removed");
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<cri::ImageFsInfoRequest>) -> Reply<cri::ImageFsInfoResponse> {
        // Kubelet takes two mount points for two disks: writable layers are on the one of the images.
        let usage = self.node.images.usage();
        let image = cri::FilesystemUsage {
            timestamp: now_ns(),
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: usage.mountpoint.to_string_lossy().into_owned() }),
            used_bytes: Some(cri::UInt64Value { value: usage.used_bytes }),
            inodes_used: Some(cri::UInt64Value { value: usage.inodes_used }),
        };
        Ok(Response::new(cri::ImageFsInfoResponse { image_filesystems: vec![image.clone()], container_filesystems: vec![image] }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_in_every_form() {
        let basic = |name: &str, word: &str| Some(RegistryAuth::Basic { username: name.into(), password: word.into() });
        let auth = |change: &dyn Fn(&mut cri::AuthConfig)| {
            let mut auth = cri::AuthConfig::default();
            change(&mut auth);
            credentials(Some(auth), "reg.example:5000/a/b:1").map_err(|status| status.message().to_owned())
        };
        assert_eq!(auth(&|_| ()), Ok(None));
        assert_eq!(auth(&|a| (a.username, a.password) = ("u".into(), "p".into())), Ok(basic("u", "p")));
        assert_eq!(auth(&|a| a.auth = "dTpwOnE=".into()), Ok(basic("u", "p:q")));
        assert_eq!(auth(&|a| a.auth = "dTpw\n".into()), Ok(basic("u", "p")));
        assert!(auth(&|a| a.auth = "?".into()).is_err_and(|message| message.contains("auth.auth")));
        assert_eq!(auth(&|a| a.registry_token = "t".into()), Ok(Some(RegistryAuth::Bearer { token: "t".into() })));
        assert_eq!(auth(&|a| a.identity_token = "t".into()), Ok(Some(RegistryAuth::Identity { token: "t".into() })));
        for (server, used) in [
            ("reg.example:5000", true),
            ("https://reg.example:5000/v2/", true),
            ("reg.example", false),
            ("https://other.example", false),
        ] {
            let found = auth(&|a| (a.username, a.server_address) = ("u".into(), server.into()));
            assert_eq!(found, Ok(basic("u", "").filter(|_| used)), "{server}");
        }
        assert!(is_for("https://index.docker.io/v1/", "busybox") && !is_for("https://index.docker.io/v1/", "reg.example/x"));
    }
}
