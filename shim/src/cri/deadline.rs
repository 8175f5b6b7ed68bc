//! The caller's deadline (`grpc-timeout`, gRPC over HTTP2). The transport's own answer to a deadline is Cancelled, which a client takes
//! for somebody's decision; this one comes a moment before it and says DeadlineExceeded.

use std::task::{Context, Poll};
use std::time::Duration;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::{Request, Status};

/// How much earlier than the transport this answers.
const AHEAD: Duration = Duration::from_millis(5);

/// Most that is kept of the caller's time for putting things back.
const PUT_BACK: Duration = Duration::from_secs(3);

#[derive(Clone)]
pub(super) struct Deadline<S>(pub(super) S);

impl<S, B, R> Service<http::Request<B>> for Deadline<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let limit = request.headers().get("grpc-timeout").and_then(|value| parse(value.to_str().ok()?));
        let answer = self.0.call(request);
        Box::pin(async move {
            let Some(limit) = limit else { return answer.await };
            match tokio::time::timeout(limit.saturating_sub(AHEAD), answer).await {
                Ok(answer) => answer,
                Err(_) => Ok(Status::deadline_exceeded(format!("not done within the caller's {limit:?}")).into_http()),
            }
        })
    }
}

/// Of the caller's time, as much as an operation may use that has something to put back when it is over.
pub(super) fn of<T>(request: &Request<T>) -> Option<Duration> {
    let limit = parse(request.metadata().get("grpc-timeout")?.to_str().ok()?)?;
    Some(limit.saturating_sub((limit / 5).min(PUT_BACK)))
}

/// At most eight digits and a unit.
fn parse(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_as_the_protocol_writes_them() {
        for (value, expected) in [
            ("2H", Some(Duration::from_secs(7200))),
            ("3M", Some(Duration::from_secs(180))),
            ("10S", Some(Duration::from_secs(10))),
            ("99999999m", Some(Duration::from_millis(99_999_999))),
            ("5u", Some(Duration::from_micros(5))),
            ("0n", Some(Duration::ZERO)),
            ("999999999S", None),
            ("S", None),
            ("", None),
            ("+1S", None),
            ("10s", None),
            ("1\u{e9}", None),
        ] {
            assert_eq!(parse(value), expected, "{value:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_is_a_deadline_exceeded_before_the_transports() {
        struct Late;
        impl Service<http::Request<()>> for Late {
            type Response = http::Response<String>;
            type Error = std::convert::Infallible;
            type Future = BoxFuture<Self::Response, Self::Error>;
            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
                Poll::Ready(Ok(()))
            }
            fn call(&mut self, _: http::Request<()>) -> Self::Future {
                Box::pin(async {
                    tokio::time::sleep(Duration::from_secs(2)).await;
                    Ok(http::Response::new("late".to_owned()))
                })
            }
        }
        for (timeout, expected, after) in [(Some("1S"), Some("4"), 995), (Some("3S"), None, 2000), (None, None, 2000)] {
            let mut request = http::Request::new(());
            if let Some(timeout) = timeout {
                request.headers_mut().insert("grpc-timeout", timeout.parse().unwrap());
            }
            let began = tokio::time::Instant::now();
            let answer = Deadline(Late).call(request).await.unwrap();
            let code = answer.headers().get("grpc-status").map(|value| value.to_str().unwrap());
            assert_eq!(code, expected, "{timeout:?}");
            assert_eq!(began.elapsed().as_millis(), after, "{timeout:?}");
        }
    }
}
