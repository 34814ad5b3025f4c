//! The sandbox's side of a connection, and the ways to tell it that it is over.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::timeout;

use super::leg::{Leg, Rewound};
use super::reply::Reply;
use super::session::Connection;
use super::source::Source;
use crate::egress::flow::End;

/// The first byte of a TLS connection: a record of the handshake.
pub const TLS_HANDSHAKE: u8 = 0x16;
/// A fatal `access_denied` (RFC 8446 §6.2) in a record of its own.
pub const ACCESS_DENIED: [u8; 7] = [21, 3, 3, 0, 2, 2, 49];

/// How long, and for how many bytes, a client that got its answer may go on sending before its socket is closed: a
/// socket that is closed with unread bytes resets the connection, and the answer is lost.
const LINGER_TIME: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 1024 * 1024;
/// How long the first byte is waited for that says in which protocol a refusal is understood.
const FACE_TIME: Duration = Duration::from_millis(500);

/// The client's two directions.
pub struct Client {
    pub source: Source<ReadHalf<Box<dyn Leg>>>,
    pub sink: WriteHalf<Box<dyn Leg>>,
}

impl Client {
    pub fn new(leg: Box<dyn Leg>) -> Self {
        let (read, sink) = tokio::io::split(leg);
        Self { source: Source::new(read), sink }
    }

    /// The connection as it was before anything was read that is not used yet.
    pub fn into_leg(self) -> Rewound {
        let pending = self.source.pending().to_vec();
        Rewound::new(pending, self.source.into_stream().unsplit(self.sink))
    }

    /// Gives a client that speaks HTTP an answer of the proxy's own, and notes it.
    pub async fn answer(mut self, connection: &Connection, reply: &Reply, head_only: bool) -> End {
        note(connection, reply);
        let bytes = reply.to_bytes(&connection.decision_id(), head_only);
        if self.sink.write_all(&bytes).await.is_err() || self.sink.flush().await.is_err() {
            return End::ClientFailed;
        }
        self.close(connection, End::Answered).await
    }

    /// Tells a client of which nothing is known but what it sends first: by an answer, by an alert of TLS, or, where it
    /// would understand neither, by a reset. Notes it.
    pub async fn refuse(mut self, connection: &Connection, reply: &Reply) -> End {
        let first = match self.source.pending().first() {
            Some(&first) => Some(first),
            None => match timeout(FACE_TIME, self.source.some()).await {
                Ok(Ok(bytes)) => bytes.first().copied(),
                _ => None,
            },
        };
        match (first, reply) {
            (Some(first), _) if first.is_ascii_uppercase() => self.answer(connection, reply, false).await,
            (Some(TLS_HANDSHAKE), Reply::Denied { .. }) => {
                note(connection, reply);
                if self.sink.write_all(&ACCESS_DENIED).await.is_err() {
                    return End::ClientFailed;
                }
                self.close(connection, End::Answered).await
            }
            _ => {
                note(connection, reply);
                // Dropped without having finished, it is reset.
                if matches!(reply, Reply::Failed { .. }) { End::UpstreamFailed } else { End::Answered }
            }
        }
    }

    /// Closes in order: what was written arrives. `end` stands from here on, even if the execution ends first.
    pub async fn close(self, connection: &Connection, end: End) -> End {
        connection.ended(end);
        let mut stream = self.source.into_stream().unsplit(self.sink);
        let _ = stream.shutdown().await;
        stream.finish();
        let mut rest = stream.take(LINGER_BYTES);
        let _ = timeout(LINGER_TIME, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
        end
    }
}

fn note(connection: &Connection, reply: &Reply) {
    match reply {
        Reply::Denied { reason, detail: None, .. } => connection.refused(reason),
        Reply::Denied { reason, detail: Some(detail), .. } => connection.refused(&format!("{reason}:{detail}")),
        Reply::Invalid { .. } => connection.refused("malformed"),
        Reply::Slow => connection.refused("no_request"),
        Reply::Failed { reason, .. } => {
            connection.allowed();
            connection.failed(reason);
        }
    }
}
