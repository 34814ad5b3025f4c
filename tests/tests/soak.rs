//! Thousands of executions through the real gate, a tenth of them ended in the middle: what the gate and the kernel hold
//! afterwards is what they held before. `LATCHGATE_SOAK` says how many; 1,000 when it is absent.
//!
//! Needs root, a v2 hierarchy and `/usr/bin/curl`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::http::Connection;
use latchgate_tests::inside::{cgroup, leaves, missing, pins, processes, send, uid_of, verified, wait};
use latchgate_tests::origin::{Authority, Origin};
use serde_json::json;

const NAME: &str = "origin.soak.test";
/// Executions at one time. There are no more uids than these, so that one that is not given back is missed.
const AT_ONCE: usize = 8;

/// What a gate holds when nothing runs.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    leaves: usize,
    pins: usize,
    /// Entries of each map of its kernel programs, by name.
    entries: BTreeMap<String, usize>,
    threads: usize,
    descriptors: usize,
    mounts: usize,
    /// Namespaces of the processes in its cgroups.
    namespaces: usize,
    processes: usize,
    /// Processes on this machine with an uid of executions.
    uids: usize,
    /// In its directory, which is also where it makes temporary ones.
    files: usize,
}

impl Held {
    fn by(gate: &Gate, uid_base: u32) -> Self {
        let process = Path::new("/proc").join(gate.pid().to_string());
        let count = |path: &Path| fs::read_dir(path).map_or(0, Iterator::count);
        let own = tree(&cgroup(gate.name()));
        let namespaces: BTreeSet<_> = own
            .iter()
            .flat_map(|pid| fs::read_dir(format!("/proc/{pid}/ns")).into_iter().flatten().flatten())
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .collect();
        let all = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let uids = uid_base..uid_base + u32::try_from(AT_ONCE).unwrap();
        Self {
            leaves: leaves(gate).len(),
            pins: pins(gate.name()).iter().map(|run| count(run)).sum(),
            entries: entries(gate),
            threads: count(&process.join("task")),
            descriptors: count(&process.join("fd")),
            mounts: fs::read_to_string(process.join("mountinfo")).unwrap().lines().count(),
            namespaces: namespaces.len(),
            processes: own.len(),
            uids: all.filter(|pid| uid_of(*pid).is_some_and(|uid| uids.contains(&uid))).count(),
            files: files(gate.directory()),
        }
    }
}

/// Every process in a cgroup and below it.
fn tree(directory: &Path) -> Vec<u32> {
    let below = latchgate_tests::inside::directories(directory).into_iter().flat_map(|child| tree(&child));
    processes(directory).into_iter().chain(below).collect()
}

/// Files of the gate's own, but for those that SQLite makes and removes as it likes.
fn files(directory: &Path) -> usize {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| match entry.file_type().unwrap().is_dir() {
            true => files(&entry.path()),
            false => usize::from(!entry.file_name().to_string_lossy().contains(".db-")),
        })
        .sum()
}

/// The gate's memory that is its alone and not a file's, in KiB.
fn memory_kib(gate: &Gate) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", gate.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// How many entries each map has that this gate's programs use, as the kernel says.
fn entries(gate: &Gate) -> BTreeMap<String, usize> {
    let descriptors = fs::read_dir(format!("/proc/{}/fdinfo", gate.pid())).unwrap().flatten();
    let held: BTreeSet<u32> = descriptors
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .filter_map(|text| text.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse().ok()))
        .collect();
    assert!(held.len() >= 13, "{held:?}");
    let programs = aya::programs::loaded_programs().flatten().filter(|program| held.contains(&program.id()));
    let ids: BTreeSet<u32> = programs.filter_map(|program| program.map_ids().ok().flatten()).flatten().collect();
    let mut entries = BTreeMap::new();
    for id in ids {
        let Ok(map) = aya::maps::MapData::from_id(id) else { continue };
        let Ok(info) = map.info() else { continue };
        // Arrays always have all of theirs, a ring has none, and storage goes with its socket.
        if !matches!(info.map_type(), Ok(aya::maps::MapType::Hash | aya::maps::MapType::LpmTrie)) {
            continue;
        }
        let name = info.name_as_str().unwrap_or("?").to_owned();
        entries.insert(name, count_keys(map.fd().as_fd().as_raw_fd(), info.key_size()));
    }
    assert!(["LEAVES", "COUNTS", "FLOWS", "REACH"].iter().all(|map| entries.contains_key(*map)), "{entries:?}");
    entries
}

