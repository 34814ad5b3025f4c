def attempt():
    with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as s:
        s.bind(("hash", "sha256"))
