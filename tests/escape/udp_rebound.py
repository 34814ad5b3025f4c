# Connected to a peer that is allowed, and then sending to another.
def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((V4, 53))
        s.sendto(TOKEN, (V4, PORT))
        s.settimeout(PATIENCE)
        s.close()
