# A socket of somebody outside, which anybody may connect to.
def attempt():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.connect(p["unix"])
        converse(s)
