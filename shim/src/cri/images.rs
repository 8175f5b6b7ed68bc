//! What `windlass image` asks of images beside the CRI (`proto/image.proto`). The command line uses the same object where no daemon runs.

use super::status;
use crate::image::{Image, ImageError, LayerState, Progress, RegistryAuth, Store, Verdict};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};
use windlass_proto::image as api;

/// Between two looks at a pull.
const LOOK: Duration = Duration::from_millis(100);
/// Of an export, in one message.
const CHUNK_BYTES: usize = 256 << 10;
/// Messages that wait for a slow caller.
const QUEUE: usize = 16;

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Containers and the images they were made from, by id.
pub type Users = Arc<dyn Fn() -> Vec<(String, String)> + Send + Sync>;

/// The service.
#[derive(Clone)]
pub struct Images {
    store: Store,
    users: Users,
}

impl Images {
    /// Of a store whose images these containers use.
    pub fn new(store: Store, users: Users) -> Images {
        Images { store, users }
    }

    fn all(&self) -> Vec<api::Image> {
        let images = self.store.list();
        let mut having: HashMap<&str, u32> = HashMap::new();
        for layer in images.iter().flat_map(|image| &image.layers) {
            *having.entry(&layer.chain_id).or_default() += 1;
        }
        let users = (self.users)();
        images.iter().map(|image| api::Image { pinned: self.store.is_pinned(image), ..message(image, &having, &users) }).collect()
    }

    fn one(&self, id: &str) -> Option<api::Image> {
        self.all().into_iter().find(|image| image.id == id)
    }
}

fn message(image: &Image, having: &HashMap<&str, u32>, users: &[(String, String)]) -> api::Image {
    let layer = |(layer, diff_id): (&crate::image::Layer, &String)| api::Layer {
        chain_id: layer.chain_id.clone(),
        diff_id: diff_id.clone(),
        bytes: layer.bytes(),
        format: layer.format().to_string(),
        images: having.get(layer.chain_id.as_str()).copied().unwrap_or_default(),
    };
    api::Image {
        id: image.id.clone(),
        tags: image.repo_tags.clone(),
        digests: image.repo_digests.clone(),
        size_bytes: image.size_bytes,
        layers: image.layers.iter().zip(image.config.rootfs().diff_ids()).map(layer).collect(),
        containers: users.iter().filter(|(_, of)| *of == image.id).map(|(id, _)| id.clone()).collect(),
        config_json: serde_json::to_string(&image.config).unwrap_or_default(),
        pinned: false,
    }
}

fn look(progress: &Progress) -> Vec<api::LayerProgress> {
    let state = |state| match state {
        LayerState::Waiting => api::layer_progress::State::Waiting,
        LayerState::Fetching => api::layer_progress::State::Fetching,
        LayerState::Done => api::layer_progress::State::Done,
        LayerState::Exists => api::layer_progress::State::Exists,
    };
    let layers = progress.layers();
    let layer = layers.iter().map(|layer| api::LayerProgress {
        digest: layer.digest.clone(),
        size_bytes: layer.size_bytes,
        fetched_bytes: layer.fetched_bytes(),
        state: state(layer.state()).into(),
    });
    layer.collect()
}

/// Writes into messages, and fails when nobody takes them any more.
struct Chunks(mpsc::Sender<Result<api::ExportChunk, Status>>);

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let gone = |_| std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        self.0.blocking_send(Ok(api::ExportChunk { data: bytes.to_vec() })).map_err(gone)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tonic::async_trait]
impl api::images_server::Images for Images {
    type PullStream = Events<api::PullEvent>;

