//! Traces for an OpenTelemetry collector: a span for each RPC, below it one for each step, by way of `tracing`'s own spans. A caller that
//! sends a W3C `traceparent` (kubelet does) gets its RPCs as part of its own trace. Off unless `tracing.otlp_endpoint` is set, and then no
//! request waits for a collector: spans go into a bounded queue, and what finds no room is counted.
//!
//! The spans that only traces want have [`TARGET`], which no line of the log mentions.
//!
//! The exporter is our own few lines on tonic and prost, which are here in any case: opentelemetry, its SDK, its exporter and
//! tracing-opentelemetry bring 17 crates more, a queue and a thread of their own.

mod export;
mod layer;

pub use export::Exporter;
pub use layer::Spans;

use crate::{
    config::TracingConfig,
    error::{Error, Result},
};

/// Target of spans that are exported and not mentioned in the log.
pub const TARGET: &str = "windlass::trace";

/// What a span passes to those below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Context {
    trace_id: [u8; 16],
    span_id: [u8; 8],
    sampled: bool,
}

/// The two halves of tracing: what `tracing` tells its spans to, and what takes them to the collector. Nothing when there is no collector.
pub fn start(config: &TracingConfig) -> Result<Option<(Spans, Exporter)>> {
    if config.otlp_endpoint.is_empty() {
        return Ok(None);
    }
    if !(0.0..=1.0).contains(&config.sampling_ratio) {
        return Err(Error::invalid(format!("tracing.sampling_ratio {} is not from 0 to 1", config.sampling_ratio)));
    }
    let (exporter, queue) = Exporter::new(&config.otlp_endpoint)?;
    Ok(Some((Spans::new(queue, config.sampling_ratio), exporter)))
}

/// W3C Trace Context: `version-trace_id-parent_id-flags` in lower-case hexadecimal. A later version may have more behind it.
fn parse_traceparent(text: &str) -> Option<Context> {
    let mut parts = text.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let lower = |part: &str| !part.bytes().any(|byte| byte.is_ascii_uppercase());
    if version.len() != 2
        || version == "ff"
        || (version == "00" && parts.next().is_some())
        || ![trace, parent].into_iter().all(lower)
    {
        return None;
    }
    let (mut trace_id, mut span_id, mut flag) = ([0; 16], [0; 8], [0; 1]);
    hex::decode_to_slice(version, &mut flag).ok()?;
    hex::decode_to_slice(trace, &mut trace_id).ok()?;
    hex::decode_to_slice(parent, &mut span_id).ok()?;
    hex::decode_to_slice(flags, &mut flag).ok()?;
    (trace_id != [0; 16] && span_id != [0; 8]).then_some(Context { trace_id, span_id, sampled: flag[0] & 1 == 1 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparents_as_the_recommendation_has_them() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = parse_traceparent(good).expect("a context");
        assert_eq!((hex::encode(context.trace_id), hex::encode(context.span_id)), (good[3..35].into(), good[36..52].into()));
        assert!(context.sampled);
        assert!(parse_traceparent(&good.replace("-01", "-00")).is_some_and(|context| !context.sampled));
        assert!(parse_traceparent(&format!("01{}-more", &good[2..])).is_some(), "a later version");
        for wrong in [
            "",
            "00",
            &good[..52],
            &format!("{good}-more"),
            &format!("ff{}", &good[2..]),
            &good.to_uppercase(),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319-b7ad6b7169203331-01",
        ] {
            assert_eq!(parse_traceparent(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn wrong_settings_are_named() {
        let config = |endpoint: &str, sampling_ratio| TracingConfig { otlp_endpoint: endpoint.into(), sampling_ratio };
        assert!(start(&config("", 7.0)).expect("off").is_none());
        for (wrong, what) in [
            (config("http://127.0.0.1:4317", 1.5), "sampling_ratio 1.5"),
            (config("https://127.0.0.1:4317", 1.0), "otlp_endpoint \"https:"),
            (config("127.0.0.1:4317", 1.0), "otlp_endpoint \"127.0.0.1"),
            (config("http://", 1.0), "otlp_endpoint \"http:"),
        ] {
            let error = start(&wrong).err().expect(what);
            assert!(error.message.contains(what), "{error}");
        }
    }
}
