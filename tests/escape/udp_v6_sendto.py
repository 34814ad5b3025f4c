def attempt():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        s.sendto(TOKEN, (V6, PORT))
        datagram(s)
