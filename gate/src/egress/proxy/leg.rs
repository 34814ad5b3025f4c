//! The sides of a connection, whatever they are made of.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, ReadHalf, WriteHalf};
use tokio_rustls::{client, server};

use super::count::Counted;
use super::source::Source;

/// Bytes both ways.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// One side of a connection, in the clear or under TLS.
pub trait Leg: Duplex {
    /// Lets the socket close in order when it is dropped.
    fn finish(&self);
}

impl Leg for Counted {
    fn finish(&self) {
        Self::finish(self);
    }
}

impl Leg for client::TlsStream<Counted> {
    fn finish(&self) {
        self.get_ref().0.finish();
    }
}

impl Leg for server::TlsStream<Rewound> {
    fn finish(&self) {
        self.get_ref().0.finish();
    }
}

/// The origin's two directions.
pub struct Up {
    pub source: Source<ReadHalf<Box<dyn Leg>>>,
    pub sink: WriteHalf<Box<dyn Leg>>,
}

impl Up {
    pub fn new(leg: Box<dyn Leg>) -> Self {
        let (read, sink) = tokio::io::split(leg);
        Self { source: Source::new(read), sink }
    }

    /// Closes the socket in order.
    pub fn finish(self) {
        self.source.into_stream().unsplit(self.sink).finish();
    }
}

/// A side of which something was read to see what it is, from its start again.
pub struct Rewound {
    read: Vec<u8>,
    at: usize,
    leg: Box<dyn Leg>,
}

impl Rewound {
    pub fn new(read: Vec<u8>, leg: Box<dyn Leg>) -> Self {
        Self { read, at: 0, leg }
    }
}

impl Leg for Rewound {
    fn finish(&self) {
        self.leg.finish();
    }
}

impl AsyncRead for Rewound {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let left = self.read.get(self.at..).unwrap_or_default();
        if left.is_empty() {
            return Pin::new(&mut *self.leg).poll_read(cx, buf);
        }
        let take = left.len().min(buf.remaining());
        buf.put_slice(left.get(..take).unwrap_or_default());
        self.at += take;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewound {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.leg).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.leg).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.leg).poll_shutdown(cx)
    }
}
