//! A map that is full: what needs a record is refused, with the reason, and what has one goes on.

use std::ffi::CString;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use aya::maps::MapData;
use latchgate::egress::Attribution;
use latchgate::egress::kernel::KernelProfile;

use super::actor::Actor;
use super::tree::Tree;

/// bpf(2).
pub fn bpf(command: i64, attributes: &mut [u64]) -> i64 {
    // SAFETY: attributes of the command's own making, in whole words and of the length that is given.
    unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(attributes)) }
}

/// A map of the program that is pinned at `link`.
fn map_of(link: &Path, name: &str) -> MapData {
    const BPF_OBJ_GET: i64 = 7;
    let path = CString::new(link.as_os_str().as_bytes()).unwrap();
    let descriptor = bpf(BPF_OBJ_GET, &mut [path.as_ptr() as u64, 0]);
    assert!(descriptor >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the call above made it.
    let link = unsafe { OwnedFd::from_raw_fd(i32::try_from(descriptor).unwrap()) };
    let said = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", link.as_raw_fd())).unwrap();
    let id = said.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse::<u32>().ok()).unwrap();
    let program = aya::programs::loaded_programs().flatten().find(|program| program.id() == id).unwrap();
    let maps = program.map_ids().unwrap().unwrap().into_iter().filter_map(|id| MapData::from_id(id).ok());
    maps.into_iter().find(|map| map.info().unwrap().name_as_str() == Some(name)).unwrap()
}

/// A map into which entries that belong to nobody were put until it took no more.
struct Full {
    map: MapData,
    keys: Vec<Vec<u8>>,
}

impl Full {
    fn fill(tree: &Tree, link: &str, name: &str) -> Self {
        const BPF_MAP_UPDATE_ELEM: i64 = 2;
        let run = std::fs::read_dir(tree.pins()).unwrap().next().unwrap().unwrap().path();
        let map = map_of(&run.join(link), name);
        let info = map.info().unwrap();
        let value = vec![0_u8; info.value_size() as usize];
        let mut keys = Vec::new();
        loop {
            let mut key = vec![0xff_u8; info.key_size() as usize];
            key[..4].copy_from_slice(&u32::try_from(keys.len()).unwrap().to_ne_bytes());
            let descriptor = u64::from(map.fd().as_fd().as_raw_fd().unsigned_abs());
            let mut attributes = [descriptor, key.as_ptr() as u64, value.as_ptr() as u64, 0];
            if bpf(BPF_MAP_UPDATE_ELEM, &mut attributes) < 0 {
                assert!(keys.len() > 60_000, "{}: {}", keys.len(), std::io::Error::last_os_error());
                return Self { map, keys };
            }
            keys.push(key);
        }
    }

    fn empty(self) {
        const BPF_MAP_DELETE_ELEM: i64 = 3;
        let descriptor = u64::from(self.map.fd().as_fd().as_raw_fd().unsigned_abs());
        for key in &self.keys {
            assert_eq!(bpf(BPF_MAP_DELETE_ELEM, &mut [descriptor, key.as_ptr() as u64, 0, 0]), 0);
        }
    }
}

#[test]
fn a_full_map_of_flows_gives_no_service_to_the_next_and_takes_none_from_those_that_are_there() {
    let mut tree = Tree::attached("flows-full");
    let (first, second) =
        (tree.admitted("first", KernelProfile::ProxyOnly), tree.admitted("second", KernelProfile::ProxyOnly));
    let (mut one, mut two) = (Actor::start_in(&first.path), Actor::start_in(&second.path));
    let proxy = format!("127.0.0.1:{}", tree.proxy.port);
    assert_eq!(one.ask(&format!("hold {proxy}")), "ok");
    let (mut held, _) = tree.proxy.v4.accept().unwrap();
    let caller = |tree: &Tree, accepted: &std::net::TcpStream| {
        tree.enforcer().caller(accepted.as_fd()).map(|caller| caller.leaf)
    };
    assert_eq!(caller(&tree, &held), Some(first.id));

    let full = Full::fill(&tree, "flow_client", "FLOWS");
    two.ask(&format!("hold {proxy}"));
    tree.event(second.id, "sock_ops", "map_full");
    let (nobodys, _) = tree.proxy.v4.accept().unwrap();
    assert_eq!(caller(&tree, &nobodys), None, "whose it is was not written down: it gets no service");
    // The one that is there goes on, both ways.
    assert_eq!(one.ask("write 10"), "ok");
    held.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    held.read_exact(&mut [0; 10]).unwrap();
    held.write_all(b"back").unwrap();
    assert_eq!(one.ask("read 4"), "ok");

    full.empty();
    assert_eq!(two.ask(&format!("hold {proxy}")), "ok");
    let (served, _) = tree.proxy.v4.accept().unwrap();
    assert_eq!(caller(&tree, &served), Some(second.id));
}

#[test]
fn a_full_map_of_queries_drops_the_next_query() {
    let mut tree = Tree::resolving("queries-full");
    let leaf = tree.admitted("leaf", KernelProfile::Allowlist);
    let mut inside = Actor::start_in(&leaf.path);
    assert_ne!(inside.ask("udp-bind 0.0.0.0:0 alone"), "");
    let arrived = |sockets: &[UdpSocket]| {
        sockets.iter().any(|socket| {
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            socket.recv_from(&mut [0; 64]).is_ok()
        })
    };
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 1"), "ok");
    assert!(arrived(&tree.resolver.as_ref().unwrap().v4));

    let full = Full::fill(&tree, "egress", "QUERIES");
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 2"), "EPERM");
    tree.event(leaf.id, "egress", "map_full");
    assert!(!arrived(&tree.resolver.as_ref().unwrap().v4));

    full.empty();
    assert_eq!(inside.ask("udp-query 9.9.9.9:53 3"), "ok");
    assert!(arrived(&tree.resolver.as_ref().unwrap().v4));
}
