//! A stream whose other end must read what it is sent: an answer that is not taken is memory that is not given back.
//!
//! While writing does not go on, time is counted, from the moment that everything before was taken; past
//! [`Patient::new`]'s limit, and a second more for every [`MIN_BYTES_PER_SECOND`] that were taken meanwhile, the
//! connection is broken off. So neither one that reads nothing nor one that reads a byte now and then holds an answer.
//!
//! A connection that became a session's is another matter: its user may pause the terminal for as long as they like, and
//! the session holds little meanwhile. [`Patience::without_end`] is for whoever takes such a connection over.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// The slowest reader that is waited for, beside the limit of time.
pub const MIN_BYTES_PER_SECOND: u64 = 16 << 10;

/// Whether a stream's other end is waited for without end; each request has that of its connection.
#[derive(Clone, Debug, Default)]
pub struct Patience(Arc<AtomicBool>);

impl Patience {
    /// From now on the stream waits. Whoever calls this bounds what is written by itself.
    pub fn without_end(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The stream.
pub struct Patient<S> {
    inner: S,
    limit: Duration,
    patience: Patience,
    /// What was taken since the last time that nothing was left.
    taken: u64,
    waiting: Option<Waiting>,
}

struct Waiting {
    since: Instant,
    alarm: Pin<Box<Sleep>>,
}

impl<S> Patient<S> {
    /// `limit`: how long the other end may take nothing.
    pub fn new(inner: S, limit: Duration) -> Self {
        Self { inner, limit, patience: Patience::default(), taken: 0, waiting: None }
    }

    pub fn patience(&self) -> Patience {
        self.patience.clone()
    }

    /// Waits with the inner stream; an error once that was too long.
    fn wait<T>(&mut self, context: &mut Context<'_>) -> Poll<io::Result<T>> {
        if self.patience.0.load(Ordering::Relaxed) {
            return Poll::Pending;
        }
        let limit =
            self.limit.saturating_add(Duration::from_millis(self.taken.saturating_mul(1000) / MIN_BYTES_PER_SECOND));
        let waiting = self.waiting.get_or_insert_with(|| {
            let since = Instant::now();
            Waiting { since, alarm: Box::pin(tokio::time::sleep_until(since + limit)) }
        });
        let end = waiting.since + limit;
        if waiting.alarm.deadline() != end {
            waiting.alarm.as_mut().reset(end);
        }
        ready!(waiting.alarm.as_mut().poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the answer was not read in time")))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.inner).poll_write(context, data) {
            Poll::Pending => self.wait(context),
            Poll::Ready(written) => {
                if let Ok(written) = &written {
                    self.taken = self.taken.saturating_add(*written as u64);
                    // All of it went at once: nobody is waited for.
                    if *written == data.len() {
                        (self.taken, self.waiting) = (0, None);
                    }
                }
                Poll::Ready(written)
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.inner).poll_flush(context) {
            Poll::Pending => self.wait(context),
            done => done,
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.inner).poll_shutdown(context) {
            Poll::Pending => self.wait(context),
            done => done,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, into)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(400);

    #[tokio::test]
    async fn who_reads_nothing_is_waited_for_once() {
        let (mine, _theirs) = tokio::io::duplex(1024);
        let mut stream = Patient::new(mine, LIMIT);
        let began = Instant::now();
        let error = stream.write_all(&[0; 4096]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!((LIMIT..LIMIT * 5).contains(&began.elapsed()), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn who_is_waited_for_without_end_may_read_when_he_likes() {
        let (mine, mut theirs) = tokio::io::duplex(1024);
        let mut stream = Patient::new(mine, LIMIT);
        stream.patience().without_end();
        let late = async {
            tokio::time::sleep(LIMIT * 3).await;
            theirs.read_exact(&mut [0; 4096]).await.unwrap();
        };
        let (written, ()) = tokio::join!(stream.write_all(&[0; 4096]), late);
        written.unwrap();
    }

    #[tokio::test]
    async fn a_byte_now_and_then_is_not_reading() {
        let (mine, mut theirs) = tokio::io::duplex(1024);
        let mut stream = Patient::new(mine, LIMIT);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(60)).await;
                if theirs.read_u8().await.is_err() {
                    return;
                }
            }
        });
        let began = Instant::now();
        assert_eq!(stream.write_all(&[0; 4096]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() < LIMIT * 6, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_slow_reader_of_a_large_answer_gets_all_of_it() {
        let (mine, mut theirs) = tokio::io::duplex(64 << 10);
        let mut stream = Patient::new(mine, LIMIT);
        let size = 1 << 20;
        let reader = tokio::spawn(async move {
            let (mut read, mut chunk) = (0, vec![0; 64 << 10]);
            while read < size {
                tokio::time::sleep(Duration::from_millis(40)).await;
                read += theirs.read(&mut chunk).await.unwrap();
            }
            read
        });
        let began = Instant::now();
        stream.write_all(&vec![0; size]).await.unwrap();
        assert!(began.elapsed() > LIMIT, "it took longer than one that reads nothing may");
        assert_eq!(reader.await.unwrap(), size);
    }

    #[tokio::test]
    async fn waiting_for_one_answer_does_not_count_for_the_next() {
        let (mine, mut theirs) = tokio::io::duplex(1024);
        let mut stream = Patient::new(mine, LIMIT);
        for _ in 0..4 {
            let late = async {
                tokio::time::sleep(LIMIT / 2).await;
                theirs.read_exact(&mut [0; 2048]).await.unwrap();
            };
            let (written, ()) = tokio::join!(stream.write_all(&[0; 2048]), late);
            written.unwrap();
        }
    }
}
