# Connected to a peer that is allowed, and then sending to another. The first has given the socket an address of
# loopback, so the other is on this side of the cable.
def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        if INSIDE:
            s.connect((V4, 53))
        s.sendto(TOKEN, (p["here"], PORT))