/// Walks the keys of a map (bpf(2), BPF_MAP_GET_NEXT_KEY).
fn count_keys(map: i32, key_size: u32) -> usize {
    const BPF_MAP_GET_NEXT_KEY: i64 = 4;
    let mut key = vec![0_u8; key_size as usize];
    let mut next = key.clone();
    for count in 0.. {
        let from = if count == 0 { 0 } else { key.as_ptr() as u64 };
        let mut attributes: [u64; 4] = [u64::from(map.unsigned_abs()), from, next.as_mut_ptr() as u64, 0];
        // SAFETY: the attributes of this command: descriptor, key, next key; both buffers are a key long.
        let result = unsafe { libc::syscall(libc::SYS_bpf, BPF_MAP_GET_NEXT_KEY, attributes.as_mut_ptr(), 32_u32) };
        if result < 0 {
            return count;
        }
        std::mem::swap(&mut key, &mut next);
    }
    unreachable!()
}

fn gate(network: &str, uid_base: u32, port: u16, certificate: &str) -> Gate {
    let entry = format!("{{profile: proxy_allowlist, allowed_domains: [{{domain: {NAME}, ports: [{port}]}}]}}");
    let none = "{profile: none}";
    let setup = Setup::new(&format!("soak-{network}"));
    fs::write(setup.directory.join("ca.pem"), certificate).unwrap();
    setup
        .config(&format!(
            "[egress]\nallow_addresses = [\"127.0.0.0/8\"]\nca_file = \"{{dir}}/ca.pem\"\n\n\
             [egress.hosts]\n\"{NAME}\" = [\"127.0.0.1\"]\n\n\
             [sandbox]\nnetwork = \"{network}\"\nuid_base = {uid_base}\nuid_count = {AT_ONCE}\n\
             max_concurrent = {AT_ONCE}\n"
        ))
        .command("says", "echo '{\"said\": 1}'", none)
        .command("writes", "for i in 1 2 3 4 5 6 7 8; do echo $i > /tmp/$i; (sleep 30 &); done; echo '{}'", none)
        .roomy_command(
            "carried",
            &format!("/usr/bin/curl -sS -k -m 10 https://{NAME}:{port}/ >/dev/null && echo '{{}}'"),
            &entry,
            4_096,
        )
        .fetch("fetch", &entry)
        .command("refused", "/usr/bin/curl -sS -m 5 https://other.soak.test/ >/dev/null 2>&1; echo '{}'", &entry)
        .command("long", "sleep 2; echo '{}'", &entry)
        .manifest(
            "hasty",
            "action_id: hasty\nversion: \"1\"\nprovider_module_digest: builtin:command\n\
             command: {argv: [/bin/sleep, \"30\"]}\nio: {request_schema: {type: object}}\n\
             resource_limits: {timeout_seconds: 1}\negress: {profile: none}\nrisk_level: low\nverifier_kind: none\n",
        )
        .start()
}

