//! Real executions in real leaves: what is inside, what is refused, and that everything ends.
//!
//! Needs root (or the capabilities that the gate has), a v2 hierarchy, `/bin/sh` and `/usr/bin/perl`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

mod inside;
mod lifetime;
mod limits;
mod network;
mod refused;
mod trust;

use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use latchgate::sandbox::{
    CgroupTree, Completed, Exit, Job, Leaf, Limits, NamespaceListeners, Network, Program, Root, Runner, RunnerConfig,
    SandboxError, SealedFile,
};

const UID_BASE: u32 = 2_000_000;
const UIDS: u32 = 64;

fn tree() -> &'static CgroupTree {
    static TREE: OnceLock<CgroupTree> = OnceLock::new();
    TREE.get_or_init(|| {
        let tree = CgroupTree::open(None, &format!("test-{}", std::process::id())).unwrap();
        // What earlier runs of this suite left.
        for old in std::fs::read_dir(tree.gate().ancestors().nth(2).unwrap()).unwrap().flatten() {
            let name = old.file_name().into_string().unwrap();
            let pid = name.rsplit_once('-').map_or("self", |(_, pid)| pid);
            if name.starts_with("test-") && !Path::new("/proc").join(pid).exists() {
                for part in ["actions", "gate", ""] {
                    let _ = std::fs::remove_dir(old.path().join(part));
                }
            }
        }
        tree
    })
}

fn runner() -> Runner {
    static RUNNER: OnceLock<Runner> = OnceLock::new();
    RUNNER.get_or_init(|| make_runner(UIDS)).clone()
}

fn make_runner(uid_count: u32) -> Runner {
    Runner::new(RunnerConfig {
        uid_base: UID_BASE,
        uid_count,
        executable: env!("CARGO_BIN_EXE_latchgate").into(),
        protected: vec!["/var/lib/latchgate".into(), "/run/latchgate".into()],
    })
    .unwrap()
}

const LIMITS: Limits = Limits {
    memory_bytes: 256 << 20,
    timeout: Duration::from_secs(20),
    stdout_bytes: 1 << 20,
    stderr_bytes: 64 << 10,
    processes: 32,
    scratch_bytes: 4 << 20,
};

fn command(argv: &[&str]) -> Job {
    Job {
        program: Program::Command {
            argv: argv.iter().map(|&text| text.to_owned()).collect(),
            env: Vec::new(),
            files: Vec::new(),
            root: Root::Host,
        },
        stdin: Vec::new(),
        limits: LIMITS,
        network: Network::Shared,
        trust_pem: None,
    }
}

fn shell(script: &str) -> Job {
    command(&["/bin/sh", "-c", script])
}

fn perl(script: &str) -> Job {
    command(&["/usr/bin/perl", "-e", script])
}

async fn run_in(leaf: &Leaf, job: Job) -> Completed {
    runner().run(leaf, job, pending()).await.unwrap()
}

async fn run(job: Job) -> Completed {
    let leaf = tree().leaf().unwrap();
    let done = run_in(&leaf, job).await;
    assert_eq!(std::fs::read_to_string(leaf.path().join("cgroup.procs")).unwrap(), "", "something is left");
    leaf.remove().unwrap();
    done
}

const TCP_PORT: u16 = 18_080;
const UDP_BASE: u16 = 18_053;
const UDP_SLOTS: u16 = 8;

/// The same in a network namespace of its own.
fn isolated(mut job: Job) -> Job {
    job.network = Network::Isolated { tcp_port: TCP_PORT, udp_base: Some(UDP_BASE), udp_slots: UDP_SLOTS };
    job
}

/// Runs an isolated job whose listeners `serve` gets.
async fn run_isolated(job: Job, serve: impl FnOnce(NamespaceListeners)) -> Completed {
    let leaf = tree().leaf().unwrap();
    let take = async |listeners| -> Result<(), String> {
        serve(listeners);
        Ok(())
    };
    let done = runner().run_with(&leaf, isolated(job), take, pending()).await.unwrap();
    assert_eq!(std::fs::read_to_string(leaf.path().join("cgroup.procs")).unwrap(), "", "something is left");
    leaf.remove().unwrap();
    done
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn output(job: Job) -> String {
    let done = run(job).await;
    assert_eq!(done.exit, Exit::Code(0), "{}{}", text(&done.stdout), text(&done.stderr));
    text(&done.stdout)
}

/// A static executable that writes the file at `path` to its output; its exit code is 1 if that cannot be opened.
fn cat_elf(path: &str) -> Vec<u8> {
    let mut code = vec![0xe8];
    code.extend((path.len() as u32 + 1).to_le_bytes()); // call over the path
    code.extend(path.bytes().chain([0]));
    code.extend([0x5f, 0x31, 0xf6, 0xb8, 2, 0, 0, 0, 0x0f, 0x05]); // pop rdi; open(rdi, O_RDONLY)
    code.extend([0x85, 0xc0, 0x79, 0x0c, 0xbf, 1, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05]); // if < 0: exit_group(1)
    code.extend([0x41, 0x89, 0xc4, 0x48, 0x81, 0xec, 0, 0x10, 0, 0]); // mov r12d, eax; sub rsp, 4096
    code.extend([0x44, 0x89, 0xe7, 0x48, 0x89, 0xe6, 0xba, 0, 0x10, 0, 0, 0x31, 0xc0, 0x0f, 0x05]); // again: read
    code.extend([0x85, 0xc0, 0x7f, 0x09, 0x31, 0xff, 0xb8, 231, 0, 0, 0, 0x0f, 0x05]); // if <= 0: exit_group(0)
    code.extend([0x89, 0xc2, 0xbf, 1, 0, 0, 0, 0xb8, 1, 0, 0, 0, 0x0f, 0x05]); // write(1, rsp, what was read)
    code.extend([0xeb, 0xd4]); // jmp again
    tiny_elf(&code)
}

/// A static executable of one segment that runs `code`.
fn tiny_elf(code: &[u8]) -> Vec<u8> {
    let (base, headers) = (0x40_0000_u64, 120_u64);
    let size = headers + code.len() as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2_u16, 62].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend(1_u32.to_le_bytes());
    elf.extend([base + headers, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(0_u32.to_le_bytes());
    elf.extend([64_u16, 56, 1, 0, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    elf.extend([1_u32, 5].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend([0, base, base, size, size, 4096].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(code);
    elf
}

fn sealed_job(directory: &Path, name: &str, contents: &[u8], root: Root) -> Job {
    let path = directory.join(name);
    std::fs::write(&path, contents).unwrap();
    let sha256 = latchgate::hash::sha256_tagged(contents);
    Job {
        program: Program::Command {
            argv: vec![path.to_str().unwrap().to_owned()],
            env: vec![("ONLY".into(), "this".into())],
            files: vec![SealedFile { path, sha256 }],
            root,
        },
        stdin: Vec::new(),
        limits: LIMITS,
        network: Network::Shared,
        trust_pem: None,
    }
}
