# The kernel hands this one to the hook of IPv4.
def attempt():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        s.sendto(TOKEN, (MAPPED, PORT))
        datagram(s)
