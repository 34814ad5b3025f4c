# Connected where it may, disconnected by AF_UNSPEC, and connected again where it may not.
def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.settimeout(PATIENCE)
        s.connect(proxy() if INSIDE else (V4, PORT))
        if libc.connect(s.fileno(), bytes(16), 16):
            raise OSError(ctypes.get_errno(), "connect to AF_UNSPEC")
        s.connect((V4, PORT))
        converse(s)
