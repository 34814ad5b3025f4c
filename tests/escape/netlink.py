# Asks the kernel for the interfaces of the namespace: one of them is the test's.
def attempt():
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
        s.settimeout(PATIENCE)
        s.send(struct.pack("=IHHIIBxHiII", 32, 18, 0x301, 1, 0, 0, 0, 0, 0, 0))
        seen = b""
        while True:
            piece = s.recv(1 << 16)
            seen += piece
            if struct.unpack_from("=H", piece, 4)[0] == 3:
                break
    if p["interface"].encode() not in seen:
        raise RuntimeError("not this namespace")
