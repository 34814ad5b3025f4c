//! The filter's meaning, by an interpreter of the few instructions that it uses; `gate/tests/sandbox.rs` asks the kernel.

use super::*;

fn verdict(filter: &[sock_filter], arch: u32, number: i64, arguments: [u64; 6]) -> u32 {
    let (mut at, mut accumulator) = (0_usize, 0_u32);
    loop {
        let sock_filter { code, jt, jf, k } = filter[at];
        at += 1;
        let code = u32::from(code);
        let mut branch = |taken: bool| at += usize::from(if taken { jt } else { jf });
        if code == BPF_LD | BPF_W | BPF_ABS {
            accumulator = match k {
                NUMBER_AT => number as u32,
                ARCH_AT => arch,
                other => arguments[((other - ARGUMENTS_AT) / 8) as usize] as u32,
            };
        } else if code == BPF_RET | BPF_K {
            return k;
        } else if code == BPF_ALU | BPF_AND | BPF_K {
            accumulator &= k;
        } else if code == BPF_JMP | BPF_JEQ | BPF_K {
            branch(accumulator == k);
        } else if code == BPF_JMP | BPF_JGE | BPF_K {
            branch(accumulator >= k);
        } else if code == BPF_JMP | BPF_JSET | BPF_K {
            branch(accumulator & k != 0);
        } else {
            panic!("unknown instruction {code:#x}");
        }
    }
}

fn asked(number: libc::c_long, arguments: &[i64]) -> u32 {
    let mut all = [0; 6];
    for (slot, argument) in all.iter_mut().zip(arguments) {
        *slot = *argument as u64;
    }
    verdict(&program(false, false), NATIVE, number, all)
}

#[test]
fn only_internet_streams_and_datagrams() {
    for family in 0..64 {
        for kind in 0..16 {
            for protocol in [0, 1, 6, 17, 132, 136, 255, 256, 262] {
                let internet = family == 2 || family == 10;
                let named = matches!((kind, protocol), (1, 0 | 6) | (2, 0 | 17));
                let expected = if internet && named { ALLOW } else { REFUSE };
                for flags in [0, 0o4000, 0o2000000, 0o2004000] {
                    let got = asked(libc::SYS_socket, &[family, kind | flags, protocol]);
                    assert_eq!(got, expected, "{family} {kind} {protocol} {flags:o}");
                }
            }
        }
    }
}

#[test]
fn a_session_has_unix_streams_besides_and_nothing_else() {
    let session = |family: u64, kind: u64, protocol: u64| {
        verdict(&program(false, true), NATIVE, libc::SYS_socket, [family, kind, protocol, 0, 0, 0])
    };
    for family in 0..64 {
        for kind in 0..16 {
            for flags in [0, 0o4000, 0o2000000, 0o2004000] {
                let without = asked(libc::SYS_socket, &[family, kind | flags, 0]);
                let expected = if (family, kind) == (1, 1) { ALLOW } else { without };
                assert_eq!(session(family as u64, (kind | flags) as u64, 0), expected, "{family} {kind} {flags:o}");
            }
        }
    }
    assert_eq!(asked(libc::SYS_socket, &[1, 1, 0]), REFUSE);
}

#[test]
fn the_high_half_that_the_kernel_drops_does_not_help() {
    let high = 1_i64 << 40;
    assert_eq!(asked(libc::SYS_socket, &[high | 1, 1, 0]), REFUSE);
    assert_eq!(asked(libc::SYS_clone, &[high | i64::from(libc::CLONE_NEWUSER)]), REFUSE);
    assert_eq!(asked(libc::SYS_ioctl, &[0, high | 0x5412]), REFUSE);
}

#[test]
fn pairs_stay_unless_they_could_be_connected_again() {
    for (family, kind, expected) in [
        (1, 1, ALLOW),
        (1, 5, ALLOW),
        (1, 5 | 0o2000000, ALLOW),
        (1, 2, REFUSE),
        (1, 3, REFUSE),
        (2, 1, REFUSE),
        (30, 1, REFUSE),
    ] {
        assert_eq!(asked(libc::SYS_socketpair, &[family, kind, 0]), expected, "{family} {kind}");
    }
}

#[test]
fn clone_makes_processes_and_threads_and_no_namespace() {
    let thread = libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
    assert_eq!(asked(libc::SYS_clone, &[i64::from(thread)]), ALLOW);
    assert_eq!(asked(libc::SYS_clone, &[i64::from(libc::SIGCHLD)]), ALLOW);
    for bit in 0..32 {
        let flag = 1_i32 << bit;
        let expected = if NAMESPACES & flag != 0 { REFUSE } else { ALLOW };
        assert_eq!(asked(libc::SYS_clone, &[i64::from(flag as u32)]), expected, "{flag:#x}");
    }
    assert_eq!(asked(libc::SYS_clone3, &[]), ABSENT);
}

#[test]
fn every_listed_call_is_refused_and_ordinary_ones_pass() {
    for number in REFUSED.iter().flat_map(|(_, numbers)| *numbers) {
        assert_eq!(asked(*number, &[]), REFUSE, "{number}");
    }
    for number in [libc::SYS_read, libc::SYS_execve, libc::SYS_connect, libc::SYS_memfd_create, libc::SYS_ioctl] {
        assert_eq!(asked(number, &[]), ALLOW, "{number}");
    }
    for number in UNCOUNTED_MEMORY {
        assert_eq!(verdict(&program(true, false), NATIVE, *number, [0; 6]), REFUSE, "{number}");
    }
    for number in NEW_PROCESSES {
        assert_eq!(verdict(&no_new_processes(), NATIVE, *number, [0; 6]), REFUSE, "{number}");
    }
}

#[test]
fn numbers_that_mean_something_else_do_not_pass() {
    for number in [i64::from(LAST_REVIEWED) + 1, 1000, 0x4000_0000, 0x4000_0029, 0x4000_0000 + 512, -1] {
        assert_eq!(verdict(&program(false, false), NATIVE, number, [0; 6]), ABSENT, "{number:#x}");
    }
    // AUDIT_ARCH_I386, ARM, and nothing.
    for arch in [0x4000_0003, 0x4000_0028, 0] {
        assert_eq!(verdict(&program(false, false), arch, libc::SYS_read, [0; 6]), KILL);
    }
}
