//! From the queue to the collector: batches by OTLP over gRPC. A batch that the collector does not take in time is dropped and counted,
//! never kept: what piles up behind a collector that hangs would be the daemon's memory.

use crate::{
    error::{Error, Result},
    telemetry,
};
use std::time::Duration;
use tokio::{sync::mpsc, time::timeout};
use tonic::transport::{Channel, Endpoint};
use windlass_proto::trace::{
    AnyValue, ExportTraceServiceRequest, InstrumentationScope, KeyValue, Resource, ResourceSpans, ScopeSpans, Span,
    any_value::Value, trace_service_client::TraceServiceClient,
};

/// Spans that wait, at most.
const QUEUE_MAX: usize = 2048;
/// Spans of one call, and how long the first of them waits for others.
const BATCH_MAX: usize = 512;
const GATHER: Duration = Duration::from_secs(1);
/// Longest connect, and longest call.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Longest last call, once the daemon is asked to end.
const LAST_LIMIT: Duration = Duration::from_secs(1);

/// Where ended spans go.
pub(super) struct Queue(mpsc::Sender<Span>);

impl Queue {
    pub(super) fn new(room: usize) -> (Queue, mpsc::Receiver<Span>) {
        let (sender, receiver) = mpsc::channel(room);
        (Queue(sender), receiver)
    }

    pub(super) fn put(&self, span: Span) {
        if self.0.try_send(span).is_err() {
            telemetry::SPANS_DROPPED.add(1);
        }
    }
}

/// Takes spans to the collector.
pub struct Exporter {
    spans: mpsc::Receiver<Span>,
    endpoint: Endpoint,
    resource: Resource,
}

impl Exporter {
    pub(super) fn new(address: &str) -> Result<(Exporter, Queue)> {
        let invalid = |reason: String| Error::invalid(format!("tracing.otlp_endpoint {address:?}: {reason}"));
        if !address.starts_with("http://") {
            return Err(invalid("only http:// is served: a collector on this node, at its gRPC port".into()));
        }
        let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|error| invalid(error.to_string()))?;
        let (queue, spans) = Queue::new(QUEUE_MAX);
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let attributes = [("service.name", "windlass"), ("service.version", env!("CARGO_PKG_VERSION")), ("host.name", &host)];
        let resource = Resource { attributes: attributes.map(|(key, value)| attribute(key, value)).into() };
        Ok((Exporter { spans, endpoint: endpoint.connect_timeout(CONNECT_LIMIT).timeout(CALL_LIMIT), resource }, queue))
    }

    /// Exports until `end` resolves, and then what is there.
    pub async fn run(mut self, end: impl Future<Output = ()>) {
        let mut collector = TraceServiceClient::new(self.endpoint.connect_lazy());
        let mut well = true;
        tokio::pin!(end);
        loop {
            let gathered = tokio::select! {
                spans = gather(&mut self.spans) => spans,
                () = &mut end => break,
            };
            let count = gathered.len() as u64;
            let sent = tokio::select! {
                sent = send(&mut collector, &self.resource, gathered) => sent,
                () = &mut end => return,
            };
            match &sent {
                Ok(()) if !well => tracing::info!("the collector takes spans again"),
                Err(status) if well => {
                    tracing::warn!(error = %status.message(), "spans not exported; dropping them until the collector takes some")
                }
                _ => {}
            }
            well = sent.is_ok();
            if !well {
                telemetry::SPANS_DROPPED.add(count);
            }
        }
        let mut last = Vec::new();
        while let Ok(span) = self.spans.try_recv() {
            last.push(span);
        }
        let _ = timeout(LAST_LIMIT, send(&mut collector, &self.resource, last)).await;
    }
}

/// The next spans: the first that comes and what follows it soon.
async fn gather(spans: &mut mpsc::Receiver<Span>) -> Vec<Span> {
    let mut gathered = Vec::new();
    let Some(first) = spans.recv().await else { return std::future::pending().await };
    gathered.push(first);
    let _ = timeout(GATHER, async {
        while gathered.len() < BATCH_MAX {
            match spans.recv().await {
                Some(span) => gathered.push(span),
                None => return,
            }
        }
    })
    .await;
    gathered
}

async fn send(
    collector: &mut TraceServiceClient<Channel>,
    resource: &Resource,
    spans: Vec<Span>,
) -> std::result::Result<(), tonic::Status> {
    let count = spans.len() as u64;
    if count == 0 {
        return Ok(());
    }
    let scope = InstrumentationScope { name: "windlass".into(), version: env!("CARGO_PKG_VERSION").into() };
    let scope_spans = vec![ScopeSpans { scope: Some(scope), spans }];
    let request =
        ExportTraceServiceRequest { resource_spans: vec![ResourceSpans { resource: Some(resource.clone()), scope_spans }] };
    let answer = timeout(CALL_LIMIT, collector.export(request))
        .await
        .map_err(|_| tonic::Status::deadline_exceeded(format!("no answer in {} s", CALL_LIMIT.as_secs())))??;
    let rejected = answer.into_inner().partial_success.map_or(0, |partial| partial.rejected_spans);
    telemetry::SPANS_DROPPED.add(u64::try_from(rejected).unwrap_or(0));
    telemetry::SPANS_EXPORTED.add(count.saturating_sub(u64::try_from(rejected).unwrap_or(0)));
    Ok(())
}

fn attribute(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.to_owned(), value: Some(AnyValue { value: Some(Value::StringValue(value.to_owned())) }) }
}
