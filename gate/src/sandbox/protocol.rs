//! What the gate and the sandbox's first process say to each other over two pipes.
//!
//! Gate to sandbox: one byte when the uid maps are written, the length-prefixed JSON of a [`Spec`], one byte to go. An
//! end of file before the last of them means that the gate is gone. Sandbox to gate: [`Status`] messages.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Descriptors of the first process, in the order in which the spawner lays them out.
pub const CONTROL_FD: i32 = 3;
pub const STATUS_FD: i32 = 4;
/// The sealed files, in the order of [`Spec::sealed`]; none outlives the building of the root.
pub const FIRST_SEALED_FD: i32 = 5;

/// The uid and gid inside. Outside it is one of the runner's range.
pub const INSIDE_ID: u32 = 65_534;

/// `argv[0]` of the second image of this binary.
pub const INIT_NAME: &str = "latchgate-sandbox-init";

/// Where a program finds the certificates to trust, when it is given any.
pub const TRUST_BUNDLE: &str = "/etc/ssl/latchgate/ca-bundle.pem";

/// What the program sees as `/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Root {
    /// The host's programs and libraries, read-only, with an `/etc` of the sandbox's own.
    Host,
    /// Nothing but what is sealed, `/dev`, `/proc` where permitted, and `/tmp`.
    Empty,
    /// The top-level entries of a directory, read-only. Its `dev`, `proc`, `sys`, `run` and `tmp` are not taken.
    Directory(PathBuf),
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Entry {
    HttpWorker,
    Command {
        argv: Vec<String>,
        env: Vec<(String, String)>,
    },
    /// The self-test's attempts, confined as a command is.
    Attempts,
}

impl Entry {
    /// Whether it has a root with programs in it, and a scratch directory.
    pub const fn has_directories(&self) -> bool {
        !matches!(self, Self::HttpWorker)
    }
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Spec {
    pub entry: Entry,
    pub root: Root,
    pub sealed: Vec<PathBuf>,
    /// The first of them is [`TRUST_BUNDLE`], and the root leaves a place for it.
    pub trust: bool,
    /// Sum of the sealed copies' sizes.
    pub sealed_bytes: u64,
    pub scratch_bytes: u64,
    pub processes: u32,
    /// Bound of each process, where no memory controller holds the leaf.
    pub process_memory_bytes: Option<u64>,
    /// For a program with a terminal; its entry is a command.
    #[serde(default)]
    pub session: Option<Session>,
    #[cfg(feature = "test-guards")]
    pub guards_off: u64,
}

/// What a program with a terminal has beside a command's root. Every path is seen where it is outside.
#[derive(Debug, Serialize, Deserialize)]
pub struct Session {
    /// The terminal's device.
    pub terminal: PathBuf,
    /// Where it starts; writable.
    pub directory: PathBuf,
    pub read_only: Vec<PathBuf>,
    pub writable: Vec<PathBuf>,
    /// Where the gate's socket is shown; the socket itself is the descriptor after the sealed files, a detached mount
    /// that the spawner made.
    pub socket: Option<PathBuf>,
    /// Sockets below what is shown: nothing is at their place inside.
    pub covered: Vec<PathBuf>,
    /// Whether abstract sockets of others are in its network namespace, so that nothing but Landlock's scope is before
    /// them.
    pub scope_needed: bool,
}

/// Where the making of a sandbox failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// clone3 with namespaces into the leaf.
    Clone = 1,
    /// Writing the uid and gid maps.
    IdMap = 2,
    /// Taking the uid inside.
    Identity = 3,
    /// Executing the second image.
    Image = 4,
    /// Reading what to run.
    Spec = 5,
    /// Building the root.
    Root = 6,
    /// The sealed copies.
    Sealed = 7,
    /// Leaving the host's root.
    Pivot = 8,
    /// Resource limits.
    Limits = 9,
    /// Giving up capabilities.
    Capabilities = 10,
    Landlock = 11,
    Seccomp = 12,
    /// Parent-death signal and reaping.
    Reaper = 13,
    /// The gate's sockets in the network namespace.
    Network = 14,
}

impl Stage {
    const ALL: [Self; 14] = [
        Self::Clone,
        Self::IdMap,
        Self::Identity,
        Self::Image,
        Self::Spec,
        Self::Root,
        Self::Sealed,
        Self::Pivot,
        Self::Limits,
        Self::Capabilities,
        Self::Landlock,
        Self::Seccomp,
        Self::Reaper,
        Self::Network,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|stage| *stage as u8 == byte)
    }
}

