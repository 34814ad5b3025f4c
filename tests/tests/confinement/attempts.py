# Every way out that is tried: p has the targets, and each attempt is made by a process of its own. Prints what each came
# to: "ok", or the name of the errno.
import ctypes
import errno
import json
import os
import socket
import struct
import subprocess

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
PATIENCE = 5


def call(number, *arguments):
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    returned = libc.syscall(ctypes.c_long(number), *arguments)
    if returned == -1:
        raise OSError(ctypes.get_errno(), "syscall")
    return returned


def tcp(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(PATIENCE)
        s.connect(tuple(address))


def fast_open(address):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.sendto(b"x", socket.MSG_FASTOPEN, tuple(address))


def udp(family, address, how):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.settimeout(PATIENCE)
        if how == "connected":
            s.connect(tuple(address))
            s.send(b"x")
        elif how == "sendto":
            s.sendto(b"x", tuple(address))
        else:
            s.sendmsg([b"x"], [], 0, tuple(address))
        s.recv(10)


def rebound_udp(good, bad):
    # Connected to one peer and then sending to another one.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(PATIENCE)
        s.connect(tuple(good))
        s.sendto(b"x", tuple(bad))


def make(family, kind, protocol):
    socket.socket(family, kind, protocol).close()


def unix(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.connect(path)


def says(*command):
    # A program that prints an errno, or curl.
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE + 5)
    if "Operation not permitted" in done.stderr:
        raise OSError(errno.EPERM, "said so")
    if done.stdout.strip().isdigit() and int(done.stdout):
        raise OSError(int(done.stdout), "said so")
    if done.returncode:
        raise RuntimeError(f"{done.returncode}: {done.stderr[-200:]}")


def mount():
    place = p["scratch"].encode() + b"/mounted"
    os.makedirs(place, exist_ok=True)
    if libc.mount(b"none", place, b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), "mount")
    libc.umount2(place, 2)


def clone3():
    arguments = struct.pack("8Q", 0, 0, 0, 0, 17, 0, 0, 0)
    child = call(435, arguments, len(arguments))
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def setns():
    call(308, os.open("/proc/self/ns/uts", os.O_RDONLY), 0)


v4, v6, dns = p["tcp4"], p["tcp6"], p["dns"]
mapped = ["::ffff:" + v4[0], v4[1]]
udp_mapped = ["::ffff:" + p["udp4"][0], p["udp4"][1]]
perl = 'use Socket; socket(S, 2, 1, 6) or do { print $!+0; exit }; print connect(S, pack_sockaddr_in(%d, inet_aton("%s"))) ? 0 : $!+0'
child = 'import socket\ns = socket.socket()\ns.settimeout(5)\nprint(s.connect_ex(("%s", %d)))'

ways = {
    "tcp v4": lambda: tcp(socket.AF_INET, v4),
    "tcp v6": lambda: tcp(socket.AF_INET6, v6),
    "tcp v4-mapped": lambda: tcp(socket.AF_INET6, mapped),
    "tcp fast open": lambda: fast_open(v4),
    "udp v4 connected": lambda: udp(socket.AF_INET, p["udp4"], "connected"),
    "udp v4 sendto": lambda: udp(socket.AF_INET, p["udp4"], "sendto"),
    "udp v4 sendmsg": lambda: udp(socket.AF_INET, p["udp4"], "sendmsg"),
    "udp v6 connected": lambda: udp(socket.AF_INET6, p["udp6"], "connected"),
    "udp v6 sendto": lambda: udp(socket.AF_INET6, p["udp6"], "sendto"),
    "udp v4-mapped sendto": lambda: udp(socket.AF_INET6, udp_mapped, "sendto"),
    "udp to another peer": lambda: rebound_udp(p["udp4"], dns),
    "dns over udp": lambda: udp(socket.AF_INET, dns, "sendto"),
    "dns over tcp": lambda: tcp(socket.AF_INET, dns),
    "raw icmp": lambda: make(socket.AF_INET, socket.SOCK_RAW, 1),
    "raw icmp v6": lambda: make(socket.AF_INET6, socket.SOCK_RAW, 58),
    "raw ip": lambda: make(socket.AF_INET, socket.SOCK_RAW, 255),
    "af_packet": lambda: make(17, socket.SOCK_RAW, socket.htons(3)),
    "af_netlink": lambda: make(16, socket.SOCK_RAW, 0),
    "af_vsock": lambda: make(40, socket.SOCK_STREAM, 0),
    "unix datagram pair": lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM),
    "the gate's socket": lambda: unix(p["unix"][0]),
    "the operators' socket": lambda: unix(p["unix"][1]),
    "io_uring_setup": lambda: call(425, 8, ctypes.create_string_buffer(120)),
    "ptrace": lambda: call(101, 0, 0, 0, 0),
    "unshare": lambda: call(272, 0x04000000),
    "setns": setns,
    "mount": mount,
    "chroot": lambda: call(161, b"/"),
    "bpf": lambda: call(321, 0, struct.pack("4I", 2, 4, 4, 1) + bytes(112), 128),
    "clone3": clone3,
    "pidfd_getfd": lambda: call(438, os.pidfd_open(os.getpid()), 1, 0),
    "keyctl": lambda: call(250, 0, -2, 1),
    "curl": lambda: says("curl", "--noproxy", "*", "-sSv", "-m", "5", "http://%s:%d/" % tuple(v4)),
    "perl": lambda: says("perl", "-e", perl % (v4[1], v4[0])),
    "python": lambda: says("/usr/bin/python3", "-c", child % tuple(v4)),
    "shell": lambda: says(
        "sh", "-c", "sh -c 'exec curl --noproxy \"*\" -sSv -m 5 http://%s:%d/ & wait $!'" % tuple(v4)
    ),
    "proxy v4": lambda: tcp(socket.AF_INET, ["127.0.0.1", p["proxy"]]),
    "proxy v6": lambda: tcp(socket.AF_INET6, ["::1", p["proxy"]]),
    "proxy v4-mapped": lambda: tcp(socket.AF_INET6, ["::ffff:127.0.0.1", p["proxy"]]),
}


def attempt(way):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ways[way]()
            said = "ok"
        except TimeoutError:
            said = "timeout"
        except OSError as error:
            said = errno.errorcode.get(error.errno, str(error))
        except BaseException as error:
            said = repr(error)
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 1000).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    return said


def everything():
    return {way: attempt(way) for way in ways}


def daemonised(work):
    # Forks twice with a session of its own between, so that its parent is gone and it belongs to nobody.
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        with os.fdopen(writer, "w") as out:
            json.dump(work(), out)
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as results:
        return json.load(results)


print(json.dumps(daemonised(everything) if p["daemon"] else everything()))
