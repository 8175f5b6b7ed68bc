//! ImageService.

use super::{Service, status, view};
use crate::{image::RegistryAuth, node::now_ns};
use std::collections::HashMap;
use tokio_stream::Empty;
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

fn credentials(auth: Option<cri::AuthConfig>) -> Result<Option<RegistryAuth>, Status> {
    let Some(auth) = auth else { return Ok(None) };
    if !auth.registry_token.is_empty() {
        return Ok(Some(RegistryAuth::Bearer { token: auth.registry_token }));
    }
    if !auth.identity_token.is_empty() {
        return Err(Status::unimplemented("auth.identity_token is not implemented by this version of windlass"));
    }
    if !auth.auth.is_empty() {
        use base64::Engine;
        let decoded = base64::engine::general_purpose::STANDARD.decode(auth.auth.trim());
        let text = decoded.ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = text.as_deref().and_then(|text| text.trim_end_matches('\0').split_once(':'));
        let (username, password) = pair.ok_or_else(|| Status::invalid_argument("auth.auth is not base64 of user:password"))?;
        return Ok(Some(RegistryAuth::Basic { username: username.into(), password: password.into() }));
    }
    if auth.username.is_empty() {
        return Ok(None);
    }
    Ok(Some(RegistryAuth::Basic { username: auth.username, password: auth.password }))
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(&self, request: Request<cri::ListImagesRequest>) -> Reply<cri::ListImagesResponse> {
        let wanted = request.into_inner().filter.and_then(|filter| filter.image).map(|spec| spec.image).unwrap_or_default();
        let images = match wanted.as_str() {
            "" => self.node.images.list(),
            name => self.node.images.get(name).into_iter().collect(),
        };
        Ok(Response::new(cri::ListImagesResponse { images: images.iter().map(|image| view::image(image)).collect() }))
    }

    type StreamImagesStream = Empty<Result<cri::StreamImagesResponse, Status>>;

    async fn stream_images(&self, _: Request<cri::StreamImagesRequest>) -> Reply<Self::StreamImagesStream> {
        Err(status::not_built("StreamImages"))
    }

    async fn image_status(&self, request: Request<cri::ImageStatusRequest>) -> Reply<cri::ImageStatusResponse> {
        let request = request.into_inner();
        let image = self.node.images.get(&reference(request.image)?);
        let mut info = HashMap::new();
        if let (Some(image), true) = (&image, request.verbose) {
            let chain: Vec<&str> = image.layers.iter().map(|layer| layer.chain_id.as_str()).collect();
            info.insert("info".to_owned(), serde_json::json!({ "imageSpec": image.config, "chainIDs": chain }).to_string());
        }
        Ok(Response::new(cri::ImageStatusResponse { image: image.map(|image| view::image(&image)), info }))
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Reply<cri::PullImageResponse> {
        let request = request.into_inner();
        let name = reference(request.image)?;
        let started = std::time::Instant::now();
        let pulled = self.node.images.pull(&name, credentials(request.auth)?).await;
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
        let usage = self.node.images.usage();
        let image = cri::FilesystemUsage {
            timestamp: now_ns(),
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: usage.mountpoint.to_string_lossy().into_owned() }),
            used_bytes: Some(cri::UInt64Value { value: usage.used_bytes }),
            inodes_used: Some(cri::UInt64Value { value: usage.inodes_used }),
        };
        Ok(Response::new(cri::ImageFsInfoResponse { image_filesystems: vec![image], container_filesystems: Vec::new() }))
    }
}
