//! From `tracing`'s spans to the collector's: ids and parents when a span begins, its time and attributes when it ends.
//!
//! Fields with a meaning of their own: `otel.name` is the span's name, `otel.kind = "server"` its kind, `traceparent` its parent, and `error` its
//! status. `pod` and `container` are ids, and bring the names that go with them.

use super::{Context, export::Queue, parse_traceparent};
use crate::log::names;
use std::{
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};
use tracing::{
    Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{Layer, layer, registry::LookupSpan};
use windlass_proto::trace::{AnyValue, KeyValue, Span, TraceStatus, any_value::Value, span::SpanKind, trace_status::StatusCode};

/// Longest value of an attribute, and most attributes of a span.
const VALUE_LIMIT_BYTES: usize = 4 << 10;
const ATTRIBUTES_MAX: usize = 32;

/// What `tracing` tells of spans.
pub struct Spans {
    queue: Queue,
    /// Traces whose id is below it, taken as a number, are exported.
    sampled_below: u64,
    all: bool,
}

/// A span under way.
struct Begun {
    context: Context,
    /// Nothing unless it is exported.
    span: Option<Box<Span>>,
}

impl Spans {
    pub(super) fn new(queue: Queue, ratio: f64) -> Spans {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the ratio is from 0 to 1; a cast saturates")]
        let sampled_below = (ratio * u64::MAX as f64) as u64;
        Spans { queue, sampled_below, all: ratio >= 1.0 }
    }

    /// The first span of a trace decides for all of it, and for all who see the same id.
    fn is_sampled(&self, trace_id: [u8; 16]) -> bool {
        let [_, _, _, _, _, _, _, _, low @ ..] = trace_id;
        self.all || u64::from_be_bytes(low) < self.sampled_below
    }

    fn begin(&self, parent: Option<Context>) -> Option<Context> {
        let mut span_id = [0; 8];
        getrandom::fill(&mut span_id).ok()?;
        if let Some(parent) = parent {
            return Some(Context { span_id, ..parent });
        }
        let mut trace_id = [0; 16];
        getrandom::fill(&mut trace_id).ok()?;
        Some(Context { trace_id, span_id, sampled: self.is_sampled(trace_id) })
    }
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).ok().and_then(|age| u64::try_from(age.as_nanos()).ok()).unwrap_or(0)
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: layer::Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut caller = Caller(None);
        attributes.record(&mut caller);
        let above = span.parent().and_then(|parent| parent.extensions().get::<Begun>().map(|begun| begun.context));
        let parent = caller.0.or(above);
        let Some(own) = self.begin(parent) else { return };
        let span_of = || {
            let mut new = Span {
                trace_id: own.trace_id.into(),
                span_id: own.span_id.into(),
                parent_span_id: parent.map_or_else(Vec::new, |parent| parent.span_id.into()),
                name: attributes.metadata().name().to_owned(),
                kind: SpanKind::Internal.into(),
                start_time_unix_nano: now_ns(),
                ..Span::default()
            };
            attributes.record(&mut Fill(&mut new));
            Box::new(new)
        };
        span.extensions_mut().insert(Begun { context: own, span: own.sampled.then(span_of) });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: layer::Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        if let Some(begun) = span.extensions_mut().get_mut::<Begun>().and_then(|begun| begun.span.as_mut()) {
            values.record(&mut Fill(begun));
        }
    }

    fn on_close(&self, id: Id, context: layer::Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let ended = span.extensions_mut().get_mut::<Begun>().and_then(|begun| begun.span.take());
        if let Some(mut ended) = ended {
            ended.end_time_unix_nano = now_ns();
            name(&mut ended);
            self.queue.put(*ended);
        }
    }
}

/// Adds the names that go with ids.
fn name(span: &mut Span) {
    let ids = span.attributes.iter().filter(|attribute| matches!(attribute.key.as_str(), POD_ID | CONTAINER_ID));
    let values = ids.filter_map(|attribute| match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(id) => Some(names::of(id)),
        _ => None,
    });
    let found: Vec<(&str, String)> = values.flatten().collect();
    for (key, value) in found {
        // OpenTelemetry's semantic conventions, resources of Kubernetes.
        let key = match key {
            "pod" => "k8s.pod.name",
            "namespace" => "k8s.namespace.name",
            "container_name" => "k8s.container.name",
            other => other,
        };
        set(span, key, Value::StringValue(value));
    }
}

const POD_ID: &str = "windlass.pod.id";
const CONTAINER_ID: &str = "container.id";