    async fn pull(&self, request: Request<api::PullRequest>) -> Result<Response<Self::PullStream>, Status> {
        let request = request.into_inner();
        let basic = RegistryAuth::Basic { username: request.username.clone(), password: request.password };
        let auth = (!request.username.is_empty()).then_some(basic);
        let (events, stream) = mpsc::channel(QUEUE);
        let images = self.clone();
        // Ends with the pull, or with the caller: then the pull is dropped, which cancels it.
        tokio::spawn(async move {
            let current: Arc<Mutex<Arc<Progress>>> = Arc::default();
            let watched = Arc::clone(&current);
            let watch = move |progress| *watched.lock().unwrap_or_else(PoisonError::into_inner) = progress;
            let pull = images.store.pull_watched(&request.name, auth, "", watch);
            tokio::pin!(pull);
            let seen = || look(&current.lock().unwrap_or_else(PoisonError::into_inner));
            loop {
                tokio::select! {
                    () = events.closed() => return,
                    result = &mut pull => {
                        let last = result.map(|image| api::PullEvent { layers: seen(), image: images.one(&image.id) });
                        let _ = events.send(last.map_err(status::of_image)).await;
                        return;
                    }
                    () = tokio::time::sleep(LOOK) => {
                        let _ = events.send(Ok(api::PullEvent { layers: seen(), image: None })).await;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn import(&self, request: Request<api::ImportRequest>) -> Result<Response<api::ImportReply>, Status> {
        let path = request.into_inner().path;
        if !Path::new(&path).is_absolute() {
            return Err(Status::invalid_argument(format!("path {path:?} is not absolute")));
        }
        let imported = self.store.import(Path::new(&path)).await.map_err(status::of_image)?;
        let images = imported.iter().filter_map(|image| self.one(&image.id)).collect();
        Ok(Response::new(api::ImportReply { images }))
    }

    type ExportStream = Events<api::ExportChunk>;

    async fn export(&self, request: Request<api::ExportRequest>) -> Result<Response<Self::ExportStream>, Status> {
        let name = request.into_inner().name;
        let store = self.store.clone();
        let (chunks, stream) = mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || {
            let to = std::io::BufWriter::with_capacity(CHUNK_BYTES, Chunks(chunks.clone()));
            if let Err(error) = store.export(&name, to) {
                let _ = chunks.blocking_send(Err(status::of_image(error)));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn list(&self, request: Request<api::ListRequest>) -> Result<Response<api::ListReply>, Status> {
        let name = request.into_inner().name;
        let images = match name.as_str() {
            "" => self.all(),
            name => self.store.get(name).and_then(|image| self.one(&image.id)).into_iter().collect(),
        };
        let usage = self.store.usage();
        let directory = usage.mountpoint.to_string_lossy().into_owned();
        Ok(Response::new(api::ListReply { images, directory, used_bytes: usage.used_bytes, partial_bytes: usage.partial_bytes }))
    }

    async fn remove(&self, request: Request<api::RemoveRequest>) -> Result<Response<api::RemoveReply>, Status> {
        let name = request.into_inner().name;
        let image = self.store.get(&name).and_then(|image| self.one(&image.id));
        if let Some(image) = &image {
            self.store.remove(&image.id).map_err(status::of_image)?;
        }
        Ok(Response::new(api::RemoveReply { image }))
    }

    async fn tag(&self, request: Request<api::TagRequest>) -> Result<Response<api::TagReply>, Status> {
        let request = request.into_inner();
        let image = self.store.tag(&request.name, &request.tag).map_err(status::of_image)?;
        Ok(Response::new(api::TagReply { image: self.one(&image.id) }))
    }

    async fn clear(&self, _: Request<api::ClearRequest>) -> Result<Response<api::ClearReply>, Status> {
        self.store.clear_partial();
        Ok(Response::new(api::ClearReply {}))
    }

    type VerifyStream = Events<api::VerifyEvent>;

    async fn verify(&self, request: Request<api::VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let request = request.into_inner();
        let names: Vec<String> = match request.name.as_str() {
            "" => self.store.list().iter().map(|image| image.id.clone()).collect(),
            name => vec![name.to_owned()],
        };
        let store = self.store.clone();
        let (events, stream) = mpsc::channel(QUEUE);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = verify(&store, &names, request.repair, &events) {
                let _ = events.blocking_send(Err(status::of_image(error)));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

type VerifySender = mpsc::Sender<Result<api::VerifyEvent, Status>>;

fn verify(store: &Store, names: &[String], repair: bool, events: &VerifySender) -> Result<(), ImageError> {
    let mut checked: HashMap<String, Verdict> = HashMap::new();
    for name in names {
        let mut gone = false;
        store.verify(name, &mut checked, |chain_id, verdict| {
            let (state, why) = match verdict {
                Verdict::Sound => (api::verify_event::Verdict::Sound, String::new()),
                Verdict::Damaged(why) => (api::verify_event::Verdict::Damaged, why.clone()),
                Verdict::Unknown => (
                    api::verify_event::Verdict::Unknown,
                    "unpacked by an earlier version, which kept nothing to check it by".to_owned(),
                ),
            };
            let (image, chain_id) = (name.clone(), chain_id.to_owned());
            let event = api::VerifyEvent { image, chain_id, verdict: state.into(), why, given_up: Vec::new() };
            gone |= events.blocking_send(Ok(event)).is_err();
            !gone
        })?;
        if gone {
            return Ok(());
        }
    }
    let damaged: Vec<String> =
        checked.into_iter().filter(|(_, verdict)| matches!(verdict, Verdict::Damaged(_))).map(|(chain_id, _)| chain_id).collect();
    if repair && !damaged.is_empty() {
        let given_up = store.give_up(&damaged)?;
        let _ = events.blocking_send(Ok(api::VerifyEvent { given_up, ..api::VerifyEvent::default() }));
    }
    Ok(())
}
