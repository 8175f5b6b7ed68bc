//! Makes one layer of an image: from a registry, resumed when the connection is cut, or from a file.

use super::digest::{self, HashingReader};
use super::error::ImageError;
use super::extract::Limits;
use super::layers::Layers;
use super::manifest::Descriptor;
use super::progress::{LayerProgress, LayerState};
use super::registry::Session;
use super::tls::cause;
use super::unpack::{CHANNEL_CHUNKS, ChannelReader, Chunk, Place, unpack};
use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};

/// Connections in a row that end early without a new byte, and in all, before a layer is given up.
const MAX_IDLE_CUTS: u32 = 4;
const MAX_CUTS: u32 = 30;
const CUT_BACKOFF: Duration = Duration::from_millis(200);

/// Where a layer's bytes are.
pub(super) enum Source {
    Registry(Arc<Session>, Descriptor, Arc<LayerProgress>),
    /// The digest is that of the bytes in the file, if known.
    File(File, Option<String>),
}

/// One layer wanted.
pub(super) struct Want {
    pub(super) chain_id: String,
    pub(super) diff_id: String,
    pub(super) source: Source,
}

/// Sees that the layer is on disk; one that another pull makes is waited for. The caller holds a lease on it.
pub(super) async fn ensure(layers: Arc<Layers>, slots: Arc<Semaphore>, want: Want, limits: Limits) -> Result<(), ImageError> {
    let building = layers.building(&want.chain_id).await;
    let progress = match &want.source {
        Source::Registry(_, _, progress) => Some(Arc::clone(progress)),
        Source::File(..) => None,
    };
    let tell = |state| progress.iter().for_each(|progress| progress.set(state));
    if layers.written(&want.chain_id).is_some() {
        tell(LayerState::Exists);
        return Ok(());
    }
    let slot = slots.acquire_owned().await.map_err(|_| ImageError::Io("pull: the store is closing".into()))?;
    // The worker outlives a caller that goes away, by a moment: it keeps the layer's lock and lease until it has cleaned up.
    let work = {
        let (lease, layers) = (layers.lease(std::slice::from_ref(&want.chain_id)), Arc::clone(&layers));
        let (chain_id, diff_id) = (want.chain_id, want.diff_id);
        move |read: &mut dyn FnMut(Place<'_>, &str) -> Result<super::extract::Written, ImageError>| {
            let temp = layers.temp()?;
            let result = read(temp.place(), &diff_id).and_then(|written| layers.publish(&chain_id, temp, written));
            drop((lease, building, slot));
            result
        }
    };
    let worker = match want.source {
        Source::File(mut file, expected) => tokio::task::spawn_blocking(move || {
            work(&mut |place, diff_id| from_file(&mut file, expected.as_deref(), diff_id, place, limits))
        }),
        Source::Registry(session, descriptor, progress) => {
            tell(LayerState::Fetching);
            let (chunks, receiver) = mpsc::channel(CHANNEL_CHUNKS);
            let mut reader = ChannelReader::new(receiver);
            let worker =
                tokio::task::spawn_blocking(move || work(&mut |place, diff_id| unpack(&mut reader, diff_id, place, limits)));
            feed(&session, &descriptor, &progress, &chunks).await;
            drop(chunks);
            worker
        }
    };
    worker.await.map_err(|e| ImageError::Io(format!("unpack: {e}")))??;
    tell(LayerState::Done);
    Ok(())
}

fn from_file(
    file: &mut File,
    expected: Option<&str>,
    diff_id: &str,
    place: Place<'_>,
    limits: Limits,
) -> Result<super::extract::Written, ImageError> {
    let mut reader = HashingReader::new(file);
    let written = unpack(&mut reader, diff_id, place, limits)?;
    match (expected, reader.finish()) {
        (Some(expected), found) if expected != found => {
            Err(ImageError::Corrupt(format!("blob {expected}: its bytes have digest {found}")))
        }
        _ => Ok(written),
    }
}

/// Sends the blob's bytes and how they ended. A receiver that has gone knows why itself.
async fn feed(session: &Session, descriptor: &Descriptor, progress: &LayerProgress, chunks: &mpsc::Sender<Chunk>) {
    let end = match fetch(session, descriptor, progress, chunks).await {
        Ok(()) => Chunk::End,
        Err(error) => Chunk::Failed(error),
    };
    let _ = chunks.send(end).await;
}

async fn fetch(
    session: &Session,
    descriptor: &Descriptor,
    progress: &LayerProgress,
    chunks: &mpsc::Sender<Chunk>,
) -> Result<(), ImageError> {
    let object = format!("blob {}", descriptor.digest);
    let mut hasher = Sha256::new();
    let (mut offset, mut cuts, mut idle_cuts) = (0u64, 0, 0);
    loop {
        let start = offset;
        let cut = match fetch_once(session, descriptor, progress, chunks, &mut hasher, &mut offset).await? {
            None if descriptor.size == 0 || offset >= descriptor.size => break,
            None => format!("the connection ended after {offset} of {} bytes", descriptor.size),
            Some(cut) => cut,
        };
        cuts += 1;
        idle_cuts = if offset > start { 0 } else { idle_cuts + 1 };
        if cuts > MAX_CUTS || idle_cuts > MAX_IDLE_CUTS {
            return Err(ImageError::RegistryUnavailable(format!("{object}: {cut}")));
        }
        tracing::debug!(object, offset, cut, "resuming");
        tokio::time::sleep(CUT_BACKOFF * (idle_cuts + 1)).await;
    }
    let found = digest::finish(hasher);
    if found != descriptor.digest {
        return Err(ImageError::Corrupt(format!("{object}: the registry sent bytes of digest {found}")));
    }
    Ok(())
}

/// One connection's worth. `Some` says why it broke off; what came before counts.
async fn fetch_once(
    session: &Session,
    descriptor: &Descriptor,
    progress: &LayerProgress,
    chunks: &mpsc::Sender<Chunk>,
    hasher: &mut Sha256,
    offset: &mut u64,
) -> Result<Option<String>, ImageError> {
    let object = || format!("blob {}", descriptor.digest);
    let mut response = session.blob(&descriptor.digest, *offset).await?;
    let mut skip = match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let range = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok()).unwrap_or_default();
            if !range.starts_with(&format!("bytes {offset}-")) {
                return Err(ImageError::RegistryUnavailable(format!(
                    "{}: asked for bytes from {offset}, got {range:?}",
                    object()
                )));
            }
            0
        }
        // The registry does not know ranges.
        _ => *offset,
    };
    loop {
        let mut chunk = match response.chunk().await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => return Ok(None),
            Err(error) => return Ok(Some(cause(&error))),
        };
        let passed = skip.min(chunk.len() as u64);
        skip -= passed;
        let chunk = chunk.split_off(usize::try_from(passed).unwrap_or(0));
        if chunk.is_empty() {
            continue;
        }
        *offset += chunk.len() as u64;
        progress.add(chunk.len() as u64);
        if descriptor.size > 0 && *offset > descriptor.size {
            return Err(ImageError::Corrupt(format!(
                "{}: is longer than the {} bytes its manifest says",
                object(),
                descriptor.size
            )));
        }
        hasher.update(&chunk);
        if chunks.send(Chunk::Data(chunk)).await.is_err() {
            return Err(ImageError::Io(format!("{}: canceled", object())));
        }
    }
}
