//! Builds the kernel program with the compiler that has its own library source beside it, takes the debugging sections
//! away and keeps BTF, and records what it was made with.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

mod strip;
mod toolchain;

use toolchain::Toolchain;

/// One object that the source is built to.
struct Variant {
    /// Features of `egress-ebpf`.
    features: &'static str,
    object: &'static str,
    lock: &'static str,
}

/// What a gate carries, and what tests load to show what each check is for.
const VARIANTS: [Variant; 2] = [
    Variant {
        features: "program",
        object: "gate/src/egress/kernel/latchgate.bpf.o",
        lock: "gate/src/egress/kernel/latchgate.bpf.lock.json",
    },
    Variant {
        features: "program,test-guards",
        object: "gate/src/egress/kernel/latchgate-guards.bpf.o",
        lock: "gate/src/egress/kernel/latchgate-guards.bpf.lock.json",
    },
];

/// What a checked-in object was made from.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Lock {
    /// Over path and contents of everything in `egress-ebpf` that is built.
    source_sha256: String,
    /// `rustc -vV`, line by line.
    rustc: Vec<String>,
    linker: String,
    object_sha256: String,
}

/// Builds and writes the objects and their lock files.
pub fn write() -> Result<String, String> {
    let root = root()?;
    let toolchain = Toolchain::find()?;
    let target = root.join("egress-ebpf/target");
    let mut said = Vec::new();
    for variant in &VARIANTS {
        let object = build(&toolchain, variant, &root.join("egress-ebpf"), &target)?;
        let lock = lock_of(&root, &toolchain, &object)?;
        put(&root.join(variant.object), &object)?;
        let mut text = serde_json::to_string_pretty(&lock).map_err(|error| error.to_string())?;
        text.push('\n');
        put(&root.join(variant.lock), text.as_bytes())?;
        said.push(format!("{}: {} bytes, sha256 {}", variant.object, object.len(), lock.object_sha256));
    }
    Ok(said.join("\n"))
}

/// Rebuilds in a clean directory and compares with what is checked in.
pub fn check() -> Result<String, String> {
    let root = root()?;
    let toolchain = Toolchain::find()?;
    let clean = Clean::make()?;
    let source = clean.0.join("egress-ebpf");
    for path in sources(&root)? {
        let to = source.join(&path);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(|error| format!("{}: {error}", parent.display()))?;
        }
        put(&to, &get(&root.join("egress-ebpf").join(&path))?)?;
    }
    let target = clean.0.join("target");
    let said = VARIANTS.iter().map(|variant| compare(&root, &toolchain, variant, &source, &target));
    Ok(said.collect::<Result<Vec<_>, _>>()?.join("\n"))
}

fn compare(
    root: &Path,
    toolchain: &Toolchain,
    variant: &Variant,
    source: &Path,
    target: &Path,
) -> Result<String, String> {
    let Variant { object: path, lock, .. } = variant;
    let recorded: Lock = serde_json::from_slice(&get(&root.join(lock))?).map_err(|error| format!("{lock}: {error}"))?;
    let checked_in = hex(&Sha256::digest(get(&root.join(path))?));
    if checked_in != recorded.object_sha256 {
        return Err(format!("{path} has SHA-256 {checked_in}, its lock says {}", recorded.object_sha256));
    }
    let object = build(toolchain, variant, source, target)?;
    let built = lock_of(root, toolchain, &object)?;
    if built.source_sha256 != recorded.source_sha256 {
        return Err("egress-ebpf was changed after the objects were built: run `cargo xtask ebpf`".to_owned());
    }
    if (&built.rustc, &built.linker) != (&recorded.rustc, &recorded.linker) {
        return Ok(format!(
            "{path}: built ({} bytes); the compiler or linker is not the recorded one, so the bytes were not compared",
            object.len()
        ));
    }
    if built.object_sha256 != recorded.object_sha256 {
        return Err(format!(
            "{path}: the same source and tools gave SHA-256 {}, checked in is {}",
            built.object_sha256, recorded.object_sha256
        ));
    }
    Ok(format!("{path}: rebuilt in a clean directory, the same bytes: sha256 {}", built.object_sha256))
}

fn build(toolchain: &Toolchain, variant: &Variant, source: &Path, target: &Path) -> Result<Vec<u8>, String> {
    toolchain.build(source, target, variant.features)?;
    let built = target.join(toolchain::TARGET).join("release").join(toolchain::BINARY);
    strip::debug_sections(&get(&built)?).map_err(|error| format!("{}: {error}", built.display()))
}

fn lock_of(root: &Path, toolchain: &Toolchain, object: &[u8]) -> Result<Lock, String> {
    let mut hash = Sha256::new();
    for path in sources(root)? {
        let contents = get(&root.join("egress-ebpf").join(&path))?;
        hash.update(format!("{}\n{}\n", path.display(), contents.len()));
        hash.update(&contents);
    }
    Ok(Lock {
        source_sha256: hex(&hash.finalize()),
        rustc: toolchain.version.lines().map(str::to_owned).collect(),
        linker: toolchain.linker_version.clone(),
        object_sha256: hex(&Sha256::digest(object)),
    })
}

/// The files that the object is made of, relative to `egress-ebpf`, sorted.
fn sources(root: &Path) -> Result<Vec<PathBuf>, String> {
    let base = root.join("egress-ebpf");
    let mut found = vec![PathBuf::from("Cargo.toml"), PathBuf::from("Cargo.lock")];
    for entry in fs::read_dir(base.join("src")).map_err(|error| format!("egress-ebpf/src: {error}"))? {
        let entry = entry.map_err(|error| format!("egress-ebpf/src: {error}"))?;
        found.push(Path::new("src").join(entry.file_name()));
    }
    found.sort();
    Ok(found)
}

fn root() -> Result<PathBuf, String> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map(Path::to_path_buf).ok_or_else(|| "xtask is not in the repository".to_owned())
}

fn get(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn put(path: &Path, contents: &[u8]) -> Result<(), String> {
    fs::write(path, contents).map_err(|error| format!("{}: {error}", path.display()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A directory that goes when the check is over.
struct Clean(PathBuf);

impl Clean {
    fn make() -> Result<Self, String> {
        let path = std::env::temp_dir().join(format!("latchgate-ebpf-{}", std::process::id()));
        fs::create_dir(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Clean {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
