def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((V4, PORT))
        s.send(TOKEN)
        datagram(s)
