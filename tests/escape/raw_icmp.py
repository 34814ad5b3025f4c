def attempt():
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as s:
        echo = struct.pack("!BBHHH", 8, 0, 0, 1, 1) + TOKEN
        s.sendto(echo[:2] + struct.pack("!H", checksum(echo)) + echo[4:], (V4, 0))
