# In front of every attacker: p has the token that the target must not see, and where the target is.
import ctypes
import errno
import json
import os
import socket
import struct
import sys
import time

TOKEN = p["token"].encode()
V4, V6, MAPPED = p["v4"], p["v6"], "::ffff:" + p["v4"]
PORT = p["port"]
# Only in an action is there a bound of it.
INSIDE = "patience" in p
PATIENCE = p.get("patience", 2)
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def call(number, *arguments):
    arguments = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    returned = libc.syscall(ctypes.c_long(number), *arguments)
    if returned == -1:
        raise OSError(ctypes.get_errno(), "syscall %d" % number)
    return returned


def tcp(family, address, port=PORT, data=TOKEN, protocol=0):
    # Connects, hands the token over, and waits for the target's word.
    with socket.socket(family, socket.SOCK_STREAM, protocol) as s:
        s.settimeout(PATIENCE)
        s.connect((address, port))
        return converse(s, data)


def converse(s, data=TOKEN):
    s.settimeout(PATIENCE)
    s.sendall(data)
    s.shutdown(socket.SHUT_WR)
    said = b""
    while piece := s.recv(4096):
        said += piece
    return said


def datagram(s):
    s.settimeout(PATIENCE)
    s.recv(2048)


def checksum(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ipv4_udp(payload, source, target, port):
    # A whole packet, made by hand.
    udp = struct.pack("!4H", 4444, port, 8 + len(payload), 0) + payload
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, *map(socket.inet_aton, (source, target))
    )
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + udp


def proxy():
    host, port = os.environ["HTTP_PROXY"].removeprefix("http://").rsplit(":", 1)
    return host, int(port)


def report(attempt):
    try:
        said = attempt()
        said = said if isinstance(said, str) else "ok"
    except TimeoutError:
        said = "timeout"
    except OSError as error:
        said = errno.errorcode.get(error.errno, str(error))
    except BaseException as error:
        said = repr(error)
    print(json.dumps(said))
