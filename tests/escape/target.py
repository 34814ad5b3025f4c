# What attackers must not reach: in a network namespace of the test's own. Prints a line for all that arrives.
import json
import socket
import struct
import sys
import threading
import time

ports, inbound = json.loads(sys.argv[1]), sys.argv[2]
lock = threading.Lock()


def arrived(how, data):
    with lock:
        print(json.dumps({"how": how, "data": data.decode("latin-1")}), flush=True)


def converse(how, stream):
    stream.settimeout(300)
    try:
        while data := stream.recv(4096):
            arrived(how, data)
            if b"HTTP/1.1" in data or data[:2] == b"\x16\x03":
                break
        stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\nconnection: close\r\n\r\nreached")
    except OSError:
        pass
    stream.close()


def serve(how, port):
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=100)
    ready.release()
    while True:
        stream, _ = listener.accept()
        threading.Thread(target=converse, args=(how, stream), daemon=True).start()


def echo(how, port, protocol):
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, protocol)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    s.bind(("::", port))
    ready.release()
    while True:
        data, peer = s.recvfrom(4096)
        arrived(how, data)
        try:
            s.sendto(data, peer)
        except OSError:
            pass


def pings():
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    ready.release()
    while True:
        arrived("icmp", s.recv(4096)[28:])


def call_back():
    # Whoever listens there is told that it was reached, and what it answers has got out.
    ready.release()
    while True:
        try:
            with socket.create_connection((inbound, 5000), 0.5) as s:
                s.settimeout(1)
                s.sendall(b"hello")
                arrived("inbound", s.recv(4096))
        except OSError:
            pass
        time.sleep(0.1)


def fast_open():
    with open("/proc/sys/net/ipv4/tcp_fastopen", "w") as setting:
        setting.write("3")


fast_open()
ready = threading.Semaphore(0)
work = [(serve, ("tcp", port)) for port in ports]
work += [(echo, ("udp", ports[0], 0)), (echo, ("udp", 53, 0)), (echo, ("udplite", ports[0], 136))]
work += [(serve, ("tcp", 53)), (pings, ()), (call_back, ())]
for function, arguments in work:
    threading.Thread(target=function, args=arguments, daemon=True).start()
for _ in work:
    ready.acquire()
print("ready", flush=True)
sys.stdin.read()
