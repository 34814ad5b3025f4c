//! The chunked transfer coding (RFC 9112 §7.1), decoded without trust: sizes in plain hexadecimal, every line ended by
//! CRLF, extensions and trailers bounded and thrown away.

use std::ops::Range;

use super::head::Malformed;

/// Bytes of one chunk's extensions.
const MAX_EXTENSION_BYTES: u32 = 1024;
/// Bytes of all trailer lines together.
const MAX_TRAILER_BYTES: u32 = 16 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Size { value: u64, digits: u8 },
    Extension { value: u64, bytes: u32 },
    SizeLf { value: u64 },
    Data { left: u64 },
    DataCr,
    DataLf,
    Trailer { bytes: u32, at_line_start: bool },
    TrailerLf { bytes: u32, last: bool },
    Done,
}

/// A decoder of one body.
#[derive(Clone, Debug)]
pub struct Decoder(State);

/// What a look at some input gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// How much of the input is used up.
    pub consumed: usize,
    /// Where in the used input body data lies; empty when more input is needed or the body is over.
    pub data: Range<usize>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self(State::Size { value: 0, digits: 0 })
    }
}

impl Decoder {
    /// Whether the last chunk and the trailers were read.
    pub fn is_done(&self) -> bool {
        self.0 == State::Done
    }

    /// Reads on until the next piece of data, the end of the body, or the end of the input.
    ///
    /// # Errors
    /// [`Malformed`] for anything that RFC 9112 §7.1 does not have.
    pub fn step(&mut self, input: &[u8]) -> Result<Step, Malformed> {
        const SIZE: Malformed = Malformed("a chunk size that is not hexadecimal or too large");
        const LINE: Malformed = Malformed("a line of the chunked coding does not end in CRLF");
        for (at, &byte) in input.iter().enumerate() {
            self.0 = match self.0 {
                State::Done => return Ok(Step { consumed: at, data: at..at }),
                State::Size { value, digits } => match (char::from(byte).to_digit(16), byte) {
                    // 15 digits: 2^60 is more than will ever pass, and nothing overflows.
                    (Some(digit), _) if digits < 15 => {
                        State::Size { value: value << 4 | u64::from(digit), digits: digits + 1 }
                    }
                    (None, b';') if digits > 0 => State::Extension { value, bytes: 0 },
                    (None, b'\r') if digits > 0 => State::SizeLf { value },
                    _ => return Err(SIZE),
                },
                State::Extension { value, bytes } => match byte {
                    b'\r' => State::SizeLf { value },
                    b'\n' | 0 => return Err(LINE),
                    _ if bytes == MAX_EXTENSION_BYTES => return Err(Malformed("chunk extensions too long")),
                    _ => State::Extension { value, bytes: bytes + 1 },
                },
                State::SizeLf { value } => match (byte, value) {
                    (b'\n', 0) => State::Trailer { bytes: 0, at_line_start: true },
                    (b'\n', left) => State::Data { left },
                    _ => return Err(LINE),
                },
                State::Data { left } => {
                    let there = input.len() - at;
                    let take = usize::try_from(left).map_or(there, |left| left.min(there));
                    let left = left - take as u64;
                    self.0 = if left == 0 { State::DataCr } else { State::Data { left } };
                    return Ok(Step { consumed: at + take, data: at..at + take });
                }
                State::DataCr => (byte == b'\r').then_some(State::DataLf).ok_or(LINE)?,
                State::DataLf => (byte == b'\n').then_some(State::Size { value: 0, digits: 0 }).ok_or(LINE)?,
                State::Trailer { bytes, at_line_start } => match byte {
                    b'\r' => State::TrailerLf { bytes, last: at_line_start },
                    b'\n' | 0 => return Err(LINE),
                    _ if bytes == MAX_TRAILER_BYTES => return Err(Malformed("trailers too long")),
                    _ => State::Trailer { bytes: bytes + 1, at_line_start: false },
                },
                State::TrailerLf { bytes, last } => match (byte, last) {
                    (b'\n', true) => State::Done,
                    (b'\n', false) => State::Trailer { bytes, at_line_start: true },
                    _ => return Err(LINE),
                },
            };
        }
        Ok(Step { consumed: input.len(), data: 0..0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Body and what follows it, the input given in pieces of `size` bytes.
    fn decode(input: &[u8], size: usize) -> Result<(Vec<u8>, usize), Malformed> {
        let mut decoder = Decoder::default();
        let (mut body, mut used) = (Vec::new(), 0);
        for piece in input.chunks(size) {
            let mut piece = piece;
            while !piece.is_empty() && !decoder.is_done() {
                let step = decoder.step(piece)?;
                body.extend_from_slice(&piece[step.data]);
                used += step.consumed;
                piece = &piece[step.consumed..];
            }
        }
        if decoder.is_done() { Ok((body, used)) } else { Err(Malformed("not whole")) }
    }

    #[test]
    fn a_body_is_decoded_wherever_it_is_cut() {
        let input = b"4\r\nWiki\r\n5;x=\"y\"\r\npedia\r\n00E\r\n in\r\n\r\nchunks.\r\n0\r\nT: a\r\nU: b\r\n\r\nnext";
        for size in 1..=input.len() {
            let (body, used) = decode(input, size).unwrap();
            assert_eq!(body, b"Wikipedia in\r\n\r\nchunks.");
            assert_eq!(&input[used..], b"next");
        }
    }

    #[test]
    fn what_a_neighbour_could_read_differently_is_refused() {
        let (long_extension, long_trailer) = ("x".repeat(2000), "x".repeat(20_000));
        for text in [
            "4\nWiki\r\n0\r\n\r\n",
            "4\r\nWiki\n0\r\n\r\n",
            "4\r\nWikix\r\n0\r\n\r\n",
            "4 \r\nWiki\r\n0\r\n\r\n",
            " 4\r\nWiki\r\n0\r\n\r\n",
            "+4\r\nWiki\r\n0\r\n\r\n",
            "-1\r\n\r\n",
            "0x4\r\nWiki\r\n0\r\n\r\n",
            "\r\nWiki\r\n",
            ";a\r\n\r\n",
            "4;a\nWiki\r\n0\r\n\r\n",
            "4\r\rWiki\r\n0\r\n\r\n",
            "FFFFFFFFFFFFFFFFF\r\n",
            "0\r\nT: a\n\r\n",
            "0\n\n",
            "0\r\n\n",
            "0\r\n",
            &format!("4;{long_extension}\r\nWiki\r\n0\r\n\r\n"),
            &format!("0\r\n{long_trailer}\r\n\r\n"),
        ] {
            assert!(decode(text.as_bytes(), 3).is_err(), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_stall(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..200)) {
            let mut decoder = Decoder::default();
            if let Ok(step) = decoder.step(&bytes) {
                assert!(step.consumed > 0 && step.data.end <= step.consumed);
            }
        }
    }
}
