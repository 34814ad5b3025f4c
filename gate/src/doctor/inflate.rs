//! gzip (RFC 1952) and DEFLATE (RFC 1951), for `/proc/config.gz` and nothing else: the whole of it at once, and bounded.

/// No kernel's configuration is longer.
const MAX_BYTES: usize = 4 << 20;

const LENGTH_BASE: [u16; 29] =
    [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
const LENGTH_BITS: [u8; 29] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const DISTANCE_BASE: [u16; 30] = [
    1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145,
    8193, 12289, 16385, 24577,
];
const CODE_ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

/// The text of a gzip file without optional fields, which is how the kernel writes it. `None` for anything else.
pub fn gunzip(bytes: &[u8]) -> Option<Vec<u8>> {
    let [0x1f, 0x8b, 8, flags, ..] = bytes else { return None };
    let name = if flags & 8 != 0 { bytes.get(10..)?.iter().position(|&byte| byte == 0)? + 1 } else { 0 };
    if flags & !8 != 0 {
        return None;
    }
    inflate(bytes.get(10 + name..)?)
}

struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn bit(&mut self) -> Option<u16> {
        let byte = self.bytes.get(self.at / 8)?;
        let bit = byte >> (self.at % 8) & 1;
        self.at += 1;
        Some(bit.into())
    }

    /// Least significant bit first.
    fn take(&mut self, count: u8) -> Option<u16> {
        (0..count).try_fold(0, |value, place| Some(value | self.bit()? << place))
    }
}

/// A canonical Huffman code: how many codes there are of each length, and the symbols in their order.
struct Code {
    counts: [u16; 16],
    symbols: Vec<u16>,
}

impl Code {
    fn of(lengths: &[u8]) -> Option<Self> {
        let mut counts = [0; 16];
        for &length in lengths.iter().filter(|&&length| length > 0) {
            *counts.get_mut(usize::from(length))? += 1;
        }
        let mut symbols: Vec<u16> = (0..u16::try_from(lengths.len()).ok()?).collect();
        let length_of = |symbol: &u16| lengths.get(usize::from(*symbol)).copied().unwrap_or(0);
        symbols.retain(|symbol| length_of(symbol) > 0);
        symbols.sort_by_key(length_of);
        Some(Self { counts, symbols })
    }

    fn read(&self, bits: &mut Bits<'_>) -> Option<u16> {
        let (mut code, mut first, mut index) = (0_u32, 0_u32, 0_u32);
        for &count in self.counts.iter().skip(1) {
            code |= u32::from(bits.bit()?);
            let count = u32::from(count);
            if code < first + count {
                return self.symbols.get(usize::try_from(index + code - first).ok()?).copied();
            }
            index += count;
            first = (first + count) << 1;
            code <<= 1;
        }
        None
    }
}

fn inflate(bytes: &[u8]) -> Option<Vec<u8>> {
    let (mut bits, mut out) = (Bits { bytes, at: 0 }, Vec::new());
    loop {
        let last = bits.bit()? == 1;
        match bits.take(2)? {
            0 => stored(&mut bits, &mut out)?,
            1 => {
                let lengths: Vec<u8> = (0..288)
                    .map(|symbol| match symbol {
                        144..=255 => 9,
                        256..=279 => 7,
                        _ => 8,
                    })
                    .collect();
                coded(&mut bits, &mut out, &Code::of(&lengths)?, &Code::of(&[5; 30])?)?;
            }
            2 => {
                let (symbols, distances) = own_codes(&mut bits)?;
                coded(&mut bits, &mut out, &symbols, &distances)?;
            }
            _ => return None,
        }
        if out.len() > MAX_BYTES {
            return None;
        }
        if last {
            return Some(out);
        }
    }
}

fn stored(bits: &mut Bits<'_>, out: &mut Vec<u8>) -> Option<()> {
    bits.at = bits.at.div_ceil(8) * 8;
    let (length, complement) = (bits.take(16)?, bits.take(16)?);
    if length != !complement {
        return None;
    }
    let start = bits.at / 8;
    out.extend_from_slice(bits.bytes.get(start..start + usize::from(length))?);
    bits.at += usize::from(length) * 8;
    Some(())
}

fn own_codes(bits: &mut Bits<'_>) -> Option<(Code, Code)> {
    let (symbols, distances) = (usize::from(bits.take(5)?) + 257, usize::from(bits.take(5)?) + 1);
    let mut lengths = [0; 19];
    for place in CODE_ORDER.iter().take(usize::from(bits.take(4)?) + 4) {
        *lengths.get_mut(*place)? = u8::try_from(bits.take(3)?).ok()?;
    }
    let code = Code::of(&lengths)?;
    let mut lengths: Vec<u8> = Vec::new();
    while lengths.len() < symbols + distances {
        let (length, times) = match code.read(bits)? {
            16 => (*lengths.last()?, 3 + bits.take(2)?),
            17 => (0, 3 + bits.take(3)?),
            18 => (0, 11 + bits.take(7)?),
            length => (u8::try_from(length).ok()?, 1),
        };
        lengths.extend(std::iter::repeat_n(length, usize::from(times)));
    }
    Some((Code::of(lengths.get(..symbols)?)?, Code::of(lengths.get(symbols..symbols + distances)?)?))
}

fn coded(bits: &mut Bits<'_>, out: &mut Vec<u8>, symbols: &Code, distances: &Code) -> Option<()> {
    while out.len() <= MAX_BYTES {
        let symbol = symbols.read(bits)?;
        match symbol {
            0..=255 => out.push(u8::try_from(symbol).ok()?),
            256 => return Some(()),
            _ => {
                let at = usize::from(symbol - 257);
                let length = LENGTH_BASE.get(at)? + bits.take(*LENGTH_BITS.get(at)?)?;
                let at = distances.read(bits)?;
                let more = bits.take(u8::try_from((at / 2).saturating_sub(1)).ok()?)?;
                let distance = usize::from(*DISTANCE_BASE.get(usize::from(at))?) + usize::from(more);
                let from = out.len().checked_sub(distance)?;
                // It may run into what it has just written.
                for at in from..from + usize::from(length) {
                    out.push(*out.get(at)?);
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_gzip_wrote() {
        // `printf 'CONFIG_BPF=y\nCONFIG_BPF=y\nCONFIG_BPF=y\n' | gzip -9n`: one block of the fixed codes, with a repeat.
        let packed = crate::hash::unhex(PACKED).unwrap();
        assert_eq!(gunzip(&packed).unwrap(), b"CONFIG_BPF=y\n".repeat(3));
        for cut in 0..packed.len() - 8 {
            let _ = gunzip(&packed[..cut]);
        }
        assert_eq!(gunzip(b"\x1f\x8b\x08\x04aaaaaaaaaaaaaaaa"), None);
        assert_eq!(gunzip(b"no"), None);
    }

    #[test]
    fn reads_this_kernel_s_own_where_it_shows_one() {
        if let Ok(packed) = std::fs::read("/proc/config.gz") {
            let text = String::from_utf8(gunzip(&packed).unwrap()).unwrap();
            assert!(text.contains("\nCONFIG_BPF_SYSCALL=y\n"), "{}", &text[..200]);
        }
    }

    const PACKED: &str = "1f8b080000000000020373f6f773f3748f770a70b3ade472c6c90100cfce783727000000";
}
