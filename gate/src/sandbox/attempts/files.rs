//! Files that would give a way out, or away what is kept.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::sys::{reached, refused_with};
use super::{Order, Saw};

/// Where cgroup2 is usually seen.
const USUAL: [&str; 2] = ["/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/unified/cgroup.procs"];

fn refused(at: &str, error: &io::Error) -> Saw {
    refused_with(at, error.raw_os_error().unwrap_or(0))
}

/// Moves itself to the gate's cgroup, or to any that can be seen. Outside, it is in the gate's already.
pub fn cgroup_move(order: &Order, _: &str) -> Saw {
    let usual = USUAL.iter().map(Path::new).filter(|_| !order.outside);
    let mut last = Saw::Hindered { why: "there is no cgroup to move to".to_owned() };
    for path in std::iter::once(order.cgroup_procs.as_path()).chain(usual) {
        match fs::OpenOptions::new().write(true).open(path).and_then(|mut procs| procs.write_all(b"0")) {
            Ok(()) => return reached("moved to another cgroup"),
            Err(error) => last = refused("cgroup.procs", &error),
        }
    }
    last
}

/// Reads what the gate's process says of itself; its arguments tell that it is the one.
pub fn proc_outside(order: &Order, _: &str) -> Saw {
    match fs::read(format!("/proc/{}/cmdline", order.victim)) {
        Ok(text) if String::from_utf8_lossy(&text).contains(&order.victim_token) => reached("/proc was read"),
        // Another process has the number inside.
        Ok(_) => Saw::Refused { at: "read".to_owned(), errno: libc::ENOENT },
        Err(error) => refused("open", &error),
    }
}

pub fn state_directory(order: &Order, _: &str) -> Saw {
    let (path, device, inode) = &order.state_dir;
    match fs::metadata(path) {
        Ok(found) if (found.dev(), found.ino()) == (*device, *inode) => match fs::read_dir(path) {
            Ok(_) => reached("the gate's state can be read"),
            Err(error) => refused("open", &error),
        },
        Ok(_) => Saw::Refused { at: "stat".to_owned(), errno: libc::ENOENT },
        Err(error) => refused("stat", &error),
    }
}

/// Only the scratch directory can be written to.
pub fn root_write(_: &Order, _: &str) -> Saw {
    for path in ["/selftest", "/etc/selftest", "/dev/selftest"] {
        match fs::OpenOptions::new().write(true).create_new(true).open(path) {
            Ok(_) => return reached(&format!("{path} was made")),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return refused("open", &error),
        }
    }
    Saw::Refused { at: "open".to_owned(), errno: libc::ENOENT }
}