/// One execution. Every tenth is ended in the middle: by its time limit, by a client that hangs up, by SIGKILL from
/// outside.
fn one(gate: &Gate, agent: &Agent, at: usize, port: u16) {
    let status = |action: &str, params: &serde_json::Value| {
        loop {
            let answer = agent.execute(action, params);
            let said = String::from_utf8_lossy(&answer.body).into_owned();
            // A machine that is busy with something else: nothing was run, and the agent is told to come again.
            if !said.contains("policy_engine_timeout") {
                break (answer.status, said);
            }
            eprintln!("{action}: the policy had no second of its own; asked again");
        }
    };
    let empty = json!({});
    match (at % 10, at / 10 % 3) {
        (9, 0) => assert_eq!(status("hasty", &empty).0, 502),
        (9, 1) => {
            let mut connection = Connection::open(&agent.target).unwrap();
            send(&mut connection, agent, "long", &empty).unwrap();
            std::thread::sleep(Duration::from_millis(u64::try_from(at % 70).unwrap()));
        }
        (9, _) => {
            std::thread::scope(|scope| {
                let call = scope.spawn(|| status("long", &empty));
                // Whichever runs: its sleep, or somebody else's, who is then the one that was killed.
                let killed = wait("a victim", Duration::from_secs(30), || {
                    let all = leaves(gate).into_iter().flat_map(|leaf| processes(&leaf));
                    let sleeps = |pid: &u32| {
                        fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == b"sleep\x002\x00")
                    };
                    let victim = all.into_iter().find(sleeps);
                    if victim.is_none() && call.is_finished() { Some(None) } else { victim.map(Some) }
                });
                if let Some(pid) = killed.and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).unwrap())) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
                assert!(matches!(call.join().unwrap().0, 200 | 502));
            });
        }
        (0..=3, _) => assert_eq!(status("says", &empty).0, 200),
        (4, _) => assert_eq!(status("writes", &empty).0, 200),
        (5 | 6, _) => {
            let (code, said) = status("fetch", &json!({"url": format!("https://{NAME}:{port}/")}));
            assert_eq!(code, 200, "{said}");
        }
        (7, _) => {
            let (code, said) = status("carried", &empty);
            assert_eq!(code, 200, "{said}");
        }
        _ => assert_eq!(status("refused", &empty).0, 200),
    }
}

fn soak(network: &str, executions: usize, uid_base: u32) {
    let authority = Authority::default();
    let origin = Origin::tls(&authority, &[NAME], IpAddr::V4(Ipv4Addr::LOCALHOST), "soaked");
    let port = origin.address.port();
    let mut gate = gate(network, uid_base, port, &authority.pem);
    let run = |from: usize, to: usize| {
        let next = AtomicUsize::new(from);
        std::thread::scope(|scope| {
            for _ in 0..AT_ONCE {
                scope.spawn(|| {
                    let mut agent = Agent::connect(&gate.agent());
                    let mut used = 0;
                    loop {
                        let at = next.fetch_add(1, Ordering::SeqCst);
                        if at >= to {
                            break;
                        }
                        one(&gate, &agent, at, port);
                        used += 1;
                        if used % 100 == 0 {
                            agent = Agent::connect(&gate.agent());
                        }
                    }
                });
            }
        });
        wait("the last one's end", Duration::from_secs(60), || leaves(&gate).is_empty().then_some(()));
    };
    // What is made once, at the first of its kind, is made now.
    run(0, 60);
    let settled = |gate: &Gate| {
        // Threads that have nothing to do go after ten seconds, a connection that ended shortly before.
        std::thread::sleep(Duration::from_secs(11));
        Held::by(gate, uid_base)
    };
    let (before, memory_before) = (settled(&gate), memory_kib(&gate));
    assert_eq!((before.leaves, before.uids), (0, 0), "{before:?}");
    let began = Instant::now();
    run(60, 60 + executions);
    let took = began.elapsed();
    let (after, memory_after) = (settled(&gate), memory_kib(&gate));
    assert_eq!(after, before, "{network}");
    let grown = memory_after.saturating_sub(memory_before);
    eprintln!(
        "{executions} executions, {network}: {:.1} a second; memory {memory_before} KiB before, {memory_after} after",
        executions as f64 / took.as_secs_f64()
    );
    // The journal of flows and the log's caches are bounded, and fill up on the way.
    assert!(grown < 65_536, "{grown} KiB more");
    // Each has its receipt, and the chain is whole.
    let report = verified(&gate);
    assert_eq!(report["open_intents"], 0, "{report}");
    assert_eq!(report["intents"], report["receipts"], "{report}");
    assert!(report["receipts"].as_u64().unwrap() >= u64::try_from(executions).unwrap(), "{report}");
    assert_eq!(gate.stop(), 0);
}

#[test]
fn what_is_held_after_thousands_of_executions_is_what_was_held_before() {
    if missing(&["/usr/bin/curl"]) {
        return;
    }
    let executions: usize = std::env::var("LATCHGATE_SOAK").map_or(1_000, |text| text.parse().unwrap());
    let uid_base = 0x6000_0000 + (std::process::id() % 0x10_0000) * 0x100;
    soak("isolated", executions / 2, uid_base);
    soak("shared", executions - executions / 2, uid_base);
}
