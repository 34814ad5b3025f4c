def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136) as s:
        s.sendto(TOKEN, (V4, PORT))
        datagram(s)