fn set(span: &mut Span, key: &str, value: Value) {
    let value = Some(AnyValue { value: Some(value) });
    if let Some(attribute) = span.attributes.iter_mut().find(|attribute| attribute.key == key) {
        attribute.value = value;
    } else if span.attributes.len() < ATTRIBUTES_MAX {
        span.attributes.push(KeyValue { key: key.to_owned(), value });
    }
}

/// The caller's context.
struct Caller(Option<Context>);

impl Visit for Caller {
    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "traceparent" {
            self.0 = parse_traceparent(value);
        }
    }
}

/// Puts fields into a span.
struct Fill<'a>(&'a mut Span);

impl Fill<'_> {
    fn text(&mut self, field: &Field, mut value: String) {
        value.truncate(value.floor_char_boundary(VALUE_LIMIT_BYTES));
        let key = match field.name() {
            "traceparent" => return,
            "otel.name" => return self.0.name = value,
            "otel.kind" => return self.0.kind = SpanKind::Server.into(),
            "error" => {
                self.0.status = Some(TraceStatus { message: value, code: StatusCode::Error.into() });
                return;
            }
            "pod" => POD_ID,
            "container" => CONTAINER_ID,
            other => other,
        };
        set(self.0, key, Value::StringValue(value));
    }
}

impl Visit for Fill<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(field, format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(field, value.to_owned());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        set(self.0, field.name(), Value::IntValue(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        set(self.0, field.name(), Value::IntValue(i64::try_from(value).unwrap_or(i64::MAX)));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        set(self.0, field.name(), Value::BoolValue(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing::info_span;
    use tracing_subscriber::prelude::*;

    fn spans(ratio: f64, body: impl FnOnce()) -> Vec<Span> {
        let (queue, mut ended) = Queue::new(16);
        let subscriber = tracing_subscriber::registry().with(Spans::new(queue, ratio));
        tracing::subscriber::with_default(subscriber, body);
        std::iter::from_fn(|| ended.try_recv().ok()).collect()
    }

    #[test]
    fn a_span_has_its_callers_trace_and_those_below_have_its_own() {
        let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let ended = spans(0.0, || {
            let _above =
                info_span!("rpc", otel.name = "Run", otel.kind = "server", traceparent, error = tracing::field::Empty).entered();
            let below = info_span!("step", pod = "p", bytes = 7_u64);
            below.record("bytes", 8_u64);
            drop(below);
            tracing::Span::current().record("error", "no room");
        });
        let [below, above] = &ended[..] else { panic!("{ended:?}") };
        assert_eq!((above.name.as_str(), above.kind()), ("Run", SpanKind::Server));
        assert_eq!(
            (hex::encode(&above.trace_id), hex::encode(&above.parent_span_id)),
            (traceparent[3..35].into(), traceparent[36..52].into())
        );
        assert_eq!(
            above.status.as_ref().map(|status| (status.message.as_str(), status.code())),
            Some(("no room", StatusCode::Error))
        );
        assert_eq!((&below.trace_id, &below.parent_span_id), (&above.trace_id, &above.span_id));
        assert!(
            below.start_time_unix_nano <= below.end_time_unix_nano && above.start_time_unix_nano <= below.start_time_unix_nano
        );
        let attributes: Vec<(&str, Option<&Value>)> = below
            .attributes
            .iter()
            .map(|one| (one.key.as_str(), one.value.as_ref().and_then(|value| value.value.as_ref())))
            .collect();
        assert_eq!(attributes, [(POD_ID, Some(&Value::StringValue("p".into()))), ("bytes", Some(&Value::IntValue(8)))]);
    }

    #[test]
    fn the_first_span_decides_for_its_trace() {
        assert!(spans(0.0, || drop(info_span!("root"))).is_empty());
        assert_eq!(spans(1.0, || drop(info_span!("root"))).len(), 1);
        let unwanted = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
        assert!(spans(1.0, || drop(info_span!("root", traceparent = unwanted))).is_empty(), "the caller has decided");
        let some = (0..200).filter(|_| !spans(0.5, || drop(info_span!("root"))).is_empty()).count();
        assert!((50..150).contains(&some), "{some} of 200");
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        let before = crate::telemetry::SPANS_DROPPED.value();
        assert_eq!(spans(1.0, || (0..20).for_each(|_| drop(info_span!("root")))).len(), 16);
        assert!(crate::telemetry::SPANS_DROPPED.value() >= before + 4);
    }
}
