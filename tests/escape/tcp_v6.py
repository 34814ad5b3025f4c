def attempt():
    tcp(socket.AF_INET6, V6)
