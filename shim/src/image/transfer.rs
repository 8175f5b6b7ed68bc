//! Makes one layer of an image: from a registry, resumed when the connection is cut, or from a file.

use super::digest::{self, HashingReader};
use super::error::ImageError;
use super::extract::{Limits, Written};
use super::layers::{Layers, Lease};
use super::manifest::Descriptor;
use super::partial::{Partial, Partials};
use super::progress::{LayerProgress, LayerState};
use super::registry::Session;
use super::tls::cause;
use super::unpack::{CHANNEL_CHUNKS, ChannelReader, Chunk, Place, unpack};
use bytes::Bytes;
use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore, mpsc};

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
pub(super) async fn ensure(
    layers: Arc<Layers>,
    partials: Arc<Partials>,
    slots: Arc<Semaphore>,
    want: Want,
    limits: Limits,
) -> Result<(), ImageError> {
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
    let lease = layers.lease(std::slice::from_ref(&want.chain_id));
    let making =
        Making { layers, chain_id: want.chain_id, diff_id: want.diff_id, limits, _held: Arc::new((lease, building, slot)) };
    match want.source {
        Source::File(mut file, expected) => {
            let read = move |place: Place<'_>, diff_id: &str| from_file(&mut file, expected.as_deref(), diff_id, place, limits);
            ended(tokio::task::spawn_blocking(move || making.make(read)).await)?;
        }
        Source::Registry(session, descriptor, progress) => {
            tell(LayerState::Fetching);
            let mut partial = partials.claim(&descriptor.digest, descriptor.size);
            let taken_up = partial.as_ref().is_some_and(|partial| partial.length_bytes() > 0);
            let mut result = from_registry(&making, &session, &descriptor, &progress, &mut partial).await;
            if let (true, Some(partial), Err(ImageError::Corrupt(_) | ImageError::TooMany(_))) = (taken_up, &mut partial, &result)
            {
                tracing::warn!(blob = descriptor.digest, "what was here of a layer is wrong: fetching it anew");
                partial.restart();
                progress.restart();
            }
            if taken_up && matches!(result, Err(ImageError::Corrupt(_) | ImageError::TooMany(_))) {
                result = from_registry(&making, &session, &descriptor, &progress, &mut partial).await;
            }
            // What came counts if another try may end well.
            if !matches!(result, Err(ImageError::RegistryUnavailable(_) | ImageError::Unauthorized(_))) {
                partial.iter().for_each(Partial::discard);
            }
            if matches!(result, Err(ImageError::NoSpace(_))) {
                drop(partial);
                partials.clear();
            }
            result?;
        }
    }
    tell(LayerState::Done);
    Ok(())
}

/// A layer that is made, and what that needs: its lease, the right to build it, a slot. The worker has it too and may outlive a caller
/// that goes away, by a moment, until it has cleaned up.
#[derive(Clone)]
struct Making {
    layers: Arc<Layers>,
    chain_id: String,
    diff_id: String,
    limits: Limits,
    _held: Arc<(Lease, OwnedMutexGuard<()>, OwnedSemaphorePermit)>,
}

impl Making {
    fn make(self, mut read: impl FnMut(Place<'_>, &str) -> Result<Written, ImageError>) -> Result<(), ImageError> {
        let temp = self.layers.temp()?;
        read(temp.place(), &self.diff_id).and_then(|written| self.layers.publish(&self.chain_id, temp, written))
    }
}

fn ended(joined: Result<Result<(), ImageError>, tokio::task::JoinError>) -> Result<(), ImageError> {
    joined.map_err(|e| ImageError::Io(format!("unpack: {e}")))?
}

async fn from_registry(
    making: &Making,
    session: &Session,
    descriptor: &Descriptor,
    progress: &LayerProgress,
    partial: &mut Option<Partial>,
) -> Result<(), ImageError> {
    let (chunks, receiver) = mpsc::channel(CHANNEL_CHUNKS);
    let mut reader = ChannelReader::new(receiver);
    let (making, limits) = (making.clone(), making.limits);
    let worker = tokio::task::spawn_blocking(move || making.make(|place, diff_id| unpack(&mut reader, diff_id, place, limits)));
    feed(session, descriptor, progress, partial, &chunks).await;
    drop(chunks);
    ended(worker.await)
}

fn from_file(
    file: &mut File,
    expected: Option<&str>,
    diff_id: &str,
    place: Place<'_>,
    limits: Limits,
) -> Result<Written, ImageError> {
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
async fn feed(
    session: &Session,
    descriptor: &Descriptor,
    progress: &LayerProgress,
    partial: &mut Option<Partial>,
    chunks: &mpsc::Sender<Chunk>,
) {
    let mut sink = Sink { descriptor, progress, chunks, partial, hasher: Sha256::new(), offset: 0 };
    let end = match fetch(session, &mut sink).await {
        Ok(()) => Chunk::End,
        Err(error) => Chunk::Failed(error),
    };
    let _ = chunks.send(end).await;
}

/// Where a blob's bytes go, in order.
struct Sink<'a> {
    descriptor: &'a Descriptor,
    progress: &'a LayerProgress,
    chunks: &'a mpsc::Sender<Chunk>,
    partial: &'a mut Option<Partial>,
    hasher: Sha256,
    /// Bytes so far.
    offset: u64,
}

impl Sink<'_> {
    fn object(&self) -> String {
        format!("blob {}", self.descriptor.digest)
    }

