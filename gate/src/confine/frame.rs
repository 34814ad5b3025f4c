//! What client and gate say to each other once a session's connection is theirs: frames of a type (one byte), a length
//! (four bytes, little-endian) and so many bytes.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes of one frame.
pub const MAX_BYTES: usize = 64 << 10;

/// Upgrades an HTTP/1.1 connection to these frames.
pub const PROTOCOL: &str = "latchgate-session/1";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// To the gate: what is typed.
    Input(Vec<u8>),
    /// To the gate: rows and columns.
    Resize(u16, u16),
    /// To the gate: the number of a signal for what is in the foreground.
    Signal(u8),
    /// To the client: what the program wrote.
    Output(Vec<u8>),
    /// To the client, the last one: how it ended, as JSON.
    Ended(Vec<u8>),
}

impl Frame {
    fn parts(&self) -> (u8, Vec<u8>) {
        match self {
            Self::Input(bytes) => (b'i', bytes.clone()),
            Self::Resize(rows, columns) => (b'r', [rows.to_le_bytes(), columns.to_le_bytes()].concat()),
            Self::Signal(number) => (b's', vec![*number]),
            Self::Output(bytes) => (b'o', bytes.clone()),
            Self::Ended(bytes) => (b'e', bytes.clone()),
        }
    }

    fn of(kind: u8, bytes: Vec<u8>) -> Option<Self> {
        Some(match (kind, bytes.as_slice()) {
            (b'i', _) => Self::Input(bytes),
            (b'r', [a, b, c, d]) => Self::Resize(u16::from_le_bytes([*a, *b]), u16::from_le_bytes([*c, *d])),
            (b's', [number]) => Self::Signal(*number),
            (b'o', _) => Self::Output(bytes),
            (b'e', _) => Self::Ended(bytes),
            _ => return None,
        })
    }

    fn append_to(&self, wire: &mut Vec<u8>) {
        let (kind, bytes) = self.parts();
        wire.push(kind);
        // One that does not fit its length is refused by whoever reads it.
        wire.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        wire.extend_from_slice(&bytes);
    }

    /// # Errors
    /// Those of the connection.
    pub async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        let mut wire = Vec::new();
        self.append_to(&mut wire);
        to.write_all(&wire).await?;
        to.flush().await
    }

    /// The next one; `None` when the other side has closed between two.
    ///
    /// # Errors
    /// Those of the connection, and what is no frame.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let kind = match from.read_u8().await {
            Ok(kind) => kind,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = usize::try_from(from.read_u32_le().await?).unwrap_or(usize::MAX);
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        if length > MAX_BYTES {
            return Err(invalid("a frame that is too long"));
        }
        let mut bytes = vec![0; length];
        from.read_exact(&mut bytes).await?;
        Self::of(kind, bytes).map(Some).ok_or_else(|| invalid("no frame of a session"))
    }
}

/// Frames on their way to somebody who may take none for a while. Whoever gives up waiting leaves no half of a frame behind:
/// what is not sent stays here, before whatever comes next.
pub struct Outbox<W> {
    to: W,
    unsent: Vec<u8>,
}

impl<W: AsyncWrite + Unpin> Outbox<W> {
    pub const fn new(to: W) -> Self {
        Self { to, unsent: Vec::new() }
    }

    pub fn put(&mut self, frame: &Frame) {
        frame.append_to(&mut self.unsent);
    }

    /// Waits until everything is sent. May be given up at any point.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.to.write(&self.unsent).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                sent => drop(self.unsent.drain(..sent)),
            }
        }
        self.to.flush().await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn what_was_given_up_in_the_middle_is_sent_before_the_next() {
        let (to, mut from) = tokio::io::duplex(100);
        let mut outbox = Outbox::new(to);
        let frames = [Frame::Output(vec![b'x'; 1000]), Frame::Ended(b"{}".to_vec())];
        outbox.put(&frames[0]);
        assert!(tokio::time::timeout(Duration::from_millis(20), outbox.send()).await.is_err(), "nobody reads");
        outbox.put(&frames[1]);
        let sent = tokio::spawn(async move { outbox.send().await });
        for frame in frames {
            assert_eq!(Frame::read(&mut from).await.unwrap(), Some(frame));
        }
        sent.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn frames_come_back_as_they_were() {
        let frames = [
            Frame::Input(b"ls\r".to_vec()),
            Frame::Resize(24, 80),
            Frame::Signal(15),
            Frame::Output(Vec::new()),
            Frame::Ended(b"{}".to_vec()),
        ];
        let mut wire = Vec::new();
        for frame in &frames {
            frame.write(&mut wire).await.unwrap();
        }
        let mut from = wire.as_slice();
        for frame in frames {
            assert_eq!(Frame::read(&mut from).await.unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut from).await.unwrap(), None);
    }

    #[tokio::test]
    async fn what_is_no_frame_is_refused() {
        for wire in [&b"x\0\0\0\0"[..], b"r\x01\0\0\0a", b"i\xff\xff\xff\xff", b"i\x05\0\0\0ab", b"i\x05"] {
            assert!(Frame::read(&mut &*wire).await.is_err(), "{wire:?}");
        }
    }
}
