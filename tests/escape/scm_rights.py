# A connection that somebody outside has made and gives away.
def attempt():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(PATIENCE)
        s.connect(p["rights"])
        _, descriptors, _, _ = socket.recv_fds(s, 10, 1)
    with socket.socket(fileno=descriptors[0]) as s:
        converse(s)