/// A message of the first process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Confined, and the parent-death signal is set: waiting to be let go.
    Ready,
    /// The making failed.
    Failed {
        stage: Stage,
        errno: i32,
        detail: String,
    },
    /// The program could not be executed.
    ExecFailed {
        errno: i32,
    },
    /// The program's own end, as `wait` has it.
    Exited {
        code: i32,
    },
    Signalled {
        signal: i32,
    },
}

/// Tag, stage, length of the detail, value; the detail follows.
pub const HEADER_BYTES: usize = 8;
const DETAIL_MAX_BYTES: usize = 512;

impl Status {
    pub fn encode(&self) -> Vec<u8> {
        let (tag, stage, value, detail): (u8, u8, i32, &str) = match self {
            Self::Ready => (b'R', 0, 0, ""),
            Self::Failed { stage, errno, detail } => (b'F', *stage as u8, *errno, detail),
            Self::ExecFailed { errno } => (b'X', 0, *errno, ""),
            Self::Exited { code } => (b'C', 0, *code, ""),
            Self::Signalled { signal } => (b'S', 0, *signal, ""),
        };
        let detail = detail.as_bytes();
        let detail = detail.get(..DETAIL_MAX_BYTES).unwrap_or(detail);
        let length = u16::try_from(detail.len()).unwrap_or(0);
        let mut out = vec![tag, stage];
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&value.to_le_bytes());
        out.extend_from_slice(detail);
        out
    }

    /// Takes one message off the front of `buffer`. `None`: not all of it is there yet. `Some(None)`: no message.
    pub fn take(buffer: &mut Vec<u8>) -> Option<Option<Self>> {
        let header: [u8; HEADER_BYTES] = buffer.get(..HEADER_BYTES)?.try_into().ok()?;
        let [tag, stage, l0, l1, v0, v1, v2, v3] = header;
        let end = HEADER_BYTES + usize::from(u16::from_le_bytes([l0, l1]));
        let detail = String::from_utf8_lossy(buffer.get(HEADER_BYTES..end)?).into_owned();
        let value = i32::from_le_bytes([v0, v1, v2, v3]);
        buffer.drain(..end);
        Some(match tag {
            b'R' => Some(Self::Ready),
            b'F' => Stage::from_byte(stage).map(|stage| Self::Failed { stage, errno: value, detail }),
            b'X' => Some(Self::ExecFailed { errno: value }),
            b'C' => Some(Self::Exited { code: value }),
            b'S' => Some(Self::Signalled { signal: value }),
            _ => None,
        })
    }

    /// A failure before the second image runs, made without allocating.
    pub const fn bare_failure(stage: Stage, errno: i32) -> [u8; HEADER_BYTES] {
        let [a, b, c, d] = errno.to_le_bytes();
        [b'F', stage as u8, 0, 0, a, b, c, d]
    }
}

/// The bytes of a spec on the control pipe.
pub fn encode_spec(spec: &Spec) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(spec)?;
    let length = u32::try_from(json.len()).map_err(io::Error::other)?;
    let mut out = length.to_le_bytes().to_vec();
    out.write_all(&json)?;
    Ok(out)
}

/// Reads a spec. An end of file in it is an error: the gate is gone.
pub fn read_spec(control: &mut impl Read) -> io::Result<Spec> {
    let mut length = [0; 4];
    control.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
    let mut json = vec![0; length];
    control.read_exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_come_back_whole_whatever_the_cut() {
        let sent = [
            Status::Ready,
            Status::Failed { stage: Stage::Root, errno: 13, detail: "/usr: open_tree".into() },
            Status::ExecFailed { errno: 2 },
            Status::Exited { code: 255 },
            Status::Signalled { signal: 9 },
        ];
        let wire: Vec<u8> = sent.iter().flat_map(Status::encode).collect();
        for chunk in 1..wire.len() {
            let (mut buffer, mut got) = (Vec::new(), Vec::new());
            for piece in wire.chunks(chunk) {
                buffer.extend_from_slice(piece);
                while let Some(status) = Status::take(&mut buffer) {
                    got.push(status.unwrap());
                }
            }
            assert_eq!(got, sent);
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn what_is_no_status_is_named_so() {
        for bytes in [[0_u8; HEADER_BYTES], [b'F', 99, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(Status::take(&mut bytes.to_vec()), Some(None));
        }
        assert_eq!(
            Status::take(&mut Status::bare_failure(Stage::Identity, 1).to_vec()),
            Some(Some(Status::Failed { stage: Stage::Identity, errno: 1, detail: String::new() }))
        );
    }

    #[test]
    fn every_stage_has_its_byte() {
        for stage in Stage::ALL {
            assert_eq!(Stage::from_byte(stage as u8), Some(stage));
        }
    }
}
