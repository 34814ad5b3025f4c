//! Sockets that count what passes, know when it last did, and end an execution that sends too much.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// The bytes that all connections of one execution may still carry on the sandbox leg, both ways together.
#[derive(Debug)]
pub struct Budget(AtomicU64);

impl Budget {
    pub fn new(bytes: u64) -> Self {
        Self(AtomicU64::new(bytes))
    }

    /// Takes up to `wanted` bytes; 0 when nothing is left.
    fn take(&self, wanted: usize) -> usize {
        let mut taken = 0;
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            taken = usize::try_from(left).map_or(wanted, |left| left.min(wanted));
            Some(left - taken as u64)
        });
        taken
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// The payload bytes of one connection's two sockets, and when any of them last moved.
#[derive(Debug)]
pub struct Counts {
    start: Instant,
    last_activity_ms: AtomicU64,
    over_budget: AtomicBool,
    pub from_sandbox: AtomicU64,
    pub to_sandbox: AtomicU64,
    pub from_upstream: AtomicU64,
    pub to_upstream: AtomicU64,
}

impl Counts {
    pub fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            start: Instant::now(),
            last_activity_ms: zero(),
            over_budget: AtomicBool::new(false),
            from_sandbox: zero(),
            to_sandbox: zero(),
            from_upstream: zero(),
            to_upstream: zero(),
        }
    }

    pub fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Returns when nothing has passed for `limit`.
    pub async fn idle(&self, limit: Duration) {
        loop {
            let last = self.start + Duration::from_millis(self.last_activity_ms.load(Ordering::Relaxed));
            if last.elapsed() >= limit {
                return;
            }
            tokio::time::sleep_until(last + limit).await;
        }
    }

    /// Whether this connection was refused a byte because its execution has none left.
    pub fn is_over_budget(&self) -> bool {
        self.over_budget.load(Ordering::Relaxed)
    }

    fn spent(&self) -> io::Error {
        self.over_budget.store(true, Ordering::Relaxed);
        io::Error::new(io::ErrorKind::QuotaExceeded, "the execution has reached its limit of bytes")
    }

    fn moved(&self, counter: &AtomicU64, bytes: usize) {
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        self.last_activity_ms.store(self.elapsed_ms(), Ordering::Relaxed);
    }
}

/// One of the two sockets. Dropped before [`Counted::finish`] it is reset, not closed, so that what was cut never looks
/// like what was whole.
#[derive(Debug)]
pub struct Counted {
    stream: TcpStream,
    counts: Arc<Counts>,
    /// Present on the sandbox leg.
    budget: Option<Arc<Budget>>,
}

impl Counted {
    pub fn sandbox(stream: TcpStream, counts: Arc<Counts>, budget: Arc<Budget>) -> Self {
        reset_on_drop(&stream);
        Self { stream, counts, budget: Some(budget) }
    }

    pub fn upstream(stream: TcpStream, counts: Arc<Counts>) -> Self {
        reset_on_drop(&stream);
        Self { stream, counts, budget: None }
    }

    /// Says that all was sent: the socket is closed in order when it is dropped.
    pub fn finish(&self) {
        let _ = rustix::net::sockopt::set_socket_linger(&self.stream, None);
    }

    fn read_counter(&self) -> &AtomicU64 {
        if self.budget.is_some() { &self.counts.from_sandbox } else { &self.counts.from_upstream }
    }

    fn write_counter(&self) -> &AtomicU64 {
        if self.budget.is_some() { &self.counts.to_sandbox } else { &self.counts.to_upstream }
    }
}

fn reset_on_drop(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = stream.set_zero_linger();
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Some(budget) = self.budget.clone().filter(|_| buf.remaining() > 0) else {
            let before = buf.filled().len();
            ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
            self.counts.moved(self.read_counter(), buf.filled().len() - before);
            return Poll::Ready(Ok(()));
        };
        let granted = budget.take(buf.remaining());
        if granted == 0 {
            return Poll::Ready(Err(self.counts.spent()));
        }
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(granted));
        let polled = Pin::new(&mut self.stream).poll_read(cx, &mut part);
        let read = part.filled().len();
        budget.give_back(granted - read);
        ready!(polled)?;
        buf.advance(read);
        self.counts.moved(self.read_counter(), read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let wanted = match &self.budget {
            Some(budget) if !data.is_empty() => match budget.take(data.len()) {
                0 => return Poll::Ready(Err(self.counts.spent())),
                granted => granted,
            },
            _ => data.len(),
        };
        let polled = Pin::new(&mut self.stream).poll_write(cx, data.get(..wanted).unwrap_or(data));
        let written = match &polled {
            Poll::Ready(Ok(written)) => *written,
            _ => 0,
        };
        if let Some(budget) = &self.budget {
            budget.give_back(wanted - written);
        }
        if written > 0 {
            self.counts.moved(self.write_counter(), written);
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
