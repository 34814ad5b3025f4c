//! A buffered reader of heads and bodies, with one bounded buffer.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

use super::chunked;
use super::head::{Framing, MAX_HEAD_BYTES, Malformed, end_of_head};

const BUFFER_BYTES: usize = 16 * 1024;

/// Why no message, or no more of it, could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the connection ended in the middle of a message")]
    Ended,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A stream and what was read of it but not yet used.
#[derive(Debug)]
pub struct Source<S> {
    stream: S,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl<S: AsyncRead + Unpin> Source<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, buffer: vec![0; BUFFER_BYTES], start: 0, end: 0 }
    }

    /// The stream back, without what was read of it and not used.
    pub fn into_stream(self) -> S {
        self.stream
    }

    /// The next head, its empty line included; `None` when the stream ends before its first byte.
    ///
    /// # Errors
    /// [`ReadError`], and `Malformed` for a head of more than [`MAX_HEAD_BYTES`].
    pub async fn head(&mut self) -> Result<Option<Vec<u8>>, ReadError> {
        let mut scanned = 0;
        loop {
            let pending = self.pending();
            if let Some(length) = end_of_head(pending, scanned)? {
                let head = pending.get(..length).unwrap_or_default().to_vec();
                self.consume(length);
                return Ok(Some(head));
            }
            scanned = pending.len();
            if scanned >= MAX_HEAD_BYTES {
                return Err(Malformed("the head is too long").into());
            }
            if self.fill().await? == 0 {
                return if scanned == 0 { Ok(None) } else { Err(ReadError::Ended) };
            }
        }
    }

    /// What is there, after waiting for at least one byte; empty at the end of the stream.
    ///
    /// # Errors
    /// Of the stream.
    pub async fn some(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            self.fill().await?;
        }
        Ok(self.pending())
    }

    /// Marks bytes that [`Source::some`] showed as used.
    pub fn consume(&mut self, bytes: usize) {
        self.start = (self.start + bytes).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Reads more behind what is there; 0 at the end of the stream. Whoever calls it bounds how much is kept.
    ///
    /// # Errors
    /// Of the stream.
    pub async fn more(&mut self) -> io::Result<usize> {
        self.fill().await
    }

    /// What was read and not used.
    pub fn pending(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    async fn fill(&mut self) -> io::Result<usize> {
        if self.end == self.buffer.len() {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            } else {
                // Only a head, or a hello, is ever kept while more is read, and their readers stop at their limits.
                self.buffer.resize(self.buffer.len() * 2, 0);
            }
        }
        let space = self.buffer.get_mut(self.end..).unwrap_or_default();
        let read = self.stream.read(space).await?;
        self.end += read;
        Ok(read)
    }
}

/// A body that is being read from a [`Source`].
#[derive(Debug)]
pub enum Body {
    Length(u64),
    Chunked(chunked::Decoder),
    UntilClose,
}

impl Body {
    pub fn new(framing: Framing) -> Self {
        match framing {
            Framing::None => Self::Length(0),
            Framing::Length(bytes) => Self::Length(bytes),
            Framing::Chunked => Self::Chunked(chunked::Decoder::default()),
            Framing::UntilClose => Self::UntilClose,
        }
    }

    /// Appends the next piece to `out`; false when the body is over.
    ///
    /// # Errors
    /// [`ReadError`]: a body that ends too early is `Ended`.
    pub async fn next<S: AsyncRead + Unpin>(
        &mut self,
        source: &mut Source<S>,
        out: &mut Vec<u8>,
    ) -> Result<bool, ReadError> {
        match self {
            Self::Length(0) => Ok(false),
            Self::Length(left) => {
                let pending = source.some().await?;
                if pending.is_empty() {
                    return Err(ReadError::Ended);
                }
                let take = usize::try_from(*left).map_or(pending.len(), |left| left.min(pending.len()));
                out.extend_from_slice(pending.get(..take).unwrap_or_default());
                source.consume(take);
                *left -= take as u64;
                Ok(true)
            }
            Self::Chunked(decoder) => {
                while !decoder.is_done() {
                    let pending = source.some().await?;
                    if pending.is_empty() {
                        return Err(ReadError::Ended);
                    }
                    let step = decoder.step(pending)?;
                    let data = pending.get(step.data).unwrap_or_default();
                    let found = !data.is_empty();
                    out.extend_from_slice(data);
                    source.consume(step.consumed);
                    if found {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Self::UntilClose => {
                let pending = source.some().await?;
                let length = pending.len();
                out.extend_from_slice(pending);
                source.consume(length);
                Ok(length > 0)
            }
        }
    }
}
