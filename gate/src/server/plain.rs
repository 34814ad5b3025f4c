//! Answers to what is no request at all.
//!
//! hyper answers a request line or header that it cannot parse by itself, with a status and nothing else, before any
//! code of ours runs. The contract says that every refusal is a JSON object with a decision id, so its writes pass
//! through here: a head that is a refusal without a body and is not ours becomes one of ours.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::error::DECISION_ID;
use crate::pipeline::Ids;

/// A stream whose bare refusals get a body.
pub struct Plain<S> {
    stream: S,
    /// What stands in for hyper's bytes, and how much of it is written.
    instead: Option<(Vec<u8>, usize)>,
}

impl<S> Plain<S> {
    pub const fn new(stream: S) -> Self {
        Self { stream, instead: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Plain<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Plain<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.instead.is_none() {
            this.instead = bare_refusal(bytes).map(|status| (refusal(status), 0));
        }
        let Some((answer, written)) = &mut this.instead else {
            return Pin::new(&mut this.stream).poll_write(context, bytes);
        };
        while let Some(rest) = answer.get(*written..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut this.stream).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => *written += count,
            }
        }
        this.instead = None;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The status of a head that hyper wrote by itself: a 4xx, whole, without a body, and without the `cache-control` that
/// every answer of ours has.
fn bare_refusal(bytes: &[u8]) -> Option<u16> {
    let head = std::str::from_utf8(bytes.strip_suffix(b"\r\n\r\n")?).ok()?;
    let status = head.strip_prefix("HTTP/1.1 4").or_else(|| head.strip_prefix("HTTP/1.0 4"))?.get(..2)?;
    let mut lines = head.split("\r\n").skip(1);
    let empty = lines.clone().any(|line| line.eq_ignore_ascii_case("content-length: 0"));
    let ours = lines.any(|line| line.to_ascii_lowercase().starts_with("cache-control:"));
    (empty && !ours).then(|| status.parse::<u16>().ok().map(|rest| 400 + rest)).flatten()
}

fn refusal(status: u16) -> Vec<u8> {
    let ids = Ids::mint();
    let (code, message) = match status {
        414 => ("invalid_request", "the request target is too long"),
        431 => ("invalid_request", "the header is too large"),
        _ => ("bad_request", "not an HTTP/1.1 request"),
    };
    let body = json!({
        "error": code,
        "message": message,
        "decision_id": ids.decision_id,
        "trace_id": ids.trace_id,
    })
    .to_string();
    let reason =
        hyper::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).unwrap_or("Refused");
    tracing::debug!(decision_id = ids.decision_id, status, "what came in is no request");
    format!(
        "HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncache-control: no-store\r\n\
         {DECISION_ID}: {}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        ids.decision_id,
        body.len()
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_refusal_of_hyper_is_replaced() {
        for (head, expected) in [
            ("HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\ndate: x\r\n\r\n", Some(400)),
            (
                "HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
                Some(431),
            ),
            ("HTTP/1.1 404 Not Found\r\ncache-control: no-store\r\ncontent-length: 0\r\n\r\n", None),
            ("HTTP/1.1 400 Bad Request\r\ncontent-length: 7\r\n\r\n", None),
            ("HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n", None),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", None),
            ("{\"error\":\"HTTP/1.1 400\"}", None),
        ] {
            assert_eq!(bare_refusal(head.as_bytes()), expected, "{head}");
        }
    }
}
