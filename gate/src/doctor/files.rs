//! What is on the disk: mounts, directories, sockets, room, and the list of DNS servers.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::Check;
use crate::config::Config;
use crate::egress::resolver::servers_of;

const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// Below this the ledger soon refuses new calls.
const LITTLE_BYTES: u64 = 256 << 20;
/// What the ledger keeps free for receipts, and as much again.
const NO_BYTES: u64 = 8 << 20;

pub fn checks(config: &Config) -> Vec<Check> {
    let mut checks = vec![bpffs(&config.egress.bpffs)];
    checks.extend(state_directory(&config.state_dir));
    let listeners =
        config.listeners.iter().filter_map(|listener| Some((listener.name.clone(), listener.path.clone()?)));
    let operators = config.operators.socket.clone().map(|path| ("operators".to_owned(), path));
    checks.extend(listeners.chain(operators).map(|(name, path)| socket(&name, &path)));
    checks.push(resolver(config));
    checks
}

/// The nearest directory above a path that is there.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn bpffs(path: &Path) -> Check {
    let name = "bpffs";
    match rustix::fs::statfs(path) {
        Err(error) => Check::fault(name, format!("{}: {error}", path.display()), "mount -t bpf bpf /sys/fs/bpf"),
        Ok(found) if u64::try_from(found.f_type).ok() == Some(BPF_FS_MAGIC) => {
            Check::ok(name, format!("mounted at {}", path.display()))
        }
        Ok(_) => Check::warning(
            name,
            format!("nothing of the kind is mounted at {}", path.display()),
            format!("the gate mounts one where it has CAP_SYS_ADMIN; else: mount -t bpf bpf {}", path.display()),
        ),
    }
}

fn state_directory(path: &Path) -> Vec<Check> {
    let own = rustix::process::geteuid().as_raw();
    let directory = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Check::ok("state directory", format!("{}: made at the first start", path.display()))
        }
        Err(error) => Check::unknown("state directory", format!("{}: {error}", path.display())),
        Ok(found) => owned(own, "state directory", path, found.uid(), found.mode(), 0o077),
    };
    let near = existing(path);
    let room = match rustix::fs::statvfs(&near) {
        Err(error) => Check::unknown("disk", format!("{}: {error}", near.display())),
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let text = format!("{} MiB free at {}", free >> 20, near.display());
            if free < NO_BYTES {
                Check::fault("disk", text, "make room: without it the ledger refuses every call")
            } else if free < LITTLE_BYTES {
                Check::warning("disk", text, "make room: the ledger grows with each call")
            } else {
                Check::ok("disk", text)
            }
        }
    };
    vec![directory, room]
}

/// Whether a path belongs to this user and is not open to these others.
fn owned(own: u32, name: &str, path: &Path, uid: u32, mode: u32, closed: u32) -> Check {
    let found = format!("{}: mode {:04o}, uid {uid}", path.display(), mode & 0o7777);
    if uid != own {
        Check::fault(name, found, format!("run the gate as uid {uid}, or: chown {own} {}", path.display()))
    } else if mode & closed != 0 {
        Check::fault(name, found, format!("chmod {:04o} {}", mode & 0o7777 & !closed, path.display()))
    } else {
        Check::ok(name, found)
    }
}

fn socket(name: &str, path: &Path) -> Check {
    let name = format!("socket {name}");
    let own = rustix::process::geteuid().as_raw();
    let Some(directory) = path.parent() else {
        return Check::fault(name, format!("{} is no path of a socket", path.display()), "give the whole path");
    };
    let Ok(around) = fs::symlink_metadata(directory) else {
        return Check::ok(name, format!("{}: its directory is made at the first start", path.display()));
    };
    // Who may write to the directory may put another socket in this one's place.
    let around = owned(own, &name, directory, around.uid(), around.mode(), 0o022);
    if around.todo.is_some() {
        return around;
    }
    match fs::symlink_metadata(path) {
        Err(_) => Check::ok(name, format!("{}: made when the gate starts", path.display())),
        Ok(found) if !found.file_type().is_socket() => {
            Check::fault(name, format!("{} is no socket", path.display()), format!("rm {}", path.display()))
        }
        Ok(found) => owned(own, &name, path, found.uid(), found.mode(), 0o002),
    }
}

fn resolver(config: &Config) -> Check {
    let (servers, from) = if config.egress.dns_servers.is_empty() {
        match servers_of(Path::new("/etc/resolv.conf")) {
            Ok(servers) => (servers, "/etc/resolv.conf"),
            Err(error) => {
                let found = format!("/etc/resolv.conf: {error}");
                return Check::warning(
                    "resolver",
                    found,
                    "set egress.dns_servers; until then only egress.hosts resolve",
                );
            }
        }
    } else {
        (config.egress.dns_servers.clone(), "egress.dns_servers")
    };
    let list = |servers: &[SocketAddr]| servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    if servers.is_empty() {
        return Check::warning(
            "resolver",
            format!("{from} names no server"),
            "set egress.dns_servers; until then only egress.hosts resolve",
        );
    }
    // A connect over UDP sends nothing: it asks the kernel for a way.
    let without: Vec<SocketAddr> = servers.iter().copied().filter(|server| !has_a_way(*server)).collect();
    if without.is_empty() {
        Check::ok("resolver", format!("{} ({from})", list(&servers)))
    } else {
        let found = format!("no way to {} ({from})", list(&without));
        Check::warning("resolver", found, "set egress.dns_servers to servers that this machine reaches")
    }
}

fn has_a_way(server: SocketAddr) -> bool {
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    UdpSocket::bind(any).and_then(|socket| socket.connect(server)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn what_others_may_write_is_a_fault_and_says_what_to_type() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gate.sock");
        let open = |mode| fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
        open(0o777);
        let check = socket("agent", &path);
        assert_eq!(check.state, State::Fault);
        assert_eq!(check.todo, Some(format!("chmod 0755 {}", directory.path().display())));
        open(0o755);
        assert_eq!(socket("agent", &path).state, State::Ok);
        fs::write(&path, "").unwrap();
        assert_eq!(socket("agent", &path).state, State::Fault);
        assert_eq!(state_directory(directory.path())[0].state, State::Fault);
        open(0o700);
        assert_eq!(state_directory(directory.path())[0].state, State::Ok);
    }

    #[test]
    fn a_bpffs_is_known_by_its_kind_and_not_by_its_path() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(bpffs(directory.path()).state, State::Warning);
        assert_eq!(bpffs(&directory.path().join("not")).state, State::Fault);
    }
}
