# connect(2) of an IPv6 datagram socket with an address of family AF_INET.
def attempt():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        address = struct.pack("=H", socket.AF_INET) + struct.pack("!H", PORT) + socket.inet_aton(V4) + bytes(8)
        if libc.connect(s.fileno(), address, len(address)):
            raise OSError(ctypes.get_errno(), "connect")
        s.send(TOKEN)
        datagram(s)
