# An IPv6 socket that speaks IPv4: the hook of the socket's family sees it.
def attempt():
    tcp(socket.AF_INET6, MAPPED)