    /// What an earlier pull got.
    async fn take_up(&mut self) -> Result<(), ImageError> {
        let there_bytes = self.partial.as_ref().map_or(0, Partial::length_bytes);
        while self.offset < there_bytes {
            let Some(partial) = &*self.partial else { break };
            let Some(chunk) = partial.read(self.offset).await else {
                return Err(ImageError::Corrupt(format!("{}: what an earlier pull got cannot be read", self.object())));
            };
            self.pass(chunk).await?;
        }
        if there_bytes > 0 {
            tracing::info!(
                blob = self.descriptor.digest,
                bytes = there_bytes,
                of = self.descriptor.size,
                "taking a layer up again"
            );
        }
        Ok(())
    }

    /// Bytes that the registry sent.
    async fn put(&mut self, chunk: Bytes) -> Result<(), ImageError> {
        crate::telemetry::PULLED_BYTES.add(chunk.len() as u64);
        if let Some(partial) = &mut *self.partial {
            partial.add(&chunk).await;
        }
        self.pass(chunk).await
    }

    async fn pass(&mut self, chunk: Bytes) -> Result<(), ImageError> {
        self.offset += chunk.len() as u64;
        self.progress.add(chunk.len() as u64);
        if self.descriptor.size > 0 && self.offset > self.descriptor.size {
            let (object, size) = (self.object(), self.descriptor.size);
            return Err(ImageError::Corrupt(format!("{object}: is longer than the {size} bytes its manifest says")));
        }
        self.hasher.update(&chunk);
        self.chunks.send(Chunk::Data(chunk)).await.map_err(|_| ImageError::Io(format!("{}: canceled", self.object())))
    }
}

async fn fetch(session: &Session, sink: &mut Sink<'_>) -> Result<(), ImageError> {
    let (object, size) = (sink.object(), sink.descriptor.size);
    let (mut cuts, mut idle_cuts) = (0, 0);
    sink.take_up().await?;
    while size == 0 || sink.offset < size {
        let start = sink.offset;
        let cut = match fetch_once(session, sink).await? {
            None if size == 0 => break,
            // All of it is here, however the connection ended.
            _ if size > 0 && sink.offset >= size => break,
            None => format!("the connection ended after {} of {size} bytes", sink.offset),
            Some(cut) => cut,
        };
        cuts += 1;
        idle_cuts = if sink.offset > start { 0 } else { idle_cuts + 1 };
        if cuts > MAX_CUTS || idle_cuts > MAX_IDLE_CUTS {
            return Err(ImageError::RegistryUnavailable(format!("{object}: {cut}")));
        }
        tracing::debug!(object, offset = sink.offset, cut, "resuming");
        tokio::time::sleep(CUT_BACKOFF * (idle_cuts + 1)).await;
    }
    let found = digest::finish(std::mem::take(&mut sink.hasher));
    if found != sink.descriptor.digest {
        return Err(ImageError::Corrupt(format!("{object}: the registry sent bytes of digest {found}")));
    }
    Ok(())
}

/// One connection's worth. `Some` says why it broke off; what came before counts.
async fn fetch_once(session: &Session, sink: &mut Sink<'_>) -> Result<Option<String>, ImageError> {
    let offset = sink.offset;
    let mut response = session.blob(&sink.descriptor.digest, offset).await?;
    let mut skip = match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let range = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok()).unwrap_or_default();
            if !range.starts_with(&format!("bytes {offset}-")) {
                let object = sink.object();
                return Err(ImageError::RegistryUnavailable(format!("{object}: asked for bytes from {offset}, got {range:?}")));
            }
            0
        }
        // The registry does not know ranges.
        _ => offset,
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
        if !chunk.is_empty() {
            sink.put(chunk).await?;
        }
    }
}
