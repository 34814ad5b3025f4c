def attempt():
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        s.connect((V6, PORT))
        s.send(TOKEN)
        datagram(s)
