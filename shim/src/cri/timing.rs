//! How long each RPC takes, by its method and code, and the span that its trace begins with. A caller that goes away is counted as Cancelled.

use crate::telemetry::{self, trace};
use std::{
    task::{Context, Poll},
    time::Instant,
};
use tonic::{
    Code,
    codegen::{BoxFuture, Service, http},
};
use tracing::{Instrument, Span, field::Empty};

#[derive(Clone)]
pub(super) struct Timing<S>(pub(super) S);

/// Counts when it is dropped, so that an RPC whose caller has gone is counted too.
struct Running {
    path: String,
    began: Instant,
    code: Code,
    span: Span,
}

impl Running {
    fn ended(mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        telemetry::called(&self.path, self.code as i32, self.began.elapsed());
        self.span.record("rpc.grpc.status_code", self.code as i32);
        if self.code != Code::Ok {
            self.span.record("error", self.code.description());
        }
    }
}

impl<S, B, R> Service<http::Request<B>> for Timing<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let span = span(&request);
        let running =
            Running { path: request.uri().path().to_owned(), began: Instant::now(), code: Code::Cancelled, span: span.clone() };
        let answer = span.in_scope(|| self.0.call(request));
        let counted = async move {
            let answer = answer.await;
            running.ended(match &answer {
                // An error has its code in the head; with a success it comes behind the message.
                Ok(answer) => answer.headers().get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes())),
                Err(_) => Code::Internal,
            });
            answer
        };
        Box::pin(counted.instrument(span))
    }
}

/// Part of the caller's trace, if it sends one.
fn span<B>(request: &http::Request<B>) -> Span {
    let method = request.uri().path().trim_start_matches('/');
    let name = method.rsplit('/').next().unwrap_or_default();
    let traceparent = request.headers().get("traceparent").and_then(|value| value.to_str().ok()).unwrap_or_default();
    tracing::info_span!(
        target: trace::TARGET, "rpc", otel.name = name, otel.kind = "server", traceparent, rpc.system = "grpc", rpc.method = method,
        rpc.grpc.status_code = Empty, error = Empty
    )
}
