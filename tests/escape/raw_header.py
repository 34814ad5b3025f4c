# IP_HDRINCL: a datagram whose headers the sender makes.
def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as s:
        s.sendto(ipv4_udp(TOKEN, p["here"], V4, PORT), (V4, 0))
