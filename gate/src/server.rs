//! Sockets, connections and drain. What a request means is in [`agent`], [`operator`] and [`metrics`]; what a refusal
//! looks like is in [`error`].

pub mod agent;
pub mod body;
pub mod error;
pub mod listen;
pub mod metrics;
pub mod operator;
pub mod patient;
mod plain;

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::Value;
use tokio::sync::{Semaphore, watch};
use tracing::debug;

use listen::{Bound, Peer};

/// A finished answer: always a JSON object (API.md §1.6, §1.7), except on `/metrics`.
pub type Answer = Response<Full<Bytes>>;

/// What a connection may cost before it has said anything worth hearing.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    pub max_connections: usize,
    pub header_timeout: Duration,
    /// How long an answer may not be read.
    pub write_timeout: Duration,
}

/// Serves `bound` until `stop` turns true, then lets the requests in flight finish.
pub async fn serve<H, F>(bound: Bound, limits: ConnectionLimits, mut stop: watch::Receiver<bool>, handler: H)
where
    H: Fn(Peer, Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(limits.max_connections));
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let place = tokio::select! {
            () = stopped(&mut stop) => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let Ok(place) = place else { break };
        let accepted = tokio::select! {
            () = stopped(&mut stop) => break,
            accepted = accept(&bound) => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let (handler, stop) = (handler.clone(), stop.clone());
                connections.spawn(async move {
                    let _place = place;
                    connection(stream, peer, limits, stop, handler).await;
                });
            }
            // EMFILE and its like pass; a busy loop would not help them to.
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
    drop(bound);
    while connections.join_next().await.is_some() {}
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A dropped sender is a gate that is going away: stop as well.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// A stream of either kind.
trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Stream for T {}

async fn accept(bound: &Bound) -> std::io::Result<(Box<dyn Stream>, Peer)> {
    match bound {
        Bound::Unix(listener, _) => {
            let (stream, _) = listener.accept().await?;
            let peer = Peer::of(&stream)?;
            Ok((Box::new(stream), peer))
        }
        Bound::Tcp(listener) => {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            Ok((Box::new(stream), Peer::default()))
        }
    }
}

async fn connection<H, F>(
    stream: Box<dyn Stream>,
    peer: Peer,
    limits: ConnectionLimits,
    mut stop: watch::Receiver<bool>,
    handler: H,
) where
    H: Fn(Peer, Request<Incoming>) -> F + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let stream = patient::Patient::new(stream, limits.write_timeout);
    let patience = stream.patience();
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(patience.clone());
        let answer = handler(peer, request);
        async move { Ok::<_, Infallible>(answer.await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.header_timeout).max_buf_size(64 << 10).half_close(false);
    let served = http.serve_connection(TokioIo::new(plain::Plain::new(stream)), service).with_upgrades();
    let mut connection = std::pin::pin!(served);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        debug!(%error, "connection ended");
    }
}

/// A JSON answer.
pub fn json(status: StatusCode, body: &Value) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(body.to_string())));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    answer
}
