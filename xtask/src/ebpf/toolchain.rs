//! The compiler whose library source is installed with it, and the linker that is built against the same LLVM.
//!
//! `-Z build-std=core` needs the source of exactly the compiler that is used. Debian has such a pair in `rustc-web` and
//! `rust-web-src`; `LATCHGATE_BPF_RUSTC` names another compiler, a nightly with `rust-src` for instance.

// The only place of this tool that starts processes.
#![allow(clippy::disallowed_methods)]

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const TARGET: &str = "bpfel-unknown-none";
pub const BINARY: &str = "latchgate-egress";
const LINKER_VERSION: &str = "0.13.0";
const PACKAGES: &str = "apt-get install -y --no-install-recommends rustc-web rust-web-src";

pub struct Toolchain {
    rustc: PathBuf,
    /// What `rustc -vV` prints.
    pub version: String,
    sysroot: PathBuf,
    /// Has `bin/bpf-linker` and `llvm/lib/libLLVM.so`.
    tools: PathBuf,
    pub linker_version: String,
}

impl Toolchain {
    pub fn find() -> Result<Self, String> {
        let rustc = std::env::var_os("LATCHGATE_BPF_RUSTC").map_or_else(|| "/usr/bin/rustc".into(), PathBuf::from);
        if !rustc.exists() {
            return Err(format!("{} is missing (package rustc-web): {PACKAGES}", rustc.display()));
        }
        let version = output(Command::new(&rustc).arg("-vV"))?;
        let sysroot = PathBuf::from(output(Command::new(&rustc).args(["--print", "sysroot"]))?.trim());
        let library = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !library.exists() {
            return Err(format!(
                "{} is missing: the library source of this very compiler (package rust-web-src): {PACKAGES}",
                library.display()
            ));
        }
        let major = version
            .lines()
            .find_map(|line| line.strip_prefix("LLVM version: "))
            .and_then(|version| version.split('.').next())
            .ok_or_else(|| format!("{} does not say its LLVM version", rustc.display()))?
            .to_owned();
        let tools = cache()?.join("bpf");
        let library = llvm_library(&major)?;
        if !tools.join("bin/bpf-linker").exists() || !is_linked(&tools, &library) {
            install_linker(&tools, &major, &library)?;
        }
        let linker_version = output(Command::new(tools.join("bin/bpf-linker")).arg("--version"))?.trim().to_owned();
        Ok(Self { rustc, version: version.trim().to_owned(), sysroot, tools, linker_version })
    }

    /// Compiles the program of `source` into `target`. Paths of this machine do not get into the object.
    pub fn build(&self, source: &Path, target: &Path, features: &str) -> Result<(), String> {
        let cargo_home = cargo_home()?;
        let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
        let flags = [
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            // The first with an addition that gives what was there before, and with compare-and-exchange: Linux 5.12.
            "-Ctarget-cpu=v3".to_owned(),
            remap(source, "egress-ebpf"),
            remap(&cargo_home, "cargo"),
            remap(&self.sysroot, "rust"),
        ]
        .join("\u{1f}");
        let mut path = OsString::from(self.tools.join("bin"));
        if let Some(rest) = std::env::var_os("PATH") {
            path.push(":");
            path.push(rest);
        }
        let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(source)
            .args(["build", "--release", "--locked", "--target", TARGET, "-Z", "build-std=core"])
            .args(["--features", features, "--bin", BINARY])
            .env("PATH", path)
            .env("RUSTC", &self.rustc)
            // Only here: the target has no stable standard library.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags)
            .env("CARGO_TARGET_DIR", target)
            .env_remove("RUSTFLAGS")
            .env_remove("RUSTUP_TOOLCHAIN")
            .status()
            .map_err(|error| format!("cargo: {error}"))?;
        if status.success() { Ok(()) } else { Err(format!("the kernel program was not built: {status}")) }
    }
}

/// Whether the installed linker was built against this library, and not that of an earlier compiler.
fn is_linked(tools: &Path, library: &Path) -> bool {
    let (found, wanted) = (fs::canonicalize(tools.join("llvm/lib/libLLVM.so")), fs::canonicalize(library));
    matches!((found, wanted), (Ok(found), Ok(wanted)) if found == wanted)
}

/// Builds bpf-linker against the LLVM of the compiler. No LLVM -dev package is needed: a link to the library is enough.
fn install_linker(tools: &Path, major: &str, library: &Path) -> Result<(), String> {
    let directory = tools.join("llvm/lib");
    fs::create_dir_all(&directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    let link = directory.join("libLLVM.so");
    if fs::symlink_metadata(&link).is_ok() {
        fs::remove_file(&link).map_err(|error| format!("{}: {error}", link.display()))?;
    }
    std::os::unix::fs::symlink(library, &link).map_err(|error| format!("{}: {error}", link.display()))?;
    eprintln!("installing bpf-linker {LINKER_VERSION} for LLVM {major} into {}", tools.display());
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        // Outside the repository, whose .cargo/config.toml is for the gate.
        .current_dir(tools)
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--force", "--no-default-features"])
        .args(["--features", &format!("llvm-{major}"), "--root"])
        .arg(tools)
        .env("LLVM_PREFIX", tools.join("llvm"))
        .env_remove("RUSTFLAGS")
        .status()
        .map_err(|error| format!("cargo install bpf-linker: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("bpf-linker was not installed: {status}")) }
}

fn llvm_library(major: &str) -> Result<PathBuf, String> {
    let mut places = vec![PathBuf::from(format!("/usr/lib/llvm-{major}/lib/libLLVM.so"))];
    let names = [format!("libLLVM.so.{major}"), format!("libLLVM-{major}.so")];
    if let Ok(directories) = fs::read_dir("/usr/lib") {
        let directories: Vec<_> = directories.flatten().map(|entry| entry.path()).collect();
        for directory in std::iter::once(PathBuf::from("/usr/lib")).chain(directories) {
            let Ok(files) = fs::read_dir(&directory) else { continue };
            let found = files.flatten().filter(|file| {
                let name = file.file_name();
                names.iter().any(|wanted| name.to_string_lossy().starts_with(wanted.as_str()))
            });
            places.extend(found.map(|file| file.path()));
        }
    }
    places.sort();
    places.into_iter().find(|place| place.exists()).ok_or_else(|| {
        format!("no libLLVM.so of LLVM {major}, which the compiler uses: apt-get install -y libllvm{major}")
    })
}

fn cache() -> Result<PathBuf, String> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(base) => PathBuf::from(base),
        None => home()?.join(".cache"),
    };
    Ok(base.join("latchgate"))
}

fn cargo_home() -> Result<PathBuf, String> {
    match std::env::var_os("CARGO_HOME") {
        Some(home) => Ok(PathBuf::from(home)),
        None => Ok(home()?.join(".cargo")),
    }
}

fn home() -> Result<PathBuf, String> {
    std::env::var_os("HOME").map(PathBuf::from).ok_or_else(|| "HOME is not set".to_owned())
}

fn output(command: &mut Command) -> Result<String, String> {
    let done = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if !done.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&done.stderr)));
    }
    String::from_utf8(done.stdout).map_err(|error| format!("{command:?}: {error}"))
}
